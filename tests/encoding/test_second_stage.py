"""`tda.trace(rerank=)` against whole gradients of a user's model."""

import numpy as np
import pytest

import tda
from tda.gradients import fitted_curvature, pair_metrics, reference
from tda.gradients import projection as projections
from tda.gradients.moments.scales import Scale
from tda.gradients.projection import Projection
from tda.gradients.sites import find_sites
from tda.retrieval import bm25
from tests.gradients.test_pair_products import balance, whitener
from tests.test_api import (  # noqa: F401
    PLACES,
    QUERIES,
    TEXTS,
    batch_of,
    call,
    model,
    sequences,
    tokenizer,
)


def whole_gradients(model, tokenizer, include, queries=QUERIES):  # noqa: F811
    """Those of queries and of passages, float64 [N, M, N] by path."""
    asked = [tokenizer.encode_query(*q[-2:]) for q in queries]
    queries = batch_of([i.tolist() for i, _ in asked], [s for _, s in asked])
    sides = []
    for batch in (queries, batch_of(sequences(tokenizer, TEXTS))):
        gradients = reference.per_example_gradients(model, batch)
        sides.append(
            {s.path: np.asarray(gradients[s.path], float) for s in find_sites(model, include)}
        )
    return sides


def cosines(sides):
    rows = [np.concatenate([x.reshape(len(x), -1) for x in s.values()], axis=1) for s in sides]
    rows = [x / np.linalg.norm(x, axis=1, keepdims=True) for x in rows]
    return rows[0] @ rows[1].T


@pytest.mark.parametrize("include", [None, "."])
@pytest.mark.parametrize("method", ["grad_cos", "exp4"])
def test_all_passages_are_ranked_by_whole_gradients(model, tokenizer, method, include):  # noqa: F811
    sides = whole_gradients(model, tokenizer, include)
    assert ("embed/embedding" in sides[0]) == (include == ".")
    if method == "exp4":
        change = {p: whitener(lambda G: G, x, "embed" in p) for p, x in sides[1].items()}
        sides = [{p: change[p](x) for p, x in s.items()} for s in sides]
        sides = balance(sides, lambda path: "embed" in path)
    how = dict(method=method, include=include)
    result = call(model, tokenizer, rerank=len(TEXTS), k=len(TEXTS), **how)
    for q, scores in enumerate(cosines(sides)):
        by_text = {p.text: p.score for p in result[q].proponents}
        got = [next(x for text, x in by_text.items() if t in text) for t in TEXTS]
        np.testing.assert_allclose(got, scores, rtol=0, atol=1e-5 if method == "grad_cos" else 1e-3)


@pytest.mark.parametrize("rerank", [0, len(TEXTS)])
@pytest.mark.parametrize("method", ["ekfac", "ekfac_cos"])
def test_influence_functions_with_and_without_projection(
    model,  # noqa: F811
    tokenizer,  # noqa: F811
    method,
    rerank,
):
    """Guards: EK-FAC's inverse on one side alone, or twice; P before it; another projection."""
    projection = Projection(side=3, pooling="matrix")
    index = tda.encode(
        model, TEXTS, tokenizer=tokenizer, method=method, projection=projection, quiet=True
    )
    (kind,) = index._kinds.values()
    factors = kind._inputs._curvature
    sites = {s.path: s for s in find_sites(model)}
    assert set(factors) == set(sites)
    rows = []
    for side in whole_gradients(model, tokenizer, None):
        parts = []
        for path, c in factors.items():
            root = (c.values + 0.1 * c.values.mean()) ** -0.5
            x = c.left @ ((c.left.T @ side[path] @ c.right) * root) @ c.right.T
            if not rerank:
                A, B = projections.matrices(sites[path], projection)
                x = A.T @ x @ B
            parts.append(x.reshape(len(x), -1))
        rows.append(np.concatenate(parts, axis=1))
    if method == "ekfac_cos":
        rows = [x / np.linalg.norm(x, axis=1, keepdims=True) for x in rows]
    found = index.query(QUERIES, k=len(TEXTS), rerank=rerank)
    for answer, scores in zip(found, rows[0] @ rows[1].T, strict=True):
        got = [next(p.score for p in answer.proponents if p.text in t) for t in TEXTS]
        np.testing.assert_allclose(got, scores, rtol=0, atol=1e-4 * np.abs(scores).max())


def test_influence_functions_keep_their_factors(model, tokenizer, tmp_path, monkeypatch):  # noqa: F811
    """A call that is repeated fits nothing anew; other passages have other factors."""
    how = dict(method="ekfac", directory=tmp_path)
    first = call(model, tokenizer, **how)
    fitted = []
    fit = fitted_curvature.fit
    monkeypatch.setattr(fitted_curvature, "fit", lambda *a: (fitted.append(1), fit(*a))[1])
    again = call(model, tokenizer, **how)
    assert not fitted and [a.proponents for a in again] == [a.proponents for a in first]
    assert {p.name for p in (tmp_path / "ekfac_seed0").iterdir()} >= {"gradients"}
    call(model, tokenizer, passages=TEXTS[:4], directory=tmp_path / "other", method="ekfac")
    assert fitted == [1]


def test_influence_functions_of_another_seed_have_a_store_of_their_own(model, tokenizer, tmp_path):  # noqa: F811
    """Guards: queries by one seed's factors against the stored passages of another's."""
    how = dict(method="ekfac_cos", k=3)
    for seed in (0, 5):
        stored = call(model, tokenizer, seed=seed, directory=tmp_path, **how)
        expected = call(model, tokenizer, seed=seed, **how)
        for a, b in zip(stored, expected, strict=True):
            assert [p.id for p in a.proponents] == [p.id for p in b.proponents]
            scores = [[p.score for p in x.proponents] for x in (a, b)]
            np.testing.assert_allclose(*scores, rtol=0, atol=1e-5)


def test_a_query_may_be_longer_than_every_passage(model, tokenizer):  # noqa: F811
    queries = [(f"The town of {a} is", b) for a in PLACES for b in PLACES.values()]
    queries[0] = ("Far in the north of Europe, behind many hills, the town of Norway is", "Oslo")
    assert len(tokenizer.encode([queries[0][0]])[0]) > max(map(len, tokenizer.encode(TEXTS)))
    result = call(model, tokenizer, queries=queries, method="trackstar", rerank=5, k=3)
    assert np.isfinite([p.score for a in result for p in a.proponents]).all()


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        (
            {"loss": lambda own_model, batch: None},
            "EK-FAC draws labels from the model's own logits",
        ),
        ({"untapped": "reference"}, "untapped='reference' has no effect with EK-FAC"),
        ({"damping": 0.1}, "damping=0.1 has no effect .* has no R"),
        ({"sample": 2}, "sample=2 has no effect"),
    ],
)
def test_what_influence_functions_cannot_do_is_refused(model, tokenizer, changes, message):  # noqa: F811
    with pytest.raises(ValueError, match=message):
        call(model, tokenizer, method="ekfac", **changes)


def test_influence_functions_of_batches_are_refused(model, tokenizer):  # noqa: F811
    batches = [batch_of(sequences(tokenizer, TEXTS))]
    with pytest.raises(ValueError, match="it is for texts .* give them and a tokenizer"):
        tda.trace(model, batches, batches, method="ekfac", quiet=True)


def test_r_has_the_damping_that_was_given(model, tokenizer):  # noqa: F811
    """Mistake: an option that one stage ignores."""
    damping = 0.3
    sides = whole_gradients(model, tokenizer, None)
    change = {p: whitener(lambda G: G, x, damping=damping) for p, x in sides[1].items()}
    sides = [{p: change[p](x) for p, x in s.items()} for s in sides]
    count = len(TEXTS)
    how = dict(method="exp4", rerank=count, k=count, damping=damping)
    for answer, scores in zip(call(model, tokenizer, **how), cosines(sides), strict=True):
        got = [next(p.score for p in answer.proponents if p.text in t) for t in TEXTS]
        np.testing.assert_allclose(got, scores, rtol=0, atol=1e-3)


def test_r_of_the_queries_is_mixed_in(model, tokenizer, monkeypatch):  # noqa: F811
    """Guards: λ of other moments than those of the correction; queries of an earlier question."""
    weights = []
    mixture = pair_metrics.mixture

    def recorded(*moments):
        weights.append(mixture(*moments)[1])
        return mixture(*moments)

    monkeypatch.setattr(pair_metrics, "mixture", recorded)
    queries = [
        (f"The {word} of {a} is", b)
        for word in ("town", "seat")
        for a in PLACES
        for b in PLACES.values()
    ]
    scales = {
        s.path: Scale(*(np.linspace(0.5, 2, n, dtype=np.float32)[None] for n in s.shape))
        for s in find_sites(model)
    }
    index = tda.encode(model, TEXTS, tokenizer=tokenizer, scales=scales, quiet=True)
    for asked in (queries[:16], queries):
        sides = [
            {p: x * scales[p].dense() for p, x in side.items()}
            for side in whole_gradients(model, tokenizer, None, asked)
        ]
        found = index.query(asked, method="trackstar", k=len(TEXTS), rerank=len(TEXTS))
        weight = weights[-1]
        assert 0 < weight < 1
        change = {
            p: whitener(lambda G: G, x, queries=sides[0][p], weight=weight)
            for p, x in sides[1].items()
        }
        expected = cosines([{p: change[p](x) for p, x in s.items()} for s in sides])
        for answer, scores in zip(found, expected, strict=True):
            got = [next(p.score for p in answer.proponents if p.text in t) for t in TEXTS]
            np.testing.assert_allclose(got, scores, rtol=0, atol=1e-3)
    assert weights[0] != weights[1]


def test_the_first_passages_of_bm25_are_scored_too(model, tokenizer):  # noqa: F811
    how = dict(method="grad_cos", k=2, rerank=2)
    alone = call(model, tokenizer, **how)
    both = call(model, tokenizer, candidates="bm25", **how)
    scores = cosines(whole_gradients(model, tokenizer, None))
    by_words = bm25.Index(TEXTS).search([" ".join(q[-2:]) for q in QUERIES], 2).proponents
    first = call(model, tokenizer, method="grad_cos", k=2)
    changes = 0
    for q, answer in enumerate(both):
        found = {int(p.id) for p in first[q].proponents}
        united = sorted(found | set(by_words[q].tolist()), key=lambda row: -scores[q, row])
        assert [int(p.id) for p in answer.proponents] == united[:2]
        changes += [p.id for p in answer.proponents] != [p.id for p in alone[q].proponents]
    assert changes
    with pytest.raises(ValueError, match="candidates='bm25' has no effect without rerank"):
        call(model, tokenizer, candidates="bm25")
    with pytest.raises(ValueError, match="candidates='dense'; give 'bm25'"):
        call(model, tokenizer, candidates="dense", rerank=3)


def test_more_passages_than_there_are_adds_none(model, tokenizer):  # noqa: F811
    """Mistake: places of a list that nothing fills, read as the last passage."""
    for answer in call(model, tokenizer, rerank=20, k=20):
        assert sorted(p.id for p in answer.proponents) == sorted(map(str, range(len(TEXTS))))
        assert np.isfinite([p.score for p in answer.proponents]).all()


def test_the_first_passages_alone_are_scored_again(model, tokenizer):  # noqa: F811
    first = call(model, tokenizer, method="grad_cos", k=4)
    again = call(model, tokenizer, method="grad_cos", k=4, rerank=4)
    for one, other in zip(first, again, strict=True):
        assert {p.id for p in one.proponents} == {p.id for p in other.proponents}
        assert [p.score for p in one.proponents] != [p.score for p in other.proponents]
        assert not other.opponents


@pytest.mark.parametrize(
    "arguments, message",
    [
        (dict(rerank=2), "rerank=2 is below k=3"),
        (dict(rerank=-1), "rerank=-1"),
        (dict(rerank=True), "rerank=True"),
        (dict(rerank=9, correction="adam"), "exact Adam correction"),
        (dict(rerank=9, include="bias", untapped="reference"), "multiply their input by a matrix"),
    ],
)
def test_what_does_not_fit_is_refused(model, tokenizer, arguments, message):  # noqa: F811
    with pytest.raises(ValueError, match=message):
        call(model, tokenizer, **arguments)
