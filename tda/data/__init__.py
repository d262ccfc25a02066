"""Tokenizers, corpora of plain documents, tables of token ids, and the batches cut from them."""
