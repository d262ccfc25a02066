"""The passages that are annotated with each query's fact, as if a method had retrieved them.

The row "annotated sentences" of the paper's table 1: what tail-patch score the ground truth gets.
"""

import hashlib
from collections.abc import Sequence

import numpy as np

from tda.retrieval.ranked import Ranked


def ranked(ids: Sequence[str], correct: Sequence[np.ndarray], k: int = 10, seed: int = 0) -> Ranked:
    """Up to k annotated passages of each query, drawn without repetition, in a random order.

    Args:
        ids: of the queries; with the seed, a query's id decides its draw.
        correct: the annotated passage rows of each query.
        k: how many at most.
        seed: of the draws.

    Returns:
        A ranking whose scores are 1. Where a query has fewer than k passages, the rest of its
        rows is −1 and of its scores NaN. It has no ranks of correct passages: it read the labels.
    """
    rows_QxK = np.full((len(ids), k), -1, np.int64)
    for row_K, name, mine in zip(rows_QxK, ids, correct, strict=True):
        digest = hashlib.sha256(f"annotated {seed} {name}".encode()).digest()
        rng = np.random.default_rng(np.frombuffer(digest, np.uint32))
        drawn = rng.permutation(np.sort(mine))[:k]
        row_K[: len(drawn)] = drawn
    scores_QxK = np.where(rows_QxK < 0, np.nan, 1.0).astype(np.float32)
    none_Qx0 = np.zeros((len(ids), 0))
    return Ranked(rows_QxK, scores_QxK, none_Qx0.astype(np.int64), none_Qx0.astype(np.float32), {})
