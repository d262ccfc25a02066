"""What a retriever returns, and the rank of the first correct passage under ties."""

import dataclasses
from collections.abc import Sequence

import numpy as np

from tda.runtime import atomic_file


@dataclasses.dataclass(frozen=True)
class Ranked:
    """The best and the worst passages of each query.

    Attributes:
        proponents: int64 [Q, K], rows with the largest scores, best first; −1, which is no
            passage, at the end where a retriever found fewer.
        proponent_scores: float32 [Q, K].
        opponents: int64 [Q, K], rows with the smallest scores, lowest first; [Q, 0] where they
            were not asked for, or low scores mean nothing.
        opponent_scores: float32, like `opponents`.
        first_ranks: for each set of labels, int64 [Q]: rank of the first correct passage in the
            whole corpus, 0 where the query has none.
    """

    proponents: np.ndarray
    proponent_scores: np.ndarray
    opponents: np.ndarray
    opponent_scores: np.ndarray
    first_ranks: dict[str, np.ndarray]


def save(path, ranked: Ranked) -> None:
    """Writes a ranking to `path` (.npz); the file appears whole or not at all."""
    arrays = {f.name: getattr(ranked, f.name) for f in dataclasses.fields(ranked)}
    ranks = arrays.pop("first_ranks")
    with atomic_file.open_atomic(path, "wb") as out:
        np.savez(out, **arrays, **{f"first_ranks/{label}": r for label, r in ranks.items()})


def load(path) -> Ranked:
    """Reads a ranking that `save` wrote."""
    with np.load(path, allow_pickle=False) as kept:
        arrays = dict(kept)
    prefix = "first_ranks/"
    ranks = {k[len(prefix) :]: arrays.pop(k) for k in list(arrays) if k.startswith(prefix)}
    return Ranked(**arrays, first_ranks=ranks)


def join(parts: Sequence[tuple[np.ndarray, Ranked]]) -> Ranked:
    """Rankings of parts of the queries as one of all.

    Args:
        parts: query numbers and their ranking; every number below Q is in just one part.
    """
    if len(parts) == 1:
        return parts[0][1]
    order = np.argsort(np.concatenate([numbers for numbers, _ in parts]))
    found = [r for _, r in parts]

    def one(name):
        return np.concatenate([getattr(r, name) for r in found])[order]

    fields = (f.name for f in dataclasses.fields(Ranked) if f.name != "first_ranks")
    labels = found[0].first_ranks
    ranks = {n: np.concatenate([r.first_ranks[n] for r in found])[order] for n in labels}
    return Ranked(**{name: one(name) for name in fields}, first_ranks=ranks)


def first_rank(scores_C: np.ndarray, correct: np.ndarray) -> int:
    """Rank, from 1, of the best of the `correct` rows; 0 where there are none.

    Among equal scores a correct passage comes last: a method that scores all alike gets nothing.
    """
    if not len(correct):
        return 0
    # A row that is named twice is one correct row.
    right = scores_C[np.unique(correct)]
    best = right.max()
    return 1 + int((scores_C >= best).sum() - (right >= best).sum())


def top(scores_C: np.ndarray, k: int) -> np.ndarray:
    """The k rows with the largest scores, best first; among equals the lower row first."""
    k = min(k, len(scores_C))
    chosen = np.argpartition(-scores_C, k - 1)[:k] if k < len(scores_C) else np.arange(k)
    # The partition may split equals arbitrarily: take all that reach its worst, then order.
    reaching = np.flatnonzero(scores_C >= scores_C[chosen].min())
    return reaching[np.lexsort((reaching, -scores_C[reaching]))][:k]
