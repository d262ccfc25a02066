"""Exact search against a direct computation, ties and signs included."""

import dataclasses
import sys

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from tda import hessian
from tda import store as stores
from tda.hessian import block_slices
from tda.retrieval import best, exact, ranked
from tda.retrieval.scorer import Scorer
from tda.retrieval.sources import InMemory
from tda.runtime import sharding

SLICES = [slice(0, 3), slice(3, 8)]


@pytest.fixture
def data():
    rng = np.random.default_rng(0)
    return rng.normal(size=(5, 8)).astype(np.float32), rng.normal(size=(97, 8)).astype(np.float32)


@pytest.fixture(autouse=True)
def small_steps(monkeypatch):
    """Searches take 16 rows at a time, or what a test sets."""
    steps = {"rows": 16}
    monkeypatch.setattr(exact, "step_rows", lambda width, devices, touched: steps["rows"] * devices)
    return steps


@pytest.fixture(params=[(3, 5), (2, 2, 2, 2)], ids=str)
def widths(request, monkeypatch):
    """Blocks of several widths, and alike: these are looped over."""
    monkeypatch.setattr(sys.modules[__name__], "SLICES", block_slices(request.param))
    return request.param


def source(x):
    return InMemory(x, SLICES)


def naive(queries, passages, roots, unit_norm):
    def encode(x):
        if roots is not None:
            x = np.concatenate([x[:, s] @ r for s, r in zip(SLICES, roots, strict=True)], axis=1)
        return x / np.linalg.norm(x, axis=1, keepdims=True) if unit_norm else x

    return encode(queries) @ encode(passages).T


@pytest.mark.parametrize("whitened", [False, True])
@pytest.mark.parametrize("unit_norm", [False, True])
@pytest.mark.parametrize("step", [8, 128])
@pytest.mark.parametrize("devices", [1, 4])
def test_equals_the_direct_computation(
    data, small_steps, widths, whitened, unit_norm, step, devices
):
    """Mistakes: proponents and opponents swapped; unit norm left out."""
    queries, passages = data
    small_steps["rows"] = step
    mesh = None if devices == 1 else sharding.make_mesh(2, 2, devices=jax.devices()[:devices])
    R = hessian.autocorrelation_of_source(InMemory(passages, SLICES)).blocks
    roots = hessian.inverse_root(R) if whitened else None
    correct = {
        "all": [np.array([3, 50]), np.array([96]), np.array([], int), np.array([0]), np.array([7])]
    }
    found = exact.search(
        queries, source(passages), {"m": Scorer(roots, unit_norm)}, 10, correct, mesh
    )["m"]
    scores = naive(queries, passages, roots, unit_norm)
    order = np.argsort(-scores, axis=1)
    np.testing.assert_array_equal(found.proponents, order[:, :10])
    np.testing.assert_array_equal(found.opponents, order[:, ::-1][:, :10])
    np.testing.assert_allclose(
        found.proponent_scores, np.take_along_axis(scores, order[:, :10], 1), rtol=2e-4, atol=1e-5
    )
    for q, rows in enumerate(correct["all"]):
        places = [int(np.flatnonzero(order[q] == r)[0]) + 1 for r in rows]
        assert found.first_ranks["all"][q] == min(places, default=0)


class Ragged(InMemory):
    """A source whose files end in the middle of a step."""

    def scan(self, step):
        for first in range(0, self.rows, 29):
            for rows in InMemory(self._gradients[first : first + 29], SLICES).scan(step):
                yield dataclasses.replace(rows, first=first + rows.first)


@pytest.mark.parametrize("devices", [1, 4])
@pytest.mark.parametrize("whitened", [False, True])
@pytest.mark.parametrize("unit_norm", [False, True])
def test_held_rows_are_ranked_as_those_of_their_source(
    data, tmp_path, monkeypatch, whitened, unit_norm, devices
):
    """Rows and correct rows of a store with a withdrawn passage; later searches read nothing."""
    queries, passages = data
    ids = [f"p{i}" for i in range(97)]
    store = stores.create(tmp_path, ids, {"a": 3, "b": 5}, {}, shard_bytes=32 * 32)
    for i in store.missing():
        store.write(i, passages[store.shards()[i]])
    roots = hessian.inverse_root(hessian.autocorrelation_of_source(store).blocks)
    scorers = {"m": Scorer(roots if whitened else None, unit_norm)}
    best_rows = exact.search(queries, store, scorers, 5)["m"].proponents[:, 0]
    store.withdraw([f"p{i}" for i in best_rows])
    mesh = None if devices == 1 else sharding.make_mesh(devices=jax.devices()[:devices])
    correct = {
        "all": [np.array([3, 90]), np.array([], np.int64), *[np.array([i]) for i in (1, 40, 96)]]
    }
    expected = exact.search(queries, store, scorers, 97, correct)["m"]
    held = exact.Held(store, mesh)
    for _ in range(2):
        found = exact.search(queries, held, scorers, 97, correct, mesh)["m"]
        np.testing.assert_array_equal(found.proponents, expected.proponents)
        np.testing.assert_array_equal(found.opponents, expected.opponents)
        np.testing.assert_allclose(found.proponent_scores, expected.proponent_scores, rtol=1e-5)
        np.testing.assert_allclose(found.opponent_scores, expected.opponent_scores, rtol=1e-5)
        np.testing.assert_array_equal(found.first_ranks["all"], expected.first_ranks["all"])
        assert not np.isin(found.proponents, best_rows).any()
        monkeypatch.setattr(store, "scan", None)


@pytest.mark.parametrize("devices", [1, 4])
def test_a_step_is_compiled_once(data, small_steps, devices):
    """However many correct rows a step has, and wherever files end."""
    queries, passages = data
    small_steps["rows"] = 8
    rng = np.random.default_rng(0)
    correct = {"all": [rng.permutation(97)[:n] for n in (40, 1, 0, 9, 2)]}
    mesh = None if devices == 1 else sharding.make_mesh(devices=jax.devices()[:devices])
    scorers = {"m": Scorer([np.eye(3, dtype=np.float32), np.eye(5, dtype=np.float32)], True)}
    before = exact._advance._cache_size()
    found = exact.search(queries, Ragged(passages, SLICES), scorers, 10, correct, mesh)["m"]
    # On a mesh the first state is laid out by hand, and the next by the program.
    assert exact._advance._cache_size() <= before + (1 if mesh is None else 2)
    whole = exact.search(queries, source(passages), scorers, 10, correct, mesh)["m"]
    np.testing.assert_array_equal(found.proponents, whole.proponents)
    np.testing.assert_array_equal(found.first_ranks["all"], whole.first_ranks["all"])


def test_several_methods_in_one_scan_equal_each_alone(data):
    queries, passages = data
    scorers = {"dot": Scorer(None, False), "cos": Scorer(None, True)}
    both = exact.search(queries, source(passages), scorers, 5)
    for name, scorer in scorers.items():
        alone = exact.search(queries, source(passages), {name: scorer}, 5)
        np.testing.assert_array_equal(both[name].proponents, alone[name].proponents)


@pytest.mark.parametrize("devices", [1, 4])
def test_proponents_alone_are_those_of_a_search_for_both(data, devices):
    queries, passages = data
    correct = {"all": [np.array([i]) for i in range(5)]}
    mesh = None if devices == 1 else sharding.make_mesh(devices=jax.devices()[:devices])
    scorers = {"m": Scorer(None, True)}
    both = exact.search(queries, source(passages), scorers, 7, correct, mesh)["m"]
    found = exact.search(queries, source(passages), scorers, 7, correct, mesh, opponents=False)["m"]
    np.testing.assert_array_equal(found.proponents, both.proponents)
    np.testing.assert_array_equal(found.proponent_scores, both.proponent_scores)
    np.testing.assert_array_equal(found.first_ranks["all"], both.first_ranks["all"])
    assert found.opponents.shape == found.opponent_scores.shape == (5, 0)


def test_a_method_that_scores_all_alike_gets_the_last_rank(data):
    queries, passages = data
    same = np.ones_like(passages)
    found = exact.search(
        queries,
        source(same),
        {"m": Scorer(None, True)},
        5,
        {"all": [np.array([0, 1])] * 5},
    )["m"]
    assert (found.first_ranks["all"] == 96).all()  # behind the 95 that are not correct


@pytest.mark.parametrize("devices", [1, 4])
def test_a_row_that_labels_name_twice_counts_once(data, devices):
    queries, passages = data
    mesh = None if devices == 1 else sharding.make_mesh(devices=jax.devices()[:devices])
    once = [np.array([q, 90]) for q in range(5)]
    twice = [np.array([90, q, q, 90]) for q in range(5)]
    found = exact.search(
        queries,
        source(passages),
        {"a": Scorer(None, False)},
        3,
        {"once": once, "twice": twice},
        mesh,
    )["a"].first_ranks
    np.testing.assert_array_equal(found["twice"], found["once"])
    assert ranked.first_rank(np.array([3.0, 2, 1]), np.array([1, 1])) == 2


def test_queries_that_have_no_ranking_are_refused(data):
    queries, passages = data
    with pytest.raises(ValueError, match="no queries"):
        exact.search(queries[:0], source(passages), {"a": Scorer(None, False)})
    queries[3, 2] = np.nan
    with pytest.raises(ValueError, match=r"query 3 \(from 0\) is not finite"):
        exact.search(queries, source(passages), {"a": Scorer(None, False)})


def test_a_zero_gradient_scores_zero_and_not_nan(data):
    queries, passages = data
    passages = passages.copy()
    passages[4] = 0
    found = exact.search(queries, source(passages), {"m": Scorer(None, True)}, 97)["m"]
    assert np.isfinite(found.proponent_scores).all()
    assert (found.proponent_scores[found.proponents == 4] == 0).all()


def test_fewer_passages_than_k(data):
    queries, passages = data
    found = exact.search(queries, source(passages[:3]), {"m": Scorer(None, True)}, 10)["m"]
    assert found.proponents.shape == (5, 3)


def test_first_rank_and_top_break_ties_against_the_method():
    scores = np.array([1.0, 5, 5, 0, 5])
    assert ranked.first_rank(scores, np.array([2])) == 3
    assert ranked.first_rank(scores, np.array([1, 2, 4])) == 1
    assert ranked.first_rank(scores, np.array([3])) == 5
    assert ranked.first_rank(scores, np.array([], int)) == 0
    np.testing.assert_array_equal(ranked.top(scores, 2), [1, 2])
    np.testing.assert_array_equal(ranked.top(scores, 9), [1, 2, 4, 0, 3])


def test_a_ranking_is_kept_and_read_again(data, tmp_path):
    queries, passages = data
    scorers, correct = {"m": Scorer(None, True)}, {"all": [np.array([1])] * 5}
    found = exact.search(queries, source(passages), scorers, 5, correct)["m"]
    ranked.save(tmp_path / "r.npz", found)
    again = ranked.load(tmp_path / "r.npz")
    for name in ("proponents", "proponent_scores", "opponents", "opponent_scores"):
        np.testing.assert_array_equal(getattr(again, name), getattr(found, name))
    np.testing.assert_array_equal(again.first_ranks["all"], found.first_ranks["all"])


@pytest.mark.parametrize("unit_norm", [False, True])
def test_invalid_rows_are_never_retrieved(data, unit_norm):
    queries, passages = data
    holes = passages.copy()
    holes[[3, 20, 96]] = np.inf
    correct = {"all": [np.array([3, 50]), np.array([96]), np.array([0]), *[np.array([7])] * 2]}
    kept = np.delete(np.arange(97), [3, 20, 96])
    search = lambda x, k, correct: exact.search(  # noqa: E731
        queries, source(x), {"m": Scorer(None, unit_norm)}, k, correct
    )["m"]
    found = search(holes, 10, correct)
    moved = {"all": [np.flatnonzero(np.isin(kept, rows)) for rows in correct["all"]]}
    expected = search(passages[kept], 10, moved)
    np.testing.assert_array_equal(found.proponents, kept[expected.proponents])
    np.testing.assert_array_equal(found.opponents, kept[expected.opponents])
    np.testing.assert_array_equal(found.first_ranks["all"], expected.first_ranks["all"])
    assert found.first_ranks["all"][1] == 0  # its only correct passage is invalid
    everything = search(holes, 97, correct)
    assert everything.proponents.shape == (5, 94) and np.isfinite(everything.proponent_scores).all()
    assert everything.opponents.shape == (5, 94) and not (everything.opponents == 20).any()


def test_duplicates_come_in_the_order_of_their_rows(data, small_steps):
    """Guards: ties that depend on where a step or a device begins."""
    queries, passages = data
    copies = np.tile(passages[:20], (8, 1))
    for step, devices in ((8, 1), (256, 1), (16, 4)):
        small_steps["rows"] = step
        mesh = sharding.make_mesh(devices=jax.devices()[:devices])
        found = exact.search(queries, source(copies), {"m": Scorer(None, True)}, 12, mesh=mesh)["m"]
        for rows in (found.proponents, found.opponents):
            # Eight copies of the best, then four of the next.
            np.testing.assert_array_equal(rows[:, :8], rows[:, :1] + 20 * np.arange(8))
            np.testing.assert_array_equal(rows[:, 8:], rows[:, 8:9] + 20 * np.arange(4))
            assert (rows[:, [0, 8]] < 20).all()


def test_more_queries_than_are_merged_at_a_time(data):
    _, passages = data
    queries = np.random.default_rng(1).normal(size=(200, 8)).astype(np.float32)
    found = exact.search(queries, source(passages), {"m": Scorer(None, True)}, 7)["m"]
    order = np.argsort(-naive(queries, passages, None, True), axis=1)
    np.testing.assert_array_equal(found.proponents, order[:, :7])
    np.testing.assert_array_equal(found.opponents, order[:, ::-1][:, :7])


@pytest.mark.parametrize(
    "length, k", [(8192, 10), (1024, 10), (96, 3), (4096, 1), (40, 10), (7, 9)]
)
@pytest.mark.parametrize("distinct", [2, 50, 10**6])
@pytest.mark.parametrize("sign", [1, -1])
def test_the_best_are_found_by_groups_and_among_equals_the_first(length, k, distinct, sign):
    rng = np.random.default_rng(length)
    scores_RxQ = rng.integers(0, distinct, (2 * length, 20)).astype(np.float32)
    valid_R = rng.random(2 * length) < 0.9
    kept = jnp.full((20, k), -jnp.inf), jnp.zeros((20, k), jnp.int32)
    merge = jax.jit(best.merge, static_argnums=4)
    for first in (0, length):
        some = slice(first, first + length)
        kept = merge(kept, scores_RxQ[some], valid_R[some], first, sign)
    top, at = map(np.asarray, kept)
    signed = np.where(valid_R[:, None], sign * scores_RxQ, -np.inf).T
    found = min(k, int(valid_R.sum()))
    order = np.argsort(-signed, axis=1, kind="stable")[:, :found]
    np.testing.assert_array_equal(at[:, :found], order)
    np.testing.assert_array_equal(top[:, :found], np.take_along_axis(signed, order, 1))


def mixture(queries, passages, weight=0.7, damping=0.1):
    """R of passages, and of queries with a common mean; blocks of λ R_eval + (1 − λ) R_train."""
    train = hessian.autocorrelation_of_source(InMemory(passages, SLICES)).blocks
    evaluation = hessian.autocorrelation_of_source(InMemory(queries, SLICES)).blocks
    return train, evaluation, weight, damping


def by_hand(queries, passages, R_of_query, unit_norm):
    """Scores with an R for every query, in float64."""
    scores = np.zeros((len(queries), len(passages)))
    for q, g in enumerate(queries.astype(np.float64)):
        inverse = [np.linalg.inv(R) for R in R_of_query(q)]

        def product(a, b, inverse=inverse):
            return sum(a[..., s] @ M @ b[..., s].T for s, M in zip(SLICES, inverse, strict=True))

        scores[q] = product(passages.astype(np.float64), g[None])[:, 0]
        if unit_norm:
            norms = [product(x[None], x[None])[0, 0] for x in passages.astype(np.float64)]
            scores[q] /= np.sqrt(np.array(norms) * product(g[None], g[None])[0, 0])
    return scores


@pytest.mark.parametrize("unit_norm", [False, True])
@pytest.mark.parametrize("devices", [1, 4])
def test_a_querys_own_part_is_taken_out_of_R(data, widths, unit_norm, devices):
    """Leave-one-out by rank one equals an R_eval that was made without the query, for each."""
    queries, passages = data
    queries = queries + np.float32(1.5)
    train, evaluation, weight, damping = mixture(queries, passages)
    n = len(queries)
    whole = [
        weight * n / (n - 1) * e + (1 - weight) * t for t, e in zip(train, evaluation, strict=True)
    ]
    floors = [damping * np.trace(b) / len(b) for b in whole]

    def without(q):
        others = np.delete(queries, q, axis=0).astype(np.float64)
        R = hessian.autocorrelation_of_source(InMemory(others.astype(np.float32), SLICES)).blocks
        return [
            weight * e + (1 - weight) * t + f * np.eye(len(e))
            for t, e, f in zip(train, R, floors, strict=True)
        ]

    expected = by_hand(queries, passages, without, unit_norm)
    mesh = None if devices == 1 else sharding.make_mesh(devices=jax.devices()[:devices])
    roots = hessian.inverse_root(whole, damping)
    scorers = {
        "all": Scorer(roots, unit_norm),
        "left out": Scorer(roots, unit_norm, (weight / (n - 1),) * len(SLICES)),
    }
    found = exact.search(queries, source(passages), scorers, 97, mesh=mesh)
    got = np.zeros_like(expected)
    np.put_along_axis(got, found["left out"].proponents, found["left out"].proponent_scores, 1)
    np.testing.assert_allclose(got, expected, rtol=2e-3, atol=2e-4 * np.abs(expected).max())
    leaking = np.zeros_like(expected)
    np.put_along_axis(leaking, found["all"].proponents, found["all"].proponent_scores, 1)
    # It matters: the same search with the query in R is far from it.
    assert np.abs(leaking - expected).max() > 0.05 * np.abs(expected).max()


def test_without_roots_there_is_nothing_to_take_out():
    with pytest.raises(ValueError, match="query_weights has 1 blocks and roots has 0"):
        Scorer(None, True, (0.1,))


def test_parts_of_the_queries_are_joined_in_their_order(data):
    queries, passages = data
    correct = {"all": [np.array([i]) for i in range(5)]}
    scorer = {"m": Scorer(None, True)}
    whole = exact.search(queries, source(passages), scorer, 4, correct)["m"]
    parts = []
    for some in ([1, 4], [0, 2, 3]):
        labels = {"all": [correct["all"][q] for q in some]}
        found = exact.search(queries[some], source(passages), scorer, 4, labels)["m"]
        parts.append((np.array(some), found))
    joined = ranked.join(parts)
    np.testing.assert_array_equal(joined.proponents, whole.proponents)
    np.testing.assert_array_equal(joined.opponents, whole.opponents)
    np.testing.assert_array_equal(joined.first_ranks["all"], whole.first_ranks["all"])
    assert ranked.join([(np.arange(5), whole)]) is whole
