"""Live tracing against what a run does for all its queries, on a tiny model and store."""

import dataclasses

import numpy as np
import pytest

from tda import hessian
from tda import store as stores
from tda.data import tokens
from tda.data.batches import BatchLayout, buckets
from tda.data.tokenizer import Tokenizer
from tda.encoding import table as encoding
from tda.evaluation.likelihood import Likelihood
from tda.gradients.encoder import make_encoder
from tda.gradients.projection import Projection
from tda.live import Encoded, Tracer
from tda.live import heat as heats
from tda.methods import METHODS, GradientKind, Method
from tda.retrieval import exact
from tda.retrieval.scorer import Scorer
from tda.retrieval.whitening import HessianSettings

CONTEXT, P = 24, Projection(side=4, blocks=2)
CAPITALS = {"France": "Paris", "Norway": "Oslo", "Italy": "Rome", "Spain": "Madrid"}
QUESTIONS = [(f"q-{a}", f"The capital of {a} is", b) for a, b in CAPITALS.items()]
TEXTS = [f"{prompt} {target}." for _, prompt, target in QUESTIONS]
TEXTS += ["It rains in Oslo all day long.", "Rome fell. " * 9, "Paris é naïve — 日本."]
NAMES = ("grad_dot", "grad_cos", "exp4", "trackstar_raw")


@pytest.fixture(scope="module")
def made(decoder, tmp_path_factory):
    """A tracer, and what it is held against: model, encoder, store, gradients of the questions."""
    folder = tmp_path_factory.mktemp("live")
    tokenizer = Tokenizer.train(TEXTS, 300)
    model = decoder(vocab_size=tokenizer.vocab_size)
    documents = [(f"d{i}", t) for i, t in enumerate(TEXTS)]
    table, _ = tokens.tokenise_passages(documents, tokenizer, CONTEXT)
    prompts = tokens.tokenise_queries(QUESTIONS, tokenizer, CONTEXT)
    encoder = make_encoder(model, P)
    found = {}
    for name, some in (("corpus", table), ("queries", prompts)):
        texts = [tokenizer.decode(some.tokens[a:b]).strip()
                 for a, b in zip(some.starts[:-1], some.starts[1:], strict=True)]  # fmt: skip
        found[name] = stores.create(
            folder / name, some.ids, dict.fromkeys(encoder.layout.blocks, 16), {"made": "here"},
            documents=some.documents, texts=texts,
        )  # fmt: skip
        layout = BatchLayout(buckets(CONTEXT), tokens_per_batch=64, pad=tokenizer.pad)
        encoding.fill_store(found[name], encoder, some, layout)
    encoded = Encoded(found["corpus"], found["queries"], P)
    tracer = Tracer(
        model, tokenizer, CONTEXT, {GradientKind(): encoded}, HessianSettings(damping=0.05), folder
    )
    return tracer, model, found["corpus"], found["queries"], prompts, tokenizer


def scorers(store, queries):
    """The methods' scorers, written out."""
    train = hessian.autocorrelation_of_source(store).blocks
    evaluation = hessian.autocorrelation_of_source(queries).blocks
    k = hessian.default_component(store.width)
    weight = hessian.mixing_weight(hessian.spectrum(train), hessian.spectrum(evaluation), k)
    mixed = hessian.inverse_root(hessian.mix(train, evaluation, weight), 0.05)
    roots = {"none": None, "train": hessian.inverse_root(train, 0.05), "mixed": mixed}
    return {n: Scorer(roots[METHODS[n].hessian], METHODS[n].unit_norm) for n in NAMES}


def test_passages_are_those_of_a_search_for_all_queries(made):
    tracer, _, store, queries, _, _ = made
    gradients = queries.read(slice(0, queries.rows))
    expected = exact.search(gradients, store, scorers(store, queries), 5)
    for q, (_, prompt, target) in enumerate(QUESTIONS):
        found = tracer.trace(prompt, target, {n: METHODS[n] for n in (*NAMES, "bm25")}, 5)
        for name in NAMES:
            ranking, record = expected[name], found[name]
            rows = [store.row_of(i) for i in record["proponent_ids"]]
            assert rows == ranking.proponents[q].tolist(), name
            assert record["proponents"] == [p.text for p in store.passages(rows)]
            scale = np.abs(ranking.proponent_scores[q]).max()
            for kind in ("proponent", "opponent"):
                np.testing.assert_allclose(
                    record[f"{kind}_scores"],
                    getattr(ranking, f"{kind}_scores")[q],
                    rtol=1e-4,
                    atol=1e-5 * scale,
                )
        assert found["bm25"]["proponents"][0] == TEXTS[q] and not found["bm25"]["opponents"]


def test_heat_sums_to_the_score(made):
    tracer, _, store, _, _, _ = made
    _, prompt, target = QUESTIONS[1]
    for name in ("grad_dot", "trackstar_raw"):
        found = tracer.trace(prompt, target, {name: METHODS[name]}, 20)[name]
        scale = max(map(abs, found["proponent_scores"]))
        of = (found[f"proponent{x}"] for x in ("_ids", "s", "_scores"))
        for passage, text, score in zip(*of, strict=True):
            heat = tracer.heat(prompt, target, METHODS[name], passage)
            assert heat["score"] == pytest.approx(score, rel=1e-3, abs=1e-4 * scale)
            # A part of a longer document may have other tokens when it is read alone.
            if "#" not in passage:
                read = "".join(t["text"] for t in heat["tokens"] if not t["special"])
                assert heat["faithful"] and read == text
                assert heat["sum"] == pytest.approx(score, rel=2e-3, abs=1e-3 * scale)


def test_heat_of_other_tokens_is_told(made, monkeypatch):
    tracer = made[0]
    _, prompt, target = QUESTIONS[0]
    other = np.asarray([1, 9, 9, 9, 9], np.int32), list("abcde")
    monkeypatch.setattr(heats, "tokens_of", lambda store, row, speaker: other)
    assert not tracer.heat(prompt, target, METHODS["grad_dot"], "d0")["faithful"]


def test_likelihood_is_that_of_the_evaluation(made):
    tracer, model, _, _, prompts, tokenizer = made
    expected = Likelihood(model, BatchLayout(buckets(CONTEXT), 64, tokenizer.pad))(prompts)
    for q, (_, prompt, target) in enumerate(QUESTIONS):
        found = tracer.speaker.likelihood(prompt, target)
        assert found["nats"] == pytest.approx(float(expected.nats[q]), rel=1e-5)
        assert found["rank"] == expected.ranks[q]


def test_completion_is_greedy(made):
    tracer, model, _, _, _, tokenizer = made
    steps = tracer.speaker.complete("The capital of", 4)
    ids = [tokenizer.bos, *tokenizer.encode(["The capital of"])[0]]
    for step in steps:
        logits_V = np.asarray(model(np.asarray([ids])))[0, -1].astype(np.float64)
        p_V = np.exp(logits_V - logits_V.max())
        p_V /= p_V.sum()
        best = int(p_V.argmax())
        assert step["probability"] == pytest.approx(p_V[best], rel=1e-4)
        told = [step["probability"], *(o["probability"] for o in step["others"])]
        np.testing.assert_allclose(told, np.sort(p_V)[::-1][:6], rtol=1e-4)
        ids.append(best)


def test_r_is_kept_for_the_next_start(made, tmp_path):
    tracer, model, store, queries, _, tokenizer = made
    encoded = {GradientKind(): Encoded(store, queries, P)}
    question, chosen = QUESTIONS[0][1:], {"exp4": METHODS["exp4"]}
    told: list[list[str]] = []
    found = []
    for how in (HessianSettings(), HessianSettings(), HessianSettings(damping=0.5)):
        told.append([])
        one = Tracer(model, tokenizer, CONTEXT, encoded, how, tmp_path / "kept")
        found.append(one.trace(*question, chosen, 5, lambda *t: told[-1].append(t[0]))["exp4"])
    assert "R of the passages" in told[0] and "reading R" in told[1]
    assert "R of the passages" in told[2]  # R made in another way is another R
    assert found[0] == found[1] != found[2]
    assert len(list((tmp_path / "kept").glob("root-train-*.npz"))) == 2


def test_withdrawn_passages_are_not_found_by_words_either(made, tmp_path):
    tracer, model, store, queries, _, tokenizer = made
    copy = stores.create(
        tmp_path / "s", store.ids, dict.fromkeys(["a", "b"], 16), {"made": "here"},
        texts=[p.text for p in store.passages(range(store.rows))],
    )  # fmt: skip
    copy.withdraw(["d0"])
    one = Tracer(model, tokenizer, CONTEXT, {GradientKind(): Encoded(copy, None, P)})
    found = one.trace("The capital of France is", "Paris", {"bm25": METHODS["bm25"]}, 3)["bm25"]
    assert "d0" not in found["proponent_ids"]


def test_refusals(made):
    tracer = made[0]
    cos = {"grad_cos": METHODS["grad_cos"]}
    for prompt, target, why in (("long " * 60, "b", "context has 24"), ("a", " ", "has no token")):
        with pytest.raises(ValueError, match=why):
            tracer.trace(prompt, target, cos)
    with pytest.raises(ValueError, match="trackstar: the run has no store .* with optimizer"):
        tracer.trace("a", "b", {"trackstar": METHODS["trackstar"]})
    with pytest.raises(ValueError, match="has no passage 'zz'"):
        tracer.heat("a", "b", METHODS["grad_cos"], "zz")
    with pytest.raises(ValueError, match="BM25 has no gradients"):
        tracer.heat("a", "b", METHODS["bm25"], "d0")
    with pytest.raises(ValueError, match="the context 24"):
        tracer.speaker.complete("long " * 60, 3)


def test_a_method_that_asks_for_more_is_not_answered_with_less(made):
    """Guards: a field that is added to methods, and left out here in silence."""

    @dataclasses.dataclass(frozen=True)
    class More(Method):
        several: bool = False

    assert made[0].lacks(More("plain")) is None
    assert made[0].lacks(More("sum", several=True)) == (
        "methods with several=True answer no live questions"
    )


def test_what_progress_raises_ends_the_work(made):
    class Enough(Exception):
        pass

    def progress(what, done, total):
        if what == "searching passages":
            raise Enough

    with pytest.raises(Enough):
        made[0].trace("a", "b", {"grad_cos": METHODS["grad_cos"]}, 3, progress)
