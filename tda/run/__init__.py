"""A run: config, workdir, corpus and trained model, and its stages in order."""
