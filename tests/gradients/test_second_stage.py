"""Scores of pairs by whole gradients: of any choice of pairs, in portions, groups, on a mesh."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from tda.data.batches import BatchLayout
from tda.gradients import pair_metrics, pair_products, reference, second_stage
from tda.gradients.factors import GradientFactors
from tda.gradients.second_stage import Pairs, PairScorer
from tda.gradients.sites import find_sites
from tda.runtime import sharding
from tda.runtime.groups import Groups
from tests.gradients.test_kronecker import table

PASSAGES, QUERIES = table((5, 8, 2, 6, 3, 7)), table((4, 2, 4, 3), seed=1)
# The last two tokens of each query are scored.
QUERIES.scored[:] = np.isin(
    np.arange(len(QUERIES.tokens)) + 2, [*QUERIES.starts, *QUERIES.starts + 1]
)
LAYOUT = BatchLayout((4, 8), tokens_per_batch=24, pad=0)
ALL = [np.arange(6)] * 4
LISTS = [np.array(rows) for rows in ([3, 0], [3, 2, 4], [], [1])]


@pytest.fixture(scope="module")
def model(decoder):
    return decoder()


@pytest.fixture(scope="module")
def factors(model):
    return GradientFactors(model, find_sites(model, "."))


@pytest.fixture(scope="module")
def expected_QxC(model):
    """Products of whole gradients, and cosines."""
    sides = []
    for t in (QUERIES, PASSAGES):
        (batch,) = dataclasses.replace(LAYOUT, bucket_lengths=(8,), tokens_per_batch=48).batches(t)
        g = jax.jit(lambda b: reference.per_example_gradients(model, b))(batch.arrays())
        rows = [np.asarray(g[s.path], np.float64).reshape(6, -1) for s in find_sites(model, ".")]
        sides.append(np.concatenate(rows, axis=1)[: len(t)])
    dot = sides[0] @ sides[1].T
    norms = [np.linalg.norm(x, axis=1) for x in sides]
    return {"dot": dot, "cosine": dot / np.outer(*norms)}


def scorer(factors, memory=1 << 30, layout=LAYOUT):
    metric = pair_metrics.identity(list(factors.sites))
    return PairScorer(factors, {"dot": (metric, False), "cosine": (metric, True)}, layout, memory)


def assert_right(scores, pairs, expected_QxC):
    for name, scores_P in scores.items():
        atol = 1e-5 * np.abs(expected_QxC[name]).max()
        for q, (rows, got) in enumerate(pairs.by_query(scores_P, len(QUERIES))):
            np.testing.assert_allclose(got, expected_QxC[name][q, rows], rtol=0, atol=atol)


def test_scores_are_those_of_whole_gradients(factors, expected_QxC):
    for pairs in (Pairs.of_lists(LISTS), Pairs.of_lists(ALL)):
        scores = scorer(factors).score(QUERIES, PASSAGES, pairs)
        assert_right(scores, pairs, expected_QxC)
    rows = [rows.tolist() for rows, _ in Pairs.of_lists(LISTS).by_query(np.zeros(6), 4)]
    assert rows == [[0, 3], [2, 3, 4], [], [1]]


def test_queries_are_held_where_they_have_gradients(model, factors):
    """Guards: V numbers of a tied head at every position of a query; bytes that are not counted."""
    few = scorer(factors)
    side = few._query_side(QUERIES, np.arange(4))["dot"]
    rows, head = side.factors["embedding/embedding"]
    assert (rows.looks_up, head.looks_up) == (True, False)
    assert rows.inputs.shape == (4, 4, 1) and head.inputs.shape == (4, 2, model.vocab_size)
    metric = pair_metrics.identity(list(factors.sites))
    batch = next(iter(LAYOUT.batches(QUERIES, np.array([0])))).arrays()
    changed = pair_products.transform(metric, factors(batch))
    arrays = jax.tree.leaves(changed)
    # Two metrics.
    assert few._bytes(4) == 2 * sum(x.nbytes for x in arrays) // len(batch["tokens"])


@pytest.mark.parametrize("lists", [ALL, LISTS], ids=["all", "few"])
def test_lists_of_queries_are_scored_in_calls_of_a_size_that_fits(
    factors, expected_QxC, monkeypatch, lists
):
    sizes = []
    listed = pair_products.listed_products
    monkeypatch.setattr(second_stage, "_LISTS", (1, 3))
    monkeypatch.setattr(pair_products, "operations", lambda *_: (0, 1))
    monkeypatch.setattr(
        pair_products, "listed_products", lambda *a: (sizes.append(a[-1].shape[1]), listed(*a))[1]
    )
    pairs = Pairs.of_lists(lists)
    assert_right(scorer(factors).score(QUERIES, PASSAGES, pairs), pairs, expected_QxC)
    # Four queries take two calls of three, and up to one query one of one.
    assert set(sizes) == ({3} if lists is ALL else {1, 3})


def test_queries_that_do_not_fit_into_memory_are_scored_in_portions(factors, expected_QxC):
    pairs, seen = Pairs.of_lists(LISTS), []
    few = scorer(factors, memory=1)
    assert few.passes(QUERIES, np.arange(4)) == 4
    assert_right(few.score(QUERIES, PASSAGES, pairs, on_passages=seen.append), pairs, expected_QxC)
    assert sum(seen) == 6  # once for each of its queries


def test_killed_scores_resume_to_identical_bytes(factors, tmp_path, monkeypatch):
    monkeypatch.setattr(second_stage, "_PASSAGES_PER_GROUP", 2)
    groups, pairs = Groups(tmp_path), Pairs.of_lists(ALL)
    first = scorer(factors).score(QUERIES, PASSAGES, pairs, groups, "id")
    files = sorted(tmp_path.glob("*/*.npz"))
    assert len(files) == 3
    files[1].unlink()
    computed = []
    monkeypatch.setattr(
        PairScorer,
        "_score_group",
        lambda self, *args, old=PairScorer._score_group: (computed.append(1), old(self, *args))[1],
    )
    second = scorer(factors).score(QUERIES, PASSAGES, pairs, groups, "id")
    assert len(computed) == 1 and second["dot"].tobytes() == first["dot"].tobytes()
    # Other gradients are other work.
    scorer(factors).score(QUERIES, PASSAGES, pairs, groups, "other")
    assert len(computed) == 4


def test_scores_are_the_same_on_a_mesh(model, factors, expected_QxC):
    mesh = sharding.make_mesh(data=2, fsdp=2, tensor=2)
    layout = dataclasses.replace(LAYOUT, tokens_per_batch=32, mesh=mesh)
    pairs, alone = Pairs.of_lists(LISTS), factors
    factors = GradientFactors(model, find_sites(model, "."), mesh=mesh)
    scores = scorer(factors, layout=layout).score(QUERIES, PASSAGES, pairs)
    assert_right(scores, pairs, expected_QxC)
    # Moments too: of a table's rows the diagonal.
    metric, rows = pair_metrics.identity(list(factors.sites)), np.arange(6)
    expected = pair_products.fit_moments(alone, metric, LAYOUT, PASSAGES, rows)
    with jax.set_mesh(mesh):
        moments = pair_products.fit_moments(factors, metric, layout, PASSAGES, rows)
    assert moments["embedding/embedding"][0].shape == (model.vocab_size,)
    for path, pair in expected.items():
        for x, y in zip(moments[path], pair, strict=True):
            np.testing.assert_allclose(x, y, rtol=0, atol=1e-5 * np.abs(y).max())


def test_a_score_that_is_not_finite_ranks_last(factors, monkeypatch):
    monkeypatch.setattr(pair_products, "norms", lambda metric, x: jnp.full(8, jnp.nan))
    scores = scorer(factors).score(QUERIES, PASSAGES, Pairs.of_lists(LISTS))
    assert np.isneginf(scores["cosine"]).all() and np.isfinite(scores["dot"]).all()
