"""Summaries of per-query metrics: means, intervals, groups of queries, differences of methods.

A metric is an array with a number for each query, NaN where it was not measured. Each is summarised
by its mean, its bootstrap interval, its mean in each group of queries, and its paired difference to
other methods.
"""

import math
from collections.abc import Mapping, Sequence

import numpy as np

from tda.evaluation import ranking, statistics
from tda.evaluation.tail_patch import change, log_change
from tda.results import KNOWN_BEYOND_PRIOR

CUT = 10
DEPTHS = (1, 3, 5, 10)
# The metrics of comparisons of methods and of groups of queries.
HEADLINE = (
    "mrr",
    "recall_at_10",
    "mrr_strict",
    "recall_at_10_strict",
    "ais_mrr",
    "ais_recall_at_10",
    "ais_precision_at_10",
    "tail_patch",
    "tail_patch_log",
)

# What the model knows of a query, by `knowledge`.
KNOWLEDGE = ("knows", "guesses", "does not state")


def knowledge(is_stated_Q: np.ndarray, beyond_Q: np.ndarray) -> np.ndarray:
    """Returns what the model knows of each query, int64 [Q], as indices into `KNOWLEDGE`, or −1.

    A stated target is known if its log p is at least a nat above its mean log p after prompts about
    other subjects. Otherwise the relation alone suggests it.

    Args:
        is_stated_Q: whether greedy decoding states the target.
        beyond_Q: log p of the target less that mean, in nats; NaN without such prompts (−1).
    """
    states = np.where(beyond_Q >= KNOWN_BEYOND_PRIOR, 0, np.where(np.isnan(beyond_Q), -1, 1))
    return np.where(is_stated_Q, states, 2)


def rank_values(first_ranks: Mapping[str, np.ndarray]) -> dict[str, np.ndarray]:
    """Returns the ranking metrics of each query.

    Args:
        first_ranks: for each set of labels, int [Q], the first correct passage's rank or 0.

    Returns:
        float64 [Q] by name: "mrr" of full ranks, "mrr_at_10" of ranks cut at 10, "recall_at_10";
        those of a set of labels other than "all" end in its name, such as "mrr_strict".
    """
    out = {}
    for label, ranks in first_ranks.items():
        suffix = "" if label == "all" else f"_{label}"
        out[f"mrr{suffix}"] = ranking.reciprocal_ranks(ranks)
        out[f"mrr_at_{CUT}{suffix}"] = ranking.reciprocal_ranks(ranks, CUT)
        out[f"recall_at_10{suffix}"] = ranking.hits(ranks, 10)
    return out


def judged_values(entails_QxK: np.ndarray) -> dict[str, np.ndarray]:
    """Returns the metrics of each query by a judge, who has read only the proponents.

    Args:
        entails_QxK: whether each proponent entails its query, by rank; False where a method found
            fewer.

    Returns:
        float64 [Q] by name: "ais_mrr", 1 over the rank of the first proponent that entails the
        query, or 0 if none does, since the rest of the corpus is not judged; "ais_recall_at_10",
        whether one of the first 10 does; "ais_precision_at_10", the share of the first 10 that do.
    """
    entails_QxK = np.asarray(entails_QxK, bool)
    K = entails_QxK.shape[1]
    # 1/rank is largest for the first one that entails.
    reciprocal_K = 1.0 / np.arange(1, K + 1)
    return {
        "ais_mrr": (entails_QxK * reciprocal_K).max(axis=1, initial=0.0),
        "ais_recall_at_10": entails_QxK[:, :10].any(axis=1).astype(np.float64),
        "ais_precision_at_10": entails_QxK[:, :10].sum(axis=1) / max(1, min(10, K)),
    }


def patch_values(log_p_QxKx2: np.ndarray, control_Qx2: np.ndarray) -> dict[str, np.ndarray]:
    """Returns tail-patch scores of each query: means over its first proponents.

    Args:
        log_p_QxKx2: log-probability of the target before and after one step on each proponent, in
            the order of their ranks; NaN where there is none, or it was not measured.
        control_Qx2: the same for a step with a zero gradient, which only momentum moves.

    Returns:
        float64 [Q] by name: "tail_patch" over the first 10 or fewer, "tail_patch_net", minus the
        control's score, "tail_patch_at_1", …, and the same in log-probability, "tail_patch_log", ….
    """
    out = {}
    K = log_p_QxKx2.shape[1]
    for name, measure in (("tail_patch", change), ("tail_patch_log", log_change)):
        changes_QxK = measure(log_p_QxKx2)
        out[name] = ranking.mean(changes_QxK[:, : DEPTHS[-1]], axis=1)
        out[f"{name}_net"] = out[name] - measure(control_Qx2)
        for k in DEPTHS:
            if k <= K:
                out[f"{name}_at_{k}"] = ranking.mean(changes_QxK[:, :k], axis=1)
    return out


def restricted(values: Mapping[str, np.ndarray], is_known_Q: np.ndarray) -> dict:
    """Returns the ranking metrics of known queries, such as "mrr_known"."""
    return {
        f"{name}_known": np.where(is_known_Q, x, np.nan)
        for name, x in values.items()
        if name.startswith(("mrr", "recall"))
    }


def intervals(
    values: Mapping[str, Mapping[str, np.ndarray]], resamples: int, seed: int
) -> dict[str, dict[str, statistics.Interval]]:
    """Returns means and intervals by method and metric.

    Args:
        values: float64 [Q] by method and metric; the same queries everywhere.
        resamples, seed: see `tda.evaluation.statistics`.
    """
    out: dict = {}
    for method, ms in values.items():
        # The same seed: every method sees the same draws of queries.
        columns_QxM = np.stack(list(ms.values()), axis=1) if ms else np.zeros((0, 0))
        computed = statistics.intervals(columns_QxM, resamples, seed)
        out[method] = dict(zip(ms, computed, strict=True))
    return out


def grouped(
    values: Mapping[str, Mapping[str, np.ndarray]],
    numbers_Q: np.ndarray,
    names: Sequence[str],
    resamples: int,
    seed: int,
    differences: bool = False,
) -> dict[str, dict[str, dict]]:
    """Returns the headline metrics in each group of queries, by method and group.

    Args:
        values, resamples, seed: as for `intervals`.
        numbers_Q: the group of each query, an index into `names`; below 0 for none.
        names: names of the groups; groups without a query are left out.
        differences: whether methods are compared in each group.

    Returns:
        For each method and group {"n_queries", each metric, "counts", "intervals"}, and
        "differences" as `compared` returns them.
    """
    out: dict = {method: {} for method in values}
    for number, group in enumerate(names):
        rows = np.flatnonzero(np.asarray(numbers_Q) == number)
        if not len(rows):
            continue
        group_values = {
            method: {name: x[rows] for name, x in ms.items() if name in HEADLINE}
            for method, ms in values.items()
        }
        for method, group_intervals in intervals(group_values, resamples, seed).items():
            out[method][group] = {"n_queries": len(rows)} | as_json(group_intervals)
        if differences:
            for method, differences_by_method in compared(group_values, resamples, seed).items():
                out[method][group]["differences"] = differences_by_method
    return out


def compared(
    values: Mapping[str, Mapping[str, np.ndarray]], resamples: int, seed: int
) -> dict[str, dict[str, dict[str, dict]]]:
    """Returns paired differences of the headline metrics between all methods.

    Args:
        values, resamples, seed: as for `intervals`.

    Returns:
        For each method, other method and metric {"difference", "low", "high", "p"}: the method's
        figure minus the other's, over queries on which both were measured.
    """
    names = list(values)
    pairs = [
        (a, b, metric)
        for i, a in enumerate(names)
        for b in names[i + 1 :]
        for metric in HEADLINE
        if metric in values[a] and metric in values[b]
    ]
    out: dict = {a: {b: {} for b in names if b != a} for a in names}
    if not pairs:
        return out
    computed = statistics.differences(
        np.stack([values[a][metric] for a, _, metric in pairs], axis=1),
        np.stack([values[b][metric] for _, b, metric in pairs], axis=1),
        resamples,
        seed,
    )
    for (a, b, metric), d in zip(pairs, computed, strict=True):
        if d.count:
            out[a][b][metric] = difference_as_json(d.mean, d.low, d.high, d.p)
            out[b][a][metric] = difference_as_json(-d.mean, -d.high, -d.low, d.p)
    return out


def difference_as_json(
    mean: float, low: float, high: float, p: float = math.nan
) -> dict[str, float | None]:
    """Returns a paired difference, its interval and its p as JSON values, None if not measured."""
    return {"difference": number(mean), "low": number(low), "high": number(high), "p": number(p)}


def as_json(intervals: Mapping[str, statistics.Interval]) -> dict:
    """Returns means and intervals as JSON values.

    Returns:
        Each metric's mean by its name, None if not measured; "counts", the number of queries on
        which each was measured; "intervals", [low, high] if these are two or more.
    """
    out: dict = {name: number(i.mean) for name, i in intervals.items()}
    out["counts"] = {name: i.count for name, i in intervals.items()}
    out["intervals"] = {
        name: [number(i.low), number(i.high)] for name, i in intervals.items() if i.count > 1
    }
    return out


def number(x: float) -> float | None:
    """Returns a number for JSON: None if it is not finite."""
    return float(x) if np.isfinite(x) else None
