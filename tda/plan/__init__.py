"""Estimates of a run's time, memory and disk."""
