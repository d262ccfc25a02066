"""The k best scores of each query as rows stream by; among equal scores the lower row."""

import math

import jax
import jax.numpy as jnp

# Queries that are merged at a time. Late in a scan few queries have a new row among their best, so
# a larger group would mostly sort unchanged queries.
_MERGED = 16


def merge(best, scores_RxQ, valid_R, first, sign: int = 1):
    """Returns the k largest of the scores so far and the new ones; among equals the lower row.

    The k largest of a query are in the k groups of rows with the largest maxima, and a query
    changes only if a maximum is above its k-th score: each score is read once, for the maxima, and
    few are read again.

    Args:
        best: the k largest scores so far, float32 [Q, k], descending, and their rows, int32 [Q, k].
        scores_RxQ: scores of the new rows.
        valid_R: which of the new rows are valid; the others are left out.
        first: number of the first new row, above all rows so far.
        sign: −1 keeps the smallest instead, as negated scores.
    """
    (count, k), size = best[0].shape, min(best[0].shape[0], _MERGED)
    length = len(valid_R)
    group = _group_rows(length, k)
    # Signed and masked here and again below: XLA fuses both, and stores no second matrix.
    scores_GxNxQ, valid_GxN = scores_RxQ.reshape(-1, group, count), valid_R.reshape(-1, group)
    maxima_GxQ = jnp.where(valid_GxN[:, :, None], sign * scores_GxNxQ, -jnp.inf).max(axis=1)

    def merge_some(carry):
        (scores_Qxk, rows_Qxk), news_Q = carry
        q = jnp.nonzero(news_Q, size=size, fill_value=count)[0]
        _, groups = jax.lax.top_k(maxima_GxQ.T.at[q].get(mode="clip"), min(k, length // group))
        # Groups in the order of their rows, since `top_k` takes the first of equal scores.
        groups = jnp.sort(groups, axis=1)
        new = sign * scores_GxNxQ.at[groups, :, q[:, None]].get(mode="clip")
        new = jnp.where(valid_GxN[groups], new, -jnp.inf).reshape(size, -1)
        places = groups[:, :, None] * group + jnp.arange(group, dtype=groups.dtype)
        # For the same reason the scores so far come first: their rows are lower.
        new = jnp.concatenate([scores_Qxk.at[q].get(mode="clip"), new], axis=1)
        rows = rows_Qxk.at[q].get(mode="clip")
        rows = jnp.concatenate([rows, first + places.reshape(size, -1)], 1)
        top, places = jax.lax.top_k(new, k)
        scores_Qxk = scores_Qxk.at[q].set(top, mode="drop")
        rows_Qxk = rows_Qxk.at[q].set(jnp.take_along_axis(rows, places, axis=1), mode="drop")
        return (scores_Qxk, rows_Qxk), news_Q.at[q].set(False, mode="drop")

    news_Q = maxima_GxQ.max(axis=0) > best[0][:, -1]
    return jax.lax.while_loop(lambda carry: carry[1].any(), merge_some, (best, news_Q))[0]


def _group_rows(length: int, k: int) -> int:
    """Returns how many rows share a maximum, a power of two."""
    # length / g maxima and then k groups of g rows are read: fewest at g = √(length / k).
    group = 1 << max(0, round(math.log2(length / k) / 2))
    return group if length % group == 0 else 1
