"""Training-data attribution for language-model pretraining, in JAX."""

__version__ = "0.1.0"
