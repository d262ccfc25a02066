"""Metagradients: reverse mode, forward mode and central differences agree for every query."""

import jax
import numpy as np
import pytest
from flax import nnx

from tda.counterfactual import metagradients
from tda.counterfactual.training import sum_by_unit, units_of_tokens, with_plain_attention
from tda.model import functional
from tda.runtime import preemption
from tests.counterfactual.world import (
    PASSAGES,
    QUERIES,
    exact_scores,
    make_queries,
    make_reverse,
    make_training,
)

ALL = np.arange(QUERIES)


@pytest.fixture(scope="module")
def reverse():
    return make_reverse()


@pytest.fixture(scope="module")
def scores():
    return exact_scores()


@pytest.fixture(scope="module")
def forward():
    return metagradients.Forward(make_training(), make_queries())


def make_direction(seed=0):
    training = make_training()
    return np.random.default_rng(seed).normal(size=len(training.table.tokens)).astype(np.float32)


def test_reverse_and_forward_mode_agree_for_every_query(scores, forward):
    """Forward mode goes through another attention, and through no backward pass of a step."""
    direction = make_direction()
    slopes = forward.along(direction)
    assert np.abs(slopes).min() > 1e-4
    np.testing.assert_allclose(-scores @ direction, slopes, rtol=1e-3)


def test_central_differences_agree(scores):
    training, queries, direction = make_training(), make_queries(), make_direction()
    h = 0.01
    after = [
        queries(training.run(1 + sign * h * direction)["params"]).astype(float) for sign in (1, -1)
    ]
    slopes = (after[0] - after[1]) / (2 * h)
    np.testing.assert_allclose(-scores @ direction, slopes, atol=1e-3)


@pytest.mark.slow
def test_queries_at_once_have_the_scores_of_each_alone(tmp_path, scores):
    batched = metagradients.Reverse(make_training(), make_queries(), tmp_path, at_once=3)
    together = batched.by_token(ALL)
    np.testing.assert_allclose(together, scores, atol=1e-5 * np.abs(scores).max())


def test_a_killed_pass_continues_backwards(tmp_path, scores, reverse, monkeypatch):
    kept = metagradients.Reverse(make_training(), make_queries(), tmp_path)

    def pull_and_notice(*arguments):
        monkeypatch.setattr(preemption, "is_noticed", lambda: True)
        return reverse._pull(*arguments)

    kept._pull = pull_and_notice
    with pytest.raises(preemption.Preempted):
        kept.by_token(ALL)
    monkeypatch.undo()
    steps = []
    monkeypatch.setattr(
        kept, "_pull", lambda *arguments: steps.append(1) or reverse._pull(*arguments)
    )
    np.testing.assert_array_equal(kept.by_token(ALL), scores)
    # √6 states apart: the killed pass had done two steps of six.
    assert kept.stride == 2 and len(steps) == 4
    assert {p.name for p in tmp_path.iterdir()} == {
        *(f"state-{i:06d}.npz" for i in (0, 2, 4, 6)),
        "pass-queries.npz",
    }
    kept.forget_pass("queries")
    np.testing.assert_array_equal(kept.final_state()["step"], 6)


def test_a_killed_training_goes_on_from_its_last_state(reverse, tmp_path, monkeypatch):
    kept = metagradients.Reverse(make_training(), make_queries(), tmp_path)
    steps, advance = [], kept.training._advance

    def count(*arguments):
        steps.append(1)
        return advance(*arguments)

    monkeypatch.setattr(kept.training, "_advance", count)
    monkeypatch.setattr(preemption, "is_noticed", lambda: len(steps) == 3)
    with pytest.raises(preemption.Preempted):
        kept.keep_states()
    assert {p.name for p in tmp_path.iterdir()} == {"state-000000.npz", "state-000002.npz"}
    monkeypatch.setattr(preemption, "is_noticed", lambda: False)
    final = kept.final_state()
    assert len(steps) == 3 + 4
    kept.keep_states()
    assert len(steps) == 7
    jax.tree.map(np.testing.assert_array_equal, final, reverse.final_state())


def test_tokens_sum_to_passages(scores, forward):
    """A passage's score is the derivative by the weight of all its tokens."""
    table = make_training().table
    unit_C, _ = units_of_tokens(table, range(PASSAGES))
    by_passage = sum_by_unit(scores, unit_C, PASSAGES)
    direction = (unit_C == 5).astype(np.float32)
    slopes = forward.along(direction)
    np.testing.assert_allclose(-by_passage[:, 5], slopes, atol=1e-3 * np.abs(slopes).max())
    # The first token of a sequence is never a target.
    assert not scores[:, table.starts[:-1]].any()


def test_a_jax_that_fails_the_check_is_refused(tmp_path, monkeypatch):
    metagradients.check_batched_second_derivatives()
    real = jax.vmap

    def wrong(function, *arguments, **options):
        return lambda x: real(function, *arguments, **options)(x) * 1.05

    metagradients.check_batched_second_derivatives.cache_clear()
    monkeypatch.setattr(jax, "vmap", wrong)
    with pytest.raises(metagradients.SecondDerivativeError, match="take queries one at a time"):
        metagradients.Reverse(make_training(), make_queries(), tmp_path, at_once=2)
    metagradients.check_batched_second_derivatives.cache_clear()


def test_only_a_decoders_attention_is_replaced():
    model_fn, params = functional.split(nnx.Linear(2, 3, rngs=nnx.Rngs(0)))
    with pytest.raises(TypeError, match="the model is a Linear"):
        with_plain_attention(model_fn, params)
