"""The web viewer: results files side by side, live tracing, notes; served, or written as files."""
