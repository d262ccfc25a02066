"""R for questions, by every rule of R_eval, against R made by hand."""

import numpy as np
import pytest

from tda import hessian
from tda.methods import METHODS
from tda.retrieval import exact
from tda.retrieval.hessian_settings import HessianSettings
from tda.retrieval.scorer import factors
from tda.retrieval.sources import InMemory
from tda.retrieval.whitening import Whitening

WIDTHS, N, D = (3, 4), 6, 0.05
SLICES = [slice(0, 3), slice(3, 7)]
LAMBDA = 0.4
# Unlike one another, so that R is not shrunk to the identity.
SCALES = np.array([0.2, 1.0, 3.0, 0.3, 1.0, 2.0, 0.1])


def gradients(rows, seed):
    return (np.random.default_rng(seed).normal(size=(rows, 7)) * SCALES).astype(np.float32)


@pytest.fixture(scope="module")
def data():
    """The passages' and the queries' gradients, float64."""
    return gradients(40, 1).astype(np.float64), gradients(N, 2).astype(np.float64)


def whitening(data, folder=None, on_progress=None, **settings):
    passages, queries = (x.astype(np.float32) for x in data)
    source = InMemory(passages, SLICES)
    settings = HessianSettings(**settings)
    return Whitening(settings, source, queries, folder=folder, on_progress=on_progress)


def inverses(p, of_queries, own=None, n=0):
    """(λ R_eval + (1 − λ) R_train + damping)⁻¹ by block; `own` taken out of n of the queries."""
    out = []
    for s in SLICES:
        R = LAMBDA * of_queries[:, s].T @ of_queries[:, s] / (n - 1 if n else len(of_queries))
        R += (1 - LAMBDA) * p[:, s].T @ p[:, s] / len(p)
        damped = R + D * np.trace(R) / len(R) * np.eye(len(R))
        if own is not None:
            damped -= LAMBDA / (n - 1) * np.outer(own[s], own[s])
        out.append(np.linalg.inv(damped))
    return out


def cosines(p, q_E, blocks):
    def product(a, b):
        pairs = zip(SLICES, blocks, strict=True)
        return sum(np.einsum("...i,ij,...j->...", a[..., s], M, b[..., s]) for s, M in pairs)

    return product(p, q_E) / np.sqrt(product(p, p) * product(q_E, q_E))


def scored(data, rule, number, folder=None, query=0, on_progress=None):
    """Scores of all passages for a query, in their order; and the scorer."""
    p, q = (x.astype(np.float32) for x in data)
    settings = dict(weight=LAMBDA, damping=D, evaluation=rule, seed=3)
    whitened = whitening(data, folder, on_progress, **settings)
    scorer = whitened.scorer(METHODS["trackstar"], number)
    ranked = exact.search(q[query : query + 1], InMemory(p, SLICES), {"": scorer}, len(p))[""]
    out = np.empty(len(p))
    out[ranked.proponents[0]] = ranked.proponent_scores[0]
    return out, scorer


def test_a_querys_own_part_is_taken_out(data):
    p, q = data
    for number in (0, 5):
        found, scorer = scored(data, "leave_one_out", number, query=number)
        blocks = inverses(p, q, q[number], N)
        np.testing.assert_allclose(found, cosines(p, q[number], blocks), rtol=1e-3, atol=1e-4)
        F = factors(scorer, q[number], SLICES)
        for f, M in zip(F, blocks, strict=True):
            np.testing.assert_allclose(f @ f.T, M, rtol=1e-3, atol=1e-4)


def test_a_query_is_whitened_by_the_half_that_it_is_not_in(data):
    p, q = data
    halves = hessian.draw_halves(N, 3)
    for mine, others in (halves, halves[::-1]):
        for number in mine:
            found, scorer = scored(data, "disjoint", int(number), query=number)
            expected = cosines(p, q[number], inverses(p, q[others]))
            np.testing.assert_allclose(found, expected, rtol=1e-3, atol=1e-4)
            assert factors(scorer, q[number], SLICES) is scorer.roots


@pytest.mark.parametrize("rule", ["all", "leave_one_out", "disjoint"])
def test_another_question_has_all_queries(data, rule):
    p, q = data
    expected = cosines(p, q[0], inverses(p, q))
    np.testing.assert_allclose(scored(data, rule, None)[0], expected, rtol=1e-3, atol=1e-4)


def test_a_method_has_a_rule_of_its_own(data):
    whitened = whitening(data, evaluation="all")
    own = whitened.scorer(METHODS["trackstar_leave_one_out"], 2).query_weights
    assert len(own) == len(WIDTHS)
    assert whitened.scorer(METHODS["trackstar"], 2).query_weights == ()


def test_too_few_queries_for_the_rule_are_refused(data):
    """As a run refuses them: three of a half have three directions in a block of four."""

    def scorer(component, number):
        whitened = whitening(data, component=component, evaluation="disjoint", seed=3)
        return whitened.scorer(METHODS["trackstar"], number)

    with pytest.raises(ValueError, match="3 queries.*component 7.*hessian.weight.*exp5"):
        scorer(7, 0)
    assert len(scorer(6, 0).roots) == 2 and len(scorer(7, None).roots) == 2


def test_r_is_shrunk_and_cut_off(data):
    """As `damping` = −1 and `cutoff` say; R_train is shrunk, not the queries' part of R."""
    settings = dict(weight=LAMBDA, damping=-1.0, cutoff=0.5, evaluation="leave_one_out")
    scorer = whitening(data, **settings).scorer(METHODS["trackstar"], 1)
    train, evaluation = (
        hessian.autocorrelation_of_source(InMemory(x.astype(np.float32), SLICES)) for x in data
    )
    shares = hessian.shrinkage(train.blocks, train.noise)
    assert (shares > 0).all() and (shares < 1).all()
    grown = [b * N / (N - 1) for b in evaluation.blocks]
    R = list(hessian.mix(list(hessian.shrink(train.blocks, shares)), grown, LAMBDA))
    expected = hessian.inverse_root(R, 1e-6, 0.5)
    for got, root in zip(scorer.roots, expected, strict=True):
        np.testing.assert_allclose(got, root, rtol=1e-4, atol=1e-5)
    assert any(np.linalg.matrix_rank(root, tol=1e-4) < len(root) for root in expected)
    np.testing.assert_allclose(scorer.query_weights, [LAMBDA / (N - 1)] * 2, rtol=1e-6)


def test_what_is_kept_is_read_with_its_own_part(data, tmp_path):
    told: list[list[str]] = [[], []]
    one, other = (
        scored(
            data, "leave_one_out", 1, tmp_path, on_progress=lambda *t, i=i: told[i].append(t[0])
        )[1]
        for i in range(2)
    )
    assert told[1] == ["reading R"] and "decomposing R" in told[0]
    assert one.query_weights == other.query_weights and len(one.query_weights) == len(WIDTHS)
    for a, b in zip(one.roots, other.roots, strict=True):
        np.testing.assert_array_equal(a, b)
