"""Samples against sampling one by one, against the model's probabilities; what counts as stated."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from tda.data.batches import BatchLayout
from tda.evaluation import sampling
from tda.evaluation.sampling import Sampler

BUCKETS = (4, 8, 16)
STOP, PAD = 7, 0
RUN = nnx.jit(lambda model, tokens: model(tokens))
LAYOUT = BatchLayout(BUCKETS, tokens_per_batch=64, pad=PAD)


def one_by_one(model, prompt, count, samples, seed):
    """Each sample alone, the whole sequence run anew for each token."""
    uniform = sampling._uniform(prompt, count, samples, seed)
    out = []
    for s in range(samples):
        drawn = []
        for step in range(count):
            tokens = prompt + drawn
            padded = jnp.asarray([tokens + [PAD] * (BUCKETS[-1] - len(tokens))])
            logits = RUN(model, padded)[0, len(tokens) - 1]
            reached = np.cumsum(np.asarray(jax.nn.softmax(logits)), dtype=np.float64)
            token = int(np.flatnonzero(reached > uniform[s, step] * reached[-1])[0])
            if token == STOP:
                break
            drawn.append(token)
            if len(prompt) + len(drawn) > BUCKETS[-1]:
                break
        out.append(drawn)
    return out


def test_samples_are_those_drawn_one_by_one(decoder, monkeypatch):
    model = decoder()
    prompts = [[1, 5, 9], [1, 4, 2, 8, 6], [1] * 14, [1, 5, 9, 3]]
    counts = [4, 3, 6, 0]
    monkeypatch.setattr(sampling, "_TOGETHER", 2)
    done = {}

    def on_done(which, drawn):
        done.update(zip(which.tolist(), drawn, strict=True))

    sampler = Sampler(model, STOP, LAYOUT)
    drawn = sampler(prompts, counts, samples=5, seed=3, on_done=on_done)
    for i, (prompt, count) in enumerate(zip(prompts, counts, strict=True)):
        assert drawn[i] == one_by_one(model, prompt, count, 5, seed=3)
    # No sequence is longer than the model's positions, and the last token needs none.
    assert max(map(len, drawn[2])) == 3
    assert done == dict(enumerate(drawn))
    # A prompt's draws depend neither on the others nor on the number of tokens.
    (alone,) = sampler(prompts[:1], [2], samples=5, seed=3)
    assert alone == [s[:2] for s in drawn[0]]
    assert sampler(prompts, counts, samples=5, seed=4) != drawn


def test_frequencies_are_the_models_probabilities(decoder):
    model = decoder()
    prompt = [1, 5, 9]
    (drawn,) = Sampler(model, STOP, LAYOUT)([prompt], [1], samples=20_000)
    p_V = np.asarray(jax.nn.softmax(model(jnp.asarray([prompt]))[0, -1]))
    seen = np.bincount([s[0] if s else STOP for s in drawn], minlength=len(p_V)) / 20_000
    assert np.abs(seen - p_V).max() < 5 * np.sqrt(p_V.max() / 20_000)
    assert 0.5 * np.abs(seen - p_V).sum() < 0.05 and p_V.max() > 0.05


def test_a_model_without_hidden_states_is_called(decoder):
    class Wrapped(nnx.Module):
        def __init__(self, inner):
            self.inner = inner

        def __call__(self, tokens_BxT):
            return self.inner(tokens_BxT)

    samplers = [Sampler(model, STOP, LAYOUT) for model in (decoder(), Wrapped(decoder()))]
    with_head, without = (sampler([[1, 5]], [3], samples=4, seed=1) for sampler in samplers)
    assert with_head == without


def test_a_token_of_no_probability_is_never_drawn():
    assert sampling._pick(np.array([0.0, 0.5, 0.0, 0.5, 0.0]), [0.0, 0.499, 0.5, 1 - 1e-16]) == [
        1, 1, 3, 3,
    ]  # fmt: skip


def test_confidence_is_the_share_of_samples_that_begin_with_an_answer():
    answers = ["Paris", "City of Light", "US"]
    said = [
        "Paris, the",
        " paris.",
        "the city of Paris",
        "Parisian",
        "US and",
        "us",
        "city of light",
    ]
    right = [True, True, False, False, True, False, True]
    for text, expected in zip(said, right, strict=True):
        assert sampling.confidence([text], answers) == expected, text
    assert sampling.confidence(said, answers) == pytest.approx(4 / 7)
    assert sampling.confidence(["", "Paris"], ["", "Paris"]) == 0.5
