"""`tda.trace(rerank=)` against whole gradients of a user's model."""

import numpy as np
import pytest

from tda.gradients import reference
from tda.gradients.sites import find_sites
from tests.gradients.test_pair_products import whitener
from tests.test_api import QUERIES, TEXTS, batch_of, call, model, sequences, tokenizer  # noqa: F401


def whole_gradients(model, tokenizer, include):  # noqa: F811
    """Those of queries and of passages, float64 [N, M, N] by path."""
    asked = [tokenizer.encode_query(*q[-2:]) for q in QUERIES]
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
    how = dict(method=method, include=include)
    result = call(model, tokenizer, rerank=len(TEXTS), k=len(TEXTS), **how)
    for q, scores in enumerate(cosines(sides)):
        by_text = {p.text: p.score for p in result[q].proponents}
        got = [next(x for text, x in by_text.items() if t in text) for t in TEXTS]
        np.testing.assert_allclose(got, scores, rtol=0, atol=1e-5 if method == "grad_cos" else 1e-3)


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
        (dict(rerank=9, method="trackstar"), "R without projection is R of the passages"),
        (dict(rerank=9, correction="adam"), "exact Adam correction"),
        (dict(rerank=9, include="bias", untapped="reference"), "multiply their input by a matrix"),
    ],
)
def test_what_does_not_fit_is_refused(model, tokenizer, arguments, message):  # noqa: F811
    with pytest.raises(ValueError, match=message):
        call(model, tokenizer, **arguments)
