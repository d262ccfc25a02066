"""SOURCE (Bae et al. 2024, 2405.12186), in its form for Adam: a training unrolled by segments.

Within a segment l of the training, the Hessian and Adam's D = 1 / (√ν̂ + eps) are taken to be
constant. With H̃ = D^½ H D^½ and c the sum of the segment's learning rates, a passage's gradient
moves the parameters by R g, R = D^½ [(1 − e^(−cH̃)) / H̃] D^½, and a displacement becomes
E = D^½ e^(−cH̃) D^(−½) of itself by the segment's end:

    τ = ∇L_qᵀ Σ_l (Π_{l'>l} E_{l'}) R_l g_{i,l}.

The query's side is pulled back through the segments, R and E symmetric about D, so that a passage's
gradients need no transform. H̃ is eigenvalue-corrected Shampoo of D^½ G: D has no Kronecker factors,
but the scaled gradients have their own.
"""

import dataclasses
import itertools
from collections.abc import Iterator

import jax.numpy as jnp
import numpy as np

from tda.counterfactual import eigenbasis
from tda.counterfactual.eigenbasis import Gradients
from tda.gradients.kronecker import Curvature
from tda.gradients.sites import Site


@dataclasses.dataclass(frozen=True)
class Segment:
    """A part of the training, whose curvature is taken to be constant."""

    rates: float
    """c: the sum of its learning rates."""
    scales: Gradients
    """D by path, in the parameters' shapes."""
    curvature: dict[str, Curvature]
    """H̃ by path; its eigenvalues are those of the loss of a training step."""


def divide(saved: list[int], count: int) -> list[tuple[int, int]]:
    """Returns the first step of each segment, and the step behind its last.

    Segments are equally long. Of a short training there are fewer: each has a saved state,
    and no step, nor its learning rate, is left out.

    Args:
        saved: the numbers of steps after which a state is saved, rising; the last is of all steps.
        count: the most segments.
    """
    bounds = [0]
    for stop in np.linspace(0, saved[-1], count + 1).round().astype(int).tolist()[1:]:
        if any(bounds[-1] < step <= stop for step in saved):
            bounds.append(stop)
    return list(itertools.pairwise(bounds))


def pull_back(chosen: list[Site], segments: list[Segment], gradients: Gradients) -> Iterator:
    """Yields the query's side of each segment, from the last to the first: by path, [Q, …].

    A passage's score is the sum over segments of ⟨side, its gradient in the segment⟩.

    Args:
        chosen: the matrices.
        segments: in the training's order.
        gradients: the queries' gradients after the training, by path, [Q, …].
    """
    side = {s.path: gradients[s.path] for s in chosen}
    for segment in reversed(segments):
        root = {p: jnp.sqrt(segment.scales[p]) for p in side}

        def through(function, side, segment=segment, root=root):
            scaled = {p: g * root[p] for p, g in side.items()}
            return eigenbasis.apply(chosen, segment.curvature, function, scaled)

        moved = through(lambda c, s=segment: growth(c.values, s.rates), side)
        yield {p: g * root[p] for p, g in moved.items()}
        passed = through(lambda c, s=segment: np.exp(-s.rates * c.values), side)
        side = {p: g / root[p] for p, g in passed.items()}


def growth(values: np.ndarray, rates: float) -> np.ndarray:
    """Returns (1 − e^(−cσ)) / σ of eigenvalues σ, c where σ is 0."""
    exponent = rates * np.asarray(values, np.float64)
    # expm1 keeps the digits of small exponents.
    one = np.ones_like(exponent)
    return rates * np.divide(-np.expm1(-exponent), exponent, out=one, where=exponent != 0)
