"""Evaluation of attribution: ranking metrics, tail-patch, and what the model knows."""
