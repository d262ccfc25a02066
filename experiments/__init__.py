"""Command-line programs: each reads a config, calls `tda`, prints and writes."""
