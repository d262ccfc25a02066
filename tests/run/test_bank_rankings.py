"""Any run's methods on a bank's board: each by itself, and with the gradients of its training."""

import jax
import numpy as np
import pytest

from tda.encoding.captured import TrainingRows
from tda.gradients import reference
from tda.gradients.projection import DEFAULT_BLOCKS
from tda.methods import GradientKind
from tda.run import bank_rankings, counterfactual, encode, stages, train
from tda.run.run import Run
from tda.run.workdir import Workdir
from tda.training import checkpoint
from tests.run import test_counterfactual


@pytest.fixture(scope="module")
def retrained(tmp_path_factory):
    path = tmp_path_factory.mktemp("bank")
    config = test_counterfactual.make_config(path, methods="captured_plain,bm25")
    config.counterfactual.update(subsets=1, orders=1, own_top=0, epochs=3.0)
    config.projection.blocks = DEFAULT_BLOCKS
    # Scores are held against sums of float32 numbers.
    config.store.dtype = "float32"
    with stages.opened(config, Workdir(path / "w")) as run:
        yield counterfactual.retrain(run)


def expected_scores(run: Run, training) -> np.ndarray:
    """Σ η_t ⟨P of the example's part of step t, P of the query's gradient⟩, [Q, N]."""
    saved = np.array(checkpoint.steps(run.trained.root))
    rate = train.learning_rates(run.config, training.steps)
    kind, states = GradientKind(), []
    training.run(on_step=lambda i, s: states.append(jax.tree.map(np.array, s["params"])))
    expected = np.zeros((len(run.corpus.queries), run.corpus.rows))
    for step, (params, batch) in enumerate(zip(states, training.batches, strict=True)):
        model = training.model_fn.merge(params)
        parts = np.asarray(reference.encode(model, batch.arrays, run.projection(kind)))
        nearest = saved[np.abs(step + 0.5 - saved).argmin()]
        queries = encode.encode_queries(run.at_step(int(nearest)), kind)
        weight = float(rate(step)) / batch.arrays["weights"].sum()
        np.add.at(expected.T, batch.rows, weight * parts[: len(batch.rows)] @ queries.T)
    return expected


@pytest.mark.slow
def test_a_bank_captures_the_gradients_of_its_own_training(retrained):
    run, training = retrained.run, retrained.trainings[0]
    scores = bank_rankings.scores_by(retrained, "captured_plain")
    expected = expected_scores(run, training)
    assert np.abs(expected).max() > 0
    np.testing.assert_allclose(scores, expected, rtol=0, atol=2e-4 * np.abs(expected).max())
    # Nothing of a method's work is left for the next one, which would seem to cost less.
    assert not (retrained.directory / "alone").exists()


@pytest.mark.slow
def test_capturing_leaves_the_bank_training_as_it_is(retrained, tmp_path):
    run = bank_rankings.run_alone(retrained, "captured", Workdir(tmp_path / "w"))
    state = bank_rankings.train_capturing(retrained, run)
    final = retrained.reverse.final_state()
    for ours, theirs in zip(*map(jax.tree.leaves, (state["params"], final["params"])), strict=True):
        np.testing.assert_allclose(ours, theirs, rtol=0, atol=1e-5)
    # Three epochs give a passage three rows.
    layout, seed = run.trained.batches
    training = retrained.trainings[0]
    rows = TrainingRows.of(training.table, layout, training.steps, seed)
    assert np.bincount(rows.sequences).tolist() == [3] * run.corpus.rows


@pytest.mark.slow
def test_a_method_knows_whether_it_needs_captured_gradients(retrained):
    assert bank_rankings.takes_captured(retrained, "captured")
    assert not bank_rankings.takes_captured(retrained, "bm25")
    names = [bank_rankings.name_of(retrained, n) for n in ("captured", "captured_plain", "bm25")]
    assert len(set(names)) == 3
