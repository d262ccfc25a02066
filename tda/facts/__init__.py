"""Labelled corpora: passages, the facts that they state, and queries about the facts."""
