"""Scores by the methods that need the training, by passage and by token."""

import jax
import numpy as np
import pytest

from tda import loss as losses
from tda.counterfactual import training_scores
from tda.counterfactual.adjoint import AdamRecursion
from tda.counterfactual.loss_products import LossProducts
from tda.counterfactual.training import sum_by_unit, tokens_as_units, units_of_tokens
from tda.counterfactual.training_scores import TITLES, ScoreSettings, TrainingScores
from tda.model import functional
from tda.training import optimizer
from tests.counterfactual.world import LAYOUT, PASSAGES, QUERIES, make_reverse, make_training


def make_scores():
    rate = optimizer.schedule("cosine", 1e-2, make_training().steps, 2, 0.1)
    settings = ScoreSettings(LAYOUT, sample=PASSAGES, fisher=8)
    return TrainingScores(make_reverse(), AdamRecursion(rate, eps_root=1e-5), settings)


def test_products_of_a_token_are_those_of_its_own_loss():
    """Against the gradient of one position's cross-entropy, for every scored position."""
    training = make_training()
    batch, params = training.batches[0], training.params
    size = sum(x.size for x in jax.tree.leaves(params))
    u_QxP = np.random.default_rng(0).normal(size=(3, size)).astype(np.float32)
    products = LossProducts(training, by_token=True)
    sums = products.zeros(3)
    products.add(sums, params, batch, u_QxP, factor=2.0)

    @jax.jit
    def gradient_of(weights):
        def loss(params):
            logits = training.model_fn.merge(params)(batch.arrays["tokens"])
            return losses.cross_entropy(logits, batch.arrays["targets"], weights).sum()

        gradient = functional.flat_parameters(jax.grad(loss)(params))
        return [x.reshape(-1) for x in gradient.values()]

    expected = np.zeros_like(sums)
    for at in zip(*np.nonzero(batch.arrays["weights"]), strict=True):
        weights = np.zeros_like(batch.arrays["weights"])
        weights[at] = 1
        expected[:, batch.places_BxT[at]] = 2 * u_QxP @ np.concatenate(gradient_of(weights))
    assert np.count_nonzero(expected) == 3 * np.count_nonzero(batch.arrays["weights"])
    np.testing.assert_allclose(sums, expected, atol=1e-4 * np.abs(expected).max())


@pytest.mark.slow
@pytest.mark.parametrize("name", TITLES)
def test_scores_of_tokens_sum_to_those_of_their_passages(name):
    scores, table = make_scores(), make_training().table
    if not training_scores.scores_tokens(name):
        with pytest.raises(ValueError, match=f"{name} scores whole passages"):
            scores.compute(name, by_token=True)
        return
    by_token, by_passage = (scores.compute(name, b) for b in (True, False))
    assert by_token.shape == (QUERIES, len(table.tokens))
    assert not by_token[:, ~table.scored].any()
    unit_C, _ = units_of_tokens(table, range(PASSAGES))
    sums = sum_by_unit(by_token, unit_C, PASSAGES)
    np.testing.assert_allclose(sums, by_passage, atol=2e-4 * np.abs(by_passage).max())


def test_every_scored_token_is_a_unit():
    table = make_training().table
    unit_C, names = tokens_as_units(table)
    assert (unit_C[table.starts[:-1]] == -1).all()
    assert sorted(unit_C[unit_C >= 0]) == list(range(len(names)))
    assert len(names) == table.scored.sum()
    third = table.starts[1] + 2
    assert names[unit_C[third]] == f"{table.ids[1]}:2"
