"""Exact search: one scan over the gradients answers every method that shares them.

Rows are decoded, whitened and scaled on the devices on the way; what is kept is the k best and the
k worst of each query, so memory does not grow with the corpus. Over a mesh, every device scores
rows of its own for all queries.
"""

import dataclasses
import functools
from collections.abc import Callable

import jax
import jax.numpy as jnp
import numpy as np

from tda import hessian, store
from tda.hessian import blocks
from tda.hessian.blocks import Block
from tda.retrieval import scorer as scoring
from tda.retrieval.best import merge
from tda.retrieval.ranked import Ranked
from tda.retrieval.scorer import InMemory, Scorer, Source
from tda.runtime import sharding
from tda.store import Rows

__all__ = ["InMemory", "Placed", "Scorer", "Source", "place", "search", "step_rows"]


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class _Group:
    """Methods with the same W and β: one product serves them all.

    Attributes:
        queries_QxE: W g of the queries.
        roots: W, as `tda.hessian.blocks` takes it, or None.
        methods: their numbers.
        own: β of `Scorer`.
    """

    queries_QxE: jax.Array
    roots: jax.Array | list | None
    methods: tuple[int, ...] = dataclasses.field(metadata=dict(static=True))
    own: tuple[float, ...] = dataclasses.field(default=(), metadata=dict(static=True))


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class _Kept:
    """What is known of a method's ranking so far; one more axis in front for devices.

    Attributes:
        best, worst: the k largest scores and negated scores, each float32 [Q, k], falling, and
            their rows, int32 [Q, k]; no worst, [Q, 0], where they are not wanted.
        above: for each set of labels, int32 [Q]: rows that are not correct and score at least as
            much as the best correct one.
    """

    best: tuple[jax.Array, jax.Array]
    worst: tuple[jax.Array, jax.Array]
    above: dict[str, jax.Array]


def step_rows(width: int, devices: int = 1, touched: bool = True) -> int:
    """Rows that are scored at a time: what fills an accelerator, or stays in a CPU's cache.

    Args:
        width: numbers in a row.
        devices: how many share the rows.
        touched: whether rows are decoded or whitened first; else nothing has to stay in a cache.
    """
    numbers, most = 1 << 26, 4096
    if jax.default_backend() == "cpu":
        numbers, most = (1 << 22, 4096) if touched else (1 << 25, 8192)
    rows = min(most, max(128, numbers // width))
    return (1 << (rows.bit_length() - 1)) * devices


def search(
    gradients_QxE: np.ndarray,
    source: Source,
    scorers: dict[str, Scorer],
    k: int = 10,
    correct: dict[str, list[np.ndarray]] | None = None,
    mesh: jax.sharding.Mesh | None = None,
    on_rows: Callable[[int], None] = lambda rows: None,
    opponents: bool = True,
) -> dict[str, Ranked]:
    """Scores every passage for every query and keeps the k best, and the k worst.

    Among equal scores the lower row comes first.

    Args:
        gradients_QxE: projected gradients of the queries, float32.
        source: those of the passages; invalid rows are never retrieved.
        scorers: the methods, by name.
        k: how many proponents and opponents to keep.
        correct: for each set of labels, the correct rows of each query; their first rank is found.
        mesh: the devices that rows are split over; one device where None.
        on_rows: told the rows of each step when it has begun.
        opponents: whether the k worst are wanted too.

    Returns:
        What each method ranks, by its name.

    Raises:
        ValueError: there are no queries, or the gradient of one is not finite.
    """
    if not len(gradients_QxE):
        raise ValueError("there are no queries to search for")
    bad = np.flatnonzero(~np.isfinite(gradients_QxE).all(axis=1))
    if len(bad):
        raise ValueError(f"the gradient of query {bad[0]} (from 0) is not finite; leave it out")
    if source.rows > np.iinfo(np.int32).max:
        raise ValueError(f"{source.rows} rows are more than one search can number; search in parts")
    devices = 1 if mesh is None else sharding.batch_devices(mesh)
    widths, methods = source.form.widths, list(scorers.values())
    touched = source.form.dtype != "float32" or any(m.roots is not None for m in methods)
    step = step_rows(source.form.width, devices, touched)
    k, correct = min(k, source.rows), correct or {}
    groups = _groups(gradients_QxE, methods, widths)
    pairs = {label: _Pairs(lists, step // devices) for label, lists in correct.items()}
    thresholds = _thresholds(groups, methods, source, pairs, step)
    counts = k, k if opponents else 0
    state = [_empty(len(gradients_QxE), counts, devices, correct) for _ in methods]
    state, groups, thresholds = _spread(mesh, state, groups, thresholds)
    norms = tuple(s.unit_norm for s in methods)
    found = 0
    for chunk in source.scan(step):
        x = chunk if isinstance(chunk, Placed) else place(chunk, step, mesh)
        found += x.valid_count
        labels = {n: p.within(x.first, devices) for n, p in pairs.items()}
        labels = _on_devices(mesh, labels)
        state = _advance(state, x.rows, labels, groups, thresholds, widths, norms)
        on_rows(len(x))
    return {
        name: _finished(kept, k, found, {n: limits[n][i] for n in correct})
        for i, (name, kept) in enumerate(zip(scorers, state, strict=True))
        for limits in [{n: np.asarray(t) for n, t in thresholds.items()}]
    }


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class _Step:
    """Rows for every device: D in front of each axis.

    Attributes:
        values: [D, R, E]; scales: [D, R, blocks] or None; valid: [D, R]; first: int32 [D].
    """

    values: jax.Array
    scales: jax.Array | None
    valid: jax.Array
    first: jax.Array


@dataclasses.dataclass(frozen=True)
class Placed:
    """Rows of one step, on the devices that will score them.

    Attributes:
        first: number of the first row.
        count: how many rows there are; behind them the step is filled with invalid ones.
        valid_count: how many of them are valid.
        rows: what `search` takes.
    """

    first: int
    count: int
    valid_count: int
    rows: _Step

    def __len__(self) -> int:
        return self.count


def place(chunk: Rows, step: int, mesh: jax.sharding.Mesh | None = None) -> Placed:
    """Puts at most `step` rows on the devices of a mesh; on one where that is None."""
    devices = 1 if mesh is None else sharding.batch_devices(mesh)
    x = scoring.padded(chunk, step)
    rows = _Step(
        _split(x.values, devices),
        None if x.scales is None else _split(x.scales, devices),
        _split(x.valid, devices),
        (chunk.first + step // devices * np.arange(devices)).astype(np.int32),
    )
    return Placed(chunk.first, len(chunk), int(chunk.valid.sum()), _on_devices(mesh, rows))


def _split(x, devices: int):
    return x.reshape(devices, -1, *x.shape[1:])


def _spread(mesh, state, groups, thresholds):
    if mesh is None:
        return state, groups, thresholds
    everywhere = functools.partial(jax.tree.map, lambda x: sharding.replicate(mesh, x))
    return _on_devices(mesh, state), everywhere(groups), everywhere(thresholds)


def _on_devices(mesh, tree):
    """Arrays whose first axis is the devices, each device's part on it."""
    if mesh is None:
        # Memory that both can use is not copied.
        return jax.tree.map(jax.device_put, tree)
    return jax.tree.map(lambda x: sharding.put_leading(mesh, x), tree)


@functools.partial(jax.jit, static_argnames=("widths", "norms"), donate_argnums=0)
def _advance(state, rows: _Step, labels, groups, thresholds, widths, norms):
    """The state after some more rows.

    `labels` are the correct rows among them: for each set, (query, row), each int32 [D, N].
    """
    one = functools.partial(
        _advance_one, groups=groups, thresholds=thresholds, widths=widths, norms=norms
    )
    if len(rows.first) > 1:
        return jax.vmap(one)(state, rows, labels)
    first = functools.partial(jax.tree.map, lambda x: x[0])
    return jax.tree.map(lambda x: x[None], one(first(state), first(rows), first(labels)))


def _advance_one(state, rows: _Step, labels, groups, thresholds, widths, norms):
    """The same on one device, without the axis of devices."""
    out = list(state)
    # What an invalid row scores is not looked at; no other row's score depends on it.
    gradients_RxE = store.decode(rows.values, rows.scales, widths)
    for group in groups:
        scores = _product(group, gradients_RxE, widths)
        for i in group.methods:
            scores_RxQ = scores[norms[i]]
            above = {}
            for label, (query_N, row_N) in labels.items():
                limit_Q = thresholds[label][i]
                high_RxQ = jnp.where(rows.valid[:, None], scores_RxQ, -jnp.inf) >= limit_Q
                own = high_RxQ.at[row_N, query_N].get(mode="fill", fill_value=False)
                count_Q = high_RxQ.sum(axis=0).at[query_N].add(-own.astype(jnp.int32), mode="drop")
                above[label] = state[i].above[label] + count_Q
            best = merge(state[i].best, scores_RxQ, rows.valid, rows.first)
            worst = state[i].worst
            if worst[0].size:
                worst = merge(worst, scores_RxQ, rows.valid, rows.first, sign=-1)
            out[i] = _Kept(best, worst, above)
    return out


def _product(group: _Group, gradients_RxE, widths) -> dict[bool, jax.Array]:
    """Scores with and without unit norm, float32 [R, Q]; unused ones are not computed."""
    x_RxE = gradients_RxE
    if group.roots is not None:
        x_RxE = hessian.whiten(x_RxE, group.roots, scoring.slices_of(widths))
    if group.own:
        return _without_own(group, x_RxE, scoring.slices_of(widths))
    # XLA's CPU product is up to three times as fast this way round.
    scores_RxQ = jnp.matmul(x_RxE, group.queries_QxE.T, precision=jax.lax.Precision.HIGHEST)
    of_queries = scoring.inverse_norms(group.queries_QxE)
    scaled_RxQ = scores_RxQ * of_queries * scoring.inverse_norms(x_RxE)[:, None]
    return {False: scores_RxQ, True: scaled_RxQ}


def _without_own(group: _Group, x_RxE, slices) -> dict[bool, jax.Array]:
    """Scores by R − β g gᵀ, from what R itself whitened: rows x, and queries h of gradient g.

    By Sherman and Morrison, (R − β g gᵀ)⁻¹ = R⁻¹ + β R⁻¹g gᵀR⁻¹ / (1 − β |h|²) in each block. So
    a passage's product with its query is ⟨h, x⟩ / (1 − β |h|²), and its squared norm, which now
    depends on the query, |x|² + β ⟨h, x⟩² / (1 − β |h|²).
    """
    shape = len(x_RxE), len(group.queries_QxE)

    def one(sums, block: Block, root, beta):
        scores_RxQ, more_RxQ, square_Q = sums
        h_QxB = block.of(group.queries_QxE)
        part_RxQ = jnp.matmul(block.of(x_RxE), h_QxB.T, precision=jax.lax.Precision.HIGHEST)
        size_Q = jnp.sum(jnp.square(h_QxB), axis=1)
        # R − β g gᵀ is damped, so this is above 0 but for rounding.
        left_Q = 1.0 / jnp.maximum(1.0 - beta * size_Q, 1e-6)
        scores_RxQ += left_Q * part_RxQ
        more_RxQ += beta * left_Q * jnp.square(part_RxQ)
        return scores_RxQ, more_RxQ, square_Q + left_Q * size_Q

    sums = jnp.zeros(shape), jnp.zeros(shape), jnp.zeros(shape[1])
    scores_RxQ, more_RxQ, square_Q = blocks.over(one, sums, slices, group.roots, group.own)
    square_RxQ = square_Q * (jnp.sum(jnp.square(x_RxE), axis=1)[:, None] + more_RxQ)
    scaled_RxQ = scores_RxQ * jnp.where(
        square_RxQ > 0, jax.lax.rsqrt(jnp.maximum(square_RxQ, 1e-37)), 0
    )
    return {False: scores_RxQ, True: scaled_RxQ}


def _groups(gradients_QxE, methods: list[Scorer], widths) -> list[_Group]:
    numbers: dict[tuple, list[int]] = {}
    for i, method in enumerate(methods):
        numbers.setdefault((id(method.roots), method.own), []).append(i)
    return [
        _Group(
            scoring.encode(gradients_QxE, methods[of[0]].whitening, False, widths),
            methods[of[0]].whitening,
            tuple(of),
            methods[of[0]].own,
        )
        for of in numbers.values()
    ]


def _empty(queries: int, counts: tuple[int, int], devices: int, correct) -> _Kept:
    def none(k: int):
        shape = (devices, queries, k)
        return jnp.full(shape, -jnp.inf), jnp.zeros(shape, jnp.int32)

    return _Kept(*map(none, counts), {n: jnp.zeros((devices, queries), jnp.int32) for n in correct})


def _thresholds(groups, methods, source: Source, pairs, step) -> dict[str, jax.Array]:
    """For each set of labels and method, the best score of a correct row: float32 [methods, Q].

    NaN where a query has none.
    """
    wanted = np.unique(np.concatenate([np.zeros(0, np.int64), *(p.rows for p in pairs.values())]))
    shape = len(methods), len(groups[0].queries_QxE)
    out = {label: np.full(shape, np.nan, np.float32) for label in pairs}
    for start in range(0, len(wanted), step):
        some = wanted[start : start + step]
        here = {label: p.among(some) for label, p in pairs.items()}
        gradients = source.read(some)
        valid_R = store.valid(gradients)
        gradients = np.where(valid_R[:, None], gradients, 0)
        gradients = np.pad(gradients, [(0, step - len(some)), (0, 0)])
        for group in groups:
            scores = _scores(group, gradients, source.form.widths)
            for i in group.methods:
                scores_RxQ = np.asarray(scores[methods[i].unit_norm])
                for label, (row_N, query_N) in here.items():
                    value_N = np.where(valid_R[row_N], scores_RxQ[row_N, query_N], np.nan)
                    np.fmax.at(out[label][i], query_N, value_N)
    return {label: jnp.asarray(best) for label, best in out.items()}


_scores = jax.jit(_product, static_argnames="widths")


class _Pairs:
    """The correct (query, row) pairs of a set of labels, by row.

    Attributes:
        rows, queries: int64 [N], rising, and int32 [N].
    """

    def __init__(self, lists: list[np.ndarray], each: int):
        # A row that is named twice is one correct row.
        lists = [np.unique(np.asarray(r, np.int64)) for r in lists]
        rows = np.concatenate([*lists, np.zeros(0, np.int64)])
        queries = np.repeat(np.arange(len(lists)), [len(r) for r in lists])
        order = np.argsort(rows, kind="stable")
        self.rows, self.queries = rows[order], queries[order].astype(np.int32)
        self._each = each
        ends = np.searchsorted(self.rows, self.rows + each)
        self._most = int((ends - np.arange(len(ends))).max(initial=1))

    def among(self, some: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """Where in `some`, rising rows with no other labelled one between them, and the queries."""
        here = slice(*np.searchsorted(self.rows, [some[0], some[-1] + 1]))
        return np.searchsorted(some, self.rows[here]), self.queries[here]

    def within(self, first: int, devices: int) -> tuple[np.ndarray, np.ndarray]:
        """Queries and local rows, int32 [devices, N], of the pairs in each device's rows.

        N is the same for all `first`, so that one program takes them; what is over is out of
        bounds.
        """
        bounds = np.searchsorted(self.rows, first + self._each * np.arange(devices + 1))
        shape = devices, self._most
        queries = np.full(shape, np.iinfo(np.int32).max, np.int32)
        rows = queries.copy()
        for d, (a, b) in enumerate(zip(bounds[:-1], bounds[1:], strict=True)):
            queries[d, : b - a] = self.queries[a:b]
            rows[d, : b - a] = self.rows[a:b] - (first + d * self._each)
        return queries, rows


def _finished(kept: _Kept, k: int, found: int, thresholds: dict[str, np.ndarray]) -> Ranked:
    """A method's ranking, from what every device kept."""
    best, best_rows = _of_all(*kept.best, k)
    worst, worst_rows = _of_all(*kept.worst, k)
    ranks = {
        label: np.where(np.isnan(limit), 0, sharding.to_host(kept.above[label]).sum(0) + 1)
        for label, limit in thresholds.items()
    }
    # Where fewer than k rows are valid, the rest of the k were never filled.
    return Ranked(
        best_rows[:, :found], best[:, :found], worst_rows[:, :found], -worst[:, :found], ranks
    )


def _of_all(scores_DxQxk, rows_DxQxk, k: int) -> tuple[np.ndarray, np.ndarray]:
    """The k best that any device kept, with their rows."""
    scores = np.concatenate(sharding.to_host(scores_DxQxk), axis=1)
    rows = np.concatenate(sharding.to_host(rows_DxQxk), axis=1).astype(np.int64)
    order = np.lexsort((rows, -scores), axis=1)[:, :k]
    return np.take_along_axis(scores, order, 1), np.take_along_axis(rows, order, 1)
