"""Candidates of several rankings, ranked anew, and ranks beyond them."""

import numpy as np

from tda.retrieval import candidates
from tda.retrieval.ranked import Ranked


def ranking(rows, ranks):
    rows = np.asarray(rows)
    return Ranked.of_proponents(rows, np.zeros(rows.shape, np.float32), {"all": np.array(ranks)})


def test_candidates_are_united_and_ranked_by_new_scores():
    first = ranking([[5, 2, 7], [1, -1, -1], [3, 4, 5]], [9, 6, 2])
    other = ranking([[2, 9, 5], [1, 0, -1], [3, 4, 5]], [1, 1, 1])
    lists = candidates.unite([first, other])
    assert [rows.tolist() for rows in lists] == [[2, 5, 7, 9], [0, 1], [3, 4, 5]]
    scores = [np.array(s, np.float32) for s in ([1, 4, 4, 2], [0, 1], [2, 2, 2])]
    correct = {"all": [np.array([8]), np.array([6, 7]), np.array([4])]}
    ranked = candidates.rank(first, zip(lists, scores, strict=True), 3, correct)
    # Among equal scores the lower row first; lists that are too short end with no passage.
    assert ranked.proponents.tolist() == [[5, 7, 9], [1, 0, -1], [3, 4, 5]]
    assert ranked.proponent_scores[0].tolist() == [4, 4, 2] and ranked.opponents.shape == (3, 0)
    # Without a correct candidate: behind all four of them, as far as behind the first three before;
    # behind the two, five places behind the one. Among equals a correct candidate comes last.
    assert ranked.first_ranks["all"].tolist() == [4 + 6, 2 + 5, 3]


def test_ranks_beyond_the_candidates_of_one_ranking_do_not_change():
    first = ranking([[5, 2], [1, 3]], [40, 0])
    lists = candidates.unite([first])
    scored = [(rows, np.ones(2, np.float32)) for rows in lists]
    correct = {"all": [np.array([8]), np.array([], np.int64)]}
    assert candidates.rank(first, scored, 2, correct).first_ranks["all"].tolist() == [40, 0]


def test_reciprocal_ranks_are_summed_over_the_rankings_that_have_a_passage():
    first = ranking([[5, 2, 7], [1, -1, -1]], [0, 0])
    other = ranking([[2, 9, 5], [0, 1, -1]], [0, 0])
    fused = list(candidates.fuse([first, other]))
    assert [rows.tolist() for rows, _ in fused] == [[2, 5, 7, 9], [0, 1]]
    expected = [[1 / 62 + 1 / 61, 1 / 61 + 1 / 63, 1 / 63, 1 / 62], [1 / 61, 1 / 61 + 1 / 62]]
    for (_, scores), by_hand in zip(fused, expected, strict=True):
        np.testing.assert_allclose(scores, by_hand, rtol=1e-12)
    best = candidates.rank(first, fused, 3).proponents.tolist()
    assert best == [[2, 5, 9], [1, 0, -1]]


def test_the_same_ranks_tie_whichever_rankings_they_are_from():
    """Guards: sums of three in another order, whose last bit would decide."""
    rows = np.arange(60)
    turned = [np.roll(rows, -20 * i)[None] for i in range(3)]
    ((_, scores),) = candidates.fuse([ranking(r, [0]) for r in turned])
    # Each passage has the ranks r, r + 20 and r + 40, by another ranking each.
    np.testing.assert_array_equal(scores.reshape(3, 20), [scores[:20]] * 3)
    assert len(set(scores)) == 20
