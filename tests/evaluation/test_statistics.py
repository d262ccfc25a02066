"""Intervals against draws made one by one, against theory, and how often they hold the truth."""

import itertools
import math

import numpy as np
import pytest

from tda.evaluation import statistics


def values(seed=0, Q=40, M=3, missing=0.2):
    rng = np.random.default_rng(seed)
    x = rng.normal(size=(Q, M)) + np.arange(M)
    x[rng.random((Q, M)) < missing] = np.nan
    return x


def test_means_are_those_of_queries_drawn_one_by_one(monkeypatch):
    x = values()
    monkeypatch.setattr(statistics, "_CHUNK", 7 * len(x))  # several chunks, the last not full
    got = statistics.resampled_means(x, resamples=30, seed=5)
    rng = np.random.default_rng(5)
    for start in range(0, 30, 7):
        drawn = rng.integers(len(x), size=(min(7, 30 - start), len(x)))
        for r, rows in enumerate(drawn):
            for m in range(x.shape[1]):
                drawn_values = [x[q, m] for q in rows if not math.isnan(x[q, m])]
                assert got[start + r, m] == pytest.approx(
                    sum(drawn_values) / len(drawn_values), rel=1e-12
                )


def test_interval_of_a_mean_is_that_of_theory():
    x = np.random.default_rng(1).exponential(size=(2000, 1))
    (interval,) = statistics.intervals(x)
    error = x.std() / math.sqrt(len(x))
    assert interval.mean == pytest.approx(x.mean(), rel=1e-12) and interval.count == 2000
    assert interval.low == pytest.approx(x.mean() - 1.96 * error, abs=0.1 * error)
    assert interval.high == pytest.approx(x.mean() + 1.96 * error, abs=0.1 * error)


def test_intervals_hold_the_truth_as_often_as_they_say():
    rng = np.random.default_rng(2)
    # 400 samples of 50 queries, each a column of its own; a fifth of each is not measured.
    x = rng.normal(0.3, 1.0, size=(50, 400))
    x[rng.random(x.shape) < 0.2] = np.nan
    intervals = statistics.intervals(x, resamples=2000)
    held = np.mean([i.low <= 0.3 <= i.high for i in intervals])
    assert 0.91 <= held <= 0.97


def test_the_same_seed_draws_the_same():
    x = values()
    assert statistics.intervals(x) == statistics.intervals(x)
    assert statistics.intervals(x, seed=1) != statistics.intervals(x)
    # A column's interval does not hang on what stands beside it.
    (alone,), (beside, *_) = statistics.intervals(x[:, :1]), statistics.intervals(x)
    assert (alone.low, alone.high) == pytest.approx((beside.low, beside.high), rel=1e-12)


def test_differences_are_paired():
    rng = np.random.default_rng(3)
    hard = rng.normal(scale=10.0, size=(200, 1))  # what both methods find hard
    a, b = hard + 0.2 + 0.1 * rng.normal(size=hard.shape), hard
    (interval,) = statistics.differences(a, b)
    assert interval.low > 0.15 and interval.high < 0.25 and interval.p < 1e-3
    assert interval.mean == pytest.approx(float((a - b).mean()))
    (back,) = statistics.differences(b, a)
    assert (back.mean, back.low, back.high) == pytest.approx(
        (-interval.mean, -interval.high, -interval.low)
    )
    # Unpaired, the same 0.2 would drown.
    (alone,) = statistics.intervals(a)
    assert alone.high - alone.low > 1
    # Queries that one of the two lacks are left out.
    a[:150] = np.nan
    assert statistics.differences(a, b)[0].count == 50


def test_p_is_uniform_where_nothing_differs():
    rng = np.random.default_rng(4)
    a, b = rng.normal(size=(2, 100, 1500))
    p = np.array([d.p for d in statistics.differences(a, b, resamples=1000)])
    assert 0.035 < np.mean(p < 0.05) < 0.075 and 0.46 < np.mean(p < 0.5) < 0.54
    # Equal to the last digit: no evidence at all.
    assert statistics.differences(a[:, :1], a[:, :1])[0].p == 1.0


def test_draws_without_a_measured_query_do_not_count_for_p():
    """Guards: a share of all draws, which is too small where few queries were measured."""
    values = np.full((100, 1), np.nan)
    values[3], values[7] = 1.0, -0.5
    (difference,) = statistics.differences(values, np.zeros((100, 1)))
    means = statistics.resampled_means(values)[:, 0]
    means = means[np.isfinite(means)]
    assert 8000 < len(means) < 9000  # 1 − (1 − 2/100)^100 of 10,000
    expected = 2 * (1 + (means <= 0).sum()) / (1 + len(means))
    assert difference.p == pytest.approx(expected, rel=1e-12)


def test_an_unmeasured_figure_is_nan():
    x = np.array([[np.nan, 1.0, 0.0], [np.nan, np.nan, 1.0]])
    none, one, two = statistics.intervals(x)
    assert math.isnan(none.mean) and none.count == 0
    assert one.mean == 1.0 and math.isnan(one.low) and one.count == 1
    assert two.mean == 0.5 and (two.low, two.high) == (0.0, 1.0)
    assert math.isnan(statistics.intervals(np.zeros((0, 1)))[0].mean)
    assert all(math.isnan(d.p) for d in statistics.differences(x[:, :2], np.zeros((2, 2))))


def test_seeds_have_a_mean_and_a_sample_deviation():
    spread = statistics.across_seeds([0.2, 0.4, 0.3])
    assert (spread["mean"], spread["least"], spread["most"], spread["seeds"]) == pytest.approx(
        (0.3, 0.2, 0.4, 3)
    )
    assert spread["sd"] == pytest.approx(0.1)  # n − 1
    one = statistics.across_seeds([0.5, float("nan")])
    assert one["mean"] == 0.5 and math.isnan(one["sd"]) and one["seeds"] == 1
    assert statistics.across_seeds([])["seeds"] == 0


def test_sums_by_label_against_all_permutations():
    """Six passages have 20 ways to choose three: the exact share of them that is as far."""
    scores = np.array([[5.0, 4.0, 3.5, 0.0, 1.0, 0.5], [7.0, 4.0, 3.5, 2.0, 1.0, 0.5]])
    high, low = statistics.group_sums(scores, list("aaabbb"), resamples=4000)
    assert (high.label, low.label, high.size, low.size) == ("a", "b", 3, 3)
    assert high.mean == pytest.approx(13.5) and low.mean == pytest.approx(2.5)
    assert high.expected == low.expected == pytest.approx(8.0)
    mean = scores.mean(axis=0)
    sums = [sum(mean[list(c)]) for c in itertools.combinations(range(6), 3)]
    exact = np.mean([abs(s - 8.0) >= 5.5 - 1e-9 for s in sums])
    assert high.p == pytest.approx(exact, abs=0.02) == pytest.approx(low.p, abs=0.02)
    assert (high.low, high.high) == (12.5, 14.5) and high.count == 2
    equal = statistics.group_sums(np.full((2, 4), 0.1), list("aabb"), resamples=50)
    assert [g.p for g in equal] == [1.0, 1.0]


def test_a_score_that_is_not_finite_is_no_evidence():
    """Guards: a p of almost 0, since no draw is nearer than NaN."""
    scores = np.array([[5.0, 4.0, np.nan, 0.0], [7.0, 4.0, 3.5, 2.0]])
    groups = statistics.group_sums(scores, list("aabb"), resamples=50)
    assert [math.isnan(g.p) for g in groups] == [True, True]
