"""Approximates a positive matrix by a sum of a few outer products, close in relative terms.

A corrected gradient g ∘ S has entries of unit variance, so the error of an approximation Ŝ is
Σ (1 − Ŝ/S)², not Σ (S − Ŝ)², which the few largest entries of S would dominate. Minimising it is a
weighted low-rank approximation (Srebro & Jaakkola 2003): given one side's vectors, every row of the
other side is a small least-squares problem of its own.
"""

import functools

import jax
import jax.numpy as jnp

_OVERSAMPLE = 8
# Measured: three are enough for a trained model's moments; heavier tails take more.
_SWEEPS = 8


def product(left, right) -> jax.Array:
    """Returns Σ_r left_r right_rᵀ: float32 [(L,) M, N] of [(L,) R, M] and [(L,) R, N]."""
    return jnp.einsum("...rm,...rn->...mn", left, right, precision="highest")


@functools.partial(jax.jit, static_argnames=("rank", "sweeps"))
@jax.default_matmul_precision("highest")
def approximate(scale, left, right, rank: int, sweeps: int = _SWEEPS):
    """Returns the factors of Ŝ = Σ_r û_r v̂_rᵀ with a small relative error Σ (1 − Ŝ/S)².

    S is divided by the outer product left·rightᵀ, which makes its entries about 1 (K); the start is
    a truncated SVD of K, by subspace iteration; then `sweeps` times each side is solved for exactly
    with weights 1/K². A sweep that does not lower the error is discarded.

    With rank ≥ min(M, N) the result is exact. Ŝ is not constrained to be positive: where S is far
    below its neighbours, entries of the wrong sign are possible.

    The layers of a stack are approximated one after the other: besides the arguments and results,
    this takes memory for a few arrays of one layer's [M, N] and for (M + N) rank² numbers. A sweep
    costs about 4 M N rank² operations.

    Args:
        scale: S, float32 [(L,) M, N], all above 0.
        left, right: a rank-one approximation of S, float32 [(L,) M] and [(L,) N], all above 0.
        rank: R, at least 1.
        sweeps: passes of alternating least squares.

    Returns:
        û, float32 [(L,) R, M], and v̂, float32 [(L,) R, N], with R no more than min(M, N).
    """
    M, N = scale.shape[-2:]
    if rank >= min(M, N):
        # Unit vectors on the short side: exact, whatever the rounding of a decomposition.
        ones = jnp.broadcast_to(jnp.eye(min(M, N)), (*scale.shape[:-2], *[min(M, N)] * 2))
        return (ones, scale) if M <= N else (jnp.swapaxes(scale, -1, -2), ones)

    def approximate_layer(layer):
        S, left, right = layer
        K = S / (left[:, None] * right[None, :])
        u, v = _alternate(K, *_start(K, rank), sweeps)
        return (u * left[:, None]).T, (v * right[:, None]).T

    arrays = scale, left, right
    return approximate_layer(arrays) if scale.ndim == 2 else jax.lax.map(approximate_layer, arrays)


def _start(K, rank: int):
    """Returns the truncated SVD of K after clipping its largest entries: [M, R] and [N, R]."""
    # An SVD would fit an entry far above the others, though its relative error is 1 at most.
    typical = jnp.mean(1.0 / K) / jnp.mean(jnp.square(1.0 / K))
    K = jnp.minimum(K, 3.0 * typical)
    width = min(rank + _OVERSAMPLE, *K.shape)
    Q = jnp.linalg.qr(K @ jax.random.normal(jax.random.key(0), (K.shape[1], width)))[0]
    for _ in range(4):
        Q = jnp.linalg.qr(K @ (K.T @ Q))[0]
    QK = Q.T @ K
    # Ascending eigenvalues: the last vectors are the leading ones.
    vectors = jnp.linalg.eigh(QK @ QK.T)[1][:, -rank:]
    return Q @ vectors, QK.T @ vectors


def _alternate(K, u, v, sweeps: int):
    def error(u, v):
        return jnp.sum(jnp.square(1.0 - (u @ v.T) / K))

    def sweep(best, _):
        u, v, e = best
        u, v = _solve(K, u, v)
        v, u = _solve(K.T, v, u)
        new = error(u, v)
        # Also false if the solution has NaNs, so these are discarded too.
        improves = new < e
        return jax.tree.map(lambda a, b: jnp.where(improves, a, b), (u, v, new), best), None

    return jax.lax.scan(sweep, (u, v, error(u, v)), None, length=sweeps)[0][:2]


def _solve(K, u, v):
    """Returns the u that minimises Σ ((K − u vᵀ)/K)² for an orthonormal v, and that v."""
    rank = v.shape[1]
    v, triangular = jnp.linalg.qr(v)
    u = u @ triangular.T
    # Solved for the change of u, so that no digits are lost where u is nearly right already.
    residual = (1.0 - (u @ v.T) / K) / K
    pairs = (v[:, :, None] * v[:, None, :]).reshape(-1, rank * rank)
    normal = (jnp.square(1.0 / K) @ pairs).reshape(-1, rank, rank)
    size = jnp.trace(normal, axis1=1, axis2=2)[:, None, None] / rank
    # Rows are normalised and regularised: with tiny weights, rounding errors would dominate.
    normal = normal / size + 1e-6 * jnp.eye(rank)
    change = jnp.linalg.solve(normal, (residual @ v)[:, :, None] / size)
    return u + change[:, :, 0], v
