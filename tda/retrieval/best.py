"""The k best scores of each query as rows stream by; among equal scores the lower row."""

import math

import jax
import jax.numpy as jnp

# Queries whose best are merged at a time; late in a scan few have any news.
_MERGED = 16


def merge(kept, scores_QxR, first):
    """The k largest of those kept and those new, with their rows; among equals the lower row."""
    count, k = kept[0].shape
    size = min(count, _MERGED)

    def some(carry):
        (scores_Qxk, rows_Qxk), news_Q = carry
        q = jnp.nonzero(news_Q, size=size, fill_value=count)[0]
        new = scores_QxR.at[q].get(mode="fill", fill_value=-jnp.inf)
        new, at = largest(new, k)
        rows = first + at
        # Those kept stand in front: their rows are lower.
        new = jnp.concatenate([scores_Qxk.at[q].get(mode="clip"), new], axis=1)
        rows = jnp.concatenate([rows_Qxk.at[q].get(mode="clip"), rows], axis=1)
        top, at = jax.lax.top_k(new, k)
        scores_Qxk = scores_Qxk.at[q].set(top, mode="drop")
        rows_Qxk = rows_Qxk.at[q].set(jnp.take_along_axis(rows, at, axis=1), mode="drop")
        return (scores_Qxk, rows_Qxk), news_Q.at[q].set(False, mode="drop")

    news_Q = scores_QxR.max(axis=1) > kept[0][:, -1]
    return jax.lax.while_loop(lambda carry: carry[1].any(), some, (kept, news_Q))[0]


def largest(scores_NxR, k: int):
    """The k largest of each row, falling, and where they stand; among equals the first ones.

    The k largest are in the k groups with the largest maxima, which are quickly found.
    """
    count, length = scores_NxR.shape
    group = 1 << max(0, round(math.log2(length / k) / 2))
    if length % group or length // group <= 2 * k:
        return jax.lax.top_k(scores_NxR, min(k, length))
    groups = scores_NxR.reshape(count, -1, group)
    _, chosen = jax.lax.top_k(groups.max(axis=2), k)
    # In the order of the row: among equals the first must come first again.
    chosen = jnp.sort(chosen, axis=1)
    some = jnp.take_along_axis(groups, chosen[:, :, None], axis=1).reshape(count, -1)
    at = (chosen[:, :, None] * group + jnp.arange(group, dtype=chosen.dtype)).reshape(count, -1)
    top, which = jax.lax.top_k(some, k)
    return top, jnp.take_along_axis(at, which, axis=1)
