"""1/√V: the optimizer's second moments, read from its state or estimated from a sample."""
