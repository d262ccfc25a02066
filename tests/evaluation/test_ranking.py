"""MRR and recall by hand."""

import math

import pytest

from tda.evaluation import ranking


def test_mrr_and_recall():
    ranks = [1, 2, 20, 0]  # the last query has no correct passage: no method could find one
    assert ranking.mean(ranking.reciprocal_ranks(ranks)) == pytest.approx((1 + 0.5 + 0.05) / 3)
    assert ranking.mean(ranking.reciprocal_ranks(ranks, cut=10)) == pytest.approx(1.5 / 3)
    assert ranking.mean(ranking.hits(ranks, 10)) == pytest.approx(2 / 3)
    assert ranking.mean(ranking.hits(ranks, 1)) == pytest.approx(1 / 3)


def test_nothing_to_measure_is_not_a_number():
    assert math.isnan(ranking.mean(ranking.reciprocal_ranks([0, 0])))
    assert math.isnan(ranking.mean(ranking.hits([], 10)))
