"""Live questions to a finished run: one prompt and target at a time."""
