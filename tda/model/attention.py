"""Causal grouped-query attention, a block of queries at a time.

A block of queries is multiplied with the keys up to its end only, which saves half of the products
of a long sequence. The backward pass recomputes the probabilities from each row's log-sum-exp (Dao
et al. 2022, algorithm 4), so that no [T, T] array outlives its block.
"""

import functools

import jax
import jax.numpy as jnp

# Large enough that exp gives 0, and finite, so that a masked row gives no NaN.
_MASKED = -1e30


def causal_attention(
    q_BxTxHxK, k_BxTxGxK, v_BxTxGxK, scale: float | None = None, window=None, soft_cap=None
):
    """Computes softmax(q kᵀ / √K) v over the positions up to each query's own.

    Vaswani et al. 2017, eq. 1. Scores are float32, whatever the dtype of the arguments.

    Args:
        q_BxTxHxK: queries of H heads.
        k_BxTxGxK, v_BxTxGxK: keys and values of G heads, each shared by H / G heads of queries.
        scale: factor of the scores; None for 1/√K.
        window: number of positions that each query attends to, counting its own; an integer or an
            integer array without axes. None for all.
        soft_cap: c of c·tanh(s / c), applied to every score s before the softmax; None for no cap.

    Returns:
        [B, T, H, K] in the dtype of `v_BxTxGxK`.
    """
    return _split_and_attend(_attend, q_BxTxHxK, k_BxTxGxK, v_BxTxGxK, scale, window, soft_cap)


def plain_attention(
    q_BxTxHxK, k_BxTxGxK, v_BxTxGxK, scale: float | None = None, window=None, soft_cap=None
):
    """Computes the same as `causal_attention`, by operations that jax differentiates itself.

    So derivatives of any order and mode exist (`jax.jvp` refuses functions with a backward pass of
    their own), but the probabilities are kept for the backward pass.
    """

    def attend(soft_cap, *arguments):
        return _forward(soft_cap, *arguments)[0]

    return _split_and_attend(attend, q_BxTxHxK, k_BxTxGxK, v_BxTxGxK, scale, window, soft_cap)


def fused_attention(
    q_BxTxHxK, k_BxTxGxK, v_BxTxGxK, scale: float | None = None, window=None, soft_cap=None
):
    """Computes the same as `causal_attention`, where it can by a kernel that keeps scores on chip.

    That is cuDNN's (Dao et al. 2022): on NVIDIA GPUs, in bfloat16, without window and cap. It has
    derivatives of first order in reverse mode alone. Everywhere else `causal_attention` computes.
    """
    has_kernel = jax.default_backend() == "gpu" and q_BxTxHxK.dtype == jnp.bfloat16
    if not has_kernel or window is not None or soft_cap is not None:
        return causal_attention(q_BxTxHxK, k_BxTxGxK, v_BxTxGxK, scale, window, soft_cap)
    return jax.nn.dot_product_attention(
        q_BxTxHxK, k_BxTxGxK, v_BxTxGxK, scale=scale, is_causal=True, implementation="cudnn"
    )


def _split_and_attend(attend, q_BxTxHxK, k_BxTxGxK, v_BxTxGxK, scale, window, soft_cap):
    B, T, H, K = q_BxTxHxK.shape
    G = k_BxTxGxK.shape[2]
    scale = K**-0.5 if scale is None else scale
    # Queries are scaled, not scores: K numbers for each position instead of T.
    q_BxGxRxTxK = (q_BxTxHxK * scale).reshape(B, T, G, H // G, K).transpose(0, 2, 3, 1, 4)
    k_BxGxTxK, v_BxGxTxK = (jnp.swapaxes(x, 1, 2) for x in (k_BxTxGxK, v_BxTxGxK))
    y_BxGxRxTxK = attend(soft_cap, q_BxGxRxTxK, k_BxGxTxK, v_BxGxTxK, window)
    return y_BxGxRxTxK.transpose(0, 3, 1, 2, 4).reshape(B, T, H, K)


def _blocks(T: int) -> list[tuple[int, int]]:
    """Returns each block's first position and end; a block has 64 positions, 128, or T / 16."""
    # Two to four times as fast as one product at 512 positions (benchmarks/RESULTS.md).
    size = 64 if T <= 128 else max(128, -(-T // 16))
    return [(i, min(i + size, T)) for i in range(0, T, size)]


def _rows(x_BxGxRxTxK, start: int, stop: int):
    """Returns a block's positions of all R heads of a group in a row: [B, G, R·S, K]."""
    B, G, _, _, K = x_BxGxRxTxK.shape
    return x_BxGxRxTxK[:, :, :, start:stop].reshape(B, G, -1, K)


def _products(equation: str, *operands):
    # Sums in float32: a bfloat16 sum of many products loses most of them. Float32 operands are not
    # rounded to TF32 or bfloat16, as accelerators do by default.
    return jnp.einsum(equation, *operands, precision="highest", preferred_element_type=jnp.float32)


def _scores(q_BxGxSxK, k_BxGxTxK, start: int, stop: int, window, soft_cap):
    """Returns scores of a block's rows and the keys up to its end; masked keys score −1e30."""
    scores = _products("bgsk,bgtk->bgst", q_BxGxSxK, k_BxGxTxK[:, :, :stop])
    if soft_cap is not None:
        scores = soft_cap * jnp.tanh(scores / soft_cap)
    # The rows of a group's R heads follow each other, so the block's positions repeat R times.
    position_S = jnp.tile(jnp.arange(start, stop), scores.shape[2] // (stop - start))
    visible = position_S[:, None] >= jnp.arange(stop)
    if window is not None:
        visible &= position_S[:, None] - jnp.arange(stop) < window
    return jnp.where(visible, scores, _MASKED)


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def _attend(soft_cap, q_BxGxRxTxK, k_BxGxTxK, v_BxGxTxK, window):
    return _forward(soft_cap, q_BxGxRxTxK, k_BxGxTxK, v_BxGxTxK, window)[0]


def _forward(soft_cap, q_BxGxRxTxK, k_BxGxTxK, v_BxGxTxK, window):
    R = q_BxGxRxTxK.shape[2]
    outs, log_sums = [], []
    for start, stop in _blocks(q_BxGxRxTxK.shape[3]):
        rows = _rows(q_BxGxRxTxK, start, stop)
        scores = _scores(rows, k_BxGxTxK, start, stop, window, soft_cap)
        largest = jnp.max(scores, axis=-1, keepdims=True)
        weights = jnp.exp(scores - largest)
        total = jnp.sum(weights, axis=-1, keepdims=True)
        p = (weights / total).astype(v_BxGxTxK.dtype)
        y_BxGxSxK = _products("bgst,bgtk->bgsk", p, v_BxGxTxK[:, :, :stop])
        outs.append(_split_heads(y_BxGxSxK.astype(v_BxGxTxK.dtype), R))
        log_sums.append(largest + jnp.log(total))
    y_BxGxRxTxK = jnp.concatenate(outs, axis=3)
    return y_BxGxRxTxK, (q_BxGxRxTxK, k_BxGxTxK, v_BxGxTxK, y_BxGxRxTxK, log_sums, window)


def _split_heads(x_BxGxSxK, R: int):
    """Undoes `_rows`: returns [B, G, R, S / R, K], with the heads on an axis of their own."""
    return x_BxGxSxK.reshape(*x_BxGxSxK.shape[:2], R, -1, x_BxGxSxK.shape[-1])


def _backward(soft_cap, residuals, d_BxGxRxTxK):
    q, k, v, y, log_sums, window = residuals
    R, T = q.shape[2:4]
    # The softmax's backward pass subtracts Σ_t p_st dp_st from each row, which equals ⟨dy, y⟩.
    inner = jnp.sum(_f32(d_BxGxRxTxK) * _f32(y), axis=-1, keepdims=True)
    dq, dk, dv = [], [], []
    for (start, stop), log_sum in zip(_blocks(T), log_sums, strict=True):
        rows = functools.partial(_rows, start=start, stop=stop)
        q_BxGxSxK, d_BxGxSxK = rows(q), rows(d_BxGxRxTxK)
        scores = _scores(q_BxGxSxK, k, start, stop, window, soft_cap)
        p = jnp.exp(scores - log_sum)
        dp = _products("bgsk,bgtk->bgst", d_BxGxSxK, v[:, :, :stop])
        ds = p * (dp - rows(inner))
        if soft_cap is not None:
            # A masked key's score is not the capped one; there p is 0, and the gradient too.
            ds = jnp.where(p > 0, ds * (1 - jnp.square(scores / soft_cap)), 0.0)
        ds = ds.astype(q.dtype)
        dq.append(_split_heads(_products("bgst,bgtk->bgsk", ds, k[:, :, :stop]), R))
        to_all_keys = [(0, 0), (0, 0), (0, T - stop), (0, 0)]
        dk.append(jnp.pad(_products("bgst,bgsk->bgtk", ds, q_BxGxSxK), to_all_keys))
        dv.append(jnp.pad(_products("bgst,bgsk->bgtk", p.astype(v.dtype), d_BxGxSxK), to_all_keys))
    return (
        jnp.concatenate(dq, axis=3).astype(q.dtype),
        sum(dk).astype(k.dtype),
        sum(dv).astype(v.dtype),
        None,
    )


def _f32(x):
    return x.astype(jnp.float32)


_attend.defvjp(_forward, _backward)
