"""How sure a mean over queries is: bootstrap intervals, paired differences, several seeds.

Queries are drawn anew with repetition (Efron & Tibshirani 1993, chapters 13 and 16); every metric
and every method sees the same draws, so that differences are paired. A query that a metric was not
measured on is NaN there, and the mean is taken over those that were drawn and measured.
"""

import dataclasses

import numpy as np

# Draws are made so many numbers at a time: 32 MiB of float64.
_CHUNK = 1 << 22


@dataclasses.dataclass(frozen=True)
class Interval:
    """A mean and the interval that holds it.

    Attributes:
        mean: over the queries that were measured; NaN where none was.
        low, high: ends of the percentile interval; NaN where fewer than two were measured.
        count: queries that were measured.
    """

    mean: float
    low: float
    high: float
    count: int


@dataclasses.dataclass(frozen=True)
class Difference(Interval):
    """The mean of a paired difference; `p` is two-sided, of the hypothesis that it is zero."""

    p: float = float("nan")


def resampled_means(values_QxM: np.ndarray, resamples: int = 10_000, seed: int = 0) -> np.ndarray:
    """Means over queries that are drawn with repetition: float64 [resamples, M].

    Args:
        values_QxM: a column for each metric; NaN where a query was not measured.
        resamples: how many draws of Q queries.
        seed: of the draws, which are the same for every column.

    Returns:
        The means; NaN where a draw has no measured query.
    """
    values_QxM = np.asarray(values_QxM, np.float64)
    Q, M = values_QxM.shape
    measured_QxM = np.isfinite(values_QxM)
    filled_QxM = np.where(measured_QxM, values_QxM, 0.0)
    complete = measured_QxM.all()
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
        weight = Q if complete else counts_RxQ @ measured_QxM.astype(np.float64)
        with np.errstate(invalid="ignore"):
            out[start : start + R] = (counts_RxQ @ filled_QxM) / weight
    return out


def intervals(
    values_QxM: np.ndarray, level: float = 0.95, resamples: int = 10_000, seed: int = 0
) -> list[Interval]:
    """The mean of each column and its percentile bootstrap interval.

    Args:
        values_QxM: a column for each metric; NaN where a query was not measured.
        level: of the interval, between 0 and 1.
        resamples, seed: see `resampled_means`.

    Raises:
        ValueError: `level` is not between 0 and 1.
    """
    values_QxM = np.asarray(values_QxM, np.float64)
    means, low, high = _percentiles(values_QxM, level, resamples, seed)[:3]
    counts = np.isfinite(values_QxM).sum(axis=0)
    return [
        Interval(float(m), float(a), float(b), int(n))
        for m, a, b, n in zip(means, low, high, counts, strict=True)
    ]


def differences(
    values_QxM: np.ndarray,
    others_QxM: np.ndarray,
    level: float = 0.95,
    resamples: int = 10_000,
    seed: int = 0,
) -> list[Difference]:
    """Paired: the mean of `values − others` of each column, over queries that both measured.

    Args:
        values_QxM, others_QxM: the same queries and metrics of two methods.
        level, resamples, seed: as for `intervals`.

    Returns:
        The differences; `p` is twice the smaller share of draws on one side of zero, each counted
        with one draw more, so that it is never 0 (Davison & Hinkley 1997, section 4.2).

    Raises:
        ValueError: the two differ in shape, or `level` is not between 0 and 1.
    """
    values_QxM, others_QxM = np.asarray(values_QxM, float), np.asarray(others_QxM, float)
    if values_QxM.shape != others_QxM.shape:
        raise ValueError(
            f"paired values must have one shape, not {values_QxM.shape} and {others_QxM.shape}"
        )
    apart_QxM = values_QxM - others_QxM
    means, low, high, drawn = _percentiles(apart_QxM, level, resamples, seed)
    counts = np.isfinite(apart_QxM).sum(axis=0)
    below, above = (drawn <= 0).sum(axis=0), (drawn >= 0).sum(axis=0)
    p = np.minimum(1.0, 2.0 * (1 + np.minimum(below, above)) / (1 + resamples))
    p = np.where(counts < 2, np.nan, p)
    return [
        Difference(float(m), float(a), float(b), int(n), float(x))
        for m, a, b, n, x in zip(means, low, high, counts, p, strict=True)
    ]


def _percentiles(values_QxM, level, resamples, seed):
    if not 0 < level < 1:
        raise ValueError(f"level={level} must be between 0 and 1, such as 0.95")
    drawn = resampled_means(values_QxM, resamples, seed)
    measured = np.isfinite(values_QxM)
    counts = measured.sum(axis=0)
    sums = np.where(measured, values_QxM, 0.0).sum(axis=0)
    means = np.full(counts.shape, np.nan)
    np.divide(sums, counts, out=means, where=counts > 0)
    low, high = np.full(counts.shape, np.nan), np.full(counts.shape, np.nan)
    has_interval = counts > 1
    if has_interval.any():
        tail = (1 - level) / 2
        # A draw that misses every measured query says nothing of the mean.
        low[has_interval], high[has_interval] = np.nanquantile(
            drawn[:, has_interval], [tail, 1 - tail], axis=0
        )
    return means, low, high, drawn


@dataclasses.dataclass(frozen=True)
class Spread:
    """A figure over several training seeds.

    Attributes:
        mean: of the seeds' figures.
        sd: their standard deviation (n − 1 in the denominator); NaN of one seed.
        least, most: the smallest and the largest.
        count: how many seeds.
    """

    mean: float
    sd: float
    least: float
    most: float
    count: int


def across_seeds(figures) -> Spread:
    """Mean and spread of one figure over training seeds.

    Args:
        figures: one number a seed; NaN where a run has no such figure.
    """
    x = np.asarray(figures, np.float64)
    x = x[np.isfinite(x)]
    if not len(x):
        return Spread(*[float("nan")] * 4, 0)
    sd = float(x.std(ddof=1)) if len(x) > 1 else float("nan")
    return Spread(float(x.mean()), sd, float(x.min()), float(x.max()), len(x))
