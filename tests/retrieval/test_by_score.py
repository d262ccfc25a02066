"""Rankings from scores, and the controls."""

import numpy as np

from tda.retrieval import by_score
from tda.retrieval.sources import InMemory


def test_ranks_and_rows_are_those_of_the_scores():
    scores = [np.array([1.0, 3, 2, -np.inf]), np.array([5.0, 5, 0, 1])]
    correct = {
        "all": [np.array([2, 3]), np.array([1])],
        "strict": [np.array([3]), np.zeros(0, int)],
    }
    ranking = by_score.rank(scores, 2, 3, correct)
    np.testing.assert_array_equal(ranking.proponents, [[1, 2, 0], [0, 1, 3]])
    np.testing.assert_array_equal(ranking.proponent_scores[1], [5, 5, 1])
    np.testing.assert_array_equal(ranking.first_ranks["all"], [2, 2])  # a tie goes against it
    np.testing.assert_array_equal(ranking.first_ranks["strict"], [0, 0])  # never retrieved
    assert ranking.opponents.shape == (2, 0)


def test_what_is_never_retrieved_is_no_passage():
    ranking = by_score.rank([np.array([1.0, -np.inf, 2]), np.full(3, -np.inf)], 2, 3)
    np.testing.assert_array_equal(ranking.proponents, [[2, 0, -1], [-1, -1, -1]])


def test_a_score_that_is_not_a_number_is_the_last_and_no_proponent():
    correct = {"all": [np.array([1])]}
    ranking = by_score.rank([np.array([1.0, np.nan, 2])], 1, 3, correct)
    np.testing.assert_array_equal(ranking.proponents, [[2, 0, -1]])
    assert ranking.first_ranks["all"][0] == 3


def test_a_score_of_all_alike_finds_nothing_first():
    ranking = by_score.rank([np.ones(50)], 1, 10, {"all": [np.array([0, 1])]})
    assert ranking.first_ranks["all"][0] == 49


def test_chance_is_the_same_again_and_different_for_each_query():
    once, again = ([by_score.random_scores(100, 4, q) for q in range(3)] for _ in range(2))
    np.testing.assert_array_equal(once, again)
    assert not np.array_equal(once[0], once[1])
    scores = (by_score.random_scores(100, 0, q) for q in range(400))
    ranks = by_score.rank(scores, 400, 10, {"all": [np.array([7])] * 400}).first_ranks["all"]
    assert 45 < ranks.mean() < 56 and ranks.min() == 1


def test_norms_of_a_source():
    x = np.random.default_rng(0).normal(size=(37, 8)).astype(np.float32)
    x[3] = np.inf
    norms = by_score.norms(InMemory(x, [slice(0, 8)]), 16)
    np.testing.assert_allclose(np.delete(norms, 3), np.linalg.norm(np.delete(x, 3, 0), axis=1))
    assert norms[3] == -np.inf
