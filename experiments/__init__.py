"""Command-line programs: each reads flags and a config, calls `tda`, and prints what it did."""
