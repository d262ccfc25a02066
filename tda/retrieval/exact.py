"""Exact search: one scan over the store answers every method that shares its gradients."""

import dataclasses
import functools
from collections.abc import Iterable

import jax
import jax.numpy as jnp
import numpy as np

from tda import hessian, store
from tda.retrieval.ranked import Ranked


@dataclasses.dataclass(frozen=True)
class Scorer:
    """score(passage, query) = ⟨N(W g_passage), N(W g_query)⟩.

    Attributes:
        roots: W = R^(−1/2) by block, or None for the identity.
        unit_norm: N divides by the norm (a zero stays zero), else it does nothing.
    """

    roots: list[np.ndarray] | None
    unit_norm: bool


def _encode(x_RxE, roots, unit_norm, bounds):
    if roots is not None:
        x_RxE = hessian.whiten(x_RxE, roots, [slice(a, b) for a, b in bounds])
    if unit_norm:
        norm_R = jnp.linalg.norm(x_RxE, axis=-1, keepdims=True)
        x_RxE = x_RxE / jnp.where(norm_R > 0, norm_R, 1.0)
    return x_RxE


encode = jax.jit(_encode, static_argnames=("unit_norm", "bounds"))


@functools.partial(jax.jit, static_argnames=("unit_norm", "bounds"))
def _scores(queries_QxE, x_RxE, valid_R, roots, unit_norm, bounds):
    """Scores, float32 [Q, R]; NaN for an invalid row."""
    encoded = _encode(jnp.where(valid_R[:, None], x_RxE, 0.0), roots, unit_norm, bounds)
    scores = jnp.matmul(queries_QxE, encoded.T, precision=jax.lax.Precision.HIGHEST)
    return jnp.where(valid_R, scores, jnp.nan)


@functools.partial(jax.jit, static_argnames=("k",))
def _merge(best, scores_QxR, first_row, k):
    """The k largest of those kept and those new, with their rows."""
    kept_scores, kept_rows = best
    rows = first_row + jnp.arange(scores_QxR.shape[1])
    rows_QxR = jnp.broadcast_to(rows, scores_QxR.shape)
    scores_QxR = jnp.where(jnp.isnan(scores_QxR), -jnp.inf, scores_QxR)
    scores = jnp.concatenate([kept_scores, scores_QxR], axis=1)
    rows = jnp.concatenate([kept_rows, rows_QxR], axis=1)
    top_scores, at = jax.lax.top_k(scores, k)
    return top_scores, jnp.take_along_axis(rows, at, axis=1)


def search(
    gradients_QxE: np.ndarray,
    chunks: Iterable[tuple[int, np.ndarray]],
    rows: int,
    slices: list[slice],
    scorers: dict[str, Scorer],
    k: int = 10,
    correct: dict[str, list[np.ndarray]] | None = None,
    read=None,
) -> dict[str, Ranked]:
    """Scores every passage for every query and keeps the k best and the k worst.

    Args:
        gradients_QxE: projected gradients of the queries, float32.
        chunks: (first row, float32 [R, E]) over the whole corpus, in order; rows that the store
            calls invalid are never retrieved.
        rows: C, the number of rows in the corpus.
        slices: where each block stands in a row.
        scorers: the methods, by name.
        k: how many proponents and opponents to keep.
        correct: for each set of labels, the correct rows of each query; their first rank is found.
        read: reads rows by number, float32 [R, E]; needed with `correct`.

    Returns:
        What each method ranks, by its name.
    """
    bounds = tuple((s.start, s.stop) for s in slices)
    k = min(k, rows)
    correct = correct or {}
    count = len(gradients_QxE)
    state = {}
    for name, scorer in scorers.items():
        queries = encode(gradients_QxE, scorer.roots, scorer.unit_norm, bounds)
        empty = (jnp.full((count, k), -jnp.inf), jnp.zeros((count, k), jnp.int32))
        thresholds = {
            label: _best_correct(queries, scorer, bounds, lists, read)
            for label, lists in correct.items()
        }
        above = {label: np.zeros(count, np.int64) for label in correct}
        state[name] = [queries, empty, empty, thresholds, above]
    found = 0
    for first, chunk in chunks:
        valid_R = store.valid(chunk)
        found += int(valid_R.sum())
        x_RxE, valid_R = jnp.asarray(chunk), jnp.asarray(valid_R)
        for name, scorer in scorers.items():
            queries, best, worst, thresholds, above = state[name]
            scores = _scores(queries, x_RxE, valid_R, scorer.roots, scorer.unit_norm, bounds)
            state[name][1] = _merge(best, scores, first, k)
            state[name][2] = _merge(worst, -scores, first, k)
            if correct:
                host = np.asarray(scores)
                for label, lists in correct.items():
                    above[label] += _count_above(host, thresholds[label], lists, first)
    out = {}
    for name in scorers:
        _, best, worst, thresholds, above = state[name]
        ranks = {
            label: np.where(np.isfinite(thresholds[label]), above[label] + 1, 0)
            for label in correct
        }
        # Where fewer than k rows are valid, the rest of the k were never filled.
        out[name] = Ranked(
            np.asarray(best[1], np.int64)[:, :found],
            np.asarray(best[0])[:, :found],
            np.asarray(worst[1], np.int64)[:, :found],
            -np.asarray(worst[0])[:, :found],
            ranks,
        )
    return out


def _best_correct(queries_QxE, scorer, bounds, lists, read) -> np.ndarray:
    """The best score of any correct row, float32 [Q]; −inf where a query has none."""
    best = np.full(len(lists), -np.inf, np.float32)
    wanted = np.unique(np.concatenate([np.asarray(r, np.int64) for r in lists] or [[]]))
    step = max(1, min(4096, 2**26 // queries_QxE.shape[1]))
    for start in range(0, len(wanted), step):
        some = wanted[start : start + step].astype(np.int64)
        rows_RxE = read(some)
        valid_R = store.valid(rows_RxE)
        scores = np.asarray(
            _scores(queries_QxE, rows_RxE, valid_R, scorer.roots, scorer.unit_norm, bounds)
        )
        for q, rows in enumerate(lists):
            at = np.flatnonzero(np.isin(some, rows) & valid_R)
            if len(at):
                best[q] = max(best[q], scores[q, at].max())
    return best


def _count_above(scores_QxR, threshold_Q, lists, first) -> np.ndarray:
    """How many rows that are not correct score at least the threshold (a tie counts against)."""
    stop = first + scores_QxR.shape[1]
    counts = (scores_QxR >= threshold_Q[:, None]).sum(axis=1)
    for q, rows in enumerate(lists):
        rows = np.asarray(rows, np.int64)
        mine = rows[(rows >= first) & (rows < stop)] - first
        # A query without a correct row has a threshold of −inf; its count is not used.
        counts[q] -= (scores_QxR[q, mine] >= threshold_Q[q]).sum()
    return counts
