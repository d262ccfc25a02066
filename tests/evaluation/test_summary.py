"""From numbers of queries to metrics, groups and differences, by hand."""

import numpy as np
import pytest

from tda.evaluation import statistics, summary
from tda.retrieval import annotated

NAN = float("nan")


def test_ranking_metrics_are_those_of_the_first_ranks():
    result = summary.rank_values({"all": np.array([1, 20, 0]), "strict": np.array([4, 0, 0])})
    np.testing.assert_array_equal(result["mrr"], [1, 0.05, NAN])
    np.testing.assert_array_equal(result["mrr_at_10"], [1, 0, NAN])
    np.testing.assert_array_equal(result["recall_at_10"], [1, 0, NAN])
    np.testing.assert_array_equal(result["mrr_strict"], [0.25, NAN, NAN])
    assert set(result) == {
        f"{m}{s}" for m in ("mrr", "mrr_at_10", "recall_at_10") for s in ("", "_strict")
    }
    known = summary.restricted(result | {"tail_patch": np.ones(3)}, np.array([0, 1, 1]) > 0)
    np.testing.assert_array_equal(known["mrr_known"], [NAN, 0.05, NAN])
    assert "tail_patch_known" not in known and len(known) == 6


def test_tail_patch_scores_are_means_over_the_first_proponents():
    p = np.full((3, 12, 2), NAN)
    # The target's probability is 0.1 before each step, and rises by 0.01, 0.02, …, 0.12.
    p[0, :, 0], p[0, :, 1] = 0.1, 0.1 + 0.01 * np.arange(1, 13)
    p[1, :2, 0], p[1, :2, 1] = 0.5, [0.6, 0.2]  # a query with two proponents
    # A step by momentum alone raises the first by 0.03; the second's halves.
    control = np.log([[0.1, 0.13], [0.5, 0.25], [NAN, NAN]])
    result = summary.patch_values(np.log(p), control)
    for name, expected in {
        "tail_patch": [0.055, -0.1, NAN],
        "tail_patch_net": [0.025, 0.15, NAN],
        "tail_patch_log_net": [
            np.log(1 + np.arange(1, 11) / 10).mean() - np.log(1.3),
            np.log([1.2, 0.4]).mean() - np.log(0.5),
            NAN,
        ],
        "tail_patch_at_1": [0.01, 0.1, NAN],
        "tail_patch_at_3": [0.02, -0.1, NAN],
        "tail_patch_at_10": [0.055, -0.1, NAN],
        "tail_patch_log_at_1": [np.log(1.1), np.log(1.2), NAN],
        "tail_patch_log_at_3": [np.log([1.1, 1.2, 1.3]).mean(), np.log([1.2, 0.4]).mean(), NAN],
    }.items():
        np.testing.assert_allclose(result[name], expected, rtol=1e-12, err_msg=name)
    few = summary.patch_values(np.log(p[:, :4]), control)
    assert "tail_patch_at_5" not in few and "tail_patch_at_3" in few
    np.testing.assert_allclose(few["tail_patch"], [0.025, -0.1, NAN])


@pytest.fixture
def values():
    rng = np.random.default_rng(0)
    a = {"mrr": rng.random(60), "tail_patch": rng.normal(size=60), "mrr_at_10": rng.random(60)}
    a["tail_patch"][10:] = NAN
    b = {"mrr": a["mrr"] + 0.1 + 0.01 * rng.normal(size=60), "tail_patch": a["tail_patch"] - 1}
    return {"a": a, "b": b, "annotated": {"tail_patch": a["tail_patch"]}}


def test_intervals_by_method_are_those_of_each_alone(values):
    result = summary.intervals(values, resamples=500, seed=2)
    for method, metrics in values.items():
        assert list(result[method]) == list(metrics)
        for name, x in metrics.items():
            (alone,) = statistics.intervals(x[:, None], resamples=500, seed=2)
            got = result[method][name]
            assert (got.mean, got.low, got.high) == pytest.approx(
                (alone.mean, alone.low, alone.high), rel=1e-9
            )
    as_json = summary.as_json(result["a"])
    assert as_json["mrr"] == result["a"]["mrr"].mean
    assert as_json["counts"] == {"mrr": 60, "tail_patch": 10, "mrr_at_10": 60}
    assert as_json["intervals"]["tail_patch"] == [
        result["a"]["tail_patch"].low, result["a"]["tail_patch"].high,
    ]  # fmt: skip
    assert summary.intervals({}, 10, 0) == {}


def test_a_group_is_summarised_by_its_own_queries(values):
    numbers = np.array([0, 1, -1] * 20)
    result = summary.grouped(values, numbers, ["x", "y", "empty"], resamples=500, seed=2)
    assert list(result["a"]) == ["x", "y"] and result["a"]["y"]["n_queries"] == 20
    assert result["a"]["y"]["mrr"] == pytest.approx(values["a"]["mrr"][1::3].mean())
    assert result["b"]["x"]["tail_patch"] == pytest.approx(
        np.nanmean(values["b"]["tail_patch"][::3])
    )
    low, high = result["a"]["y"]["intervals"]["mrr"]
    assert low < result["a"]["y"]["mrr"] < high
    assert "mrr_at_10" not in result["a"]["x"] and "mrr" not in result["annotated"]["x"]
    assert "differences" not in result["a"]["x"]


def test_differences_in_groups_are_those_of_their_queries(values):
    numbers = np.array([0, 1, -1] * 20)
    bootstrap = dict(resamples=500, seed=2)
    result = summary.grouped(values, numbers, ["x", "y"], **bootstrap, differences=True)
    alone = summary.compared(
        {m: {n: x[1::3] for n, x in v.items()} for m, v in values.items()}, **bootstrap
    )
    assert result["b"]["y"]["differences"] == alone["b"]
    assert result["b"]["y"]["differences"] != result["b"]["x"]["differences"]


def test_differences_between_all_methods(values):
    result = summary.compared(values, resamples=500, seed=2)
    d = result["b"]["a"]["mrr"]
    assert d["difference"] == pytest.approx(0.1, abs=0.01) and d["low"] > 0.09 and d["p"] < 0.01
    assert result["a"]["b"]["mrr"] == {
        "difference": -d["difference"], "low": -d["high"], "high": -d["low"], "p": d["p"],
    }  # fmt: skip
    assert result["b"]["a"]["tail_patch"]["difference"] == pytest.approx(-1)
    # Only what both have, and only the headline.
    assert set(result["annotated"]["a"]) == {"tail_patch"}
    assert set(result["a"]["b"]) == {"mrr", "tail_patch"}
    assert summary.compared({"a": values["a"]}, 10, 0) == {"a": {}}


def test_annotated_passages_are_drawn_and_padded():
    correct = [np.array([5, 3, 5]), np.arange(50), np.array([], np.int64)]
    result = annotated.ranked(["q1", "q2", "q3"], correct, k=4)
    assert set(result.proponents[0]) == {3, 5, -1} and result.proponents[0, 2:].tolist() == [-1, -1]
    assert len(set(result.proponents[1].tolist())) == 4 and (result.proponents[1] >= 0).all()
    assert (result.proponents[2] == -1).all()
    assert np.isnan(result.proponent_scores[result.proponents < 0]).all()
    assert result.first_ranks == {} and result.opponents.shape == (3, 0)
    # A query's draw hangs on neither the others nor the order of its labels.
    again = annotated.ranked(["q2"], [np.arange(50)[::-1]], k=4)
    np.testing.assert_array_equal(again.proponents[0], result.proponents[1])
    other = annotated.ranked(["q2"], [np.arange(50)], k=4, seed=1)
    assert set(other.proponents[0]) != set(result.proponents[1])


def test_a_stated_target_is_known_beyond_its_prior_or_guessed():
    beyond = np.array([3.0, 1.0, 0.99, -2.0, np.nan, np.nan, 5.0])
    stated = np.array([1, 1, 1, 1, 1, 0, 0], bool)
    groups = summary.knowledge(stated, beyond)
    names = [summary.KNOWLEDGE[i] if i >= 0 else None for i in groups]
    assert names == ["knows"] * 2 + ["guesses"] * 2 + [None] + ["does not state"] * 2
