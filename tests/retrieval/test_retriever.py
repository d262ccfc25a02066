"""The retriever against exact search over its source, in memory and through an index."""

import functools

import jax
import numpy as np
import pytest

from tda import hessian
from tda import store as stores
from tda.retrieval import exact
from tda.retrieval.retriever import Retriever
from tda.retrieval.scorer import Scorer
from tda.retrieval.sources import InMemory
from tda.runtime import sharding

BLOCKS = {"a": 3, "b": 5}
SLICES = [slice(0, 3), slice(3, 8)]


@pytest.fixture
def data():
    rng = np.random.default_rng(0)
    return rng.normal(size=(5, 8)).astype(np.float32), rng.normal(size=(97, 8)).astype(np.float32)


@pytest.fixture
def store(data, tmp_path):
    ids = [f"p{i}" for i in range(97)]
    texts = [f"text {i}" for i in range(97)]
    out = stores.create(tmp_path / "s", ids, BLOCKS, {}, shard_bytes=32 * 32, texts=texts)
    for i in out.missing():
        out.write(i, data[1][out.shards()[i]])
    return out


@pytest.fixture(autouse=True)
def small_steps(monkeypatch):
    monkeypatch.setattr(exact, "step_rows", lambda width, devices, touched: 16 * devices)


def scorer(x, whitened=True, unit_norm=True):
    R = hessian.autocorrelation_of_source(InMemory(x, SLICES)).blocks
    return Scorer(hessian.inverse_root(R) if whitened else None, unit_norm)


def assert_same(one, other):
    np.testing.assert_array_equal(one.proponents, other.proponents)
    np.testing.assert_array_equal(one.opponents, other.opponents)
    np.testing.assert_allclose(one.proponent_scores, other.proponent_scores, rtol=1e-5)
    np.testing.assert_allclose(one.opponent_scores, other.opponent_scores, rtol=1e-5)
    assert sorted(one.first_ranks) == sorted(other.first_ranks)
    for label, ranks in one.first_ranks.items():
        np.testing.assert_array_equal(ranks, other.first_ranks[label])


@pytest.mark.parametrize("devices", [1, 4])
@pytest.mark.parametrize("whitened", [False, True])
@pytest.mark.parametrize("unit_norm", [False, True])
def test_equals_exact_search_over_its_source(data, store, devices, whitened, unit_norm):
    queries, passages = data
    method = scorer(passages, whitened, unit_norm)
    mesh = None
    if devices > 1:
        mesh = sharding.make_mesh(devices=jax.devices()[:devices])
    correct = {
        "all": [np.array([3, 90]), np.array([], np.int64), *[np.array([i]) for i in (1, 40, 96)]]
    }
    seen = []
    retriever = Retriever(store, method, mesh=mesh, on_rows=seen.append)
    wanted = exact.search(queries, store, {"m": method}, 7, correct)["m"]
    assert_same(retriever.search(queries, 7, correct), wanted)
    assert sum(seen) == retriever.rows == 97
    alone = retriever.search(queries, 7, correct, opponents=False)
    np.testing.assert_array_equal(alone.proponents, wanted.proponents)
    assert alone.opponents.shape == (len(queries), 0)


def test_an_answer_has_the_passages_with_their_texts(data, store):
    queries, passages = data
    method = scorer(passages)
    answer = Retriever(store, method).ask(queries[2], 3)
    wanted = exact.search(queries, store, {"m": method}, 3)["m"]
    assert [h.row for h in answer.proponents] == wanted.proponents[2].tolist()
    assert [h.row for h in answer.opponents] == wanted.opponents[2].tolist()
    assert [h.passage.text for h in answer.proponents] == [
        f"text {i}" for i in wanted.proponents[2]
    ]
    scores = [h.score for h in answer.proponents + answer.opponents[::-1]]
    assert scores == sorted(scores, reverse=True)
    # An array has no passages, only rows.
    bare = Retriever(InMemory(passages, SLICES), method).ask(queries[2], 3)
    assert [(h.row, h.passage) for h in bare.proponents] == [
        (h.row, None) for h in answer.proponents
    ]


def test_withdrawn_and_invalid_passages_are_never_retrieved(data, store):
    queries, passages = data
    method = scorer(passages)
    best = Retriever(store, method).search(queries, 5).proponents[:, 0]
    store.withdraw([f"p{i}" for i in best])
    found = Retriever(store, method).search(queries, 97)
    assert not np.isin(found.proponents, best).any() and not np.isin(found.opponents, best).any()
    assert found.proponents.shape[1] == 97 - len(set(best.tolist()))


def test_through_an_index(data, store, tmp_path):
    pytest.importorskip("scann", reason="ScaNN is not installed: pip install 'tda[scann]'")
    from tda.retrieval import scorer as scoring
    from tda.retrieval.scann import build

    queries, passages = data
    method = scorer(passages)
    # Two ways to score candidates by their encodings: kept in the index, or read from the store.
    for name, changes in {
        "kept": dict(reorder=97, reorder_dtype="float32"),
        "read": dict(reorder=0),
    }.items():
        settings = build.Settings(97, dims_per_block=2, training_rows=97, **changes)
        read = functools.partial(scoring.read_encodings, store, method)
        index = build.build(tmp_path / name, read, (97, 8), settings, {})
        retriever = Retriever(store, method, index)
        wanted = exact.search(queries, store, {"m": method}, 4)["m"]
        assert_same(retriever.search(queries, 4), wanted)
        alone = retriever.search(queries, 4, opponents=False)
        np.testing.assert_array_equal(alone.proponents, wanted.proponents)
        assert alone.opponents.shape == (len(queries), 0)
        with pytest.raises(ValueError, match="does not know the rank of every row"):
            retriever.search(queries, 4, {"all": [np.array([1])] * 5})
    gone = wanted.proponents[0, 0]
    store.withdraw([f"p{gone}"])
    assert gone not in Retriever(store, method, index).search(queries, 4).proponents
    with pytest.raises(ValueError, match="has 97 rows of 8 numbers, the source 96 of 8"):
        Retriever(InMemory(passages[:96], SLICES), method, index)


def test_refusals(data, store):
    queries, passages = data
    method = scorer(passages)
    with pytest.raises(ValueError, match="takes a query's own part out of R"):
        Retriever(store, Scorer(method.roots, True, query_weights=(0.1, 0.1)))
    with pytest.raises(ValueError, match="97 rows take .* more than memory_bytes"):
        Retriever(store, method, memory_bytes=97 * 8 * 4 - 1)
    retriever = Retriever(store, method, memory_bytes=97 * 8 * 4)
    with pytest.raises(ValueError, match=r"queries \[5, 7\] do not fit rows of 8 numbers"):
        retriever.search(queries[:, :7])
    with pytest.raises(ValueError, match="query 1 is not finite"):
        retriever.search(np.where(np.arange(5)[:, None] == 1, np.nan, queries))
