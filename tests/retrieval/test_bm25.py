"""BM25: what it ranks, and against the formula."""

import math

import numpy as np
import pytest

from tda.retrieval import bm25

TEXTS = ["paris capital france", "berlin capital germany", "paris hotel guide", "oslo ferry"]


def test_ranks_the_passage_that_states_the_fact_first():
    found = bm25.search(
        ["capital france paris", "oslo"], TEXTS, 2, {"all": [np.array([0]), np.array([3])]}
    )
    assert found.proponents[0, 0] == 0 and found.proponents[1, 0] == 3
    np.testing.assert_array_equal(found.first_ranks["all"], [1, 1])
    assert found.opponents.shape == (2, 0)


def test_scores_are_the_formula():
    """Lucene's variant: idf = ln(1 + (N − n + ½)/(n + ½)), tf / (tf + k1 (1 − b + b |d|/avg))."""
    found = bm25.search(["ferry"], TEXTS, 1)
    average = (3 + 3 + 3 + 2) / 4
    idf = math.log(1 + (4 - 1 + 0.5) / (1 + 0.5))
    wanted = idf / (1 + 1.5 * (1 - 0.75 + 0.75 * 2 / average))
    assert found.proponent_scores[0, 0] == pytest.approx(wanted, rel=1e-5)


def test_a_query_of_unknown_words_ranks_nothing_first():
    found = bm25.search(["zzz qqq"], TEXTS, 2, {"all": [np.array([0])]})
    assert (found.proponent_scores == 0).all()
    assert found.first_ranks["all"][0] == 4


def test_a_corpus_without_words_is_an_error():
    with pytest.raises(ValueError, match="no passage has a word"):
        bm25.search(["a"], ["!", "?"])
