"""Approximate first-stage search with ScaNN."""
