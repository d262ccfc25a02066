"""Sources made of others: several checkpoints as one search, rows that are changed first."""

import numpy as np
import pytest

from tda import store as stores
from tda.retrieval import exact, sources
from tda.retrieval.scorer import Scorer
from tda.retrieval.sources import InMemory

SLICES = [slice(0, 3), slice(3, 8)]


@pytest.fixture(autouse=True)
def small_steps(monkeypatch):
    """Searches take 16 rows at a time."""
    monkeypatch.setattr(exact, "step_rows", lambda total, width, devices, touched: 16 * devices)


def gradients(count=61, seed=0):
    return np.random.default_rng(seed).normal(size=(count, 8)).astype(np.float32)


def stored(tmp_path, name, x, dtype="float32", rows=20):
    """A store with several shards."""
    store = stores.create(
        tmp_path / name,
        [f"p{i}" for i in range(len(x))],
        {"a": 3, "b": 5},
        {},
        dtype=dtype,
        shard_bytes=rows * stores.Form(dtype, (3, 5)).row_bytes,
    )
    for i, rows_of_shard in enumerate(store.shards()):
        store.write(i, x[rows_of_shard])
    return store


@pytest.mark.parametrize("dtype", ["float32", "2bit", "bfloat16"])
def test_side_by_side_is_a_sum_of_scores(tmp_path, dtype):
    """TracIn: Σ_c η_c ⟨q_c, p_c⟩; files of different sizes, rows invalid in one of them."""
    parts = [gradients(seed=i) for i in (1, 2, 3)]
    parts[1][7] = np.inf
    checkpoints = [stored(tmp_path, f"s{i}", x, dtype, 16 + 8 * i) for i, x in enumerate(parts)]
    joined = sources.Joined(checkpoints)
    queries = [gradients(4, seed=10 + i) for i in range(3)]
    counts = np.array([0.2, 0.3, 0.5], np.float32)
    joined_queries = np.concatenate([c * q for c, q in zip(counts, queries, strict=True)], axis=1)
    correct = {"all": [np.array([3]), np.array([7]), np.array([60]), np.array([1, 2])]}
    ranking = exact.search(joined_queries, joined, {"m": Scorer(None, False)}, 60, correct)["m"]
    read = [k.read(slice(0, 61)) for k in checkpoints]
    scores = sum(
        c * q @ np.where(np.isinf(p), 0, p).T for c, q, p in zip(counts, queries, read, strict=True)
    )
    by_row = np.full((4, 61), np.nan)
    np.put_along_axis(by_row, ranking.proponents, ranking.proponent_scores.astype(np.float64), 1)
    np.testing.assert_allclose(
        np.delete(by_row, 7, 1), np.delete(scores, 7, 1), rtol=1e-4, atol=1e-4
    )
    assert np.isnan(by_row[:, 7]).all() and ranking.first_ranks["all"][1] == 0
    best = np.delete(np.arange(61), 7)[np.delete(scores, 7, 1).argmax(1)]
    np.testing.assert_array_equal(ranking.proponents[:, 0], best)
    np.testing.assert_array_equal(joined.read([7, 8])[1], np.concatenate([r[8] for r in read]))
    assert np.isinf(joined.read([7])).all()


def test_different_dtypes_are_joined_in_float32(tmp_path):
    first, second = gradients(), gradients(seed=1)
    joined = sources.Joined([stored(tmp_path, "a", first, "int8"), InMemory(second, SLICES)])
    assert joined.form.dtype == "float32" and joined.form.widths == (3, 5, 3, 5)
    rows = np.concatenate([f.decoded(joined.form) for f in joined.scan(16)])
    np.testing.assert_array_equal(rows[:, 8:], second)
    assert [len(f) for f in joined.scan(16)] == [16, 16, 16, 13]
    with pytest.raises(ValueError, match="equally many rows"):
        sources.Joined([InMemory(first, SLICES), InMemory(first[:5], SLICES)])


def test_changed_rows_are_the_same_scanned_or_read(tmp_path):
    x = gradients()
    norms = np.linalg.norm(x, axis=1, keepdims=True)
    x[5] = np.inf
    weights = np.random.default_rng(2).random(61)
    for change, expected in (
        (sources.scale_by(weights), x * weights[:, None]),
        (sources.normalise, x / norms),
    ):
        mapped = sources.Mapped(stored(tmp_path, change.__name__, x), change)
        scanned = np.concatenate([f.decoded(mapped.form) for f in mapped.scan(16)])
        for x_RxE in (scanned, mapped.read(np.arange(61))):
            np.testing.assert_allclose(np.delete(x_RxE, 5, 0), np.delete(expected, 5, 0), rtol=1e-5)
            assert np.isinf(x_RxE[5]).all()
        assert not np.concatenate([f.valid for f in mapped.scan(16)])[5]


def test_a_zero_row_stays_zero():
    assert not sources.normalise(np.zeros((2, 4), np.float32)).any()
