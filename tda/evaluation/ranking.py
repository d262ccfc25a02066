"""MRR and recall from the rank of each query's first correct passage (0: it has none).

Two conventions are in use for MRR. With full ranks a first correct passage at rank 500 counts
1/500; cut at 10 (MRR@10) it counts nothing. Recall@10 is the same in both.
"""

import numpy as np


def reciprocal_ranks(first_ranks, cut: int | None = None) -> np.ndarray:
    """Returns 1/rank of each query's first correct passage.

    Args:
        first_ranks: int [Q], ranks from 1; a query without a correct passage has rank 0.
        cut: ranks beyond it count as 0 (MRR@cut); None takes full ranks.

    Returns:
        float64 [Q], in [0, 1]; NaN for a query without a correct passage, which no method could
        find.
    """
    ranks = np.asarray(first_ranks, np.int64)
    out = 1.0 / np.maximum(ranks, 1)
    if cut is not None:
        out = np.where(ranks <= cut, out, 0.0)
    return np.where(ranks > 0, out, np.nan)


def hits(first_ranks, k: int) -> np.ndarray:
    """Returns 1 or 0, float64 [Q]: whether a correct passage is among the first k; NaN as above."""
    ranks = np.asarray(first_ranks, np.int64)
    return np.where(ranks > 0, (ranks <= k).astype(np.float64), np.nan)


def mean(values, axis: int | None = None):
    """Returns the mean, float64, of the measured values (not NaN); NaN if there are none."""
    values = np.asarray(values, np.float64)
    measured = np.isfinite(values)
    count = measured.sum(axis)
    # `np.nanmean` warns where nothing was measured.
    return np.where(
        count > 0, np.where(measured, values, 0.0).sum(axis) / np.maximum(count, 1), np.nan
    )
