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
from tda.retrieval import best, exact, ranked, scorer
from tda.retrieval.scorer import Scorer
from tda.retrieval.sources import InMemory
from tda.runtime import groups, sharding
from tda.runtime.groups import Groups

SLICES = [slice(0, 3), slice(3, 8)]
STEP_ROWS = exact.step_rows


@pytest.fixture
def data():
    rng = np.random.default_rng(0)
    return rng.normal(size=(5, 8)).astype(np.float32), rng.normal(size=(97, 8)).astype(np.float32)


@pytest.fixture(autouse=True)
def small_steps(monkeypatch):
    """Searches take 16 rows at a time, or what a test sets."""
    steps = {"rows": 16}

    def step_rows(total, width, devices, touched):
        return steps["rows"] * devices

    monkeypatch.setattr(exact, "step_rows", step_rows)
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


def mesh_of(devices, *sizes):
    """A mesh of so many devices; None for one."""
    return None if devices == 1 else sharding.make_mesh(*sizes, devices=jax.devices()[:devices])


@pytest.mark.parametrize("whitened", [False, True])
@pytest.mark.parametrize("step", [8, 128])
@pytest.mark.parametrize("devices", [1, 4])
def test_rankings_equal_the_direct_computation(data, small_steps, widths, whitened, step, devices):
    """Mistakes: proponents and opponents swapped; unit norm left out."""
    queries, passages = data
    small_steps["rows"] = step
    R = hessian.autocorrelation_of_source(InMemory(passages, SLICES)).blocks
    roots = hessian.inverse_root(R) if whitened else None
    correct = {
        "all": [np.array([3, 50]), np.array([96]), np.array([], int), np.array([0]), np.array([7])]
    }
    search = exact.ExactSearch(source(passages), mesh_of(devices, 2, 2))
    scorers = {unit_norm: Scorer(roots, unit_norm) for unit_norm in (False, True)}
    for unit_norm, ranking in search.rank(queries, scorers, 10, correct).items():
        scores = naive(queries, passages, roots, unit_norm)
        order = np.argsort(-scores, axis=1)
        np.testing.assert_array_equal(ranking.proponents, order[:, :10])
        np.testing.assert_array_equal(ranking.opponents, order[:, ::-1][:, :10])
        best_scores = np.take_along_axis(scores, order[:, :10], 1)
        np.testing.assert_allclose(ranking.proponent_scores, best_scores, rtol=2e-4, atol=1e-5)
        for q, rows in enumerate(correct["all"]):
            places = [int(np.flatnonzero(order[q] == r)[0]) + 1 for r in rows]
            assert ranking.first_ranks["all"][q] == min(places, default=0)


class Ragged(InMemory):
    """A source whose files end in the middle of a step."""

    def scan(self, step, rows=None):
        for first in range(0, self.rows, 29):
            for piece in InMemory(self._gradients[first : first + 29], SLICES).scan(step):
                yield dataclasses.replace(piece, first=first + piece.first)


@pytest.mark.parametrize("devices", [1, 4])
def test_held_rows_are_ranked_as_those_of_their_source(data, tmp_path, monkeypatch, devices):
    """Rows and correct rows of a store with a withdrawn passage; later searches read nothing."""
    queries, passages = data
    ids = [f"p{i}" for i in range(97)]
    store = stores.create(tmp_path, ids, {"a": 3, "b": 5}, {}, shard_bytes=32 * 32)
    for i in store.missing():
        store.write(i, passages[store.shards()[i]])
    roots = hessian.inverse_root(hessian.autocorrelation_of_source(store).blocks)
    scorers = {(r is roots, n): Scorer(r, n) for r in (None, roots) for n in (False, True)}
    best_rows = exact.search(queries, store, scorers, 5)[False, True].proponents[:, 0]
    store.withdraw([f"p{i}" for i in best_rows])
    correct = {
        "all": [np.array([3, 90]), np.array([], np.int64), *[np.array([i]) for i in (1, 40, 96)]]
    }
    expected = exact.search(queries, store, scorers, 97, correct)
    held = exact.ExactSearch(store, mesh_of(devices), hold=True)
    for _ in range(2):
        for name, ranking in held.rank(queries, scorers, 97, correct).items():
            assert_equal_rankings(ranking, expected[name])
            assert not np.isin(ranking.proponents, best_rows).any()
        monkeypatch.setattr(store, "scan", None)


def assert_equal_rankings(a, b, rtol=1e-5):
    np.testing.assert_array_equal(a.proponents, b.proponents)
    np.testing.assert_array_equal(a.opponents, b.opponents)
    np.testing.assert_allclose(a.proponent_scores, b.proponent_scores, rtol=rtol)
    np.testing.assert_allclose(a.opponent_scores, b.opponent_scores, rtol=rtol)
    np.testing.assert_array_equal(a.first_ranks["all"], b.first_ranks["all"])


@pytest.mark.parametrize("devices", [1, 4])
def test_a_step_is_compiled_once(data, small_steps, devices):
    """However many correct rows a step has, and wherever files end."""
    queries, passages = data
    small_steps["rows"] = 8
    rng = np.random.default_rng(0)
    correct = {"all": [rng.permutation(97)[:n] for n in (40, 1, 0, 9, 2)]}
    mesh = mesh_of(devices)
    scorers = {"m": Scorer([np.eye(3, dtype=np.float32), np.eye(5, dtype=np.float32)], True)}
    before = exact._advance._cache_size()
    ragged = exact.ExactSearch(Ragged(passages, SLICES), mesh)
    ranking = ragged.rank(queries, scorers, 10, correct)["m"]
    # On a mesh the first state is laid out by hand, and the next by the program.
    assert exact._advance._cache_size() <= before + (1 if mesh is None else 2)
    expected = exact.ExactSearch(source(passages), mesh).rank(queries, scorers, 10, correct)["m"]
    np.testing.assert_array_equal(ranking.proponents, expected.proponents)
    np.testing.assert_array_equal(ranking.first_ranks["all"], expected.first_ranks["all"])


@pytest.mark.parametrize("devices", [1, 4])
def test_proponents_alone_are_those_of_a_search_for_both(data, devices):
    queries, passages = data
    correct = {"all": [np.array([i]) for i in range(5)]}
    mesh = mesh_of(devices)
    scorers = {"m": Scorer(None, True)}
    search = exact.ExactSearch(source(passages), mesh)
    both = search.rank(queries, scorers, 7, correct)["m"]
    ranking = search.rank(queries, scorers, 7, correct, opponents=False)["m"]
    np.testing.assert_array_equal(ranking.proponents, both.proponents)
    np.testing.assert_array_equal(ranking.proponent_scores, both.proponent_scores)
    np.testing.assert_array_equal(ranking.first_ranks["all"], both.first_ranks["all"])
    assert ranking.opponents.shape == ranking.opponent_scores.shape == (5, 0)


def test_a_method_that_scores_all_alike_gets_the_last_rank(data):
    queries, passages = data
    same = np.ones_like(passages)
    ranking = exact.search(
        queries, source(same), {"m": Scorer(None, True)}, 5, {"all": [np.array([0, 1])] * 5}
    )["m"]
    assert (ranking.first_ranks["all"] == 96).all()  # behind the 95 that are not correct


@pytest.mark.parametrize("devices", [1, 4])
def test_a_row_that_labels_name_twice_counts_once(data, devices):
    queries, passages = data
    mesh = mesh_of(devices)
    once = [np.array([q, 90]) for q in range(5)]
    twice = [np.array([90, q, q, 90]) for q in range(5)]
    search, labels = exact.ExactSearch(source(passages), mesh), {"once": once, "twice": twice}
    ranking = search.rank(queries, {"a": Scorer(None, False)}, 3, labels)["a"].first_ranks
    np.testing.assert_array_equal(ranking["twice"], ranking["once"])
    assert ranked.first_rank(np.array([3.0, 2, 1]), np.array([1, 1])) == 2


@pytest.mark.parametrize("unit_norm", [False, True])
@pytest.mark.parametrize("rounding", [1 - 2.0**-23, 1 + 2.0**-23])
def test_a_duplicate_counts_however_it_is_rounded(data, monkeypatch, unit_norm, rounding):
    """The search for limits and the scan are other programs, which may round in other ways."""
    queries, passages = data
    passages = np.concatenate([passages, passages[:5], passages[:5]])
    correct = [np.array([q]) for q in range(5)]
    scorers = {"m": Scorer(None, unit_norm)}
    expected = exact.search(queries, source(passages), scorers, 10, {"a": correct})["m"]

    def score_elsewhere(*arguments):
        return jax.tree.map(lambda x: x * rounding, scorer.score(*arguments))

    monkeypatch.setattr(exact, "_score", score_elsewhere)
    rounded = exact.search(queries, source(passages), scorers, 10, {"a": correct})["m"]
    np.testing.assert_array_equal(rounded.first_ranks["a"], expected.first_ranks["a"])
    # The row itself, its two duplicates, and what scores more.
    scores_QxC = naive(queries, passages, None, unit_norm)
    ranks_Q = [(scores_QxC[q] >= scores_QxC[q, q] - 1e-6).sum() for q in range(5)]
    np.testing.assert_array_equal(expected.first_ranks["a"], ranks_Q)


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
    ranking = exact.search(queries, source(passages), {"m": Scorer(None, True)}, 97)["m"]
    assert np.isfinite(ranking.proponent_scores).all()
    assert (ranking.proponent_scores[ranking.proponents == 4] == 0).all()


@pytest.mark.parametrize("devices", [1, 8])
def test_a_small_source_is_not_padded_to_a_large_step(data, monkeypatch, devices):
    queries, passages = data
    monkeypatch.setattr(exact, "step_rows", STEP_ROWS)
    steps = []

    def pad_rows(rows, step):
        steps.append(step)
        return scorer.pad_rows(rows, step)

    monkeypatch.setattr(exact, "pad_rows", pad_rows)
    search = exact.ExactSearch(source(passages), mesh_of(devices))
    ranking = search.rank(queries, {"dot": Scorer(None, False)}, len(passages))["dot"]
    expected = np.argsort(-queries @ passages.T, kind="stable")
    np.testing.assert_array_equal(ranking.proponents, expected)
    # 97 rows: one step of 128 on one device, or of 16 on each of eight.
    assert steps == [128]


@pytest.mark.parametrize("total", [1, 3, 511, 4096, 10**6, 2**31 - 1])
def test_a_large_source_is_searched_in_steps_of_a_size(total):
    full = STEP_ROWS(2**31 - 1, 4608)
    step = STEP_ROWS(total, 4608)
    assert step == full or total <= step < 2 * total


def test_fewer_passages_than_k(data):
    queries, passages = data
    ranking = exact.search(queries, source(passages[:3]), {"m": Scorer(None, True)}, 10)["m"]
    assert ranking.proponents.shape == (5, 3)


def test_first_rank_and_top_break_ties_against_the_method():
    scores = np.array([1.0, 5, 5, 0, 5])
    assert ranked.first_rank(scores, np.array([2])) == 3
    assert ranked.first_rank(scores, np.array([1, 2, 4])) == 1
    assert ranked.first_rank(scores, np.array([3])) == 5
    assert ranked.first_rank(scores, np.array([], int)) == 0
    np.testing.assert_array_equal(ranked.top(scores, 2), [1, 2])
    np.testing.assert_array_equal(ranked.top(scores, 9), [1, 2, 4, 0, 3])
    # Guards: a passage whose score is NaN, before which nothing ranks.
    unknown = np.array([1.0, np.nan, 5, np.nan])
    assert ranked.first_rank(unknown, np.array([1])) == 4
    assert ranked.first_rank(unknown, np.array([0, 1])) == 2
    np.testing.assert_array_equal(ranked.top(unknown, 3), [2, 0, 1])


def test_a_ranking_is_kept_and_read_again(data, tmp_path):
    queries, passages = data
    scorers, correct = {"m": Scorer(None, True)}, {"all": [np.array([1])] * 5}
    ranking = exact.search(queries, source(passages), scorers, 5, correct)["m"]
    ranked.save(tmp_path / "r.npz", ranking)
    again = ranked.load(tmp_path / "r.npz")
    for name in ("proponents", "proponent_scores", "opponents", "opponent_scores"):
        np.testing.assert_array_equal(getattr(again, name), getattr(ranking, name))
    np.testing.assert_array_equal(again.first_ranks["all"], ranking.first_ranks["all"])


def test_invalid_rows_are_never_retrieved(data):
    queries, passages = data
    holes = passages.copy()
    holes[[3, 20, 96]] = np.inf
    correct = {"all": [np.array([3, 50]), np.array([96]), np.array([0]), *[np.array([7])] * 2]}
    valid = np.delete(np.arange(97), [3, 20, 96])
    scorers = {unit_norm: Scorer(None, unit_norm) for unit_norm in (False, True)}
    moved = {"all": [np.flatnonzero(np.isin(valid, rows)) for rows in correct["all"]]}
    expected = exact.search(queries, source(passages[valid]), scorers, 10, moved)
    for name, ranking in exact.search(queries, source(holes), scorers, 10, correct).items():
        np.testing.assert_array_equal(ranking.proponents, valid[expected[name].proponents])
        np.testing.assert_array_equal(ranking.opponents, valid[expected[name].opponents])
        ranks = ranking.first_ranks["all"]
        np.testing.assert_array_equal(ranks, expected[name].first_ranks["all"])
        assert ranks[1] == 0  # its only correct passage is invalid
    for ranking in exact.search(queries, source(holes), scorers, 97, correct).values():
        assert ranking.proponents.shape == ranking.opponents.shape == (5, 94)
        assert np.isfinite(ranking.proponent_scores).all() and not (ranking.opponents == 20).any()


def test_duplicates_come_in_the_order_of_their_rows(data, small_steps):
    """Guards: ties that depend on where a step or a device begins."""
    queries, passages = data
    copies = np.tile(passages[:20], (8, 1))
    for step, devices in ((8, 1), (256, 1), (16, 4)):
        small_steps["rows"] = step
        mesh = sharding.make_mesh(devices=jax.devices()[:devices])
        search = exact.ExactSearch(source(copies), mesh)
        ranking = search.rank(queries, {"m": Scorer(None, True)}, 12)["m"]
        for rows in (ranking.proponents, ranking.opponents):
            # Eight copies of the best, then four of the next.
            np.testing.assert_array_equal(rows[:, :8], rows[:, :1] + 20 * np.arange(8))
            np.testing.assert_array_equal(rows[:, 8:], rows[:, 8:9] + 20 * np.arange(4))
            assert (rows[:, [0, 8]] < 20).all()


def test_more_queries_than_are_merged_at_a_time(data):
    _, passages = data
    queries = np.random.default_rng(1).normal(size=(200, 8)).astype(np.float32)
    ranking = exact.search(queries, source(passages), {"m": Scorer(None, True)}, 7)["m"]
    order = np.argsort(-naive(queries, passages, None, True), axis=1)
    np.testing.assert_array_equal(ranking.proponents, order[:, :7])
    np.testing.assert_array_equal(ranking.opponents, order[:, ::-1][:, :7])


@pytest.mark.parametrize(
    "length, k", [(8192, 10), (1024, 10), (96, 3), (4096, 1), (40, 10), (7, 9)]
)
@pytest.mark.parametrize("distinct", [2, 50, 10**6])
@pytest.mark.parametrize("sign", [1, -1])
def test_the_best_are_found_by_groups_and_among_equals_the_first(length, k, distinct, sign):
    rng = np.random.default_rng(length)
    scores_RxQ = rng.integers(0, distinct, (2 * length, 20)).astype(np.float32)
    valid_R = rng.random(2 * length) < 0.9
    carry = jnp.full((20, k), -jnp.inf), jnp.zeros((20, k), jnp.int32)
    merge = jax.jit(best.merge, static_argnums=4)
    for first in (0, length):
        part = slice(first, first + length)
        carry = merge(carry, scores_RxQ[part], valid_R[part], first, sign)
    top, at = map(np.asarray, carry)
    signed = np.where(valid_R[:, None], sign * scores_RxQ, -np.inf).T
    count = min(k, int(valid_R.sum()))
    order = np.argsort(-signed, axis=1, kind="stable")[:, :count]
    np.testing.assert_array_equal(at[:, :count], order)
    np.testing.assert_array_equal(top[:, :count], np.take_along_axis(signed, order, 1))


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


@pytest.mark.parametrize("devices", [1, 4])
def test_a_querys_own_part_is_taken_out_of_R(data, widths, devices):
    """Leave-one-out by rank one equals an R_eval that was made without the query, for each."""
    queries, passages = data
    queries = queries + np.float32(1.5)
    train, evaluation, weight, damping = mixture(queries, passages)
    n = len(queries)
    mixed = [
        weight * n / (n - 1) * e + (1 - weight) * t for t, e in zip(train, evaluation, strict=True)
    ]
    floors = [damping * np.trace(b) / len(b) for b in mixed]

    def without(q):
        rest = np.delete(queries, q, axis=0).astype(np.float64)
        R = hessian.autocorrelation_of_source(InMemory(rest.astype(np.float32), SLICES)).blocks
        return [
            weight * e + (1 - weight) * t + f * np.eye(len(e))
            for t, e, f in zip(train, R, floors, strict=True)
        ]

    roots = hessian.inverse_root(mixed, damping)
    scorers = {}
    for unit_norm in (False, True):
        scorers["all", unit_norm] = Scorer(roots, unit_norm)
        own_weights = (weight / (n - 1),) * len(SLICES)
        scorers["left out", unit_norm] = Scorer(roots, unit_norm, own_weights)
    rankings = exact.ExactSearch(source(passages), mesh_of(devices)).rank(queries, scorers, 97)
    for unit_norm in (False, True):
        expected = by_hand(queries, passages, without, unit_norm)
        scale = np.abs(expected).max()
        left_out, leaking = np.zeros_like(expected), np.zeros_like(expected)
        for name, scores in (("left out", left_out), ("all", leaking)):
            ranking = rankings[name, unit_norm]
            np.put_along_axis(scores, ranking.proponents, ranking.proponent_scores, 1)
        np.testing.assert_allclose(left_out, expected, rtol=2e-3, atol=2e-4 * scale)
        # It matters: the same search with the query in R is far from it.
        assert np.abs(leaking - expected).max() > 0.05 * scale


def test_without_roots_there_is_nothing_to_take_out():
    with pytest.raises(ValueError, match="query_weights has 1 blocks and roots has 0"):
        Scorer(None, True, (0.1,))


def test_parts_of_the_queries_are_joined_in_their_order():
    rng = np.random.default_rng(0)
    arrays = [rng.integers(0, 97, (5, 4)) for _ in range(4)]
    ranks = rng.integers(1, 97, 5)

    def part(numbers):
        return ranked.Ranked(*(x[numbers] for x in arrays), {"all": ranks[numbers]})

    joined = ranked.join([(np.array(n), part(n)) for n in ([1, 4], [0, 2, 3])])
    assert_equal_rankings(joined, part(np.arange(5)), rtol=0)
    ranking = part([2, 0])
    assert ranked.join([(np.arange(2), ranking)]) is ranking


class Killed(InMemory):
    """A source that counts the rows that are scanned, and is killed at one of them."""

    def __init__(self, x, killed_at=None):
        super().__init__(x, SLICES)
        self.scanned, self._killed_at = [], killed_at

    def scan(self, step, rows=None):
        for piece in super().scan(step, rows):
            if self._killed_at is not None and piece.first >= self._killed_at:
                raise KeyboardInterrupt
            self.scanned.append(piece.first)
            yield piece


@pytest.mark.parametrize("devices", [1, 4])
def test_a_killed_search_resumes_to_the_ranking_of_one_scan(
    data, tmp_path, monkeypatch, small_steps, devices
):
    """Equal scores and invalid rows in different groups, groups of fewer rows than k, opponents."""
    monkeypatch.setattr(groups, "_ROWS_PER_RESULT", 0)
    queries, passages = data
    passages = passages.copy()
    passages[90:] = passages[:7]
    passages[[5, 64, 65]] = np.inf
    small_steps["rows"] = 4
    correct = {"all": [np.array([3, 93]), np.array([96]), np.array([], int), *[np.array([5])] * 2]}
    roots = [np.eye(s.stop - s.start, dtype=np.float32) * 2 for s in SLICES]
    scorers = {"a": Scorer(None, True), "b": Scorer(roots, False)}
    mesh, kept = mesh_of(devices), Groups(tmp_path, group_bytes=16 * 32)
    expected = exact.ExactSearch(source(passages), mesh).rank(queries, scorers, 20, correct)

    def rank(source, identity="rows"):
        search = exact.ExactSearch(source, mesh, groups=kept, identity=identity)
        return search.rank(queries[:2], scorers, 1, {"all": correct["all"][:2]})

    with pytest.raises(KeyboardInterrupt):
        rank(Killed(passages, killed_at=48))
    resumed, other = Killed(passages), Killed(passages)
    rank(resumed)
    assert min(resumed.scanned) == 48
    # Other rows, and other queries, are another search.
    rank(other, "other rows")
    assert min(other.scanned) == 0
    search = exact.ExactSearch(source(passages), mesh, groups=kept, identity="rows")
    for name, ranking in search.rank(queries, scorers, 20, correct).items():
        for field in dataclasses.fields(ranking):
            np.testing.assert_equal(
                getattr(ranking, field.name), getattr(expected[name], field.name)
            )
