"""Retrieval: from queries to ranked passages."""
