"""Figures against a bank, by hand and against scipy."""

import numpy as np
import pytest
from scipy import stats

from tda.counterfactual import figures
from tda.counterfactual.bank import Bank, draw_subsets


def make_bank(noise=0.0, M=60, Q=6, U=40, seed=0):
    rng = np.random.default_rng(seed)
    scores = rng.normal(size=(Q, U))
    removed = draw_subsets(U, 0.2, M, seed)
    changes = removed @ scores.T + noise * rng.normal(size=(M, Q))
    base = rng.random(Q).astype(np.float32)
    return scores, Bank(removed, (base + changes).astype(np.float32), base)


def test_spearman_is_scipys_with_ties():
    rng = np.random.default_rng(0)
    a, b = rng.integers(0, 6, (30, 4)).astype(float), rng.normal(size=(30, 4))
    expected = [stats.spearmanr(a[:, i], b[:, i]).statistic for i in range(4)]
    np.testing.assert_allclose(figures.spearman(a, b), expected, rtol=1e-12)
    # A constant knows nothing of the query; what is not finite is not measured.
    a[:, 0], a[3, 1] = 1.0, np.nan
    np.testing.assert_array_equal(np.isnan(figures.spearman(a, b)), [0, 1, 0, 0])
    assert figures.spearman(a, b)[0] == 0


def test_lds_is_one_for_the_truth_and_minus_one_for_its_opposite():
    scores, bank = make_bank()
    result = figures.lds({"true": scores, "opposed": -scores}, bank, resamples=50)
    assert result.interval("true").mean == pytest.approx(1, abs=1e-3)
    assert result.interval("opposed").mean == pytest.approx(-1, abs=1e-3)
    assert result.difference("true", "opposed").low == pytest.approx(2, abs=1e-2)


def test_intervals_cover_subsets_and_queries_and_pair_methods():
    scores, bank = make_bank(noise=2.0)
    other = scores + 0.3 * np.random.default_rng(1).normal(size=scores.shape)
    result = figures.lds({"a": scores, "b": other}, bank, resamples=400)
    a, b, difference = result.interval("a"), result.interval("b"), result.difference("a", "b")
    assert a.low < a.mean < a.high and a.count == 6
    assert difference.mean == pytest.approx(a.mean - b.mean)
    # Paired: the two share subsets and queries, so their difference varies less than either.
    assert difference.high - difference.low < a.high - a.low
    # More subsets narrow the interval, which queries alone would not do.
    _, wide = make_bank(noise=2.0, M=15)
    fewer = figures.lds({"a": scores}, wide, resamples=400).interval("a")
    assert fewer.high - fewer.low > 1.3 * (a.high - a.low)


def test_a_difference_is_over_the_queries_measured_in_both():
    """Guards: an interval of means over each method's own queries, far from its own mean."""
    scores, bank = make_bank(noise=2.0)
    changes = bank.changes_MxQ.copy()
    changes[:, 3:] = np.random.default_rng(2).normal(size=changes[:, 3:].shape)  # hard queries
    part, other = scores.copy(), 0.5 * scores + np.random.default_rng(1).normal(size=scores.shape)
    part[3:], other[:1] = np.nan, np.nan
    methods = {"all": scores, "part": part, "other": other}
    result = figures.lds(methods, bank, resamples=100, changes_MxQ=changes)
    same = result.difference("part", "all")
    assert (same.mean, same.low, same.high, same.count) == (0, 0, 0, 3)
    # As if the other queries had no scores in either.
    cut = {
        n: np.where(np.isin(np.arange(6), [1, 2])[:, None], x, np.nan) for n, x in methods.items()
    }
    alone = figures.lds(cut, bank, resamples=100, changes_MxQ=changes)
    for pair in (("part", "other"), ("other", "part")):
        assert vars(result.difference(*pair)) == pytest.approx(vars(alone.difference(*pair)))


def test_intervals_are_of_resampled_rows():
    """Against scipy's correlation of each draw, ties and a column that is not finite included."""
    scores, bank = make_bank(noise=1.0, M=12, Q=4, U=8)
    scores = {"ties": scores.round(), "flat": np.ones_like(scores)}
    changes = bank.changes_MxQ.round(1)
    changes[3, 2] = np.nan
    found = figures.lds(scores, bank, resamples=20, seed=3, changes_MxQ=changes)
    rng, measured = np.random.default_rng(3), [0, 1, 3]
    for r in range(20):
        rows, queries = rng.integers(12, size=12), rng.integers(4, size=4)
        of_query = {
            q: stats.spearmanr(
                figures.predictions(scores["ties"], bank.removed_MxU)[rows, q], changes[rows, q]
            ).statistic
            for q in measured
        }
        expected = np.mean([of_query[q] for q in queries if q in measured])
        assert found.resampled["ties"][r] == pytest.approx(expected, rel=1e-12)
        assert found.resampled["flat"][r] == 0


def test_ceilings_of_reruns():
    rng = np.random.default_rng(0)
    common = rng.normal(size=(4000, 3))
    one, two = (common + rng.normal(size=common.shape) for _ in range(2))
    c = figures.ceiling(one, two)
    assert c.agreement == pytest.approx(0.48, abs=0.02)
    assert c.one == pytest.approx(c.agreement**0.5)
    # What the truth reaches on one run, and on the mean of two.
    assert figures.spearman(common, one).mean() == pytest.approx(c.one, abs=0.02)
    assert figures.spearman(common, one + two).mean() == pytest.approx(c.mean, abs=0.02)
    assert figures.ceiling(one, -one).one == 0
    # Every pair of orders counts, and the mean of more of them has less noise.
    third = common + rng.normal(size=common.shape)
    c = figures.ceiling(one, two, third)
    pairs = [(one, two), (one, third), (two, third)]
    assert c.agreement == pytest.approx(np.mean([figures.spearman(*p) for p in pairs]))
    expected = figures.spearman(common, one + two + third).mean()
    assert c.orders == 3 and expected == pytest.approx(c.mean, abs=0.02)


def test_top_units_are_each_querys_own():
    scores = np.array([[0.0, 3.0, 3.0, 1.0], [5.0, 3.0, 2.0, 9.0]])
    expected = np.array([[0, 1, 0, 0], [0, 0, 0, 1]], bool)
    np.testing.assert_array_equal(figures.top_units(scores, 0.01), expected)
    assert (figures.top_units(scores, 0.5).sum(axis=1) == 2).all()


def test_metasmoothness_of_a_line_is_one_and_of_a_zigzag_minus_one():
    rng = np.random.default_rng(0)
    start, step = rng.normal(size=20), rng.normal(size=20)
    assert figures.metasmoothness(start, start + step, start + 2 * step) == pytest.approx(1)
    assert figures.metasmoothness(start, start + step, start + 0.5 * step) == pytest.approx(-1)
    mixed = start + step * np.where(np.arange(20) < 10, 2, 0.5)
    d = np.abs(mixed - start)
    expected = (d[:10].sum() - d[10:].sum()) / d.sum()
    assert figures.metasmoothness(start, start + step, mixed) == pytest.approx(expected)


def test_scores_of_other_units_are_refused():
    scores, bank = make_bank()
    with pytest.raises(ValueError, match="the scores are of 39 units and the bank of 40"):
        figures.lds({"a": scores[:, 1:]}, bank)


def test_sets_of_equal_scores_tie_in_whatever_order_they_are_added():
    """Guards: rounding that ranks ties, and so gives scores that say nothing a correlation."""
    _, bank = make_bank(U=500)
    alike = figures.lds({"a": np.full((6, 500), 0.1)}, bank, resamples=20)
    assert (alike.by_query["a"] == 0).all() and (alike.resampled["a"] == 0).all()
    counts = np.random.default_rng(0).integers(1, 4, (6, 500))
    sums = figures.predictions(counts / 10, bank.removed_MxU)
    np.testing.assert_allclose(sums, bank.removed_MxU @ counts.T / 10, rtol=1e-12)
    for of_query, of_units in zip(sums.T, counts, strict=True):
        made_of = [tuple(np.bincount(of_units[r], minlength=4)) for r in bank.removed_MxU]
        assert len(set(of_query)) <= len(set(made_of)) < len(made_of)
    assert figures.predictions(np.zeros((1, 500)), bank.removed_MxU).max() == 0


def test_one_retraining_has_no_lds():
    scores, bank = make_bank(M=1)
    with pytest.raises(ValueError, match="the bank has 1; give two subsets or more"):
        figures.lds({"a": scores}, bank)
