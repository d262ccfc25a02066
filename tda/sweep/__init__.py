"""A grid of runs over one config."""
