"""Refined inverses and Kronecker bases, against dense matrices."""

import functools
import types

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from tda.counterfactual import adjoint, conjugate_gradients, eigenbasis
from tda.counterfactual.inverse import DampedInverse
from tda.gradients import kronecker
from tda.gradients.sites import Site, find_sites
from tests.conftest import make_decoder

V, D, B, T = 7, 4, 6, 5
SITES = [Site(("hidden",), "kernel", D, D), Site(("out",), "kernel", D, V)]


def logits_of(params, tokens_BxT):
    """A model of one hidden layer, through which jax differentiates as it likes."""
    hidden = jnp.tanh(params["table"][tokens_BxT] @ params["hidden"]["kernel"])
    return hidden @ params["out"]["kernel"]


@functools.cache
def problem():
    """A damped inverse, a batch, targets by path, and the dense Σ w Jᵀ (diag p − p pᵀ) J."""
    rng = np.random.default_rng(0)

    def draw(*shape):
        return jnp.asarray(rng.normal(size=shape), jnp.float32)

    params = {"table": draw(V, D), "hidden": {"kernel": draw(D, D)}, "out": {"kernel": draw(D, V)}}
    batch = {"tokens": rng.integers(0, V, (B, T)), "weights": np.ones((B, T), np.float32)}
    # A row of padding is no passage, and a position may not count.
    batch["weights"][5], batch["weights"][0, :3] = 0, 0
    model_fn = types.SimpleNamespace(merge=lambda params: functools.partial(logits_of, params))
    targets = {s.path: draw(3, *s.shape) for s in SITES}
    gradients = {s.path: draw(20, *s.shape) for s in SITES}
    curvature = eigenbasis.fit_shampoo(SITES, lambda: [gradients])
    inverse = DampedInverse(model_fn, params, SITES, curvature)

    jacobian = jax.jacrev(logits_of)(params, batch["tokens"])
    J = {p: np.asarray(x, np.float64).reshape(B * T, V, -1) for p, x in flat(jacobian).items()}
    J = np.concatenate(list(J.values()), axis=-1)
    p = np.asarray(jax.nn.softmax(logits_of(params, batch["tokens"])), np.float64).reshape(-1, V)
    centred = J - np.einsum("tv,tvp->tp", p, J)[:, None]
    H = np.einsum("t,tv,tvp,tvq->pq", batch["weights"].ravel(), p, J, centred)
    return inverse, batch, targets, H


def flat(params):
    return {
        "hidden/kernel": params["hidden"]["kernel"],
        "out/kernel": params["out"]["kernel"],
        "table": params["table"],
    }


def as_rows(tree):
    return np.concatenate([np.asarray(tree[s.path], np.float64).reshape(3, -1) for s in SITES], 1)


def error_of(solution):
    """Relative to (H + D)⁻¹ g in float64; five passages have a scored position."""
    inverse, _, targets, H = problem()
    means = [inverse.curvature[s.path].values.mean() for s in SITES]
    damping = np.repeat(means, [D * D, D * V]) * 0.1
    size = D * D + D * V
    expected = np.linalg.solve(H[:size, :size] / 5 + np.diag(damping), as_rows(targets).T).T
    return np.linalg.norm(as_rows(solution) - expected) / np.linalg.norm(expected)


def test_conjugate_gradients_reach_the_dense_solution():
    inverse, batch, targets, _ = problem()
    start = error_of(inverse.precondition(targets))
    errors = [error_of(inverse.by_conjugate_gradients(targets, batch, n)) for n in (5, 60)]
    assert start > 0.1 and errors[0] < 0.7 * start and errors[1] < 1e-3


def test_astra_comes_near_the_dense_solution_or_says_that_it_diverged():
    inverse, batch, targets, _ = problem()
    start = inverse.precondition(targets)
    residual = jax.tree.map(jnp.subtract, inverse.product(batch, start), targets)
    step = as_rows(inverse.by_astra(targets, [batch], rate=0.1)) - as_rows(start)
    np.testing.assert_allclose(step, -0.1 * as_rows(inverse.precondition(residual)), atol=1e-4)
    solution = inverse.by_astra(targets, [batch] * 400, rate=0.1)
    assert error_of(solution) < 0.2 * error_of(start)
    with pytest.raises(FloatingPointError, match="ASTRA diverged at a rate of 1000.0"):
        inverse.by_astra(targets, [batch] * 30, rate=1e3)


def test_the_batchs_gauss_newton_matrix_is_dense_one_over_its_tokens():
    """Of all parameters, in the order of rows: what the adjoint takes for a step's Hessian."""
    inverse, batch, _, H = problem()
    u = np.random.default_rng(1).normal(size=(2, len(H)))
    product = adjoint.batch_gauss_newton(inverse.model_fn)
    actual = product(batch, inverse.params, jnp.asarray(u, jnp.float32))
    expected = u @ H / batch["weights"].sum()
    np.testing.assert_allclose(actual, expected, atol=1e-5 * np.abs(expected).max())


def test_a_row_stops_where_its_curvature_is_not_positive():
    """Guards: one row's indefinite matrix has no part in another's solution."""
    rng = np.random.default_rng(0)
    root = rng.normal(size=(4, 4))
    positive, indefinite = root @ root.T + np.eye(4), np.diag([1.0, 1.0, 1.0, -5.0])
    A = jnp.asarray(np.stack([positive, indefinite]), jnp.float32)
    target = {"x": jnp.asarray([rng.normal(size=4), [0, 0, 0, 1.0]], jnp.float32)}

    def product(tree):
        return {"x": jnp.einsum("qij,qj->qi", A, tree["x"], precision="highest")}

    solution = conjugate_gradients.solve(
        product, lambda r: r, target, jax.tree.map(jnp.zeros_like, target), 8
    )
    np.testing.assert_allclose(
        solution["x"][0], np.linalg.solve(positive, target["x"][0]), rtol=1e-4
    )
    np.testing.assert_array_equal(solution["x"][1], np.zeros(4))


@pytest.mark.parametrize("path", ["layers/attention/out/kernel", "layers/mlp/up/kernel"])
def test_shampoo_is_a_function_of_the_dense_matrix(path):
    """Factors E[GGᵀ] and E[GᵀG] over two batches, Λ in their basis, and the way back."""
    (site,) = [s for s in find_sites(make_decoder()) if s.path == path]
    rng = np.random.default_rng(0)
    G = rng.normal(size=(6, *site.shape)).astype(np.float32)
    curvature = eigenbasis.fit_shampoo([site], lambda: ({path: x} for x in (G[:4], G[4:])))
    damped = eigenbasis.apply(
        [site], curvature, lambda c: 1 / kronecker.damped(c, 0.1), {path: jnp.asarray(G)}
    )[path]
    matrices = np.stack([site.matrix(x) for x in G]).astype(np.float64)
    solved = np.stack([site.matrix(x) for x in damped])
    for layer in range(2):
        x = matrices[:, layer]
        left = np.linalg.eigh(np.einsum("bmn,bkn->mk", x, x))[1]
        right = np.linalg.eigh(np.einsum("bmn,bmk->nk", x, x))[1]
        values = ((left.T @ x @ right) ** 2).mean(axis=0)
        basis = np.kron(left, right)
        F = basis @ np.diag(values.ravel()) @ basis.T + 0.1 * values.mean() * np.eye(values.size)
        expected = np.linalg.solve(F, x.reshape(6, -1).T).T
        scale = np.abs(expected).max()
        np.testing.assert_allclose(solved[:, layer].reshape(6, -1), expected, atol=2e-3 * scale)
    with pytest.raises(ValueError, match="give at least one passage"):
        eigenbasis.fit_shampoo([site], lambda: [])
