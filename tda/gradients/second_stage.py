"""Scores of (query, passage) pairs by whole gradients: all metrics in one pass over passages.

The queries are held as factors, T·(M + N) numbers a layer, not as gradients. Each passage's factors
are computed once for all queries and metrics, then dropped.
"""

import contextlib
import dataclasses
import functools
from collections.abc import Callable, Iterator
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from tda.data.batches import BatchLayout
from tda.data.tokens import TokenTable
from tda.gradients import outer_products, pair_products
from tda.gradients.factors import GradientFactors
from tda.gradients.outer_products import Factors, Terms
from tda.gradients.pair_metrics import Metric
from tda.runtime import sharding
from tda.runtime.fingerprint import fingerprint, fingerprint_parts
from tda.runtime.groups import ONE_GROUP, Groups

# Queries that a passage is compared with in one call: a list is filled up to a multiple of the
# smallest that holds it, or of the largest. Each size is a program of its own.
_LISTS = 2, 8, 32
# Numbers of the queries' gradients of a matrix that are formed at a time: 256 MiB of float32.
_FORMED = 2**26
# The most pairs and passages in a group: a minute or so on CPUs, the work that a kill may lose.
_PAIRS_PER_GROUP, _PASSAGES_PER_GROUP = 1 << 17, 1 << 12


@dataclasses.dataclass(frozen=True)
class Pairs:
    """Which queries are compared with which passages; rows ascend, each with at least one query."""

    rows: np.ndarray
    """int64 [R], the passages' rows."""
    starts: np.ndarray
    """int64 [R + 1]: the queries of `rows[i]` are `queries[starts[i]:starts[i + 1]]`."""
    queries: np.ndarray
    """int64 [P], numbers of queries."""

    @classmethod
    def of_lists(cls, lists: list[np.ndarray]) -> "Pairs":
        """Returns the pairs of each query with a list of passage rows, none of them twice."""
        queries = np.repeat(np.arange(len(lists)), [len(rows) for rows in lists])
        passages = np.concatenate([*lists, np.zeros(0, np.int64)]).astype(np.int64)
        order = np.lexsort((queries, passages))
        rows, counts = np.unique(passages, return_counts=True)
        return cls(rows, np.concatenate([[0], np.cumsum(counts)]), queries[order])

    def of_queries(self, numbers: np.ndarray) -> tuple[np.ndarray, "Pairs"]:
        """Returns the places of some queries' pairs among all pairs, and those pairs.

        The returned pairs number the queries by their places in `numbers`.
        """
        places = np.full(max(self.queries.max(initial=0), numbers.max(initial=0)) + 1, -1)
        places[numbers] = np.arange(len(numbers))
        at = np.flatnonzero(places[self.queries] >= 0)
        starts = np.searchsorted(at, self.starts)
        has_pairs = np.diff(starts) > 0
        starts = np.append(starts[:-1][has_pairs], len(at))
        return at, Pairs(self.rows[has_pairs], starts, places[self.queries[at]])

    def ranges(self) -> list[range]:
        """Returns groups of rows that are scored together."""
        ranges, first = [], 0
        while first < len(self.rows):
            last = np.searchsorted(self.starts, self.starts[first] + _PAIRS_PER_GROUP, "right") - 1
            last = min(max(int(last), first + 1), first + _PASSAGES_PER_GROUP, len(self.rows))
            ranges.append(range(first, last))
            first = last
        return ranges

    def by_query(self, scores_P: np.ndarray, queries: int) -> Iterator[tuple]:
        """Yields each query's passage rows and their scores."""
        rows_P = np.repeat(self.rows, np.diff(self.starts))
        order = np.argsort(self.queries, kind="stable")
        ends = np.cumsum(np.bincount(self.queries, minlength=queries))
        for members in np.split(order, ends[:-1]):
            yield rows_P[members], scores_P[members]


class PairScorer:
    """Scores pairs by ⟨C^(1/2) G_i, C^(1/2) G_q⟩, perhaps of unit norms.

    Args:
        factors: computes the factors of gradients.
        metrics: C^(1/2) by name, with whether gradients are scaled to unit norm.
        layout: how sequences are batched, and the devices that a batch is split over.
        memory: bytes for the queries' factors; passages are computed once for as many queries as
            fit.
    """

    def __init__(
        self,
        factors: GradientFactors,
        metrics: dict[str, tuple[Metric, bool]],
        layout: BatchLayout,
        memory: int,
    ):
        self._factors, self._metrics, self._layout = factors, metrics, layout
        self._memory = memory

    def score(
        self,
        queries: TokenTable,
        passages: TokenTable,
        pairs: Pairs,
        groups: Groups = ONE_GROUP,
        identity: Any = None,
        on_passages: Callable[[int], None] = lambda passages: None,
    ) -> dict[str, np.ndarray] | None:
        """Returns the scores of pairs, float32 [P] by metric, in the order of `pairs.queries`.

        A score that is not finite is −inf.

        Args:
            queries, passages: the sequences.
            pairs: the pairs.
            groups: where results of groups of pairs are kept.
            identity: JSON values that tell the gradients and metrics from others.
            on_passages: called with the number of passages of each batch, once for all queries that
                fit into memory.

        Returns:
            The scores; None in all processes but the first.
        """
        mesh = self._layout.mesh
        with contextlib.nullcontext() if mesh is None else jax.set_mesh(mesh):
            return self._score(queries, passages, pairs, groups, identity, on_passages)

    def _score(self, queries, passages, pairs: Pairs, groups: Groups, identity, on_passages):
        scores = {name: np.zeros(len(pairs.queries), np.float32) for name in self._metrics}
        is_reduced = True
        for numbers in self._portions(queries, np.unique(pairs.queries)):
            at, portion = pairs.of_queries(numbers)
            side = functools.cache(lambda numbers=numbers: self._query_side(queries, numbers))

            def work(group: range, side=side, portion=portion) -> dict[str, np.ndarray]:
                return self._score_group(side(), passages, portion, group, on_passages)

            def keep(results: Iterator[dict[str, np.ndarray]], at=at) -> bool:
                parts = list(results)
                for name, scores_P in scores.items():
                    scores_P[at] = np.concatenate([part[name] for part in parts])
                return True

            digest = fingerprint_parts([portion.rows, portion.starts, numbers[portion.queries]])
            name = f"second-stage-{fingerprint([identity, digest])}"
            is_reduced = groups.reduce(name, portion.ranges(), work, keep, on_passages)
        return scores if is_reduced else None

    def passes(self, queries: TokenTable, numbers: np.ndarray) -> int:
        """Returns how many times passages are computed for these queries."""
        return len(self._portions(queries, numbers))

    def _portions(self, queries: TokenTable, numbers: np.ndarray) -> list[np.ndarray]:
        """Splits queries into portions that fit into memory, of similar lengths."""
        lengths = queries.lengths_of(numbers) - 1
        order = np.argsort(lengths, kind="stable")
        if not len(order):
            return []
        each = max(1, self._memory // self._bytes(self._padded(lengths)))
        return [numbers[order[i : i + each]] for i in range(0, len(order), each)]

    def _bytes(self, length: int) -> int:
        """Returns the bytes that a query of some positions takes, for all metrics."""
        factors = self._shapes(length)
        metrics = [metric for metric, _ in self._metrics.values()]
        changed = [jax.eval_shape(pair_products.transform, m, factors) for m in metrics]
        arrays = jax.tree.leaves(changed)
        return sum(x.size * x.dtype.itemsize for x in arrays) // self._layout.multiple

    def _shapes(self, length: int) -> dict[str, Terms]:
        """Returns the shapes of the factors of the smallest batch of sequences of a length."""
        dtypes = {"tokens": np.int32, "targets": np.int32, "weights": np.float32}
        shape = self._layout.multiple, length
        return self._factors.shapes({k: jax.ShapeDtypeStruct(shape, x) for k, x in dtypes.items()})

    def _padded(self, lengths: np.ndarray) -> int:
        """Returns the padded length of queries: a bucket's, if one is long enough."""
        longest = int(lengths.max())
        return next((n for n in self._layout.bucket_lengths if n >= longest), longest)

    def _query_side(self, queries: TokenTable, numbers: np.ndarray) -> dict[str, "_QuerySide"]:
        """Returns the transformed factors of some queries by metric, all of one padded length."""
        longest = self._padded(queries.lengths_of(numbers) - 1)
        layout = dataclasses.replace(self._layout, bucket_lengths=(longest,))
        sizes = map(outer_products.sizes_of, self._shapes(longest).values())
        largest = max(map(outer_products.matrix_numbers, sizes))
        tile = min(max(1, _FORMED // max(1, largest)), len(numbers))
        count = -(-len(numbers) // tile) * tile
        arrays: dict[str, Any] = {name: None for name in self._metrics}
        norms = {name: np.ones(count, np.float32) for name in self._metrics}
        for batch in layout.batches(queries, numbers):
            factors = self._factors(layout.put(batch.arrays()))
            for name, (metric, unit_norm) in self._metrics.items():
                changed = pair_products.transform(metric, factors)
                if unit_norm:
                    norms_B = sharding.to_host(pair_products.norms(metric, changed))
                    norms[name][batch.places] = norms_B[: len(batch.places)]
                if arrays[name] is None:
                    # Zeros fill up the last tile.
                    arrays[name] = jax.tree.map(
                        lambda x: np.zeros((*x.shape[:-3], count, *x.shape[-2:]), x.dtype), changed
                    )
                for all_x, x in zip(*map(jax.tree.leaves, (arrays[name], changed)), strict=True):
                    rows = sharding.to_host(x)[..., : len(batch.places), :, :]
                    all_x[..., batch.places, :, :] = rows
        mesh = self._layout.mesh
        for by_path in arrays.values():
            by_path |= {path: tuple(map(_drop_zeros, terms)) for path, terms in by_path.items()}

        def place(x):
            return jnp.asarray(x) if mesh is None else sharding.replicate(mesh, x)

        return {
            name: _QuerySide(jax.tree.map(place, arrays.pop(name)), norms[name], tile)
            for name in self._metrics
        }

    def _score_group(
        self,
        side: dict[str, "_QuerySide"],
        passages: TokenTable,
        pairs: Pairs,
        group: range,
        on_passages: Callable[[int], None],
    ) -> dict[str, np.ndarray]:
        """Returns the scores of the pairs of a group of passages, by metric."""
        starts = pairs.starts[group.start : group.stop + 1]
        counts = np.diff(starts)
        # Passages with lists of similar length share a batch.
        order = np.argsort(-counts, kind="stable")
        queries = pairs.queries[starts[0] : starts[-1]]
        scores = {name: np.empty(len(queries), np.float32) for name in side}
        rows = pairs.rows[group.start : group.stop][order]
        for batch in self._layout.batches(passages, rows):
            factors = self._factors(self._layout.put(batch.arrays()))
            members = order[batch.places]
            # The places of each passage's pairs in the group.
            at = [np.arange(starts[i], starts[i + 1]) - starts[0] for i in members]
            for name, (metric, unit_norm) in self._metrics.items():
                changed = pair_products.transform(metric, factors)
                norms_B = np.ones(len(members), np.float32)
                if unit_norm:
                    norms_B = sharding.to_host(pair_products.norms(metric, changed))[: len(members)]
                products = side[name].products(metric, changed, [queries[a] for a in at])
                for i, (a, product) in enumerate(zip(at, products, strict=True)):
                    norms_U = side[name].norms[queries[a]] * norms_B[i]
                    scores[name][a] = product / np.where(norms_U == 0, 1, norms_U)
            on_passages(len(members))
        return {
            n: np.where(np.isfinite(x), x, -np.inf).astype(np.float32) for n, x in scores.items()
        }


def _drop_zeros(term: Factors) -> Factors:
    """Drops positions that add nothing to any sequence's gradient; the others move to the front.

    A query scores its target alone, so that most of a head's positions are such, each V wide.
    """
    is_used = np.any(term.deltas, axis=-1)
    if not term.looks_up:
        is_used &= np.any(term.inputs, axis=-1)
    most = max(1, int(is_used.sum(axis=-1).max()))
    at = np.argsort(~is_used, axis=-1, kind="stable")[..., :most, None]
    return Factors(*(np.take_along_axis(x, at, axis=-2) for x in term))


@dataclasses.dataclass(frozen=True)
class _QuerySide:
    """Transformed factors of Q queries; whole gradients are formed for a tile of them at a time."""

    factors: dict[str, Terms]
    norms: np.ndarray  # float32 [Q]
    tile: int

    def products(
        self, metric: Metric, passages: dict[str, Terms], lists: list[np.ndarray]
    ) -> list[np.ndarray]:
        """Returns the products of each passage with the queries of its list."""
        B = next(iter(passages.values()))[0].deltas.shape[-3]
        longest = max(map(len, lists))
        size = next((n for n in _LISTS if n >= longest), _LISTS[-1])
        filled_length = -(-longest // size) * size
        listed, complete = pair_products.operations(
            metric, passages, self.factors, filled_length, self.tile
        )
        if complete <= listed:
            parts = []
            for i in range(0, len(self.norms), self.tile):
                tile = jax.tree.map(lambda x, i=i: x[..., i : i + self.tile, :, :], self.factors)
                parts.append(pair_products.all_products(metric, passages, tile))
            all_BxQ = np.concatenate([sharding.to_host(x) for x in parts], axis=1)
            return [all_BxQ[i, numbers] for i, numbers in enumerate(lists)]
        # The last call of a list is filled up with the first query.
        filled = np.zeros((B, filled_length), np.int32)
        for i, numbers in enumerate(lists):
            filled[i, : len(numbers)] = numbers
        parts = [
            pair_products.listed_products(metric, passages, self.factors, filled[:, i : i + size])
            for i in range(0, filled_length, size)
        ]
        listed_BxU = np.concatenate([sharding.to_host(x) for x in parts], axis=1)
        return [listed_BxU[i, : len(numbers)] for i, numbers in enumerate(lists)]
