"""Refined inverses and Kronecker bases, against dense matrices."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from tda.counterfactual import conjugate_gradients, eigenbasis
from tda.counterfactual.inverse import DampedInverse
from tda.counterfactual.metagradients import with_plain_attention
from tda.gradients import kronecker
from tda.gradients.sites import find_sites
from tda.model import functional
from tests.conftest import make_decoder
from tests.counterfactual.world import LAYOUT, make_queries, make_training

SITES = ("layers/attention/out/kernel", "layers/mlp/down/kernel")


@functools.cache
def problem():
    """A damped inverse, a batch, the queries' gradients, and the dense H + D by site and layer."""
    training = make_training()
    model, params = make_decoder(), training.params
    chosen = [s for s in find_sites(model) if s.path in SITES]
    rows = np.arange(8)

    def batches():
        return kronecker.batches(training.table, rows, labels="sampled", layout=LAYOUT)

    curvature = eigenbasis.fit_ekfac(model, chosen, batches)
    plain = with_plain_attention(training.model_fn, params)
    inverse = DampedInverse(plain, params, chosen, curvature)
    (batch,) = LAYOUT.batches(training.table, rows)
    gradients = make_queries().all_gradients(params)
    return inverse, batch.arrays(), {p: gradients[p] for p in SITES}


def as_rows(tree):
    return np.concatenate([np.asarray(tree[p], np.float64).reshape(5, -1) for p in SITES], axis=1)


@functools.cache
def dense_solution():
    """(H + D)⁻¹ g in float64, H = Σ_t Jᵀ (diag p − p pᵀ) J of all chosen weights together."""
    inverse, batch, gradients = problem()
    own = {p: functional.flat_parameters(inverse.params)[p] for p in SITES}

    def logits(own):
        params = jax.tree_util.tree_map_with_path(
            lambda path, x: own.get(functional.path_name(path), x), inverse.params
        )
        return inverse.model_fn.merge(params)(batch["tokens"])

    jacobian = jax.jacrev(logits)(own)
    p = np.asarray(jax.nn.softmax(logits(own)), np.float64)
    J = np.concatenate(
        [np.asarray(jacobian[s], np.float64).reshape(*p.shape, -1) for s in SITES], axis=-1
    )
    weights = np.asarray(batch["weights"], np.float64)
    centred = J - np.einsum("btv,btvp->btp", p, J)[:, :, None]
    H = np.einsum("bt,btv,btvp,btvq->pq", weights, p, centred, J, optimize=True) / 8
    damping = []
    for s in SITES:
        per_layer = own[s].size // 2
        for values in inverse.curvature[s].values:
            damping += [0.1 * float(values.mean())] * per_layer
    return np.linalg.solve(H + np.diag(damping), as_rows(gradients).T).T


def error_of(solution):
    expected = dense_solution()
    return np.linalg.norm(as_rows(solution) - expected) / np.linalg.norm(expected)


@pytest.mark.slow
def test_conjugate_gradients_reach_the_dense_solution():
    inverse, batch, gradients = problem()
    start = error_of(inverse.precondition(gradients))
    errors = [error_of(inverse.by_conjugate_gradients(gradients, batch, n)) for n in (20, 200)]
    assert start > 0.5 and errors[0] < 0.5 * start and errors[1] < 2e-3


@pytest.mark.slow
def test_astra_comes_near_the_dense_solution():
    inverse, batch, gradients = problem()
    solution = inverse.by_astra(gradients, [batch] * 200, rate=0.1)
    assert error_of(solution) < 0.2 * error_of(inverse.precondition(gradients))


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
        [site], curvature, lambda c: 1 / eigenbasis.damped(c, 0.1), {path: jnp.asarray(G)}
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
