"""Trainings without some of their passages: the retraining bank, metagradients, and their figures.

Retraining is the measure of a passage's score: the bank has the losses of queries under models that
were trained without random sets of passages, and every method is compared with it.
"""
