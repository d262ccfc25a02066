"""Trainings without some of their passages: the retraining bank, metagradients, and their figures.

A score of a passage is worth what retraining says: the bank holds the losses of queries under
models that were trained without random sets of passages, and every method is held against it.
"""
