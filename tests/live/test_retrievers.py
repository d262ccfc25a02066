"""Retrievers without gradients, asked one question at a time."""

import dataclasses
import types

import numpy as np
import pytest

from tda.live import finished_run
from tda.methods import METHODS, GradientKind, Method
from tda.retrieval import bm25, by_score
from tda.retrieval.sources import InMemory
from tda.run import encode, gradient_retrievers, registry
from tda.run.controls import GradientNorm, Labels, Random
from tda.run.gradient_retrievers import Encodings
from tda.run.remembered import Known
from tda.run.retrievers import Queries, Words, _Vectors
from tda.store import Passage

TEXTS = ["Oslo is the capital.", "It rains in Oslo.", "Rome fell.", "Oslo, Oslo, Oslo!"]


def live_run(*withdrawn):
    """A run held open for questions, of whose corpus passages may be withdrawn."""
    corpus = types.SimpleNamespace(
        rows=len(TEXTS),
        withdrawn=np.asarray(withdrawn, np.int64),
        read_passages=lambda rows: [Passage(f"d{i}", f"d{i}", TEXTS[i]) for i in rows],
        correct={"all": [np.array([3]), np.array([0, 2])]},
        query_ids=["q0", "q1"],
    )
    config = types.SimpleNamespace(seed=7, data=types.SimpleNamespace(seed=0))
    return types.SimpleNamespace(live=True, corpus=corpus, config=config, search_mesh=None)


def ask(retriever, name, number=None, k=10):
    queries = Queries(None, ["Where is Oslo"], [number], {})
    ranked = retriever.search(queries, {name: METHODS[name]}, k)[name].ranked
    return ranked.proponents[0].tolist(), ranked.proponent_scores[0]


def test_words_score_as_without_a_withdrawal():
    whole = bm25.Index(TEXTS).search(["Where is Oslo"])
    rows, scores = ask(Words(live_run()), "bm25")
    assert rows == whole.proponents[0].tolist()
    np.testing.assert_array_equal(scores, whole.proponent_scores[0])
    rows, scores = ask(Words(live_run(rows[0])), "bm25", k=2)
    assert rows == whole.proponents[0].tolist()[1:3]
    np.testing.assert_array_equal(scores, whole.proponent_scores[0][1:3])


def test_vectors_are_asked_for_once_for_each_layer():
    x = np.random.default_rng(0).normal(size=(4, 5)).astype(np.float32)
    asked = []

    class Rows(_Vectors):
        def _vectors(self, name, layer, on_rows):
            asked.append(layer)
            return x if layer == "last" else -x

        def _encode(self, queries, layer):
            return x[1:2]

    vectors = Rows(live_run(2))
    for _ in range(2):
        rows, scores = ask(vectors, "hidden_last")
        assert rows[0] == 1 and set(rows) == {0, 1, 3} and scores[0] == pytest.approx(1)
        rows, _ = ask(vectors, "hidden_middle")
        assert rows[-1] == 1
    assert asked == ["last", "middle"] and np.isfinite(x).all()


def test_chance_is_the_runs_for_its_queries_and_the_texts_for_others():
    control = Random(live_run())
    expected = [by_score.random_scores(4, 7, q) for q in range(3)]
    for number in range(3):
        rows, scores = ask(control, "random", number)
        np.testing.assert_allclose(scores, np.sort(expected[number])[::-1], rtol=1e-6)
    once, again = (ask(control, "random")[1] for _ in range(2))
    np.testing.assert_array_equal(once, again)
    assert not any(np.allclose(once, np.sort(e)[::-1]) for e in expected)
    assert len(ask(Random(live_run(1)), "random")[0]) == 3


def test_norms_are_those_of_each_methods_own_gradients(monkeypatch):
    norms = {False: [1.0, 4.0, 2.0, 3.0], True: [3.0, 1.0, 4.0, 2.0]}

    def passages(run, kind):
        return InMemory(np.float32(norms[kind.corrected])[:, None], [slice(0, 1)])

    monkeypatch.setattr(encode, "encode_passages", passages)
    methods = {
        "plain": METHODS["gradient_norm"],
        "corrected": dataclasses.replace(METHODS["gradient_norm"], corrected=True),
    }
    queries = Queries(None, ["Where is Oslo"], [None], {})
    results = GradientNorm(live_run()).search(queries, methods, 4)
    assert results["plain"].ranked.proponents[0].tolist() == [1, 3, 2, 0]
    assert results["corrected"].ranked.proponents[0].tolist() == [2, 0, 3, 1]


def test_labels_are_of_the_runs_queries_alone():
    labels = Labels(live_run())
    rows, _ = ask(labels, "annotated", 1)
    assert set(rows) - {-1} == {0, 2}
    assert set(ask(labels, "annotated")[0]) == {-1}


def test_a_retriever_of_ones_own_is_registered_once(monkeypatch):
    monkeypatch.setattr(registry, "RETRIEVERS", dict(registry.RETRIEVERS))
    method = Method("mine", retriever="mine")
    with pytest.raises(ValueError, match="mine: unknown retriever 'mine'; there are gradient"):
        registry.retriever_of(method)
    registry.register_retriever("mine", Words)
    registry.register_retriever("mine", Words)  # a module that is imported twice
    assert registry.retriever_of(method) is Words
    with pytest.raises(ValueError, match="'bm25' is registered already"):
        registry.register_retriever("bm25", Labels)
    with pytest.raises(ValueError, match="--plugin=no_such_module cannot be imported"):
        registry.load_plugins(["no_such_module"])


def test_a_method_that_asks_for_more_is_not_answered_with_less():
    """Guards: a field that a plugin adds to methods, and that is left out in silence."""

    @dataclasses.dataclass(frozen=True)
    class Squared(Method):
        squared: bool = False

    live = finished_run.LiveRun(None)
    live.run = live_run()
    live.run.corpus.rows = len(TEXTS)
    assert live.lacks(Squared("as usual", retriever="bm25")) is None
    why = "the retriever '{}' does not know squared=True; register a retriever that uses it"
    for retriever in ("bm25", "gradient"):
        method = Squared("more", retriever=retriever, squared=True)
        assert why.format(retriever) in live.lacks(method)
        with pytest.raises(ValueError, match="does not know squared=True"):
            registry.retriever_of(method)


def test_a_question_is_known_by_its_text():
    known = Known(["q0", "q1", "q2"], ["a", "b", "b"], ["c", "d", "d"], [np.zeros(0, int)] * 3)
    assert known.number("a", "c") == 0
    assert known.number("b ", " d") == 1  # the first of two alike
    assert known.number("a", "d") is None and Known().number("a", "c") is None


def test_a_gradient_that_is_not_finite_is_refused(monkeypatch):
    encodings = Encodings(live_run())
    encodings.run.corpus.layout = lambda tokens: None
    monkeypatch.setattr(encodings, "run_queries", lambda kind: None)
    monkeypatch.setattr(encodings, "encoder", lambda kind, on_progress: None)
    rows = np.full((1, 4), np.nan, np.float32)
    monkeypatch.setattr(gradient_retrievers.encoding, "encode_rows", lambda *args: rows)
    with pytest.raises(ValueError, match="question's gradient is not finite"):
        encodings.of_queries(Queries(None, ["a b"], [None], {}), GradientKind())
