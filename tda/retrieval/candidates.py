"""The candidates of a second stage: the first passages of several rankings, ranked anew."""

import dataclasses
from collections.abc import Iterable, Iterator, Sequence

import numpy as np

from tda.retrieval.ranked import Ranked, first_rank

# The larger this is, the less the first ranks count.
_FUSION = 60


def without_unmatched(ranked: Ranked) -> Ranked:
    """Drops the proponents whose score is not above 0: their rows are −1."""
    rows = np.where(ranked.proponent_scores > 0, ranked.proponents, -1)
    return dataclasses.replace(ranked, proponents=rows)


def unite(rankings: Sequence[Ranked]) -> list[np.ndarray]:
    """Returns each query's rows in any of the rankings, int64, ascending."""
    rows_QxK = np.concatenate([ranked.proponents for ranked in rankings], axis=1)
    return [np.unique(rows[rows >= 0]) for rows in rows_QxK]


def fuse(rankings: Sequence[Ranked]) -> Iterator[tuple[np.ndarray, np.ndarray]]:
    """Yields each query's candidates, ascending, and their scores by reciprocal-rank fusion.

    A passage's score is the sum of 1 / (60 + rank) over the rankings that have it, ranks from 1
    (Cormack, Clarke & Büttcher 2009, whose constant it is).
    """
    for q, rows in enumerate(unite(rankings)):
        parts = np.zeros((len(rankings), len(rows)))
        for part, ranked in zip(parts, rankings, strict=True):
            ranks = np.flatnonzero(ranked.proponents[q] >= 0)
            part[np.searchsorted(rows, ranked.proponents[q, ranks])] = 1.0 / (_FUSION + 1 + ranks)
        # Added from the smallest on, so that the same ranks tie whichever rankings they are from.
        yield rows, np.sort(parts, axis=0).sum(axis=0)


def rank(
    first: Ranked,
    scored: Iterable[tuple[np.ndarray, np.ndarray]],
    k: int,
    correct: dict[str, list[np.ndarray]] | None = None,
) -> Ranked:
    """Ranks candidates by new scores; all other passages follow in the order of a first stage.

    If the candidates are the first stage's best, the first correct passage of a query without a
    correct candidate keeps its rank of the first stage. Candidates from other rankings count as if
    they had moved up from behind it, which is the least favourable case.

    Args:
        first: the first stage, whose passages are all among the candidates.
        scored: each query's candidates, rows and their scores.
        k: number of proponents to keep; shorter lists are padded with −1.
        correct: for each set of labels, the correct rows of each query.

    Returns:
        The ranking, without opponents: the last candidate is no opponent.
    """
    count = len(first.proponents)
    rows_QxK = np.full((count, k), -1, np.int64)
    scores_QxK = np.full((count, k), -np.inf, np.float32)
    ranks = {label: np.zeros(count, np.int64) for label in correct or {}}
    for q, (rows, scores) in enumerate(scored):
        order = np.lexsort((rows, -scores))[:k]
        rows_QxK[q, : len(order)], scores_QxK[q, : len(order)] = rows[order], scores[order]
        depth = int((first.proponents[q] >= 0).sum())
        for label, lists in (correct or {}).items():
            among = np.flatnonzero(np.isin(rows, lists[q]))
            beyond = int(first.first_ranks[label][q])
            if len(among):
                ranks[label][q] = first_rank(scores, among)
            elif beyond:
                ranks[label][q] = len(rows) + max(1, beyond - depth)
    return Ranked.of_proponents(rows_QxK, scores_QxK, ranks)
