"""How sure a mean over queries is: bootstrap intervals, paired differences, several seeds.

Queries are resampled with repetition (Efron & Tibshirani 1993, chapters 13 and 16); every metric
and every method sees the same draws, so that differences are paired. A query that a metric was not
measured on is NaN there, and the mean is taken over those that were drawn and measured.
"""

import dataclasses

import numpy as np

# Draws are made so many numbers at a time: 32 MiB of float64.
_CHUNK = 1 << 22
# Ends of a 95 % percentile interval.
_TAILS = (0.025, 0.975)


@dataclasses.dataclass(frozen=True)
class Interval:
    """A mean and its 95 % interval."""

    mean: float
    """Over the queries that were measured; NaN if none was."""
    low: float
    high: float
    """Ends of the percentile interval; NaN if fewer than two were measured."""
    count: int
    """Queries that were measured."""


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
        # How often each query was drawn: a mean is then a product of matrices.
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
    section 4.2).

    Raises:
        ValueError: the two differ in shape.
    """
    values_QxM, others_QxM = np.asarray(values_QxM, float), np.asarray(others_QxM, float)
    if values_QxM.shape != others_QxM.shape:
        raise ValueError(
            f"paired values must have one shape, not {values_QxM.shape} and {others_QxM.shape}"
        )
    paired, drawn_RxM = _intervals(values_QxM - others_QxM, resamples, seed)
    below_M, above_M = (drawn_RxM <= 0).sum(axis=0), (drawn_RxM >= 0).sum(axis=0)
    p_M = np.minimum(1.0, 2.0 * (1 + np.minimum(below_M, above_M)) / (1 + resamples))
    return [
        Difference(**vars(i), p=float(p) if i.count > 1 else float("nan"))
        for i, p in zip(paired, p_M, strict=True)
    ]


def _intervals(values_QxM, resamples: int, seed: int) -> tuple[list[Interval], np.ndarray]:
    """Returns the interval of each column, and the resampled means."""
    drawn_RxM = resampled_means(values_QxM, resamples, seed)
    out = []
    for x_Q, drawn_R in zip(values_QxM.T, drawn_RxM.T, strict=True):
        measured = x_Q[np.isfinite(x_Q)]
        mean = measured.mean() if len(measured) else np.nan
        # A draw that misses every measured query says nothing of the mean.
        ends = np.nanquantile(drawn_R, _TAILS) if len(measured) > 1 else (np.nan, np.nan)
        out.append(Interval(float(mean), *map(float, ends), len(measured)))
    return out, drawn_RxM


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
