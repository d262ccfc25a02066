"""Square blocks as a few pairs of vectors: G ≈ Σ_c u_c v_cᵀ, the u_c orthonormal.

The best such sum has G's first singular vectors as u_c, and v_c = Gᵀ u_c. They are found by
orthogonal iteration, whose products every device does well, where its singular value decomposition
of many small matrices may be slow. After three rounds they keep some 99% of what the best would.
"""

import math

import jax
import jax.numpy as jnp
import numpy as np

_ROUNDS = 3
# A vector with less than this share of its norm outside the ones before it is their rounding.
_DEPENDENT = 1e-5


def side(widths: tuple[int, ...], rank: int) -> int:
    """Returns k of blocks of k² numbers each.

    Raises:
        ValueError: the blocks are not squares of one side, or pairs would take no fewer numbers.
    """
    k = math.isqrt(widths[0])
    if len(set(widths)) > 1 or k * k != widths[0]:
        raise ValueError(f"pairs of vectors need square blocks of one side, not {set(widths)}")
    if not 0 < 2 * rank < k:
        raise ValueError(
            f"rank {rank}: {rank} pairs of vectors of {k} numbers take {2 * rank * k} numbers, and "
            f"a whole block {k * k}; use a rank below {k / 2:g}, or 0 for whole blocks"
        )
    return k


def split(x_RxE: jax.Array, k: int, rank: int) -> jax.Array:
    """Returns every block's pairs: float32 [R, blocks · 2 · rank · k], all u_c before all v_c.

    Where a block's own rank is lower, its last vectors are 0.
    """
    G_NxKxK = x_RxE.astype(jnp.float32).reshape(-1, k, k)
    # Squares of very small or large numbers would be 0 or infinite.
    largest_N = jnp.max(jnp.abs(G_NxKxK), axis=(1, 2))
    size_Nx1x1 = jnp.where(largest_N > 0, largest_N, 1)[:, None, None]
    G_NxKxK = G_NxKxK / size_Nx1x1
    v_NxCxK = jnp.broadcast_to(_start(k, rank), (len(G_NxKxK), rank, k))

    def round_(_, v_NxCxK):
        return _orthonormal(_columns(G_NxKxK, _orthonormal(_rows(G_NxKxK, v_NxCxK))))

    v_NxCxK = jax.lax.fori_loop(0, _ROUNDS, round_, v_NxCxK)
    u_NxCxK = _orthonormal(_rows(G_NxKxK, v_NxCxK))
    v_NxCxK = _columns(G_NxKxK, u_NxCxK) * size_Nx1x1
    return jnp.concatenate([u_NxCxK, v_NxCxK], axis=1).reshape(len(x_RxE), -1)


def join(pairs_RxP: jax.Array, k: int, rank: int) -> jax.Array:
    """Returns the blocks that pairs add up to, float32 [R, E]."""
    u_NxCxK, v_NxCxK = _halves(pairs_RxP, k, rank)
    G_NxKxK = jnp.einsum("nck,ncl->nkl", u_NxCxK, v_NxCxK, precision="highest")
    return G_NxKxK.reshape(len(pairs_RxP), -1)


def join_on_host(pairs_RxP: np.ndarray, k: int, rank: int) -> np.ndarray:
    """Returns the same in NumPy, up to the rounding of sums in another order."""
    u_NxCxK, v_NxCxK = _halves(pairs_RxP, k, rank)
    return (u_NxCxK.swapaxes(1, 2) @ v_NxCxK).reshape(len(pairs_RxP), -1)


def _halves(pairs_RxP, k: int, rank: int):
    pairs_Nx2xCxK = pairs_RxP.reshape(-1, 2, rank, k)
    return pairs_Nx2xCxK[:, 0], pairs_Nx2xCxK[:, 1]


def _start(k: int, rank: int) -> np.ndarray:
    """Returns fixed random signs, float32 [C, k]: Philox's stream is the same everywhere."""
    words = np.random.Philox(key=0).random_raw(-(-rank * k // 64))
    bits = np.unpackbits(words.astype("<u8").view(np.uint8))[: rank * k]
    return bits.reshape(rank, k).astype(np.float32) * 2 - 1


# The default precision would be bfloat16 on TPUs, TF32 on GPUs.
def _rows(G_NxKxK, v_NxCxK):
    return jnp.einsum("nij,ncj->nci", G_NxKxK, v_NxCxK, precision="highest")


def _columns(G_NxKxK, u_NxCxK):
    return jnp.einsum("nij,nci->ncj", G_NxKxK, u_NxCxK, precision="highest")


def _orthonormal(x_NxCxK: jax.Array) -> jax.Array:
    """Makes vectors orthonormal, each less its parts along those before it (Gram and Schmidt)."""

    def add(c, done_NxCxK):
        x_NxK = x_NxCxK[:, c]
        least_Nx1 = _DEPENDENT * jnp.linalg.norm(x_NxK, axis=1, keepdims=True)
        # Twice: the first time leaves parts of the size of its rounding, which may be all of x.
        for _ in range(2):
            part_NxCx1 = jnp.sum(done_NxCxK * x_NxK[:, None], axis=2, keepdims=True)
            x_NxK = x_NxK - jnp.sum(part_NxCx1 * done_NxCxK, axis=1)
        norm_Nx1 = jnp.linalg.norm(x_NxK, axis=1, keepdims=True)
        unit_NxK = jnp.where(norm_Nx1 > least_Nx1, x_NxK / jnp.maximum(norm_Nx1, least_Nx1), 0)
        return done_NxCxK.at[:, c].set(unit_NxK)

    return jax.lax.fori_loop(0, x_NxCxK.shape[1], add, jnp.zeros_like(x_NxCxK))
