"""Projected, corrected per-example gradients: the fast encoder and the slow reference."""

from tda.gradients.examples import left_out, per_example
from tda.gradients.projection import Projection
