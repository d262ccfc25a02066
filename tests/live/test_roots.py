"""R for questions, by every rule of R_eval, against R made by hand."""

import numpy as np
import pytest

from tda import hessian
from tda import store as stores
from tda.gradients.projection import Projection
from tda.live import Encoded, Hessian
from tda.live.roots import Roots, factors
from tda.methods import METHODS, GradientKind
from tda.retrieval import exact

WIDTHS, N, D = (3, 4), 6, 0.05
SLICES = [slice(0, 3), slice(3, 7)]
LAMBDA = 0.4
# Unlike one another, so that R is not shrunk to the identity.
SCALES = np.array([0.2, 1.0, 3.0, 0.3, 1.0, 2.0, 0.1])
KEY = GradientKind(corrected=True)


def store(path, rows, seed):
    x = np.random.default_rng(seed).normal(size=(rows, 7)) * SCALES
    x = x.astype(np.float32)
    names = [f"r{i}" for i in range(rows)]
    found = stores.create(path, names, {"a": 3, "b": 4}, {"made": "here"}, texts=names)
    for i, rows_of in enumerate(found.shards()):
        found.write(i, x[rows_of])
    return found, x.astype(np.float64)


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    """Encoded gradients, and the passages' and queries' rows."""
    folder = tmp_path_factory.mktemp("roots")
    corpus, p = store(folder / "corpus", 40, 1)
    queries, q = store(folder / "queries", N, 2)
    return {KEY: Encoded(corpus, queries, Projection(side=2))}, p, q


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


def scored(made, rule, number, folder=None, query=0, told=lambda *t: None):
    """Scores of all passages for a query, in their order; and the scorer."""
    encoded, _, q = made
    roots = Roots(encoded, Hessian(weight=LAMBDA, damping=D, evaluation=rule, seed=3), folder)
    scorer = roots.scorer(METHODS["trackstar"], number, KEY, told)
    corpus = encoded[KEY].store
    query_1xE = q[query : query + 1].astype(np.float32)
    found = exact.search(query_1xE, corpus, {"": scorer}, corpus.rows)[""]
    out = np.empty(corpus.rows)
    out[found.proponents[0]] = found.proponent_scores[0]
    return out, scorer


def test_a_querys_own_part_is_taken_out(made):
    _, p, q = made
    for number in (0, 5):
        found, scorer = scored(made, "leave_one_out", number, query=number)
        blocks = inverses(p, q, q[number], N)
        np.testing.assert_allclose(found, cosines(p, q[number], blocks), rtol=1e-3, atol=1e-4)
        F = factors(scorer, q[number], SLICES)
        for f, M in zip(F, blocks, strict=True):
            np.testing.assert_allclose(f.T @ f, M, rtol=1e-3, atol=1e-4)


def test_a_query_is_whitened_by_the_half_that_it_is_not_in(made):
    _, p, q = made
    halves = hessian.halves(N, 3)
    for mine, others in (halves, halves[::-1]):
        for number in mine:
            found, scorer = scored(made, "disjoint", int(number), query=number)
            expected = cosines(p, q[number], inverses(p, q[others]))
            np.testing.assert_allclose(found, expected, rtol=1e-3, atol=1e-4)
            assert factors(scorer, q[number], SLICES) is scorer.roots


@pytest.mark.parametrize("rule", ["all", "leave_one_out", "disjoint"])
def test_another_question_has_all_queries(made, rule):
    _, p, q = made
    expected = cosines(p, q[0], inverses(p, q))
    np.testing.assert_allclose(scored(made, rule, None)[0], expected, rtol=1e-3, atol=1e-4)


def test_a_method_has_a_rule_of_its_own(made):
    roots = Roots(made[0], Hessian(evaluation="all"))
    chosen = METHODS["trackstar_leave_one_out"]
    assert len(roots.scorer(chosen, 2, KEY, lambda *t: None).own) == len(WIDTHS)
    assert roots.scorer(METHODS["trackstar"], 2, KEY, lambda *t: None).own == ()


def test_too_few_queries_for_the_rule_are_refused(made):
    """As a run refuses them: three of a half have three directions in a block of four."""

    def scorer(component, number):
        how = Hessian(component=component, evaluation="disjoint", seed=3)
        return Roots(made[0], how).scorer(METHODS["trackstar"], number, KEY, lambda *t: None)

    with pytest.raises(ValueError, match="3 queries.*component 7.*hessian.weight.*exp5"):
        scorer(7, 0)
    assert len(scorer(6, 0).roots) == 2 and len(scorer(7, None).roots) == 2


def test_r_is_shrunk_and_cut_off(made):
    """As `damping` = −1 and `cutoff` say; what is taken out again is shrunk with the rest."""
    encoded, _, q = made
    how = Hessian(weight=LAMBDA, damping=-1.0, cutoff=0.5, evaluation="leave_one_out")
    scorer = Roots(encoded, how).scorer(METHODS["trackstar"], 1, KEY, lambda *t: None)
    train = hessian.of_source(encoded[KEY].store)
    evaluation = hessian.of_source(exact.InMemory(q.astype(np.float32), SLICES))
    grown = [b * N / (N - 1) for b in evaluation.blocks]
    R = list(hessian.mix(train.blocks, grown, LAMBDA))
    shares = hessian.shrinkage(R, LAMBDA**2 * evaluation.noise + (1 - LAMBDA) ** 2 * train.noise)
    assert (shares > 0).all() and (shares < 1).all()
    expected = hessian.inverse_root(hessian.shrunk(R, shares), 1e-6, 0.5)
    for got, root in zip(scorer.roots, expected, strict=True):
        np.testing.assert_allclose(got, root, rtol=1e-4, atol=1e-5)
    assert any(np.linalg.matrix_rank(root, tol=1e-4) < len(root) for root in expected)
    np.testing.assert_allclose(scorer.own, (1 - shares) * LAMBDA / (N - 1), rtol=1e-6)


def test_what_is_kept_is_read_with_its_own_part(made, tmp_path):
    told: list[list[str]] = [[], []]
    one, other = (
        scored(made, "leave_one_out", 1, tmp_path, told=lambda *t, i=i: told[i].append(t[0]))[1]
        for i in range(2)
    )
    assert told[1] == ["reading R"] and "decomposing R" in told[0]
    assert one.own == other.own and len(one.own) == len(WIDTHS)
    for a, b in zip(one.roots, other.roots, strict=True):
        np.testing.assert_array_equal(a, b)
