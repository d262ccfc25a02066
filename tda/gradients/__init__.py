"""Projected, corrected per-example gradients: the fast encoder and the slow reference."""
