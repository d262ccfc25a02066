"""The decoder and its sizes."""
