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

A table that only looks up rows has S·T·N a pair, and its gradient is never formed: a metric's part
of a row is applied to that row's δ, so that even one that weighs every number leaves a sum of outer
products. A tied table has all four products of its two sums (`tda.gradients.outer_products`).
"""

import dataclasses
import functools
import itertools
import math
from collections.abc import Callable

import jax
import jax.numpy as jnp
import numpy as np

from tda.data.batches import BatchLayout, draw
from tda.data.tokens import TokenTable
from tda.gradients import pair_metrics
from tda.gradients.factors import GradientFactors
from tda.gradients.outer_products import (
    Factors,
    Size,
    Terms,
    einsum,
    form,
    forming,
    matrix_numbers,
    multiply,
    products,
    second_moments,
    sizes_of,
)
from tda.gradients.pair_metrics import Metric, SiteMetric
from tda.gradients.sites import Site
from tda.runtime import sharding

# Numbers that a device holds at once while products are taken: 64 MiB of float32.
_AT_ONCE = 2**24
# Passages over which the norms of tables and of other matrices are compared.
_BALANCED = 512


@jax.jit
def transform(metric: Metric, factors: dict[str, Terms]) -> dict[str, Terms]:
    """Applies scales and bases of a metric to factors; scales give R copies of every position.

    Weights are applied to rows that are looked up, unless the table is tied.
    """
    return {path: _transform(m, factors[path]) for path, m in metric.items()}


def _transform(m: SiteMetric, terms: Terms) -> Terms:
    if terms[0].inputs.ndim == 4:
        return jax.vmap(_transform)(m, terms)
    # The gradient of a table that is tied must be formed for weights, with all its terms.
    at_once = m if _is_looked_up(terms) else dataclasses.replace(m, weights=None)
    return tuple(_transform_rows(at_once, t) if t.looks_up else _change(m, t) for t in terms)


def _change(m: SiteMetric, factors: Factors) -> Factors:
    ends = list(factors)
    for i in range(2):
        x = ends[i]  # [B, S, M]
        if m.scales is not None:
            copies = x[:, None] * m.scales[i][:, None]
            x = copies.reshape(len(x), -1, x.shape[-1])
        if m.bases is not None:
            basis = m.bases[i]
            x = x * basis if basis.ndim == 1 else multiply(x, basis)
        ends[i] = x
    return Factors(*ends)


def _transform_rows(m: SiteMetric, rows: Factors) -> Factors:
    """Applies a metric to δ alone: equal row numbers have equal parts of it."""
    numbers_BxS, d_BxSxN = rows.inputs[..., 0], rows.deltas
    if m.scales is not None:
        left_RxV, right_RxN = m.scales
        d_BxSxN = d_BxSxN * einsum("rbs,rn->bsn", left_RxV[:, numbers_BxS], right_RxN)
    if m.bases is not None:
        left_V, right_NxN = m.bases
        d_BxSxN = multiply(d_BxSxN * left_V[numbers_BxS][..., None], right_NxN)
    return rows._replace(deltas=_weighted(m, d_BxSxN, numbers_BxS))


def _is_looked_up(terms: Terms) -> bool:
    """Returns whether a gradient is that of a table's rows alone."""
    return all(t.looks_up for t in terms)


def zero_moments(factors: GradientFactors) -> dict[str, tuple[jax.Array, jax.Array]]:
    """Returns zeros to add moments to, by path."""

    def zeros(site: Site) -> tuple[jax.Array, jax.Array]:
        # V² numbers of a table's rows would not fit. Rows are nearly orthogonal, since few
        # passages have any two tokens in common.
        left = (site.rows,) if site.path in factors.tables else (site.rows, site.rows)
        sides = left, (site.columns, site.columns)
        return tuple(jnp.zeros((*site.stack_shape, *side)) for side in sides)

    return {s.path: zeros(s) for s in factors.sites}


@functools.partial(jax.jit, donate_argnums=0)
def add_moments(sums: dict, factors: dict[str, Terms]) -> dict:
    """Adds Σ_i G_i G_iᵀ and Σ_i G_iᵀ G_i of a batch's transformed factors, by path.

    Of a table the diagonal of Σ_i G_i G_iᵀ is added.
    """

    def add(pair, terms: Terms):
        if terms[0].inputs.ndim == 4:
            return jax.vmap(add)(pair, terms)
        rows = len(pair[0]) if pair[0].ndim == 1 else None
        return jax.tree.map(jnp.add, pair, second_moments(terms, rows))

    return {path: add(pair, factors[path]) for path, pair in sums.items()}


def fit_moments(
    factors: GradientFactors,
    metric: Metric,
    layout: BatchLayout,
    table: TokenTable,
    rows: np.ndarray,
    on_rows: Callable[[int], None] = lambda rows: None,
) -> dict[str, tuple[np.ndarray, np.ndarray]]:
    """Returns E[G Gᵀ] and E[Gᵀ G] of the gradients of some sequences under a metric, by path.

    E[G Gᵀ] is [(L,) M, M]; of a table of tokens or positions its diagonal, [(L,) M].
    """
    sums = zero_moments(factors)
    for batch in layout.batches(table, rows):
        changed = transform(metric, factors(layout.put(batch.arrays())))
        sums = add_moments(sums, changed)
        on_rows(len(batch.rows))
    count = np.float32(len(rows))
    return {path: tuple(sharding.to_host(x) / count for x in pair) for path, pair in sums.items()}


def balanced(
    factors: GradientFactors,
    metric: Metric,
    layout: BatchLayout,
    table: TokenTable,
    seed: int,
) -> Metric:
    """Returns a metric with R whose tables weigh what other matrices do (`balance_tables`).

    Args:
        factors, metric: the gradients and C^(1/2).
        layout, table: the passages, over some of which squared norms are averaged.
        seed: of the draw of R's own passages.
    """
    if not factors.tables:
        return metric
    # Others than R's, whose tokens R has seen: those of other passages may be rarer.
    rows = draw(len(table), _BALANCED, seed + 1)
    squares = dict.fromkeys(metric, 0.0)
    for batch in layout.batches(table, rows):
        changed = transform(metric, factors(layout.put(batch.arrays())))
        for path in metric:
            norms_B = sharding.to_host(norms({path: metric[path]}, {path: changed[path]}))
            squares[path] += float(np.square(norms_B[: len(batch.rows)], dtype=np.float64).sum())
    squares = {path: x / len(rows) for path, x in squares.items()}
    numbers = {s.path: math.prod(s.shape) for s in factors.sites}
    return pair_metrics.balance_tables(metric, squares, numbers, factors.tables)


@jax.jit
def norms(metric: Metric, factors: dict[str, Terms]) -> jax.Array:
    """Returns ‖C^(1/2) G_i‖ of transformed factors, float32 [B]."""

    def of_layer(m: SiteMetric, passages: Terms, _):
        sizes = sizes_of(passages)
        is_ghost = _ghost(1, sizes, sizes, m) < forming(sizes)

        def of_passage(passage: Terms):
            if is_ghost:
                return products(passage, jax.tree.map(lambda x: x[None], passage))[0]
            return jnp.sum(jnp.square(_weighted(m, form(passage))))

        S = sum(z.positions for z in sizes)
        numbers = sum(z.positions * (z.rows + z.columns) for z in sizes)
        numbers += S * S if is_ghost else matrix_numbers(sizes)
        return _map(of_passage, (passages,), numbers)

    squares_B = _sum_over_sites(metric, factors, None, of_layer)
    return jnp.sqrt(jnp.maximum(squares_B, 0.0))


@jax.jit
def listed_products(
    metric: Metric, passages: dict[str, Terms], queries: dict[str, Terms], lists_BxU: jax.Array
) -> jax.Array:
    """Returns products of each passage with queries of its own, float32 [B, U].

    Args:
        metric: C^(1/2), whose weights are still to be applied.
        passages, queries: transformed factors of B passages and of Q queries.
        lists_BxU: numbers of queries.
    """

    def of_layer(m: SiteMetric, passages: Terms, queries: Terms):
        def of_passage(passage: Terms, list_U):
            return _products(m, passage, jax.tree.map(lambda x: x[list_U], queries))

        S = sum(z.positions for z in sizes_of(passages))
        each = sum(z.positions * (S + z.rows + z.columns) for z in sizes_of(queries))
        return _map(of_passage, (passages, lists_BxU), lists_BxU.shape[1] * each)

    return _sum_over_sites(metric, passages, queries, of_layer)


@jax.jit
def all_products(metric: Metric, passages: dict[str, Terms], queries: dict[str, Terms]):
    """Returns products of all passages with all queries, float32 [B, Q]; see `listed_products`."""

    def of_layer(m: SiteMetric, passages: Terms, queries: Terms):
        sizes = sizes_of(passages), sizes_of(queries)
        B, Q = len(passages[0].deltas), len(queries[0].deltas)
        if _both_formed(B, Q, *sizes) > B * min(_ghost(Q, *sizes, m), _half(Q, *sizes)):
            S = sum(z.positions for z in sizes[0])
            numbers = sum(z.positions * (S + z.columns) for z in sizes[1])
            return _map(lambda passage: _products(m, passage, queries), (passages,), Q * numbers)
        H_QxMxN = _weighted(m, jax.vmap(form)(queries))

        def of_passage(passage: Terms):
            return einsum("mn,qmn->q", _weighted(m, form(passage)), H_QxMxN)

        return _map(of_passage, (passages,), matrix_numbers(sizes[0]), _AT_ONCE)

    return _sum_over_sites(metric, passages, queries, of_layer)


def operations(
    metric: Metric, passages: dict, queries: dict, each: int, tile: int
) -> tuple[float, float]:
    """Returns the operations of `each` listed products a passage, and of all products by tiles."""
    listed = complete = 0.0
    for path, m in metric.items():
        sizes = sizes_of(passages[path]), sizes_of(queries[path])
        m = _still_to_apply(m, passages[path])
        *stack, B, _, _ = passages[path][0].deltas.shape
        layers, Q = math.prod(stack), queries[path][0].deltas.shape[-3]
        listed += layers * B * min(_ghost(each, *sizes, m), _half(each, *sizes))
        of_tile = min(
            _ghost(tile, *sizes, m), _half(tile, *sizes), _both_formed(B, tile, *sizes) / B
        )
        complete += layers * B * of_tile * Q / tile
    return listed, complete


def _both_formed(B: int, Q: int, passage: list[Size], query: list[Size]) -> float:
    return B * forming(passage) + Q * forming(query) + B * Q * matrix_numbers(passage)


def _ghost(U: int, passage: list[Size], query: list[Size], m: SiteMetric) -> float:
    if m.weights is not None:
        return math.inf
    pairs = itertools.product(passage, query)
    return U * sum(a.positions * b.positions * (min(a.rows, b.rows) + a.columns) for a, b in pairs)


def _half(U: int, passage: list[Size], query: list[Size]) -> float:
    return forming(passage) + U * forming(query)


def _products(m: SiteMetric, passage: Terms, queries: Terms):
    """Returns products of one passage with U queries, float32 [U]."""
    sizes, U = (sizes_of(passage), sizes_of(queries)), len(queries[0].deltas)
    if _ghost(U, *sizes, m) <= _half(U, *sizes):
        return products(passage, queries)
    # Both sides have the weights, and here the passage's gradient has them twice.
    G_MxN = _weighted(m, _weighted(m, form(passage)))
    return sum(einsum("utn,utn->u", multiply(b.inputs, G_MxN), b.deltas) for b in queries)


def _weighted(m: SiteMetric, G, rows=...):
    return G if m.weights is None else G * m.weights[rows]


def _still_to_apply(m: SiteMetric, terms: Terms) -> SiteMetric:
    """Returns what `transform` left of a metric."""
    return SiteMetric(weights=None if _is_looked_up(terms) else m.weights)


def _map(of_passage, batch: tuple, numbers: int, limit: int | None = None):
    """Maps a function over passages, each device over its own; see `sharding.map_in_portions`."""
    if limit is None:
        # CPUs are fastest one passage at a time, whose product with all its queries is large.
        limit = _AT_ONCE if sharding.is_accelerated() else 0
    return sharding.map_in_portions(
        lambda arrays: jax.vmap(jax.vmap(of_passage))(*arrays), batch, numbers, limit
    )


def _sum_over_sites(metric: Metric, passages: dict, queries: dict | None, of_layer):
    """Sums a function of (metric, passages, queries) of a layer over all sites and their layers."""
    total = jnp.float32(0)
    for path, m in metric.items():
        m = _still_to_apply(m, passages[path])
        layer = m, passages[path], None if queries is None else queries[path]
        if passages[path][0].inputs.ndim == 3:
            total = total + of_layer(*layer)
        else:
            out = jax.eval_shape(of_layer, *jax.tree.map(lambda x: x[0], layer))
            summed = jax.lax.scan(
                lambda so_far, layer: (so_far + of_layer(*layer), None), jnp.zeros(out.shape), layer
            )
            total = total + summed[0]
    return total
