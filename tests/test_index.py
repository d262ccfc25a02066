"""Gradients that are computed once and asked again: the answers of `tda.trace`, with less work."""

import json

import jax
import numpy as np
import pytest
from flax import nnx

import tda
from tda import hessian
from tda.data.corpora import Corpus
from tda.data.rows import Query
from tda.encoding import table as encoding
from tda.encoding.inputs import EncodedQueries
from tda.gradients.projection import Projection
from tda.index import mean_of
from tda.viewer import opening
from tests.test_api import PLACES, QUERIES, TEXTS, batch_of, call, model, sequences, tokenizer

__all__ = ["model", "tokenizer"]
OPTIONS = dict(projection=Projection(side=4, pooling="matrix"), quiet=True)


def same(answers, others):
    """Whether two traces have the same passages with the same scores."""
    pairs = [
        (p, o)
        for a, b in zip(answers, others, strict=True)
        for p, o in zip(a.proponents + a.opponents, b.proponents + b.opponents, strict=True)
    ]
    return all(p.id == o.id and p.score == pytest.approx(o.score, abs=1e-6) for p, o in pairs)


@pytest.fixture
def counts(monkeypatch):
    """How often R is summed and rows are encoded: the number of rows each time."""
    counted = {"R": [], "rows": []}
    sum_rows, encode = hessian.autocorrelation_of_source, encoding.encode_kinds

    def watched_sum(source, *arguments, **options):
        counted["R"].append(source.rows)
        return sum_rows(source, *arguments, **options)

    def watched_encode(encoder, table, rows, *arguments):
        counted["rows"].append(len(rows))
        return encode(encoder, table, rows, *arguments)

    monkeypatch.setattr(hessian, "autocorrelation_of_source", watched_sum)
    monkeypatch.setattr(encoding, "encode_kinds", watched_encode)
    return counted


@pytest.mark.parametrize("in_directory", [False, pytest.param(True, marks=pytest.mark.slow)])
def test_an_index_answers_as_a_trace_does(model, tokenizer, counts, tmp_path, in_directory):
    where = {"directory": tmp_path} if in_directory else {}
    index = tda.encode(model, TEXTS, tokenizer=tokenizer, **OPTIONS, **where)
    assert sum(counts["rows"]) - (len(TEXTS) if in_directory else 0) <= len(TEXTS) + 1
    counts["rows"].clear()
    first = index.query(QUERIES, k=3)
    second = index.query([QUERIES[1]], k=3)
    assert counts == {"R": [len(TEXTS)], "rows": [2, 1]}
    assert same(first, call(model, tokenizer)) and same(second, [first[1]])
    mixed = [(f"The town of {a} is", b) for a in PLACES for b in PLACES.values()]
    counts["R"].clear()
    several = index.query(mixed, ["trackstar", "exp3", "grad_cos"], k=3)
    # R of the passages is that of the first question.
    assert list(several) == ["exp3", "trackstar", "grad_cos"] or counts["R"] == [16]
    assert counts["R"] == [16]
    for name, answers in several.items():
        assert same(answers, call(model, tokenizer, queries=mixed, method=name)), name


def test_a_second_question_compiles_nothing(model, tokenizer):
    index = tda.encode(model, TEXTS, tokenizer=tokenizer, **OPTIONS)
    index.query([QUERIES[0]])
    compiled = []

    def listen(event, seconds, **details):
        if event.startswith("/jax/core/compile/backend"):
            compiled.append(event)

    jax.monitoring.register_event_duration_secs_listener(listen)
    index.query([("The town of Chad is", "Lima")])
    assert not compiled
    # Longer than any before: a program of its own, which shows that the listener hears.
    index.query([(" ".join(TEXTS[:3]), "Lima")])
    assert compiled


def test_a_model_that_is_trained_on_does_not_change_the_answers(model, tokenizer):
    """Mistake: gradients of two models in one ranking."""
    trained = nnx.clone(model)
    index = tda.encode(trained, TEXTS, method="grad_cos", tokenizer=tokenizer, **OPTIONS)
    trained.second.kernel[...] = -2 * trained.first.kernel[...].sum() * trained.second.kernel[...]
    for method, how in (("grad_cos", {}), ("exp3", {}), ("grad_cos", dict(rerank=4))):
        answers = index.query(QUERIES, method, k=3, **how)
        assert same(answers, call(model, tokenizer, method=method, **how)), method


def test_batches_are_asked_again_too(model, tokenizer):
    batches = [batch_of(sequences(tokenizer, TEXTS[i : i + 4])) for i in (0, 4)]
    index = tda.encode(model, batches, method=["exp3", "grad_cos"], texts=TEXTS, **OPTIONS)
    asked = [batch_of(sequences(tokenizer, [TEXTS[2]]))]
    both = index.query(asked, method=["exp3", "grad_cos"], k=2)
    assert [a[0].proponents[0].text for a in both.values()] == [TEXTS[2]] * 2
    for name, answers in both.items():
        traced = tda.trace(model, batches, asked, method=name, texts=TEXTS, k=2, **OPTIONS)
        assert same(answers, traced), name


def test_an_iterator_serves_the_gradients_that_were_named(model, tokenizer):
    batches = [batch_of(sequences(tokenizer, TEXTS[i : i + 4])) for i in (0, 4)]
    index = tda.encode(model, iter(batches), **OPTIONS)
    assert index.query(batches[:1], "exp3", k=1)[3].proponents[0].id == "3"
    with pytest.raises(ValueError, match="an iterator of batches that was read already"):
        index.query(batches[:1], "grad_cos")


@pytest.mark.parametrize(
    ("asked", "message"),
    [
        (dict(method="bm25"), "method='bm25' is not one of exp1"),
        (dict(method=["exp3", "exp3"]), "method 'exp3' is named twice"),
        (dict(method=[]), r"method=\[\]; give the name of one"),
        (dict(method="exp3", damping=0.1), "damping=0.1 has no effect with method='exp3'"),
        (dict(k=0), "k=0; give a whole number"),
        (dict(joiner=3), "joiner=3; give a string"),
    ],
)
def test_questions_that_do_not_fit_are_told(model, tokenizer, asked, message):
    index = tda.encode(model, TEXTS, tokenizer=tokenizer, **OPTIONS)
    with pytest.raises(ValueError, match=message):
        index.query(QUERIES, **asked)


def test_unknown_arguments_are_refused_before_anything_is_encoded(model, tokenizer, counts):
    with pytest.raises(ValueError, match="joiner='' has no effect on batches"):
        tda.trace(model, [batch_of([[1, 2]])], [batch_of([[1, 2]])], joiner="")
    with pytest.raises(TypeError, match="queries"):
        tda.encode(model, TEXTS, tokenizer=tokenizer, queries=QUERIES)
    assert not counts["rows"]


def test_answers_become_a_table_and_a_page(model, tokenizer, monkeypatch):
    import pandas

    answers = call(model, tokenizer)
    frame = answers.to_pandas()
    assert isinstance(frame, pandas.DataFrame) and len(frame) == 2 * 2 * 3
    first = frame[(frame["query"] == "q2") & (frame["list"] == "proponents")]
    assert first["passage"].tolist() == [p.id for p in answers[1].proponents]
    assert first["rank"].tolist() == [1, 2, 3]
    served = []
    monkeypatch.setattr(opening, "serve", lambda *arguments, **how: served.append(arguments[0]))
    answers.view()
    (file,) = served[0].files
    assert file.title == answers.method and served[0].index()["keys"] == []
    answers.view(labels={"source": {}})
    assert served[1].index()["keys"] == ("source",)


def test_a_contrast_is_the_difference_of_two_means(model, tokenizer):
    index = tda.encode(model, TEXTS, tokenizer=tokenizer, **OPTIONS)
    others = [("The town of Chad is", "Lima")]

    def scores(queries, method="grad_dot", **options):
        answers = index.query(queries, method, k=len(TEXTS), **options)
        return np.mean(
            [[dict((p.id, p.score) for p in a.proponents)[str(i)] for i in range(len(TEXTS))]
             for a in answers], axis=0
        )  # fmt: skip

    assert len(index.query(QUERIES, contrast=others)) == 1
    expected = scores(QUERIES) - scores(others)
    np.testing.assert_allclose(scores(QUERIES, contrast=iter(others)), expected, rtol=1e-4)
    np.testing.assert_allclose(scores(QUERIES, contrast=()), scores(QUERIES), rtol=1e-4)
    # The norm is that of the difference: swapped sets have the opposite scores.
    cosines = scores(QUERIES, "trackstar_train", contrast=others)
    turned = scores(others, "trackstar_train", contrast=QUERIES)
    np.testing.assert_allclose(cosines, -turned, atol=1e-5)
    assert 0.01 < np.abs(cosines).max() <= 1
    for options, message in (
        (dict(contrast=QUERIES), "same mean gradient"),
        (dict(contrast=[("The town", 3)]), "contrast: query 0: the target is 3"),
        (dict(contrast=others, rerank=10), "rerank=10 scores each query by its own"),
        (dict(contrast=others, method="trackstar"), "R of the queries is for single queries"),
    ):
        with pytest.raises(ValueError, match=message):
            index.query(QUERIES, **options)


def test_means_that_differ_by_rounding_are_the_same():
    """Mistake: scores of what is left of a gradient less itself, in a batch of another shape."""
    rng = np.random.default_rng(0)
    x_QxE = rng.normal(size=(3, 50)).astype(np.float32)
    rounded_QxE = x_QxE[[1, 2, 0]] * np.float32(1 + 1e-6)
    queries = [Query(str(i), "", "") for i in range(3)]
    with pytest.raises(ValueError, match="same mean gradient"):
        mean_of(EncodedQueries(queries, x_QxE), EncodedQueries(queries, rounded_QxE))
    other = mean_of(EncodedQueries(queries, x_QxE), EncodedQueries(queries[:2], x_QxE[:2]))
    expected = x_QxE.mean(0) - x_QxE[:2].mean(0)
    np.testing.assert_allclose(other.gradients_QxE[0], expected, rtol=1e-4, atol=1e-6)


def test_a_passage_without_a_finite_gradient_is_told(model, tokenizer):
    """Mistake: a passage that is missing from every ranking without a word."""
    batches = [batch_of(sequences(tokenizer, TEXTS))]
    batches[0]["weights"][3] = np.nan
    asked = [batch_of(sequences(tokenizer, [TEXTS[2]]))]
    with pytest.warns(UserWarning, match="gradients of 1 passages are not finite.*retrieved: 3$"):
        answers = tda.trace(model, batches, asked, method="grad_cos", k=9, **OPTIONS)
    assert [p.id for p in answers[0].proponents].count("3") == 0
    assert len(answers[0].proponents) == len(TEXTS) - 1


def test_scores_are_added_up_by_label(model, tokenizer):
    index = tda.encode(model, TEXTS, tokenizer=tokenizer, **OPTIONS)
    traced = index.query(QUERIES, "grad_cos", k=len(TEXTS))
    scores = {p.id: 0.0 for p in traced[0].proponents}
    for answer in traced:
        for p in answer.proponents:
            scores[p.id] += p.score / len(traced)
    labels = {str(i): "even" if i % 2 == 0 else "odd" for i in range(len(TEXTS))}
    for label_of in (labels, lambda p: labels[p.id]):
        groups = traced.by(label_of, resamples=20)
        for group in groups:
            ids = [i for i, label in labels.items() if label == group.label]
            assert group.size == len(ids) and 0 < group.p <= 1
            assert group.mean == pytest.approx(sum(scores[i] for i in ids), rel=1e-6)
    assert {g.label for g in groups} == {"even", "odd"}
    for missing in ({}, {"7": None}, {"7": float("nan")}):
        with pytest.raises(ValueError, match="document '7' has no label"):
            traced.by({str(i): "a" for i in range(7)} | missing)
    with pytest.raises(ValueError, match="document '7' has no label"):
        traced.by(lambda p: None if p.id == "7" else "a")
    for k in (2, len(TEXTS) // 2):
        with pytest.raises(ValueError, match="trace again with k= the number of passages"):
            index.query(QUERIES, "grad_cos", k=k).by(labels)


def test_scores_are_added_up_by_a_field_of_the_corpus(model, tokenizer, tmp_path, monkeypatch):
    served = []
    monkeypatch.setattr(opening, "serve", lambda *arguments, **how: served.append(arguments[0]))
    lines = [{"id": f"d{i}", "text": t, "source": "ab"[i % 2]} for i, t in enumerate(TEXTS)]
    (tmp_path / "c.jsonl").write_text("\n".join(map(json.dumps, lines)))
    corpus = tmp_path / "c.jsonl"
    for passages in (str(corpus), Corpus(corpus)):
        index = tda.encode(model, passages, tokenizer=tokenizer, **OPTIONS)
        traced = index.query(QUERIES, "grad_cos", k=len(TEXTS))
        by_field = traced.by("source", resamples=20)
        assert by_field == traced.by({d["id"]: d["source"] for d in lines}, resamples=20)
        assert {g.label for g in by_field} == {"a", "b"}
        with pytest.raises(ValueError, match="c.jsonl.*topic"):
            traced.by("topic")
    traced.view(labels=["source"])
    assert served[0].index()["keys"] == ("source",)
    traced = tda.trace(model, TEXTS, QUERIES, tokenizer=tokenizer, k=len(TEXTS), **OPTIONS)
    with pytest.raises(ValueError, match="no field 'source'; give the labels"):
        traced.by("source")


def test_the_passages_of_a_document_have_its_label(model, tokenizer):
    long = " ".join(TEXTS)
    traced = tda.trace(
        model, [("a", long), ("b", TEXTS[0])], QUERIES, tokenizer=tokenizer, context=32, k=99,
        method="grad_cos", **OPTIONS,
    )  # fmt: skip
    sizes = {g.label: g.size for g in traced.by({"a": "long", "b": "short"}, resamples=5)}
    assert sizes["short"] == 1 and sizes["long"] == len(traced[0].proponents) - 1 > 1
