"""Preconditioned conjugate gradients for several right-hand sides, each with its own steps."""

from collections.abc import Callable

import jax
import jax.numpy as jnp

# Maps trees of arrays [Q, …], row by row: row q of the result depends on row q alone.
Operator = Callable[[dict], dict]


def solve(product: Operator, precondition: Operator, target: dict, start: dict, steps: int) -> dict:
    """Returns x with A x ≈ target, from x = start, after some steps.

    A row stops if its curvature pᵀAp is not positive, by rounding or because A is not positive
    definite: further directions would be of no use. (`jax.scipy.sparse.linalg.cg` would continue.)

    Args:
        product: x ↦ A x, A symmetric.
        precondition: r ↦ M r, M positive definite and near the inverse of A.
        target, start: trees of arrays [Q, …].
        steps: the number of products.
    """

    def step(state, _):
        x, residual, direction, slope_Q, is_running_Q = state
        of_direction = product(direction)
        curvature_Q = inner(direction, of_direction)
        is_running_Q = is_running_Q & (curvature_Q > 0)
        size_Q = jnp.where(is_running_Q, slope_Q / jnp.where(is_running_Q, curvature_Q, 1.0), 0.0)
        x = add(x, size_Q, direction)
        residual = add(residual, -size_Q, of_direction)
        preconditioned = precondition(residual)
        next_Q = inner(residual, preconditioned)
        ratio_Q = next_Q / jnp.where(slope_Q > 0, slope_Q, 1.0)
        direction = add(preconditioned, ratio_Q, direction)
        return (x, residual, direction, next_Q, is_running_Q), None

    residual = jax.tree.map(jnp.subtract, target, product(start))
    direction = precondition(residual)
    slope_Q = inner(residual, direction)
    state = (start, residual, direction, slope_Q, slope_Q > 0)
    return jax.lax.scan(step, state, length=steps)[0][0]


def inner(a: dict, b: dict) -> jax.Array:
    """Returns the inner product of each row of two trees, [Q]."""
    products = jax.tree.map(lambda x, y: jnp.sum((x * y).reshape(len(x), -1), axis=1), a, b)
    return sum(jax.tree.leaves(products))


def add(x: dict, size_Q: jax.Array, direction: dict) -> dict:
    """Returns x + size · direction, row by row."""
    return jax.tree.map(lambda a, d: a + size_Q.reshape(-1, *(1,) * (d.ndim - 1)) * d, x, direction)
