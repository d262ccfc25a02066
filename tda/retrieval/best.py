"""The k best scores of each query as rows stream by; among equal scores the lower row."""

import math

import jax
import jax.numpy as jnp

# Queries whose best are merged at a time; late in a scan few have any news.
_MERGED = 16


def merge(kept, scores_RxQ, valid_R, first, sign: int = 1):
    """The k largest of those kept and those new; among equals the lower row.

    The k largest of a query are in the k groups of rows with the largest maxima, and whether it has
    news is seen from the maxima alone: all scores are looked at once.

    Args:
        kept: scores, float32 [Q, k], falling, and their rows, int32 [Q, k].
        scores_RxQ: those of the new rows.
        valid_R: which rows count.
        first: number of the first new row, above those of all kept.
        sign: −1 keeps the smallest instead, as negated scores.
    """
    (count, k), size = kept[0].shape, min(kept[0].shape[0], _MERGED)
    length = len(valid_R)
    group = _group(length, k)
    # Signed and masked twice, here and where some are looked at, so as not to be written out.
    scores_GxNxQ, valid_GxN = scores_RxQ.reshape(-1, group, count), valid_R.reshape(-1, group)
    maxima_GxQ = jnp.where(valid_GxN[:, :, None], sign * scores_GxNxQ, -jnp.inf).max(axis=1)

    def some(carry):
        (scores_Qxk, rows_Qxk), news_Q = carry
        q = jnp.nonzero(news_Q, size=size, fill_value=count)[0]
        _, chosen = jax.lax.top_k(maxima_GxQ.T.at[q].get(mode="clip"), min(k, length // group))
        # In the order of rows: among equals the first must come first again.
        chosen = jnp.sort(chosen, axis=1)
        new = sign * scores_GxNxQ.at[chosen, :, q[:, None]].get(mode="clip")
        new = jnp.where(valid_GxN[chosen], new, -jnp.inf).reshape(size, -1)
        at = chosen[:, :, None] * group + jnp.arange(group, dtype=chosen.dtype)
        # Those kept stand in front: their rows are lower.
        new = jnp.concatenate([scores_Qxk.at[q].get(mode="clip"), new], axis=1)
        rows = jnp.concatenate([rows_Qxk.at[q].get(mode="clip"), first + at.reshape(size, -1)], 1)
        top, at = jax.lax.top_k(new, k)
        scores_Qxk = scores_Qxk.at[q].set(top, mode="drop")
        rows_Qxk = rows_Qxk.at[q].set(jnp.take_along_axis(rows, at, axis=1), mode="drop")
        return (scores_Qxk, rows_Qxk), news_Q.at[q].set(False, mode="drop")

    news_Q = maxima_GxQ.max(axis=0) > kept[0][:, -1]
    return jax.lax.while_loop(lambda carry: carry[1].any(), some, (kept, news_Q))[0]


def _group(length: int, k: int) -> int:
    """How many rows share a maximum: as many as leave the fewest numbers to look at again."""
    group = 1 << max(0, round(math.log2(length / k) / 2))
    return group if length % group == 0 else 1
