"""The passages annotated with each query's fact, as if a method had retrieved them.

The row "annotated sentences" of the paper's table 1, the tail-patch score of the ground truth.
"""

from collections.abc import Sequence

import numpy as np

from tda.retrieval.ranked import Ranked
from tda.runtime.fingerprint import seed_of


def ranked(ids: Sequence[str], correct: Sequence[np.ndarray], k: int = 10, seed: int = 0) -> Ranked:
    """Draws up to k annotated passages of each query, without repetition, in a random order.

    Args:
        ids: ids of the queries; a query's draw depends on its id and the seed alone.
        correct: rows of the annotated passages of each query.
        k: the most passages of a query; if it has fewer, rows of −1 and scores of NaN follow.
        seed: seed of the draws.

    Returns:
        A ranking whose scores are 1, without first ranks, since it is made from the labels.
    """
    rows_QxK = np.full((len(ids), k), -1, np.int64)
    for row_K, name, passages in zip(rows_QxK, ids, correct, strict=True):
        rng = np.random.default_rng(seed_of(f"annotated {seed} {name}".encode()))
        # A row that is named twice is one passage.
        drawn = rng.permutation(np.unique(passages))[:k]
        row_K[: len(drawn)] = drawn
    scores_QxK = np.where(rows_QxK < 0, np.nan, 1.0).astype(np.float32)
    return Ranked.of_proponents(rows_QxK, scores_QxK)
