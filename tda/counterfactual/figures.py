"""Figures of methods against a bank: LDS with intervals, ceilings, QLD, and metasmoothness.

LDS (Park et al. 2023): for each query, Spearman's correlation over the sets S of removed units
between Σ_{i∈S} τ_i, which a method predicts, and how much the query's loss rose; then the mean
over queries. Scores τ are positive for units that lower the loss.
"""

import dataclasses
import itertools

import numpy as np

from tda.counterfactual.bank import Bank
from tda.evaluation import ranking
from tda.evaluation.statistics import Interval, interval_of_draws
from tda.runtime import progress


def spearman(a: np.ndarray, b: np.ndarray) -> np.ndarray:
    """Returns Spearman's correlation of each column of two arrays, float64 […, Q].

    A constant column has the correlation 0, as a method without information on the query; a column
    with a value that is not finite has NaN.

    Args:
        a, b: [M, …, Q]; axes of length 1 between M and Q are repeated.
    """
    ones_M = np.ones(len(a), np.int64)
    out = _correlations(_Columns(a).ranks(ones_M), _Columns(b).ranks(ones_M), ones_M)
    return np.where(np.isfinite(a).all(axis=0) & np.isfinite(b).all(axis=0), out, np.nan)


class _Columns:
    """Columns of an array, sorted once for the ranks of any draws of its rows.

    Args:
        x: [M, …]; a column with a value that is not finite is taken as constant.
    """

    def __init__(self, x: np.ndarray):
        x = np.where(np.isfinite(x).all(axis=0), x, 0.0)
        self._order = np.argsort(x, axis=0)
        values = np.take_along_axis(x, self._order, axis=0)
        places = np.arange(len(x) + 1).reshape(-1, *[1] * (x.ndim - 1))
        edges = np.ones((1, *x.shape[1:]), bool)
        begins = np.concatenate([edges, values[1:] != values[:-1], edges])
        # Of each row: how many sorted rows are below its ties, and how many are not above them.
        below = np.maximum.accumulate(np.where(begins, places, 0), axis=0)[:-1]
        ends = np.where(begins, places, len(x))[::-1]
        up_to = np.minimum.accumulate(ends, axis=0)[::-1][1:]
        self._below, self._up_to = np.empty_like(self._order), np.empty_like(self._order)
        np.put_along_axis(self._below, self._order, below, axis=0)
        np.put_along_axis(self._up_to, self._order, up_to, axis=0)

    def ranks(self, count_M: np.ndarray) -> np.ndarray:
        """Returns the rows' ranks less their mean, where row m is there `count_M[m]` times."""
        drawn = np.zeros((len(self._order) + 1, *self._order.shape[1:]), np.int64)
        np.cumsum(count_M[self._order], axis=0, out=drawn[1:])
        low, high = (np.take_along_axis(drawn, x, axis=0) for x in (self._below, self._up_to))
        return (low + high - count_M.sum()) / 2


def _correlations(a: np.ndarray, b: np.ndarray, count_M: np.ndarray) -> np.ndarray:
    """Returns the correlations of centred columns whose rows are there several times."""
    product, squares_a, squares_b = (
        np.tensordot(count_M, x, axes=1) for x in (a * b, a * a, b * b)
    )
    size = np.sqrt(squares_a * squares_b)
    return np.divide(product, size, out=np.zeros_like(product), where=size > 0)


def predictions(scores_QxU: np.ndarray, removed_MxU: np.ndarray) -> np.ndarray:
    """Returns Σ_{i∈S} τ_i of each set of removed units: float64 [M, Q].

    Sets whose scores are the same in another order have the same sum, to the last bit.

    Raises:
        ValueError: the scores are not of these units.
    """
    if scores_QxU.shape[1] != removed_MxU.shape[1]:
        raise ValueError(
            f"the scores are of {scores_QxU.shape[1]} units and the bank of {removed_MxU.shape[1]}"
            "; give a score for every unit of the bank"
        )
    scores_QxU = np.asarray(scores_QxU, np.float64)
    # In whole numbers, whose sums are exact in float64 below 2⁵³: rounding would rank sets that
    # tie, and give a method whose scores are all alike a correlation by chance.
    largest_Q = np.abs(scores_QxU).max(axis=1, initial=0.0)
    power_Qx1 = 52 - np.frexp(largest_Q * scores_QxU.shape[1])[1][:, None]
    whole_QxU = np.rint(np.ldexp(scores_QxU, power_Qx1))
    return np.ldexp(removed_MxU.astype(np.float64) @ whole_QxU.T, -power_Qx1.T)


@dataclasses.dataclass(frozen=True)
class Lds:
    """LDS of several methods on one bank, with the resamples for intervals."""

    by_query: dict[str, np.ndarray]
    """Of each method, the correlation of each query, float64 [Q]."""
    resampled: dict[str, np.ndarray]
    """Of each method, means over resampled queries and subsets, float64 [resamples]."""
    resampled_with: dict[tuple[str, str], np.ndarray] = dataclasses.field(default_factory=dict)
    """The same of a method and another one that was measured on other queries: means of the first
    over the queries measured in both."""

    def interval(self, name: str) -> Interval:
        """Returns the mean over queries and its 95 % interval."""
        return interval_of_draws(self.by_query[name], self.resampled[name])

    def difference(self, name: str, other: str) -> Interval:
        """Returns the difference of two methods over the queries measured in both, and its 95 %
        interval."""
        difference_Q = self.by_query[name] - self.by_query[other]
        drawn_R, others_R = (
            self.resampled_with.get((a, b), self.resampled[a])
            for a, b in ((name, other), (other, name))
        )
        return interval_of_draws(difference_Q, drawn_R - others_R)


def lds(
    scores: dict[str, np.ndarray],
    bank: Bank,
    resamples: int = 1000,
    seed: int = 0,
    changes_MxQ: np.ndarray | None = None,
) -> Lds:
    """Returns the LDS of methods on a bank.

    For intervals, both subsets and queries are drawn with repetition; all methods see the same
    draws, so that their differences are paired.

    Args:
        scores: of each method, τ of every query and unit, [Q, U].
        bank: the bank.
        resamples: the number of draws.
        seed: the seed of the draws.
        changes_MxQ: how much losses rose; by default those of the bank.

    Raises:
        ValueError: the bank has fewer than two subsets, which no correlation can be taken over.
    """
    changes_MxQ = bank.changes_MxQ if changes_MxQ is None else changes_MxQ
    if len(changes_MxQ) < 2:
        raise ValueError(
            f"LDS is a correlation over retrainings, and the bank has {len(changes_MxQ)}; give two "
            "subsets or more (counterfactual.subsets)"
        )
    predicted_MxNxQ = np.stack([predictions(x, bank.removed_MxU) for x in scores.values()], axis=1)
    by_query_NxQ = spearman(predicted_MxNxQ, changes_MxQ[:, None])
    is_measured_NxQ = np.isfinite(by_query_NxQ)
    # Nearly always one: all methods are measured on the same queries.
    sets_SxQ, set_N = np.unique(is_measured_NxQ, axis=0, return_inverse=True)
    columns = _Columns(predicted_MxNxQ), _Columns(changes_MxQ[:, None])
    M, Q = changes_MxQ.shape
    rng = np.random.default_rng(seed)
    means_SxRxN = np.full((len(sets_SxQ), resamples, len(scores)), np.nan)
    with progress.bar(resamples, "intervals", "resample") as bar:
        for r in range(resamples):
            subsets, queries = rng.integers(M, size=M), rng.integers(Q, size=Q)
            count_M = np.bincount(subsets, minlength=M)
            predicted, changes = (x.ranks(count_M) for x in columns)
            correlations_NxQ = _correlations(predicted, changes, count_M)[:, queries]
            for set_Q, means_RxN in zip(sets_SxQ, means_SxRxN, strict=True):
                measured = (is_measured_NxQ & set_Q)[:, queries]
                total_N = np.where(measured, correlations_NxQ, 0.0).sum(axis=1)
                np.divide(total_N, measured.sum(axis=1), means_RxN[r], where=measured.any(axis=1))
            bar.update()
    set_of = dict(zip(scores, set_N.ravel().tolist(), strict=True))
    column = {name: n for n, name in enumerate(scores)}
    return Lds(
        dict(zip(scores, by_query_NxQ, strict=True)),
        {name: means_SxRxN[set_of[name], :, column[name]] for name in scores},
        {
            (name, other): means_SxRxN[set_of[other], :, column[name]]
            for name, other in itertools.permutations(scores, 2)
            if set_of[name] != set_of[other]
        },
    )


@dataclasses.dataclass(frozen=True)
class Ceiling:
    """How far reruns with another order of the data agree, and the LDS that this allows."""

    agreement: float
    """r: the correlation between the changes of two orders, mean over queries and pairs of orders;
    NaN if no query was measured in two."""
    one: float
    """√r: the correlation of one run's changes with what is common to all orders, if noise is
    independent: the most that scores can reach that know nothing of the order."""
    mean: float
    """√(kr / (1 + (k − 1) r)): the same for the mean of all k orders (Spearman and Brown)."""
    orders: int
    """k."""


def ceiling(*changes_MxQ: np.ndarray) -> Ceiling:
    """Returns the ceilings of LDS from changes of loss under two or more orders of the data."""
    pairs = itertools.combinations(changes_MxQ, 2)
    r = float(ranking.mean([spearman(*pair) for pair in pairs]))
    positive, k = np.maximum(r, 0.0), len(changes_MxQ)
    of_mean = k * positive / (1 + (k - 1) * positive)
    return Ceiling(r, float(positive**0.5), float(of_mean**0.5), k)


def top_units(scores_QxU: np.ndarray, share: float) -> np.ndarray:
    """Returns each query's own units of the highest scores, bool [Q, U]; at least one."""
    U = scores_QxU.shape[1]
    count = max(1, round(share * U))
    # Among equal scores the lower unit comes first.
    order = np.argsort(-np.asarray(scores_QxU, np.float64), axis=1, kind="stable")[:, :count]
    out = np.zeros(scores_QxU.shape, bool)
    np.put_along_axis(out, order, True, axis=1)
    return out


def metasmoothness(start: np.ndarray, after_h: np.ndarray, after_2h: np.ndarray) -> float:
    """Returns how smoothly parameters depend on the data's weights (2503.13751, Definition 2).

    Args:
        start, after_h, after_2h: the trained parameters, [P], with data weights 1, 1 + h v and
            1 + 2 h v, v normal.

    Returns:
        Σ d / ‖d‖₁ · sign(θ_h − θ_0) · sign(θ_2h − θ_h), d = |θ_2h − θ_0|: near 1 is smooth.
    """
    start, after_h, after_2h = (np.asarray(x, np.float64) for x in (start, after_h, after_2h))
    d = np.abs(after_2h - start)
    agreement = np.sign(after_h - start) * np.sign(after_2h - after_h)
    return float((d * agreement).sum() / d.sum()) if d.sum() else float("nan")
