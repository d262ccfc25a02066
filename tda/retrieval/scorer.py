"""A method's score of passages for queries: whitening by R^(−1/2), unit norm, inner product."""

import dataclasses
import functools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from tda import hessian, store
from tda.hessian import blocks
from tda.hessian.blocks import Block
from tda.retrieval.sources import Source
from tda.store import Rows


@dataclasses.dataclass(frozen=True)
class Scorer:
    """score(passage, query) = ⟨N(W g_passage), N(W g_query)⟩.

    Attributes:
        roots: W = R^(−1/2) by block, or None for the identity.
        unit_norm: whether N divides by the norm (a zero stays zero) or does nothing.
        query_weights: β of each block, or empty. With it a query with gradient g is scored by
            R − β g gᵀ in place of R, which removes the query's own part from R_eval. Needs `roots`,
            all of them dense.
    """

    roots: list[hessian.Root] | None
    unit_norm: bool
    query_weights: tuple[float, ...] = ()

    def __post_init__(self):
        if self.query_weights and len(self.query_weights) != len(self.roots or ()):
            raise ValueError(
                f"query_weights has {len(self.query_weights)} blocks and roots has "
                f"{len(self.roots or ())}; give a weight for each block of R"
            )

    @functools.cached_property
    def whitening(self):
        """W on the device (`blocks.stack`), or None for the identity."""
        return None if self.roots is None else blocks.stack(self.roots)


def factors(scorer: Scorer, query_E: np.ndarray, slices: list[slice]) -> list[hessian.Root] | None:
    """Returns F by block, where F Fᵀ is the inverse of the R that scores a query: rows become x F.

    F is R^(−1/2) itself if the query's own part stays in R, and None for the identity.

    Args:
        scorer: how the query is scored.
        query_E: its gradient, float32 [E].
        slices: the columns of each block.
    """
    if not scorer.query_weights:
        return scorer.roots
    out = []
    for root, s, beta in zip(scorer.roots, slices, scorer.query_weights, strict=True):
        # (R − β g gᵀ)⁻¹ = W (I + γ h hᵀ) W, h = W g (Sherman and Morrison).
        h_E = np.asarray(root, np.float64) @ query_E[s]
        square = h_E @ h_E
        longer = max(1 - beta * square, 1e-6) ** -0.5 - 1
        step = longer / square if square > 0 else 0.0
        out.append(root + step * np.outer(root @ h_E, h_E))
    return out


def inverse_norms(x_RxE):
    """Returns 1 / |x| of every row, float32 [R]; 0 for a zero row."""
    norm_R = jnp.linalg.norm(x_RxE, axis=-1)
    # The inner `where` avoids a division by zero in the values that the outer one drops.
    return jnp.where(norm_R > 0, 1 / jnp.where(norm_R > 0, norm_R, 1.0), 0.0)


@functools.partial(jax.jit, static_argnames=("unit_norm", "widths"))
def encode(x_RxE, whitening, unit_norm: bool, widths: tuple[int, ...]):
    """Returns N(W g), the encodings of gradients, float32 [R, E], by the W and N of a `Scorer`."""
    if whitening is not None:
        x_RxE = hessian.whiten(x_RxE, whitening, hessian.block_slices(widths))
    return x_RxE * inverse_norms(x_RxE)[:, None] if unit_norm else x_RxE


def read_encodings(source: Source, scorer: Scorer, numbers) -> np.ndarray:
    """Reads rows of a source and encodes them: float32 [R, E]; invalid rows are all infinite."""
    x_RxE = source.read(numbers)
    valid_R = store.valid(x_RxE)
    cleaned = jnp.where(valid_R[:, None], x_RxE, 0.0)
    encoded = encode(cleaned, scorer.whitening, scorer.unit_norm, source.form.widths)
    return np.where(valid_R[:, None], np.asarray(encoded), np.float32(np.inf))


def pad_rows(rows: Rows, step: int) -> Rows:
    """Appends invalid rows up to `step`, so that one compiled program suffices."""
    lacking = step - len(rows)
    if not lacking:
        return rows

    def pad(x):
        return np.pad(x, [(0, lacking), *[(0, 0)] * (x.ndim - 1)])

    return Rows(rows.first, *rows.map(pad))


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class ScorerGroup:
    """Methods with the same W and β: one product gives the scores of all, apart from norms."""

    queries_QxE: jax.Array
    """W g of the queries."""
    whitening: Any
    """W (`blocks.stack`), or None for the identity."""
    methods: tuple[int, ...] = dataclasses.field(metadata=dict(static=True))
    """The methods' numbers."""
    query_weights: tuple[float, ...] = dataclasses.field(default=(), metadata=dict(static=True))


def group_scorers(gradients_QxE, scorers: list[Scorer], widths) -> list[ScorerGroup]:
    """Groups scorers that share W and β, and whitens the queries once for each group."""
    # By identity: methods that share R hold the same list of roots, and comparing them is slow.
    numbers: dict[tuple, list[int]] = {}
    for i, scorer in enumerate(scorers):
        numbers.setdefault((id(scorer.roots), scorer.query_weights), []).append(i)
    groups = []
    for methods in numbers.values():
        scorer = scorers[methods[0]]
        queries_QxE = encode(gradients_QxE, scorer.whitening, False, widths)
        groups.append(
            ScorerGroup(queries_QxE, scorer.whitening, tuple(methods), scorer.query_weights)
        )
    return groups


def score(group: ScorerGroup, gradients_RxE, widths) -> dict[bool, jax.Array]:
    """Returns scores by whether they have unit norm, each float32 [R, Q].

    Within a compiled program, scores that nothing uses are not computed.
    """
    x_RxE = gradients_RxE
    if group.whitening is not None:
        x_RxE = hessian.whiten(x_RxE, group.whitening, hessian.block_slices(widths))
    if group.query_weights:
        return _score_without_query(group, x_RxE, hessian.block_slices(widths))
    # Rows first: XLA's CPU product is up to three times as fast as with queries first.
    scores_RxQ = jnp.matmul(x_RxE, group.queries_QxE.T, precision=jax.lax.Precision.HIGHEST)
    query_scales_Q = inverse_norms(group.queries_QxE)
    scaled_RxQ = scores_RxQ * query_scales_Q * inverse_norms(x_RxE)[:, None]
    return {False: scores_RxQ, True: scaled_RxQ}


def _score_without_query(group: ScorerGroup, x_RxE, slices) -> dict[bool, jax.Array]:
    """Scores by R − β g gᵀ, from rows x and queries h = R^(−1/2) g whitened by R itself.

    By Sherman and Morrison, (R − β g gᵀ)⁻¹ = R⁻¹ + β R⁻¹g gᵀR⁻¹ / (1 − β |h|²) in each block. So
    a passage's product with its query is ⟨h, x⟩ / (1 − β |h|²), and its squared norm, which now
    depends on the query, is |x|² + β ⟨h, x⟩² / (1 − β |h|²).
    """
    shape = len(x_RxE), len(group.queries_QxE)

    def add_block(sums, block: Block, root, beta):
        scores_RxQ, extra_square_RxQ, query_square_Q = sums
        h_QxB = block.columns(group.queries_QxE)
        product_RxQ = jnp.matmul(block.columns(x_RxE), h_QxB.T, precision=jax.lax.Precision.HIGHEST)
        h_square_Q = jnp.sum(jnp.square(h_QxB), axis=1)
        # R − β g gᵀ is positive definite by its damping, so 1 − β |h|² is above 0 up to rounding.
        growth_Q = 1.0 / jnp.maximum(1.0 - beta * h_square_Q, 1e-6)
        scores_RxQ += growth_Q * product_RxQ
        extra_square_RxQ += beta * growth_Q * jnp.square(product_RxQ)
        return scores_RxQ, extra_square_RxQ, query_square_Q + growth_Q * h_square_Q

    sums = jnp.zeros(shape), jnp.zeros(shape), jnp.zeros(shape[1])
    scores_RxQ, extra_square_RxQ, query_square_Q = blocks.fold(
        add_block, sums, slices, group.whitening, group.query_weights
    )
    square_RxQ = query_square_Q * (jnp.sum(jnp.square(x_RxE), axis=1)[:, None] + extra_square_RxQ)
    # 1e-37 is about the smallest normal float32: rsqrt of a subnormal is infinite on some devices.
    scaled_RxQ = scores_RxQ * jnp.where(
        square_RxQ > 0, jax.lax.rsqrt(jnp.maximum(square_RxQ, 1e-37)), 0
    )
    return {False: scores_RxQ, True: scaled_RxQ}
