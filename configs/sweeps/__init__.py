"""Sweeps: each file's `get_sweep()` says what to vary, over any config (`experiments.sweep`)."""
