"""Scores by whole gradients, against the reference's gradients and dense matrices."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from tda.counterfactual import unprojected
from tda.counterfactual.inverse import DampedInverse
from tda.counterfactual.unprojected import GradientScore
from tda.gradients import fitted_curvature, reference, sampled_labels
from tda.gradients.sites import find_sites
from tda.model import functional
from tests.conftest import make_decoder
from tests.counterfactual.world import LAYOUT, PASSAGES, make_queries, make_training

SITE = "layers/mlp/up/kernel"


def gradients_of(table):
    """The reference's gradients of a table's rows by path, [N, …]."""
    by_row, model = {}, make_decoder()
    per_example_gradients = jax.jit(lambda b: reference.per_example_gradients(model, b))
    for batch in LAYOUT.batches(table):
        per_example = per_example_gradients(batch.arrays())
        for i, row in enumerate(batch.rows):
            by_row[int(row)] = {p: np.asarray(g[i], np.float64) for p, g in per_example.items()}
    return {p: np.stack([by_row[r][p] for r in range(len(table))]) for p in by_row[0]}


@pytest.fixture(scope="module")
def scored():
    training, queries = make_training(), make_queries()
    passages, asked = gradients_of(training.table), gradients_of(queries.table)
    rng = np.random.default_rng(0)
    scales = {
        p: jnp.asarray(rng.random(g.shape[1:]) + 0.5, jnp.float32) for p, g in passages.items()
    }
    chosen = [s for s in find_sites(make_decoder()) if s.path == SITE]

    def batches(stage):
        rows = np.arange(PASSAGES)
        return sampled_labels.batches(training.table, rows, labels="sampled", layout=LAYOUT)

    curvature = fitted_curvature.fit(make_decoder(), chosen, batches, "sampled")
    methods = {
        "dot": GradientScore(unprojected.identity),
        "cosine": GradientScore(unprojected.identity, unit_norm=True),
        "one": GradientScore(unprojected.only([SITE])),
        "half": GradientScore(unprojected.times(scales, 0.5)),
        "ekfac": GradientScore(unprojected.ekfac(chosen, curvature)),
    }
    params, layout = training.params, LAYOUT.batches(training.table)
    of_queries = queries.all_gradients(params)
    scores = {
        name: unprojected.score(training, of_queries, params, layout, method)
        for name, method in methods.items()
    }
    return scores, passages, asked, scales, curvature[SITE]


def flat(gradients, change=lambda p, g: g):
    parts = [change(p, g).reshape(len(g), -1) for p, g in gradients.items()]
    return np.concatenate(parts, axis=1)


def assert_close(actual, expected):
    np.testing.assert_allclose(actual, expected, atol=2e-5 * np.abs(expected).max())


def test_dot_and_cosine_are_of_the_reference_gradients(scored):
    scores, passages, asked, *_ = scored
    a, b = flat(asked), flat(passages)
    assert_close(scores["dot"], a @ b.T)
    norms = np.linalg.norm(a, axis=1)[:, None] * np.linalg.norm(b, axis=1)
    assert_close(scores["cosine"], a @ b.T / norms)
    assert_close(scores["one"], flat({SITE: asked[SITE]}) @ flat({SITE: passages[SITE]}).T)


def test_scales_multiply_each_weight(scored):
    scores, passages, asked, scales, _ = scored
    a = flat(asked, lambda p, g: g * np.asarray(scales[p], np.float64))
    assert_close(scores["half"], a @ flat(passages).T)


def test_directions_have_the_order_of_the_parameters():
    """Guards: the order of names, where layers are numbered: 10 before 2."""
    params = {"layers": {i: np.full(2, i, np.float32) for i in range(12)}}
    queries = {p: x[None] for p, x in functional.flat_parameters(params).items()}
    directions = unprojected._directions(GradientScore(unprojected.identity), params, queries)
    np.testing.assert_array_equal(directions[0], np.repeat(np.arange(12), 2))


def test_ekfac_is_a_solve_with_the_dense_matrix(scored):
    """Per layer: F = Σ_ij Λ_ij (q_i ⊗ s_j)(q_i ⊗ s_j)ᵀ, and λ = 0.1 of its mean eigenvalue."""
    scores, passages, asked, _, c = scored
    expected = 0
    for layer in range(2):
        basis = np.kron(c.left[layer], c.right[layer]).astype(np.float64)
        values = c.values[layer].astype(np.float64)
        F = basis @ np.diag(values.ravel()) @ basis.T + 0.1 * values.mean() * np.eye(values.size)
        a, b = (x[SITE][:, layer].reshape(len(x[SITE]), -1) for x in (asked, passages))
        expected = expected + a @ np.linalg.solve(F, b.T)
    assert_close(scores["ekfac"], expected)


def test_a_matrix_without_curvature_is_refused(scored):
    """Guards: 0 / 0 in every score, found when the board is written."""
    c = dataclasses.replace(scored[4], values=np.zeros_like(scored[4].values))
    sites = [s for s in find_sites(make_decoder()) if s.path == SITE]
    with pytest.raises(ValueError, match="has no curvature: all gradients of the sample vanish"):
        unprojected.ekfac(sites, {SITE: c})
    with pytest.raises(ValueError, match="has no curvature"):
        DampedInverse(None, {}, sites, {SITE: c})
    with pytest.raises(ValueError, match="damping=0.0 of EK-FAC must be above 0"):
        unprojected.ekfac(sites, {SITE: scored[4]}, damping=0.0)
