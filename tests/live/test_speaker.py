"""The model's own words: greedy completions, and likelihoods as the evaluation has them."""

import numpy as np
import pytest

from tda.data import tokens
from tda.data.tokenizer import Tokenizer
from tda.evaluation.likelihood import Likelihood
from tda.live.speaker import Speaker

CAPITALS = {"France": "Paris", "Norway": "Oslo", "Italy": "Rome", "Spain": "Madrid"}
QUESTIONS = [(f"q-{a}", f"The capital of {a} is", b) for a, b in CAPITALS.items()]
CONTEXT = 24


@pytest.fixture(scope="module")
def speaker_and_model(decoder):
    texts = [f"{prompt} {target}." for _, prompt, target in QUESTIONS]
    tokenizer = Tokenizer.train(texts, 300)
    model = decoder(vocab_size=tokenizer.vocab_size)
    return Speaker(model, tokenizer, CONTEXT), model


def test_completion_is_greedy(speaker_and_model):
    speaker, model = speaker_and_model
    tokenizer = speaker.tokenizer
    steps = speaker.complete("The capital of", 4)
    ids = [tokenizer.bos, *tokenizer.encode(["The capital of"])[0]]
    assert steps
    for step in steps:
        logits_V = np.asarray(model(np.asarray([ids])))[0, -1].astype(np.float64)
        p_V = np.exp(logits_V - logits_V.max())
        p_V /= p_V.sum()
        best = int(p_V.argmax())
        assert step["probability"] == pytest.approx(p_V[best], rel=1e-4)
        shown = [step["probability"], *(o["probability"] for o in step["others"])]
        np.testing.assert_allclose(shown, np.sort(p_V)[::-1][:6], rtol=1e-4)
        ids.append(best)


def test_likelihood_is_that_of_the_evaluation(speaker_and_model):
    speaker, model = speaker_and_model
    prompts = tokens.tokenise_queries(QUESTIONS, speaker.tokenizer, CONTEXT)
    expected = Likelihood(model, speaker.layout)(prompts)
    for q, (_, prompt, target) in enumerate(QUESTIONS):
        likelihood = speaker.likelihood(prompt, target)
        assert likelihood["nats"] == pytest.approx(float(expected.nats[q]), rel=1e-5)
        assert likelihood["rank"] == expected.ranks[q]


def test_refusals(speaker_and_model):
    speaker, _ = speaker_and_model
    with pytest.raises(ValueError, match="the context 24"):
        speaker.complete("long " * 60, 3)
    with pytest.raises(ValueError, match="context has 24"):
        speaker.query("long " * 60, "b")
    with pytest.raises(ValueError, match="has no token"):
        speaker.query("a", " ")
