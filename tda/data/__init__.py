"""Corpora and queries: records, their files and labels, and the TFDS builders that serve them."""
