"""From a corpus, texts or batches, to a store of projected gradients."""
