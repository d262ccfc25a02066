"""The ranking that a retriever returns, and the first correct rank under ties."""

import dataclasses
from collections.abc import Sequence

import jax
import numpy as np

from tda.runtime import atomic_file


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Ranked:
    """The best and the worst passages of each query, with their scores, float32 [Q, K]."""

    proponents: np.ndarray
    """int64 [Q, K], rows with the largest scores, best first; if a retriever returns fewer than K,
    the end is padded with −1."""
    proponent_scores: np.ndarray
    opponents: np.ndarray
    """int64 [Q, K], rows with the smallest scores, lowest first; [Q, 0] if they were not searched
    for, or low scores mean nothing."""
    opponent_scores: np.ndarray
    first_ranks: dict[str, np.ndarray]
    """For each set of labels, int64 [Q]: rank, from 1, of the first correct passage in the whole
    corpus; 0 if the query has none."""

    @classmethod
    def of_proponents(cls, rows_QxK, scores_QxK, first_ranks=None) -> "Ranked":
        """Returns a ranking without opponents, for scores whose lowest values mean nothing."""
        empty = np.zeros((len(rows_QxK), 0))
        opponents = empty.astype(np.int64), empty.astype(np.float32)
        return cls(rows_QxK, scores_QxK, *opponents, first_ranks or {})


def save(path, ranked: Ranked) -> None:
    """Writes a ranking to `path` (.npz); the file appears whole or not at all."""
    arrays = {f.name: getattr(ranked, f.name) for f in dataclasses.fields(ranked)}
    ranks = arrays.pop("first_ranks")
    arrays |= {f"first_ranks/{label}": r for label, r in ranks.items()}
    atomic_file.write_arrays(path, arrays)


def load(path) -> Ranked:
    """Reads a ranking that `save` wrote."""
    arrays = atomic_file.read_arrays(path)
    prefix = "first_ranks/"
    ranks = {k[len(prefix) :]: arrays.pop(k) for k in list(arrays) if k.startswith(prefix)}
    return Ranked(**arrays, first_ranks=ranks)


def shorten(ranked: Ranked, k: int) -> Ranked:
    """Returns the first k proponents and opponents of each query; ranks stay those of all rows."""
    fields = ("proponents", "proponent_scores", "opponents", "opponent_scores")
    return dataclasses.replace(ranked, **{name: getattr(ranked, name)[:, :k] for name in fields})


def join(parts: Sequence[tuple[np.ndarray, Ranked]]) -> Ranked:
    """Joins rankings of parts of the queries to one ranking, in the order of the query numbers.

    Args:
        parts: query numbers and their ranking; every number below Q is in exactly one part.
    """
    if len(parts) == 1:
        return parts[0][1]
    order = np.argsort(np.concatenate([numbers for numbers, _ in parts]))
    rankings = (ranking for _, ranking in parts)
    return jax.tree.map(lambda *fields: np.concatenate(fields)[order], *rankings)


def first_rank(scores_C: np.ndarray, correct: np.ndarray) -> int:
    """Returns the rank, from 1, of the best of the `correct` rows; 0 if there are none.

    Among equal scores a correct passage comes last, so a method that gives all passages the same
    score gains nothing. A score that is not a number is below all others.
    """
    if not len(correct):
        return 0
    scores_C = _with_nan_last(scores_C)
    # A row that is named twice is one correct row.
    correct_scores = scores_C[np.unique(correct)]
    best = correct_scores.max()
    return 1 + int((scores_C >= best).sum() - (correct_scores >= best).sum())


def best_of(scores_QxN, rows_QxN, k: int) -> tuple[np.ndarray, np.ndarray]:
    """Returns each query's k largest scores with their rows; among equals the lower row first."""
    order = np.lexsort((rows_QxN, -scores_QxN), axis=1)[:, :k]
    return np.take_along_axis(scores_QxN, order, 1), np.take_along_axis(rows_QxN, order, 1)


def top(scores_C: np.ndarray, k: int) -> np.ndarray:
    """Returns the k rows with the largest scores, best first; among equals the lower row first.

    A score that is not a number is below all others.
    """
    scores_C = _with_nan_last(scores_C)
    k = min(k, len(scores_C))
    chosen = np.argpartition(-scores_C, k - 1)[:k] if k < len(scores_C) else np.arange(k)
    # The partition takes any of equal scores: take all that reach its worst one, then order them.
    reaching = np.flatnonzero(scores_C >= scores_C[chosen].min())
    return reaching[np.lexsort((reaching, -scores_C[reaching]))][:k]


def _with_nan_last(scores_C: np.ndarray) -> np.ndarray:
    # NaN compares as neither above nor below: nothing would rank before a passage that has it.
    return np.where(np.isnan(scores_C), -np.inf, scores_C)
