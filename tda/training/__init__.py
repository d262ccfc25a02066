"""The training step and loop, optimizers, checkpoints."""
