"""Attribution through a training of one's own model, against trainings without its passages."""

import dataclasses
import json

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import nnx

import tda
from tda.counterfactual import training as training_lib
from tda.counterfactual.training_scores import THROUGH_TRAINING, TITLES
from tda.training.recipe import TrainingRecipe
from tests.conftest import make_decoder
from tests.test_api import QUERIES, TEXTS, batch_of, model, sequences, tokenizer

__all__ = ["model", "tokenizer"]
# All passages are one batch, so that the order of the data does not matter.
RECIPE = TrainingRecipe(learning_rate=3e-3, epochs=6, schedule="linear", warmup=2, eps_root=1e-5)


def trace(model, tokenizer, method="adjoint", **how):
    how = dict(recipe=RECIPE, k=len(TEXTS), quiet=True, method=method) | how
    return tda.trace_training(model, TEXTS, QUERIES, tokenizer=tokenizer, **how)


def scores_of(traced):
    """Scores by query and passage, [Q, N]."""
    by_id = [{p.id: p.score for p in answer.proponents} for answer in traced]
    return np.array([[s[str(i)] for i in range(len(TEXTS))] for s in by_id])


def derivatives(model, tokenizer):
    """−dL/dw by central differences of a training by hand: queries by passages."""
    batch = batch_of(sequences(tokenizer, TEXTS))
    asked = [tokenizer.encode_query(*q[-2:]) for q in QUERIES]
    queries = batch_of([i.tolist() for i, _ in asked], [s for _, s in asked])
    graphdef, start = nnx.split(model)

    def nats(params, batch):
        logits = nnx.merge(graphdef, params)(batch["tokens"])
        by_token = optax.softmax_cross_entropy_with_integer_labels(logits, batch["targets"])
        return (by_token * batch["weights"]).sum(axis=-1)

    rates = [3e-3 * min(step / 2, (6 - step) / 4) for step in range(6)]

    @jax.jit
    def losses_with(weights):
        def loss(params):
            return nats(params, batch) @ weights / batch["weights"].sum()

        tx = optax.chain(optax.clip_by_global_norm(1.0), optax.scale_by_adam(0.9, 0.99, 1e-8, 1e-5))
        params, state = start, tx.init(start)
        for rate in rates:
            updates, state = tx.update(jax.grad(loss)(params), state)
            params = optax.apply_updates(params, optax.tree.scale(-rate, updates))
        return nats(params, queries)

    even, out = jnp.ones(len(TEXTS)), []
    for i in range(len(TEXTS)):
        less, more = (losses_with(even.at[i].add(h)) for h in (-0.01, 0.01))
        out.append((np.asarray(less, np.float64) - more) / 0.02)
    return np.stack(out, axis=1)


def test_metagradients_are_the_derivatives_of_a_training_by_hand(model, tokenizer):
    expected = derivatives(model, tokenizer)
    traced = trace(model, tokenizer, "metagradient")
    assert traced.method == TITLES["metagradient"]
    np.testing.assert_allclose(scores_of(traced), expected, atol=0.01 * np.abs(expected).max())
    for q, answer in enumerate(traced):
        assert (answer.prompt, answer.target) == QUERIES[q][-2:]
        order = np.argsort(-scores_of(traced)[q])
        assert [int(p.id) for p in answer.proponents] == order.tolist()
        assert [int(p.id) for p in answer.opponents] == order[::-1].tolist()
        assert all(p.text == TEXTS[int(p.id)] for p in answer.proponents)


@pytest.mark.slow
@pytest.mark.parametrize("method", [n for n in THROUGH_TRAINING if n != "adjoint_batch"])
def test_every_method_is_close_to_the_derivatives(model, tokenizer, method):
    expected = derivatives(model, tokenizer)
    scores = scores_of(trace(model, tokenizer, method))
    for q in range(len(QUERIES)):
        assert np.corrcoef(scores[q], expected[q])[0, 1] > 0.8


def test_a_directory_keeps_the_training_and_passes(model, tokenizer, tmp_path, monkeypatch):
    """Another method trains no more; other settings or another model do."""
    runs, run = [], training_lib.Training.run

    def watched(self, *args, **how):
        runs.append(how.get("first", 0) == 0 and how.get("stop") is None)
        return run(self, *args, **how)

    monkeypatch.setattr(training_lib.Training, "run", watched)
    first = trace(model, tokenizer, "in_run", directory=tmp_path)
    assert sum(runs) == 1
    again = trace(model, tokenizer, "in_run", directory=tmp_path)
    assert sum(runs) == 1 and scores_of(again).tolist() == scores_of(first).tolist()
    trace(model, tokenizer, "dot_whole", directory=tmp_path)
    longer = [("The town of Norway is " + "the " * 40, "Oslo")]
    how = dict(tokenizer=tokenizer, recipe=RECIPE, directory=tmp_path, quiet=True)
    tda.trace_training(model, TEXTS, longer, method="dot_whole", **how)
    assert sum(runs) == 1
    faster = dataclasses.replace(RECIPE, learning_rate=6e-3)
    trace(model, tokenizer, "dot_whole", directory=tmp_path, recipe=faster)
    assert sum(runs) == 2
    other = nnx.clone(model)
    other.first.bias[...] += 0.1
    trace(other, tokenizer, "dot_whole", directory=tmp_path)
    assert sum(runs) == 3


def test_k_is_the_number_of_passages(model, tokenizer):
    (answer, _) = trace(model, tokenizer, "dot_whole", k=3)
    everything = trace(model, tokenizer, "dot_whole")[0]
    assert answer.proponents == everything.proponents[:3]
    assert answer.opponents == everything.opponents[:3]


def test_the_model_stays_as_it_was(model, tokenizer):
    before = [np.array(x) for x in jax.tree.leaves(nnx.state(model))]
    trace(model, tokenizer, "dot_whole")
    for a, b in zip(before, jax.tree.leaves(nnx.state(model)), strict=True):
        np.testing.assert_array_equal(a, b)


@pytest.mark.slow
def test_the_adjoint_knows_the_recipe(model, tokenizer):
    """Without the clipping its scores would be 49 times the exact ones; without the decay, 4.4."""

    def ratio(**changes):
        recipe = dataclasses.replace(RECIPE, **changes)
        scores = [scores_of(trace(model, tokenizer, n, recipe=recipe)) for n in names]
        return np.linalg.norm(scores[0]) / np.linalg.norm(scores[1])

    names = ("adjoint_none", "metagradient")
    assert 0.7 < ratio(clip=0.01) < 1.4
    assert ratio(weight_decay=100.0) < 1.3 * ratio()


@pytest.mark.parametrize(
    "how, message",
    [
        ({"method": "trackstar"}, "method='trackstar'; give one of metagradient, adjoint"),
        ({"method": ["adjoint"]}, r"method=\['adjoint'\]; give one of"),
        ({"recipe": {"epochs": 1}}, "give a tda.TrainingRecipe"),
        ({"recipe": dataclasses.replace(RECIPE, warmup=9)}, "warmup=9 exceeds steps=6"),
        ({"k": 0}, "k=0"),
        ({"context": 0}, "context=0"),
        ({"directory": ""}, "directory"),
    ],
)
def test_bad_arguments_are_refused_by_name(model, tokenizer, how, message):
    with pytest.raises(ValueError, match=message):
        trace(model, tokenizer, **how)


def test_bad_models_are_refused(model, tokenizer):
    with pytest.raises(ValueError, match="there are no queries"):
        tda.trace_training(model, TEXTS, [], tokenizer=tokenizer)
    half = nnx.clone(model)
    half.first.bias = nnx.Param(jnp.zeros(16, jnp.bfloat16))
    with pytest.raises(ValueError, match="need float32"):
        trace(half, tokenizer)
    decoder = make_decoder(vocab_size=tokenizer.vocab_size, dtype="bfloat16")
    with pytest.raises(ValueError, match="computes in bfloat16"):
        trace(decoder, tokenizer)
    with pytest.raises(TypeError, match="only a Decoder's attention"):
        trace(model, tokenizer, "adjoint_batch")


def test_a_training_that_diverges_is_refused(model, tokenizer):
    wild = dataclasses.replace(RECIPE, learning_rate=1e38)
    with pytest.raises(FloatingPointError, match=r"diverge with learning_rate=1e\+38; lower it"):
        trace(model, tokenizer, "dot_whole", recipe=wild)


def test_metagradients_without_eps_root_name_it(model, tokenizer, tmp_path):
    """√ν of a token that no passage has is 0, where it has no derivative."""
    rough = dataclasses.replace(RECIPE, eps_root=0.0)
    with pytest.raises(FloatingPointError, match="unless eps_root is above 0"):
        trace(model, tokenizer, "metagradient", recipe=rough, directory=tmp_path)
    assert not list(tmp_path.rglob("pass-*"))


@pytest.mark.parametrize(
    "change, message",
    [
        ({"learning_rate": 0.0}, "learning_rate=0.0 of the recipe; give a number above 0"),
        ({"epochs": -1}, "epochs=-1 of the recipe"),
        ({"clip": -1.0}, "clip=-1.0 of the recipe; give a number 0 or more"),
        ({"schedule": "step"}, "unknown schedule 'step'"),
        ({"b1": float("nan")}, "b1=nan"),
        ({"b1": 1}, "b1=1 of the recipe; give a number from 0 to below 1"),
        ({"b2": 1.5}, "b2=1.5 of the recipe"),
        ({"epochs": float("inf")}, "epochs=inf of the recipe; give a number above 0"),
        ({"learning_rate": "1e-4"}, "learning_rate='1e-4' of the recipe"),
        (
            {"learning_rate": lambda step: 1e-4},
            "is a function; .* by schedule=, warmup= and final=",
        ),
        ({"clip": None}, "clip=None of the recipe; give a number 0 or more, 0 for no clipping"),
        ({"weight_decay": None}, "weight_decay=None"),
        ({"tokens_per_batch": 64.5}, "tokens_per_batch=64.5 of the recipe; give a whole number"),
        ({"warmup": True}, "warmup=True"),
        ({"final": 2}, "final=2 of the recipe; give a number from 0 to 1"),
        ({"seed": -1}, "seed=-1 of the recipe; give a whole number"),
        ({"schedule": ["cosine"]}, r"unknown schedule \['cosine'\]"),
    ],
)
def test_bad_recipes_are_refused(change, message):
    with pytest.raises(ValueError, match=message):
        TrainingRecipe(**change)


def test_numbers_of_numpy_are_as_pythons():
    recipe = TrainingRecipe(np.float32(0.5), np.int64(2), np.int32(64), seed=np.uint8(3))
    assert recipe == TrainingRecipe(0.5, 2, 64, seed=3)
    values = dataclasses.asdict(recipe)
    assert json.loads(json.dumps(values)) == values
