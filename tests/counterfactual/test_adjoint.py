"""The surrogate adjoint, against reverse mode where the two must agree, and by a dense matrix."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from tda.counterfactual import adjoint, metagradients
from tda.counterfactual.example_gradients import as_rows, by_path
from tda.counterfactual.in_run import in_run
from tda.counterfactual.training import (
    Training,
    sum_by_unit,
    units_of_tokens,
    with_plain_attention,
)
from tda.gradients import fitted_curvature, kronecker, sampled_labels
from tda.gradients.sites import find_sites
from tda.training import optimizer
from tests.counterfactual.world import (
    LAYOUT,
    PASSAGES,
    exact_scores,
    make_queries,
    make_reverse,
    make_training,
)


def make_recursion(**changes):
    rate = optimizer.schedule("cosine", 1e-2, make_training().steps, 2, 0.1)
    return adjoint.AdamRecursion(rate, **({"eps_root": 1e-5} | changes))


@pytest.mark.slow
def test_one_step_without_second_moments_is_exact(tmp_path):
    """With b2 = 1 − tiny and one step the Hessian has no part: the surrogate is the derivative."""
    training = make_training()
    # At the first step ν̂ = g² moves with the data; a large eps_root takes that path away.
    tx = optimizer.make_optimizer("adam", 0.1, eps_root=1e4, clip=None)
    one = Training(
        training.model_fn,
        training.params,
        tx,
        training.table,
        list(LAYOUT.batches(training.table))[:1],
    )
    exact = metagradients.Reverse(one, make_queries(), tmp_path)
    recursion = adjoint.AdamRecursion(lambda step: 0.1, clip=0.0, eps_root=1e4)
    scores = adjoint.surrogate(exact, recursion, None)
    unit_C, _ = units_of_tokens(one.table, range(PASSAGES))
    expected = sum_by_unit(exact.by_token(np.arange(5)), unit_C, PASSAGES)
    assert np.abs(expected).max() > 0
    np.testing.assert_allclose(scores, expected, atol=2e-4 * np.abs(expected).max())


def test_the_recursion_is_that_of_a_dense_matrix():
    """By hand, in float64, for one query: clipping, momentum, corrections and H̄ u."""
    rng = np.random.default_rng(0)
    P, B, steps = 6, 3, 2
    fisher = rng.normal(size=(4, P))
    G, nu = rng.normal(size=(steps, B, P)), rng.random((steps, P))
    r = make_recursion(clip=0.5, weight_decay=0.1, eps=1e-3)
    hessian = adjoint.mean_fisher(jnp.asarray(fisher, jnp.float32))
    theta, mu = rng.normal(size=P), np.zeros(P)
    ours = jnp.asarray(theta[None], jnp.float32), jnp.asarray(mu[None], jnp.float32)
    for t in reversed(range(steps)):
        rate, tokens = 0.3 + t, 7.0
        norm = np.linalg.norm(G[t].sum(0) / tokens)
        arrays = [jnp.asarray(x, jnp.float32) for x in (norm, nu[t], t, rate)]
        *ours, u_of_step = adjoint._step_back(*ours, *arrays, recursion=r)
        ours[0] = ours[0] + hessian({}, {}, u_of_step)
        D = np.diag(1 / (np.sqrt(nu[t] / (1 - r.b2 ** (t + 1)) + r.eps_root) + r.eps))
        mu = mu - rate / (1 - r.b1 ** (t + 1)) * D @ theta
        clip = min(1, 0.5 / norm)
        u = (1 - r.b1) * clip * mu
        theta = (1 - rate * 0.1) * theta + fisher.T @ fisher @ u
        mu = r.b1 * mu
        np.testing.assert_allclose(u_of_step[0], u, rtol=1e-4)
    np.testing.assert_allclose(ours[0][0], theta, rtol=1e-4)
    np.testing.assert_allclose(ours[1][0], mu, rtol=1e-4)


def test_products_with_ekfac_are_those_of_its_matrices():
    """Guards: the inverse in place of F; means over passages where the recursion is per token."""
    training = make_training()
    model = training.model_fn.merge(training.params)
    chosen = kronecker.factored(find_sites(model))
    rows = np.arange(PASSAGES)

    def batches(stage):
        return sampled_labels.batches(training.table, rows, labels="sampled", layout=LAYOUT)

    curvature = fitted_curvature.fit(model, chosen, batches, "sampled")
    size = sum(x.size for x in jax.tree.leaves(training.params))
    u_QxP = np.random.default_rng(0).normal(size=(2, size)).astype(np.float32)
    product = adjoint.ekfac(chosen, curvature, tokens=7.0)({}, training.params, u_QxP)
    u, products = (by_path(x, training.params) for x in (u_QxP, product))
    sites = {s.path: s for s in chosen}
    assert 0 < len(sites) < len(u)
    for path, x in u.items():
        if path not in sites:
            assert not np.asarray(products[path]).any()
            continue
        c, matrix = curvature[path], jax.vmap(sites[path].matrix)
        U = np.asarray(matrix(x), np.float64)
        expected = c.left @ ((np.swapaxes(c.left, -1, -2) @ U @ c.right) * c.values / 7)
        expected = expected @ np.swapaxes(c.right, -1, -2)
        atol = 1e-5 * np.abs(expected).max()
        np.testing.assert_allclose(matrix(products[path]), expected, rtol=0, atol=atol)


@pytest.mark.slow
def test_it_is_close_to_reverse_mode_with_each_hessian():
    training, reverse = make_training(), make_reverse()
    unit_C, _ = units_of_tokens(training.table, range(PASSAGES))
    exact = sum_by_unit(exact_scores(), unit_C, PASSAGES)
    rows, final = np.arange(PASSAGES), reverse.final_state()["params"]
    batches = sampled_labels.batches(training.table, rows, labels="sampled", layout=LAYOUT)
    fisher = adjoint.fisher_rows(training.model_fn, final, batches, limit=10**6)
    plain_fn = with_plain_attention(training.model_fn, training.params)
    hessians = None, adjoint.mean_fisher(fisher), adjoint.batch_gauss_newton(plain_fn)
    plain, mean, batch = (adjoint.surrogate(reverse, make_recursion(), h) for h in hessians)
    for scores in (plain, mean, batch):
        assert np.corrcoef(scores.ravel(), exact.ravel())[0, 1] > 0.85
    assert np.abs(mean - plain).max() > 1e-2 * np.abs(plain).max()


@pytest.mark.slow
def test_in_run_influence_is_the_sum_of_each_steps_products():
    """Against a loop over steps and passages with the reference's gradients."""
    training, queries, reverse = make_training(), make_queries(), make_reverse()
    recursion, expected = make_recursion(), np.zeros((2, 5, PASSAGES))
    for step, before, after in reverse.backwards():
        batch = training.batches[step]
        asked = np.asarray(as_rows(queries.all_gradients(before["params"])), np.float64)
        rows = as_rows(training.example_gradients(before["params"], batch.arrays))
        rows = np.asarray(rows, np.float64)[: len(batch.rows)]
        nu = np.asarray(adjoint.second_moment(after), np.float64)
        P = 1 / (np.sqrt(nu / (1 - 0.99 ** (step + 1)) + 1e-5) + 1e-8)
        rate = float(recursion.learning_rate(step)) / batch.arrays["weights"].sum()
        for i, scale in enumerate((P, 1.0)):
            expected[i][:, batch.rows] += rate * (asked * scale) @ rows.T
    for products, is_preconditioned in zip(expected, (True, False), strict=True):
        scores = in_run(reverse, recursion, is_preconditioned)
        np.testing.assert_allclose(scores, products, atol=1e-4 * np.abs(products).max())


def test_too_large_a_fisher_matrix_is_refused():
    training = make_training()
    batches = sampled_labels.batches(training.table, np.arange(8), labels="sampled", layout=LAYOUT)
    with pytest.raises(ValueError, match="sample fewer passages"):
        adjoint.fisher_rows(training.model_fn, training.params, batches, limit=10**4)
