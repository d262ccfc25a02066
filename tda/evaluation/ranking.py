"""MRR and recall from the rank of each query's first correct passage (0: it has none)."""

import numpy as np


def mean_reciprocal_rank(first_ranks, cut: int | None = None) -> float:
    """Mean over queries of 1/rank of the first correct passage.

    Args:
        first_ranks: int [Q], ranks from 1; a query without a correct passage has rank 0 and is left
            out, as no method could find one.
        cut: ranks beyond it count as 0 (MRR@cut); None takes full ranks.

    Returns:
        A number in [0, 1]; NaN where no query has a correct passage.
    """
    ranks = np.asarray(first_ranks)
    ranks = ranks[ranks > 0]
    if not len(ranks):
        return float("nan")
    reciprocal = 1.0 / ranks
    return float(np.mean(reciprocal if cut is None else np.where(ranks <= cut, reciprocal, 0.0)))


def recall_at(first_ranks, k: int) -> float:
    """Share of queries with a correct passage among the first k; NaN where none has one at all."""
    ranks = np.asarray(first_ranks)
    ranks = ranks[ranks > 0]
    return float(np.mean(ranks <= k)) if len(ranks) else float("nan")
