"""Exact search: one scan over the gradients answers every method that shares them.

The devices decode, whiten and scale rows during the scan. Only the k best and the k worst rows of
each query are kept, so memory does not grow with the corpus. Over a mesh, every device scores its
own rows for all queries. Each group of rows, which several processes may share, gets its own
rankings, which are merged at the end.
"""

import dataclasses
import functools
from collections.abc import Callable, Iterator
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from tda import store
from tda.retrieval.best import merge
from tda.retrieval.correct_rows import CorrectRows
from tda.retrieval.ranked import Ranked, best_of
from tda.retrieval.scorer import Scorer, ScorerGroup, group_scorers, pad_rows, score
from tda.retrieval.sources import Source, scan_full_steps
from tda.runtime import sharding
from tda.runtime.fingerprint import fingerprint, fingerprint_arrays
from tda.runtime.groups import ONE_GROUP, Groups
from tda.store import Form, Rows

# Scores that differ by no more, in units of the norms' product, are equal: all were seen to be
# within 2^-23 of float64's, and those of one gradient to differ by 2^-25 between two programs.
_ROUNDING = 2.0**-22


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class _Ranking:
    """A method's ranking so far; arrays have one more axis in front for devices.

    Attributes:
        best, worst: the k largest scores and negated scores, each float32 [Q, k], descending, and
            their rows, int32 [Q, k]; worst is [Q, 0] if opponents are not searched for.
        above: for each set of labels, int32 [Q]: rows that are not correct and score at least as
            much as the best correct one, up to rounding.
    """

    best: tuple[jax.Array, jax.Array]
    worst: tuple[jax.Array, jax.Array]
    above: dict[str, jax.Array]


def step_rows(total: int, width: int, devices: int = 1, touched: bool = True) -> int:
    """Returns the rows to score at a time: enough to fill an accelerator, or a CPU's cache.

    Args:
        total: rows of the source.
        width: numbers in a row.
        devices: number of devices that share the rows.
        touched: whether rows are decoded or whitened first; otherwise no data is read twice.
    """
    # 16 MiB of float32 stay in the last-level cache of server CPUs between decoding, whitening and
    # scoring; an accelerator needs long products to be busy.
    numbers, most = 1 << 26, 4096
    if jax.default_backend() == "cpu":
        numbers, most = (1 << 22, 4096) if touched else (1 << 25, 8192)
    rows = min(most, max(128, numbers // width))
    # The last step is padded to its full length, so a small source gets a shorter one: 60 rows over
    # eight devices would otherwise take a gigabyte of zeros.
    needed = -(-total // devices)
    return min(1 << (rows.bit_length() - 1), 1 << max(0, needed - 1).bit_length()) * devices


class ExactSearch:
    """Exact search over one source of passages' gradients.

    Args:
        source: projected gradients of the passages; invalid rows are never retrieved.
        mesh: the devices that rows are split over; None is the default device.
        on_rows: called with the number of rows of each step once the step has begun.
        groups: how rows are cut into groups whose rankings are kept, and which processes share.
        identity: JSON values that identify the source's rows in the files of `groups`.
        hold: whether the rows stay on the devices, which must have the memory, so that later
            searches read and copy nothing. A later withdrawal of rows takes effect only in a new
            `ExactSearch`.
    """

    def __init__(
        self,
        source: Source,
        mesh: jax.sharding.Mesh | None = None,
        on_rows: Callable[[int], None] = lambda rows: None,
        groups: Groups = ONE_GROUP,
        identity: Any = None,
        hold: bool = False,
    ):
        self._source, self._mesh, self._on_rows, self._hold = source, mesh, on_rows, hold
        self._groups, self._identity = groups, identity
        self._devices = 1 if mesh is None else sharding.batch_devices(mesh)
        self._held_step, self._held = 0, []

    def rank(
        self,
        gradients_QxE: np.ndarray,
        scorers: dict[str, Scorer],
        k: int = 10,
        correct: dict[str, list[np.ndarray]] | None = None,
        opponents: bool = True,
    ) -> dict[str, Ranked]:
        """Scores every passage for every query and keeps the k best and the k worst.

        Among equal scores the lower row comes first.

        Args:
            gradients_QxE: projected gradients of the queries, float32.
            scorers: the methods, by name.
            k: number of proponents and opponents to keep.
            correct: for each set of labels, the correct rows of each query, whose first rank is
                counted.
            opponents: whether to keep the k worst too.

        Returns:
            The ranking of each method, by its name; nothing in all processes but the first if
            `groups` has a directory.

        Raises:
            ValueError: there are no queries, the gradient of one is not finite, or the source has
                more rows than int32 can number.
        """
        source, devices = self._source, self._devices
        if not len(gradients_QxE):
            raise ValueError("there are no queries to search for")
        bad = np.flatnonzero(~np.isfinite(gradients_QxE).all(axis=1))
        if len(bad):
            raise ValueError(f"the gradient of query {bad[0]} (from 0) is not finite; leave it out")
        if source.rows > np.iinfo(np.int32).max:
            raise ValueError(f"one search cannot number {source.rows} rows; search in parts")
        widths, methods = source.form.widths, list(scorers.values())
        touched = not source.form.is_plain or any(m.roots is not None for m in methods)
        step = step_rows(source.rows, source.form.width, devices, touched)
        k, correct = min(k, source.rows), correct or {}
        scorer_groups = group_scorers(gradients_QxE, methods, widths)
        pairs = {label: CorrectRows(lists, step // devices) for label, lists in correct.items()}
        # Ranks need the best correct score of each query before the scan: they are counts of rows
        # at or above it.
        limits = _rank_limits(scorer_groups, methods, source, pairs, step)
        scan = _Scan(scorer_groups, limits, source.form, tuple(m.unit_norm for m in methods))
        if self._mesh is not None:
            scan = jax.tree.map(functools.partial(sharding.replicate, self._mesh), scan)
        counts = k, k if opponents else 0

        def work(rows: range) -> dict[str, np.ndarray]:
            rankings = [_empty_ranking(len(gradients_QxE), counts, devices, pairs) for _ in methods]
            return self._scan(rows, step, _split_over(self._mesh, rankings), pairs, scan)

        def merge_all(results: Iterator[dict[str, np.ndarray]]) -> dict[str, Ranked]:
            merged = functools.reduce(functools.partial(_merge_groups, k), results)
            limits_MxQ = {label: np.asarray(x) for label, x in limits.items()}
            return {
                name: _finish(merged, i, {label: x[i] for label, x in limits_MxQ.items()})
                for i, name in enumerate(scorers)
            }

        # A float32 score and an int64 row for each of the k best and the k worst of every method.
        result_bytes = 24 * k * len(gradients_QxE) * len(methods)
        ranges = self._groups.ranges(source.rows, source.form.row_bytes, result_bytes)
        name = "search"
        if self._groups.directory is not None:
            arrays = {"queries": gradients_QxE, "unit norm": np.array(scan.norms)}
            for i, method in enumerate(methods):
                arrays |= {f"root {i} {b}": x for b, x in enumerate(jax.tree.leaves(method.roots))}
                arrays[f"query weights {i}"] = np.array(method.query_weights)
            for label, rows in pairs.items():
                arrays |= {f"rows {label}": rows.rows, f"queries {label}": rows.queries}
            parts = [self._identity, fingerprint_arrays(arrays), list(pairs), counts]
            name = f"search-{fingerprint(parts)}"
        return self._groups.reduce(name, ranges, work, merge_all, self._on_rows) or {}

    def _scan(self, rows: range, step: int, rankings, pairs, scan: "_Scan") -> dict:
        """Returns the rankings of a range of rows, as arrays named "METHOD/FIELD"."""
        valid_count = 0
        for first, valid, device_rows in self._steps(step, rows):
            valid_count += int(valid.sum())
            labels = {label: p.within(first, self._devices) for label, p in pairs.items()}
            rankings = _advance(rankings, device_rows, _split_over(self._mesh, labels), scan)
            self._on_rows(len(valid))
        out = {}
        for i, ranking in enumerate(rankings):
            for field, places in (("best", ranking.best), ("worst", ranking.worst)):
                scores_DxQxk, rows_DxQxk = map(sharding.to_host, places)
                # With fewer than k valid rows, some of the k places were never filled.
                k = min(scores_DxQxk.shape[-1], valid_count)
                scores = np.concatenate(scores_DxQxk, axis=1)
                row_numbers = np.concatenate(rows_DxQxk, axis=1).astype(np.int64)
                out[f"{i}/{field}"], out[f"{i}/{field} rows"] = best_of(scores, row_numbers, k)
            for label, above in ranking.above.items():
                out[f"{i}/above {label}"] = sharding.to_host(above).sum(0, dtype=np.int64)
        return out

    def _steps(self, step: int, rows: range) -> Iterator[tuple[int, np.ndarray, Rows]]:
        """Yields the first row of every step, which rows are valid, and the rows on the devices."""
        if not self._hold:
            yield from map(functools.partial(self._place, step), self._source.scan(step, rows))
            return
        if step != self._held_step:
            rows = scan_full_steps(self._source, step)
            self._held_step, self._held = step, [self._place(step, r) for r in rows]
        yield from self._held

    def _place(self, step: int, rows: Rows) -> tuple[int, np.ndarray, Rows]:
        """Returns the first row, which rows are valid, and the rows on the devices, [D, R, …]."""
        devices = self._devices
        firsts_D = (rows.first + step // devices * np.arange(devices)).astype(np.int32)
        split = pad_rows(rows, step).map(lambda x: x.reshape(devices, -1, *x.shape[1:]))
        return rows.first, rows.valid, _split_over(self._mesh, Rows(firsts_D, *split))


def search(
    gradients_QxE: np.ndarray,
    source: Source,
    scorers: dict[str, Scorer],
    k: int = 10,
    correct: dict[str, list[np.ndarray]] | None = None,
) -> dict[str, Ranked]:
    """Ranks passages on the default device; arguments as for `ExactSearch`."""
    return ExactSearch(source).rank(gradients_QxE, scorers, k, correct)


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class _Scan:
    """The inputs that all steps of a scan share.

    Attributes:
        groups: the methods, grouped by R.
        limits: for each set of labels, float32 [methods, Q]: the scores from which on a row counts
            against the best correct one.
        form: how rows are stored.
        norms: whether each method divides by norms.
    """

    groups: list[ScorerGroup]
    limits: dict[str, jax.Array]
    form: Form = dataclasses.field(metadata=dict(static=True))
    norms: tuple[bool, ...] = dataclasses.field(metadata=dict(static=True))


def _split_over(mesh, tree):
    """Puts arrays whose first axis is the devices, one part on each device."""
    if mesh is None:
        # On a CPU this shares the memory of NumPy's array, where `jnp.asarray` would copy.
        return jax.tree.map(jax.device_put, tree)
    return jax.tree.map(lambda x: sharding.put_leading(mesh, x), tree)


@functools.partial(jax.jit, donate_argnums=0)
def _advance(rankings, rows: Rows, labels, scan: _Scan):
    """Returns the rankings after some more rows.

    `labels` are the correct rows among them: for each set, (query, row), each int32 [D, N].
    """
    advance = functools.partial(_advance_on_device, scan=scan)
    if len(rows.first) > 1:
        return jax.vmap(advance)(rankings, rows, labels)
    # Without vmap on one device: its batched products are slower on CPUs.
    first = functools.partial(jax.tree.map, lambda x: x[0])
    return jax.tree.map(lambda x: x[None], advance(first(rankings), first(rows), first(labels)))


def _advance_on_device(rankings, rows: Rows, labels, scan: _Scan):
    """Advances the rankings on one device, without the axis of devices."""
    out = list(rankings)
    # Scores of invalid rows may be anything: they are masked below, and no other row's score
    # depends on them.
    gradients_RxE = store.decode(rows.values, scan.form)
    for group in scan.groups:
        scores = score(group, gradients_RxE, scan.form.widths)
        for i in group.methods:
            scores_RxQ = scores[scan.norms[i]]
            above = {}
            for label, (query_N, row_N) in labels.items():
                limit_Q = scan.limits[label][i]
                high_RxQ = jnp.where(rows.valid[:, None], scores_RxQ, -jnp.inf) >= limit_Q
                # Correct rows do not count: take each (row, query) pair out of its query's sum.
                correct_N = high_RxQ.at[row_N, query_N].get(mode="fill", fill_value=False)
                count_Q = high_RxQ.sum(axis=0)
                count_Q = count_Q.at[query_N].add(-correct_N.astype(jnp.int32), mode="drop")
                above[label] = rankings[i].above[label] + count_Q
            best = merge(rankings[i].best, scores_RxQ, rows.valid, rows.first)
            worst = rankings[i].worst
            if worst[0].size:
                worst = merge(worst, scores_RxQ, rows.valid, rows.first, sign=-1)
            out[i] = _Ranking(best, worst, above)
    return out


def _empty_ranking(queries: int, counts: tuple[int, int], devices: int, correct) -> _Ranking:
    # Empty places have minus infinity, which any score exceeds.
    def empty(k: int):
        shape = (devices, queries, k)
        return jnp.full(shape, -jnp.inf), jnp.zeros(shape, jnp.int32)

    above = {label: jnp.zeros((devices, queries), jnp.int32) for label in correct}
    return _Ranking(*map(empty, counts), above)


_score = jax.jit(score, static_argnames="widths")


def _rank_limits(
    groups: list[ScorerGroup],
    methods: list[Scorer],
    source: Source,
    pairs: dict[str, CorrectRows],
    step: int,
) -> dict[str, jax.Array]:
    """Returns the scores that count against a query's best correct row: float32 [methods, Q].

    By label; NaN where a query has no correct row. A score is as high if it reaches that of the
    correct row up to rounding: a duplicate's may be rounded in another way, on another device or
    in another place of a step, and is to count wherever it lies.
    """
    rows = np.unique(np.concatenate([np.zeros(0, np.int64), *(p.rows for p in pairs.values())]))
    shape = len(methods), len(groups[0].queries_QxE)
    limits = {label: np.full(shape, np.nan, np.float32) for label in pairs}
    for start in range(0, len(rows), step):
        step_of_rows = rows[start : start + step]
        places = {label: p.among(step_of_rows) for label, p in pairs.items()}
        gradients = source.read(step_of_rows)
        valid_R = store.valid(gradients)
        gradients = np.where(valid_R[:, None], gradients, 0)
        # Padded, so that one compiled program takes every step.
        gradients = np.pad(gradients, [(0, step - len(step_of_rows)), (0, 0)])
        for group in groups:
            scores = _score(group, gradients, source.form.widths)
            products_RxQ, cosines_RxQ = (np.asarray(scores[n]) for n in (False, True))
            for label, (row_N, query_N) in places.items():
                product_N, cosine_N = products_RxQ[row_N, query_N], cosines_RxQ[row_N, query_N]
                # The norms' product; 0 where the score is.
                norms_N = np.zeros_like(product_N)
                np.divide(product_N, cosine_N, where=cosine_N != 0, out=norms_N)
                for i in group.methods:
                    limit_N = product_N - _ROUNDING * norms_N
                    if methods[i].unit_norm:
                        limit_N = cosine_N - _ROUNDING
                    limit_N = np.where(valid_R[row_N], limit_N, np.nan)
                    np.fmax.at(limits[label][i], query_N, limit_N)
    return {label: jnp.asarray(x) for label, x in limits.items()}


def _merge_groups(k: int, a: dict[str, np.ndarray], b: dict[str, np.ndarray]) -> dict:
    """Returns the rankings of two groups as those of one; see `ExactSearch._scan`."""
    out = {name: a[name] + b[name] for name in a if "/above " in name}
    for name in (n for n in a if f"{n} rows" in a):
        pair = (np.concatenate([x[n] for x in (a, b)], axis=1) for n in (name, f"{name} rows"))
        out[name], out[f"{name} rows"] = best_of(*pair, k)
    return out


def _finish(arrays: dict[str, np.ndarray], method: int, limits: dict[str, np.ndarray]):
    """Returns a method's ranking from the merged arrays of all groups."""
    ranks = {
        label: np.where(np.isnan(limit), 0, arrays[f"{method}/above {label}"] + 1)
        for label, limit in limits.items()
    }
    return Ranked(
        arrays[f"{method}/best rows"],
        arrays[f"{method}/best"],
        arrays[f"{method}/worst rows"],
        -arrays[f"{method}/worst"],
        ranks,
    )
