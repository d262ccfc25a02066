"""Rankings from scores that are computed outright; the controls, which look at no query."""

from collections.abc import Iterable

import numpy as np

from tda.retrieval.ranked import Ranked, first_rank, top
from tda.retrieval.sources import Source


def rank(
    scores: Iterable[np.ndarray],
    count: int,
    k: int = 10,
    correct: dict[str, list[np.ndarray]] | None = None,
) -> Ranked:
    """The k best passages of each query; opponents mean nothing here and are left out.

    Args:
        scores: of every query in turn, [C]; minus infinity of what is never retrieved.
        count: Q, the number of queries.
        k: how many proponents to keep.
        correct: for each set of labels, the correct rows of each query.
    """
    rows, kept = [], []
    ranks = {label: np.zeros(count, np.int64) for label in correct or {}}
    for q, scores_C in enumerate(scores):
        best = top(scores_C, k)
        kept.append(scores_C[best])
        rows.append(np.where(kept[-1] > -np.inf, best, -1))
        for label, lists in (correct or {}).items():
            right = lists[q][scores_C[lists[q]] > -np.inf]
            ranks[label][q] = first_rank(scores_C, right)
    width = len(rows[0]) if rows else 0
    none = np.zeros((count, 0))
    return Ranked(
        np.asarray(rows, np.int64).reshape(count, width),
        np.asarray(kept, np.float32).reshape(count, width),
        none.astype(np.int64),
        none.astype(np.float32),
        ranks,
    )


def at_random(passages: int, queries: int, seed: int = 0) -> Iterable[np.ndarray]:
    """Scores in [0, 1) for every query, a function of the seed and its number."""
    return (random_scores(passages, seed, q) for q in range(queries))


def random_scores(passages: int, *seeds: int) -> np.ndarray:
    """Scores in [0, 1), float64 [C], a function of the seeds."""
    return np.random.default_rng(seeds).random(passages)


def norms(source: Source, step: int) -> np.ndarray:
    """The norm of every gradient, float32 [C]; minus infinity of an invalid one.

    Args:
        source: the gradients.
        step: rows at a time, a power of two.
    """
    out = np.empty(source.rows, np.float32)
    for found in source.scan(step):
        x_RxE = np.where(found.valid[:, None], found.decoded(source.form.widths), 0)
        norm_R = np.linalg.norm(x_RxE, axis=1)
        out[found.first : found.first + len(found)] = np.where(found.valid, norm_R, -np.inf)
    return out
