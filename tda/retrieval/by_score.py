"""Rankings from scores of all passages, and the scores of controls, which ignore the query."""

from collections.abc import Iterable, Sequence

import numpy as np

from tda.retrieval.ranked import Ranked, first_rank, top
from tda.retrieval.sources import Source


def rank(
    scores: Iterable[np.ndarray],
    count: int,
    k: int = 10,
    correct: dict[str, list[np.ndarray]] | None = None,
    withdrawn: Sequence[int] | np.ndarray = (),
) -> Ranked:
    """Ranks the k best passages of each query, without opponents, which mean nothing here.

    Args:
        scores: scores of each query in turn, [C]; a score of minus infinity is never retrieved.
        count: Q, the number of queries.
        k: number of proponents to keep.
        correct: for each set of labels, the correct rows of each query.
        withdrawn: rows that are never retrieved, whatever their scores.
    """
    rows, best_scores = [], []
    ranks = {label: np.zeros(count, np.int64) for label in correct or {}}
    for q, scores_C in enumerate(scores):
        if len(withdrawn):
            # A copy: the caller may keep its scores.
            scores_C = np.array(scores_C)
            scores_C[np.asarray(withdrawn, np.int64)] = -np.inf
        best = top(scores_C, k)
        best_scores.append(scores_C[best])
        rows.append(np.where(best_scores[-1] > -np.inf, best, -1))
        for label, lists in (correct or {}).items():
            retrievable = lists[q][scores_C[lists[q]] != -np.inf]
            ranks[label][q] = first_rank(scores_C, retrievable)
    width = len(rows[0]) if rows else 0
    return Ranked.of_proponents(
        np.asarray(rows, np.int64).reshape(count, width),
        np.asarray(best_scores, np.float32).reshape(count, width),
        ranks,
    )


def random_scores(passages: int, *seeds: int) -> np.ndarray:
    """Draws scores in [0, 1), float64 [C], which the seeds determine."""
    return np.random.default_rng(seeds).random(passages)


def norms(source: Source, step: int) -> np.ndarray:
    """Returns the norm of every gradient, float32 [C]; minus infinity if it is invalid.

    `step` is a power of two, the rows that are read at a time.
    """
    out = np.empty(source.rows, np.float32)
    for rows in source.scan(step):
        x_RxE = np.where(rows.valid[:, None], rows.decoded(source.form), 0)
        norm_R = np.linalg.norm(x_RxE, axis=1)
        out[rows.first : rows.first + len(rows)] = np.where(rows.valid, norm_R, -np.inf)
    return out
