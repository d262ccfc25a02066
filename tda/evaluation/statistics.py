"""The uncertainty of a mean over queries: bootstrap intervals, paired differences, several seeds.

Queries are resampled with repetition (Efron & Tibshirani 1993, chapters 13 and 16); every metric
and every method sees the same draws, so that differences are paired. A query on which a metric was
not measured is NaN, and means are taken over the drawn queries that were measured.
"""

import dataclasses
from collections.abc import Sequence

import numpy as np

# Numbers that are drawn at a time: 32 MiB of float64.
_CHUNK = 1 << 22
# Ends of a 95 % percentile interval.
_TAILS = (0.025, 0.975)


@dataclasses.dataclass(frozen=True)
class Interval:
    """A mean and its 95 % interval."""

    mean: float
    """The mean over the measured queries; NaN if there are none."""
    low: float
    high: float
    """Ends of the percentile interval; NaN if fewer than two were measured."""
    count: int
    """The number of measured queries."""


@dataclasses.dataclass(frozen=True)
class Difference(Interval):
    """The mean of a paired difference; `p` is two-sided, of the hypothesis that it is zero."""

    p: float = float("nan")


def resampled_means(values_QxM: np.ndarray, resamples: int = 10_000, seed: int = 0) -> np.ndarray:
    """Returns means over queries that are drawn with repetition.

    Args:
        values_QxM: a column for each metric; NaN where a query was not measured.
        resamples: how many draws of Q queries, the same for every column.
        seed: seed of the draws.

    Returns:
        The means, float64 [resamples, M]; NaN where a draw has no measured query.
    """
    values_QxM = np.asarray(values_QxM, np.float64)
    Q, M = values_QxM.shape
    measured_QxM = np.isfinite(values_QxM)
    filled_QxM = np.where(measured_QxM, values_QxM, 0.0)
    rng = np.random.default_rng(seed)
    out = np.full((resamples, M), np.nan)
    if not Q:
        return out
    step = max(1, _CHUNK // Q)
    for start in range(0, resamples, step):
        R = min(step, resamples - start)
        # How often each query was drawn, so that all means are one matrix product.
        drawn = rng.integers(Q, size=(R, Q)) + Q * np.arange(R)[:, None]
        counts_RxQ = np.bincount(drawn.ravel(), minlength=R * Q).reshape(R, Q).astype(np.float64)
        weight_RxM = counts_RxQ @ measured_QxM.astype(np.float64)
        # 0 / 0 is NaN where a draw has no measured query.
        with np.errstate(invalid="ignore"):
            out[start : start + R] = (counts_RxQ @ filled_QxM) / weight_RxM
    return out


def intervals(values_QxM: np.ndarray, resamples: int = 10_000, seed: int = 0) -> list[Interval]:
    """Returns each column's mean and percentile bootstrap interval (see `resampled_means`)."""
    return _intervals(np.asarray(values_QxM, np.float64), resamples, seed)[0]


def differences(
    values_QxM: np.ndarray, others_QxM: np.ndarray, resamples: int = 10_000, seed: int = 0
) -> list[Difference]:
    """Returns the mean of `values − others` of each column, over queries measured in both.

    Both arrays have the same queries and metrics. `p` is twice the smaller share of draws on one
    side of zero, each counted with one draw more, so that it is never 0 (Davison & Hinkley 1997,
    section 4.2). A draw without any measured query is on neither side and does not count.
    """
    values_QxM, others_QxM = np.asarray(values_QxM, float), np.asarray(others_QxM, float)
    paired, drawn_RxM = _intervals(values_QxM - others_QxM, resamples, seed)
    below_M, above_M = (drawn_RxM <= 0).sum(axis=0), (drawn_RxM >= 0).sum(axis=0)
    draws_M = np.isfinite(drawn_RxM).sum(axis=0)
    p_M = np.minimum(1.0, 2.0 * (1 + np.minimum(below_M, above_M)) / (1 + draws_M))
    return [
        Difference(**vars(i), p=float(p) if i.count > 1 else float("nan"))
        for i, p in zip(paired, p_M, strict=True)
    ]


def _intervals(values_QxM, resamples: int, seed: int) -> tuple[list[Interval], np.ndarray]:
    """Returns the interval of each column, and the resampled means."""
    drawn_RxM = resampled_means(values_QxM, resamples, seed)
    return list(map(interval_of_draws, values_QxM.T, drawn_RxM.T)), drawn_RxM


def interval_of_draws(values_Q: np.ndarray, drawn_R: np.ndarray) -> Interval:
    """Returns the mean of measured values, and the interval of their means in resamples."""
    measured = values_Q[np.isfinite(values_Q)]
    mean = measured.mean() if len(measured) else np.nan
    # A draw without any measured query has no mean.
    ends = np.nanquantile(drawn_R, _TAILS) if len(measured) > 1 else (np.nan, np.nan)
    return Interval(float(mean), *map(float, ends), len(measured))


@dataclasses.dataclass(frozen=True)
class GroupSum(Interval):
    """A group's sum of scores, averaged over queries, and the sum expected from its size alone."""

    label: str = ""
    size: int = 0
    """Passages of the group."""
    expected: float = float("nan")
    """Its size times the mean score of all passages."""
    p: float = float("nan")
    """Two-sided, of the hypothesis that labels and scores are independent."""


def group_sums(
    scores_QxC: np.ndarray, labels: Sequence[str], resamples: int = 10_000, seed: int = 0
) -> list[GroupSum]:
    """Adds up scores by the labels of their passages.

    A permutation test draws a group's passages anew from all of them: `p` is the share of draws
    whose sum is as far from the expected one, counted with one draw more, so that it is never 0.
    Intervals are over queries (see `intervals`).

    Args:
        scores_QxC: each query's scores of the passages.
        labels: the passages' labels, length C.
        resamples, seed: of the draws, and of those of the intervals.

    Returns:
        The groups, those first whose sum is furthest above the expected one.
    """
    scores_QxC = np.asarray(scores_QxC, np.float64)
    names, group_C = np.unique(np.asarray(labels, str), return_inverse=True)
    sums_QxG = np.stack([np.bincount(group_C, row, len(names)) for row in scores_QxC])
    mean_C = scores_QxC.mean(axis=0)
    size_G = np.bincount(group_C)
    sum_G, expected_G = sums_QxG.mean(axis=0), size_G * mean_C.mean()
    rng, as_far_G = np.random.default_rng(seed), np.zeros(len(names), np.int64)
    # Less a tolerance for rounding: with equal scores every draw counts as equally far.
    distance_G = np.abs(sum_G - expected_G) - 1e-9 * np.abs(mean_C).sum()
    for _ in range(resamples):
        drawn_G = np.bincount(group_C, rng.permutation(mean_C), len(names))
        as_far_G += np.abs(drawn_G - expected_G) >= distance_G
    sums = [
        GroupSum(
            **vars(i),
            label=str(name),
            size=int(n),
            expected=float(e),
            # Nothing is near or far of a sum that is not finite.
            p=(1 + far) / (1 + resamples) if np.isfinite(e) else float("nan"),
        )
        for i, name, n, e, far in zip(
            intervals(sums_QxG, resamples, seed),
            names,
            size_G,
            expected_G,
            as_far_G.tolist(),
            strict=True,
        )
    ]
    return sorted(sums, key=lambda g: g.expected - g.mean)


def across_seeds(figures) -> dict[str, float]:
    """Returns mean and spread of one figure over training seeds.

    Args:
        figures: one number a seed; NaN where a run has no such figure.

    Returns:
        "mean"; "sd", the standard deviation (n − 1 in the denominator), NaN for one seed; "least"
        and "most"; "seeds", how many had the figure. All but the last are NaN if none had it.
    """
    x = np.asarray(figures, np.float64)
    x = x[np.isfinite(x)]
    if not len(x):
        return dict.fromkeys(("mean", "sd", "least", "most"), float("nan")) | {"seeds": 0}
    spread = {"mean": x.mean(), "sd": x.std(ddof=1) if len(x) > 1 else np.nan}
    spread |= {"least": x.min(), "most": x.max()}
    return {name: float(value) for name, value in spread.items()} | {"seeds": len(x)}
