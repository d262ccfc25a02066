"""Inner products of whole gradients, without projection, from their factors (ghost products).

With G_i = Σ_s x_is δ_isᵀ the product of two is Σ_{s,t} ⟨x_is, x_qt⟩ ⟨δ_is, δ_qt⟩. A metric
C on both sides that is a product of a row's and a column's part can be applied to the factors. One
that weighs every number (Adam's exact V, EK-FAC's eigenvalues) needs the passage's gradient to be
formed. Each product takes the form with the fewest operations (their rates differ by less than a
factor of two on CPUs):

    ghost   S·T·(M + N) a pair: neither gradient is formed
    half    S·M·N a passage, T·M·N a pair: the passage's is formed
    whole   S·M·N a passage, T·M·N a query, M·N a pair: both are; only where every passage of a
            batch is compared with every query
"""

import dataclasses
import functools
import math
from collections.abc import Callable, Sequence

import jax
import jax.numpy as jnp
import numpy as np

from tda.data.batches import BatchLayout
from tda.data.tokens import TokenTable
from tda.gradients import kronecker
from tda.gradients.factors import Factors, GradientFactors
from tda.gradients.moments.second_moments import Scale
from tda.gradients.sites import Site
from tda.runtime import host_blas, sharding

# Numbers that a device holds at once while products are taken: 64 MiB of float32.
_AT_ONCE = 2**24
NOT_FACTORED = (
    "R without projection is a product of a row's and a column's part, and the exact Adam "
    "correction (gradients.correction=adam) is not: use factored or low_rank(R), or a method "
    "without R"
)
# Added to a Kronecker factor of R, in mean eigenvalues.
DAMPING = 1e-3


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class SiteMetric:
    """C^(1/2) of one site, applied to both sides of a product; None is the identity.

    Attributes:
        scales: a sum of outer products by which every number is multiplied first: [(L,) R, M] and
            [(L,) R, N].
        bases: matrices that rows and columns are then multiplied by: [(L,) M, M] and [(L,) N, N].
        weights: what every number is multiplied by last: [(L,) M, N].
    """

    scales: tuple[jax.Array, jax.Array] | None = None
    bases: tuple[jax.Array, jax.Array] | None = None
    weights: jax.Array | None = None

    @classmethod
    def of_scale(cls, scale: Scale) -> "SiteMetric":
        """Returns the metric that multiplies a gradient by 1/√V."""
        if scale.full is not None:
            return cls(weights=jnp.asarray(scale.full, jnp.float32))
        return cls(scales=(jnp.asarray(scale.left), jnp.asarray(scale.right)))


# C^(1/2) by path of site.
Metric = dict[str, SiteMetric]


def identity(sites: list[Site]) -> Metric:
    """Returns the metric that leaves gradients unchanged."""
    return {s.path: SiteMetric() for s in sites}


def corrected(sites: list[Site], scales: dict[str, Scale]) -> Metric:
    """Returns the metric of 1/√V on both sides."""
    return {s.path: SiteMetric.of_scale(scales[s.path]) for s in sites}


def ekfac(sites: list[Site], curvature: dict[str, kronecker.Curvature], damping: float) -> Metric:
    """Returns the metric of (F + λ)^(−1), F EK-FAC's Fisher matrix (`tda.gradients.kronecker`)."""
    metric = {}
    for site in sites:
        c = curvature[site.path]
        bases = jnp.asarray(c.left), jnp.asarray(c.right)
        weights = kronecker.inverse_root_values(site, c, damping)
        metric[site.path] = SiteMetric(bases=bases, weights=weights)
    return metric


def whitened(
    metric: Metric, moments: dict[str, tuple[np.ndarray, np.ndarray]], damping: float = DAMPING
) -> Metric:
    """Returns a metric followed by R^(−1/2), R = A ⊗ B / tr A of each matrix.

    Args:
        metric: without weights, from `identity` or `corrected`.
        moments: A = E[G Gᵀ] and B = E[Gᵀ G] by path, under `metric`, from `add_moments`.
        damping: added to A and B, in mean eigenvalues of each.

    Raises:
        ValueError: the metric has weights, or all gradients of a matrix vanish.
    """
    whitened_metric = {}
    for path, m in metric.items():
        if m.weights is not None:
            raise ValueError(NOT_FACTORED)
        A, B = moments[path]
        trace = np.trace(A, axis1=-2, axis2=-1)[..., None, None]
        if not (trace > 0).all():
            raise ValueError(f"{path} has no R: all gradients of the sample vanish")
        with host_blas.one_thread():
            left, right = _inverse_root(A / trace, damping), _inverse_root(B / trace, damping)
        # R is A ⊗ B / tr A, so that E‖G‖² is its trace; left and right here are those of A / tr A.
        bases = jnp.asarray(left, jnp.float32), jnp.asarray(right / np.sqrt(trace), jnp.float32)
        whitened_metric[path] = dataclasses.replace(m, bases=bases)
    return whitened_metric


def _inverse_root(A: np.ndarray, damping: float) -> np.ndarray:
    """Returns A^(−1/2) of a damped moment, float64 [(L,) M, M]."""
    mean = np.trace(A, axis1=-2, axis2=-1)[..., None] / A.shape[-1]
    values, vectors = np.linalg.eigh(np.asarray(A, np.float64))
    values = np.maximum(values, 0) + damping * mean
    return np.einsum("...mk,...k,...nk->...mn", vectors, values**-0.5, vectors)


@jax.jit
def transform(metric: Metric, factors: dict[str, Factors]) -> dict[str, Factors]:
    """Applies scales and bases of a metric to factors; scales give R copies of every position."""
    return {path: _transform(m, factors[path]) for path, m in metric.items()}


def _transform(m: SiteMetric, factors: Factors) -> Factors:
    ends = list(factors)
    for i in range(2):
        x = ends[i]  # [(L,) B, S, M]
        if m.scales is not None:
            copies = x[..., None, :, :] * m.scales[i][..., None, :, None, :]
            x = copies.reshape(*x.shape[:-2], -1, x.shape[-1])
        if m.bases is not None:
            x = _einsum("...bsm,...mk->...bsk", x, m.bases[i])
        ends[i] = x
    return Factors(*ends)


def zero_moments(sites: Sequence[Site]) -> dict[str, tuple[jax.Array, jax.Array]]:
    """Returns zeros to add moments to, by path."""

    def zeros(site: Site, side: int) -> jax.Array:
        return jnp.zeros((*site.stack_shape, side, side))

    return {s.path: (zeros(s, s.rows), zeros(s, s.columns)) for s in sites}


@functools.partial(jax.jit, donate_argnums=0)
def add_moments(sums: dict, factors: dict[str, Factors]) -> dict:
    """Adds Σ_i G_i G_iᵀ and Σ_i G_iᵀ G_i of a batch's transformed factors, by path."""

    def add(path: str, pair):
        x, d = factors[path]
        # G Gᵀ = Σ_{s,t} x_s ⟨δ_s, δ_t⟩ x_tᵀ: no gradient is formed.
        kernels = _einsum("...sn,...tn->...st", d, d), _einsum("...sm,...tm->...st", x, x)
        left = _einsum("...bsm,...bsk->...mk", x, _einsum("...st,...tm->...sm", kernels[0], x))
        right = _einsum("...bsn,...bsk->...nk", d, _einsum("...st,...tn->...sn", kernels[1], d))
        return pair[0] + left, pair[1] + right

    return {path: add(path, pair) for path, pair in sums.items()}


def fit_moments(
    factors: GradientFactors,
    metric: Metric,
    layout: BatchLayout,
    table: TokenTable,
    rows: np.ndarray,
    on_rows: Callable[[int], None] = lambda rows: None,
) -> dict[str, tuple[np.ndarray, np.ndarray]]:
    """Returns E[G Gᵀ] and E[Gᵀ G] of the gradients of a table's rows under a metric, by path."""
    sums = zero_moments(factors.sites)
    for batch in layout.batches(table, rows):
        changed = transform(metric, factors(layout.put(batch.arrays())))
        sums = add_moments(sums, changed)
        on_rows(len(batch.rows))
    count = np.float32(len(rows))
    return {path: tuple(sharding.to_host(x) / count for x in pair) for path, pair in sums.items()}


@jax.jit
def norms(metric: Metric, factors: dict[str, Factors]) -> jax.Array:
    """Returns ‖C^(1/2) G_i‖ of transformed factors, float32 [B]."""

    def of_layer(m: SiteMetric, passages: Factors, _):
        def of_passage(x_SxM, d_SxN):
            (S, M), N = x_SxM.shape, d_SxN.shape[1]
            if m.weights is None and S * (M + N) < M * N:
                kernels = _einsum("sm,tm->st", x_SxM, x_SxM), _einsum("sn,tn->st", d_SxN, d_SxN)
                return jnp.sum(kernels[0] * kernels[1])
            return jnp.sum(jnp.square(_weighted(m, _einsum("sm,sn->mn", x_SxM, d_SxN))))

        S, M, N = _shape(passages)
        return _map(of_passage, passages, min(M * N, S * S) + S * (M + N))

    squares_B = _sum_over_sites(metric, factors, None, of_layer)
    return jnp.sqrt(jnp.maximum(squares_B, 0.0))


@jax.jit
def listed_products(
    metric: Metric, passages: dict[str, Factors], queries: dict[str, Factors], lists_BxU: jax.Array
) -> jax.Array:
    """Returns products of each passage with queries of its own, float32 [B, U].

    Args:
        metric: C^(1/2), whose weights are still to be applied.
        passages, queries: transformed factors of B passages and of Q queries.
        lists_BxU: numbers of queries.
    """

    def of_layer(m: SiteMetric, passages: Factors, queries: Factors):
        def of_passage(x_SxM, d_SxN, list_U):
            return _products(m, x_SxM, d_SxN, queries.inputs[list_U], queries.deltas[list_U])

        (S, M, N), (T, _, _) = _shape(passages), _shape(queries)
        numbers = lists_BxU.shape[1] * T * (S + M + N)
        return _map(of_passage, (*passages, lists_BxU), numbers)

    return _sum_over_sites(metric, passages, queries, of_layer)


@jax.jit
def all_products(
    metric: Metric, passages: dict[str, Factors], queries: dict[str, Factors]
) -> jax.Array:
    """Returns products of all passages with all queries, float32 [B, Q]; see `listed_products`."""

    def of_layer(m: SiteMetric, passages: Factors, queries: Factors):
        (S, M, N), (T, _, _) = _shape(passages), _shape(queries)
        B, Q = len(passages.inputs), len(queries.inputs)
        if _both_formed(B, Q, S, T, M, N) > B * min(_ghost(Q, S, T, M, N, m), _half(Q, S, T, M, N)):
            return _map(
                lambda x_SxM, d_SxN: _products(m, x_SxM, d_SxN, *queries),
                passages,
                Q * T * (S + N),
            )
        H_QxMxN = _weighted(m, _einsum("qtm,qtn->qmn", *queries))

        def of_passage(x_SxM, d_SxN):
            return _einsum("mn,qmn->q", _weighted(m, _einsum("sm,sn->mn", x_SxM, d_SxN)), H_QxMxN)

        return _map(of_passage, passages, M * N, _AT_ONCE)

    return _sum_over_sites(metric, passages, queries, of_layer)


def operations(
    metric: Metric, passages: dict, queries: dict, each: int, tile: int
) -> tuple[float, float]:
    """Returns the operations of `each` listed products a passage, and of all products by tiles."""
    listed = complete = 0.0
    for path, m in metric.items():
        shape = *_shape(passages[path])[:1], *_shape(queries[path])
        *stack, B, _, _ = passages[path].inputs.shape
        layers, Q = math.prod(stack), queries[path].inputs.shape[-3]
        listed += layers * B * min(_ghost(each, *shape, m), _half(each, *shape))
        of_tile = min(
            _ghost(tile, *shape, m), _half(tile, *shape), _both_formed(B, tile, *shape) / B
        )
        complete += layers * B * of_tile * Q / tile
    return listed, complete


def _both_formed(B: int, Q: int, S: int, T: int, M: int, N: int) -> int:
    return (B * S + Q * T + B * Q) * M * N


def _ghost(U: int, S: int, T: int, M: int, N: int, m: SiteMetric) -> float:
    return math.inf if m.weights is not None else U * S * T * (M + N)


def _half(U: int, S: int, T: int, M: int, N: int) -> int:
    return (S + U * T) * M * N


def _products(m: SiteMetric, x_SxM, d_SxN, xq_UxTxM, dq_UxTxN):
    """Returns products of one passage with U queries, float32 [U]."""
    (S, M), N, (U, T, _) = x_SxM.shape, d_SxN.shape[1], xq_UxTxM.shape
    if _ghost(U, S, T, M, N, m) <= _half(U, S, T, M, N):
        x_SxUxT = _einsum("sm,utm->sut", x_SxM, xq_UxTxM)
        return _einsum("sut,sut->u", x_SxUxT, _einsum("sn,utn->sut", d_SxN, dq_UxTxN))
    # Both sides have the weights, and here the passage's gradient has them twice.
    G_MxN = _weighted(m, _weighted(m, _einsum("sm,sn->mn", x_SxM, d_SxN)))
    return _einsum("utn,utn->u", _einsum("utm,mn->utn", xq_UxTxM, G_MxN), dq_UxTxN)


def _weighted(m: SiteMetric, G):
    return G if m.weights is None else G * m.weights


def _shape(factors: Factors) -> tuple[int, int, int]:
    """Returns positions, M and N."""
    return (*factors.inputs.shape[-2:], factors.deltas.shape[-1])


def _map(of_passage, batch, numbers: int, limit: int | None = None):
    """Maps a function over passages, each device over its own; see `sharding.map_in_portions`."""
    if limit is None:
        # CPUs are fastest one passage at a time, whose product with all its queries is large.
        limit = _AT_ONCE if sharding.is_accelerated() else 0
    return sharding.map_in_portions(
        lambda arrays: jax.vmap(jax.vmap(of_passage))(*arrays), tuple(batch), numbers, limit
    )


def _sum_over_sites(metric: Metric, passages: dict, queries: dict | None, of_layer):
    """Sums a function of (metric, passages, queries) of a layer over all sites and their layers."""
    total = jnp.float32(0)
    for path, m in metric.items():
        weights = SiteMetric(weights=m.weights)
        layer = weights, passages[path], None if queries is None else queries[path]
        if passages[path].inputs.ndim == 3:
            total = total + of_layer(*layer)
        else:
            out = jax.eval_shape(of_layer, *jax.tree.map(lambda x: x[0], layer))
            summed = jax.lax.scan(
                lambda so_far, layer: (so_far + of_layer(*layer), None), jnp.zeros(out.shape), layer
            )
            total = total + summed[0]
    return total


# Products of lower precision than float32 would differ by more than near candidates do.
_einsum = functools.partial(jnp.einsum, precision="highest")
