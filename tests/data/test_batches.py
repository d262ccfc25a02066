"""Batches: every row once, few shapes, and contents exactly right."""

import jax
import numpy as np
import pytest

from tda.data import batches
from tda.data.batches import BatchLayout
from tda.data.tokens import TokenTable
from tda.runtime import sharding

BUCKETS = (4, 8, 16)


def table_of(sequences, scored=None):
    ids = [str(i) for i in range(len(sequences))]
    starts = np.cumsum([0, *map(len, sequences)])
    flat = np.asarray([t for s in sequences for t in s], np.int32)
    if scored is None:
        scored = [[False] + [True] * (len(s) - 1) for s in sequences]
    flags = np.asarray([f for s in scored for f in s], bool)
    return TokenTable(ids, ids, flat, starts, flags)


@pytest.mark.parametrize("seed", [None, 0, 1, 7])
@pytest.mark.parametrize("multiple", [1, 4])
@pytest.mark.parametrize("count", [1, 5, 97, 1000])
def test_every_row_is_in_one_batch_that_holds_it(count, multiple, seed):
    """Guards: rows that are dropped, repeated, or cut."""
    positions = np.random.default_rng(count).integers(1, 17, count)
    planned = batches.plan(positions, BUCKETS, 48, multiple=multiple, seed=seed)
    assert sorted(planned.order.tolist()) == list(range(count))
    assert planned.starts[0] == 0 and planned.starts[-1] == count
    assert len(planned.starts) == len(planned) + 1
    held = np.diff(planned.starts)
    assert np.all(held >= 1) and np.all(held <= planned.sizes)
    for i, length in enumerate(planned.lengths):
        rows = planned.members(i)
        assert positions[rows].max() <= length
    # All shapes are of the few lengths, one size each, a multiple of the devices, and near 48.
    assert set(planned.lengths.tolist()) <= set(BUCKETS)
    for length, size in zip(planned.lengths, planned.sizes, strict=True):
        assert size == max(1, 48 // length // multiple) * multiple


def test_lengths_are_not_all_padded_to_the_longest():
    """Guards: all padded to the global maximum."""
    positions = np.asarray([3] * 40 + [16] * 6)
    planned = batches.plan(positions, BUCKETS, 48, seed=0)
    cells = int(np.sum(planned.lengths * planned.sizes))
    assert cells < 40 * 4 + 6 * 16 + 3 * 48
    assert set(planned.lengths.tolist()) >= {4, 16}


@pytest.mark.parametrize("seed", [None, 3])
@pytest.mark.parametrize("multiple", [1, 4])
def test_sequences_are_spread_evenly_over_a_lengths_batches(multiple, seed):
    positions = np.array([4] * 25 + [16] * 7 + [3] * 8)
    planned = batches.plan(positions, BUCKETS, 48, multiple=multiple, seed=seed, spread=True)
    assert sorted(planned.order.tolist()) == list(range(40))
    held = {4: [], 16: []}
    for i, length in enumerate(planned.lengths):
        rows = planned.members(i)
        assert len(rows) <= planned.sizes[i] and planned.sizes[i] % multiple == 0
        # None moves on to a longer length.
        assert all(
            batches.BatchLayout(BUCKETS, 48, 0).padded_length(n) == length for n in positions[rows]
        )
        held[int(length)].append(len(rows))
    assert sorted(held[4]) == ([11, 11, 11] if multiple == 1 else [9, 12, 12])
    assert sorted(held[16]) == ([1, 3, 3] if multiple == 1 else [3, 4])


def test_plans_are_deterministic_and_seeds_differ():
    positions = np.random.default_rng(0).integers(1, 17, 300)

    def rows(seed):
        return batches.plan(positions, BUCKETS, 48, seed=seed)

    for field in ("order", "starts", "lengths", "sizes"):
        np.testing.assert_array_equal(getattr(rows(3), field), getattr(rows(3), field))
    assert rows(3).order.tolist() != rows(4).order.tolist()
    # Batches are shuffled too, not only the rows in them: lengths do not come sorted.
    assert np.any(np.diff(rows(3).lengths) < 0)


def test_without_a_seed_short_batches_come_first_and_rows_in_order():
    positions = np.asarray([16, 2, 3, 16, 4, 1])
    planned = batches.plan(positions, (4, 16), 16)
    assert planned.order.tolist() == [1, 2, 4, 5, 0, 3]
    assert np.all(np.diff(planned.lengths) >= 0)


def test_a_row_too_long_is_refused():
    with pytest.raises(ValueError, match="row 1 has 17 positions, the longest batch 16"):
        batches.plan(np.asarray([3, 17, 16]), BUCKETS, 48)


def test_no_rows_make_no_batches():
    for seed in (None, 0):
        planned = batches.plan(np.zeros(0, int), BUCKETS, 48, seed=seed)
        assert len(planned) == 0 and len(planned.order) == 0


def test_ten_million_rows_are_planned():
    """Guards: batch planning in hours on millions of rows (a loop over rows would not end here)."""
    positions = np.random.default_rng(0).integers(1, 513, 10_000_000, dtype=np.int16)
    planned = batches.plan(positions, batches.buckets(512), 2**15, seed=0)
    assert len(planned.order) == 10_000_000
    assert np.all(np.bincount(planned.order, minlength=10_000_000) == 1)
    longest = np.maximum.reduceat(positions[planned.order], planned.starts[:-1])
    assert np.all(longest <= planned.lengths)


@pytest.mark.parametrize("context", [1, 7, 8, 9, 128, 500])
def test_buckets_rise_to_the_context(context):
    lengths = batches.buckets(context)
    assert lengths[-1] == context and list(lengths) == sorted(set(lengths))
    assert all(n % 8 == 0 for n in lengths[:-1])
    assert len(lengths) <= 20


def test_buckets_need_a_context():
    with pytest.raises(ValueError, match="context=0 must be positive"):
        batches.buckets(0)


def test_a_batch_by_hand():
    """Guards: padding rows overwriting real rows; weights of padding."""
    table = table_of(
        [[1, 5, 6, 2], [1, 7, 2], [1, 8, 9, 4, 2]], [[0, 0, 1, 1], [0, 1, 1], [0, 0, 0, 1, 0]]
    )
    batch = batches.materialise(table, np.asarray([2, 0]), length=5, size=3, pad=0)
    np.testing.assert_array_equal(batch.tokens, [[1, 8, 9, 4, 2], [1, 5, 6, 2, 0], [0, 0, 0, 0, 0]])
    np.testing.assert_array_equal(
        batch.targets, [[8, 9, 4, 2, 0], [5, 6, 2, 0, 0], [0, 0, 0, 0, 0]]
    )
    np.testing.assert_array_equal(
        batch.weights, [[0, 0, 1, 0, 0], [0, 1, 1, 0, 0], [0, 0, 0, 0, 0]]
    )
    np.testing.assert_array_equal(batch.rows, [2, 0])
    assert batch.tokens.dtype == batch.targets.dtype == np.int32
    assert batch.weights.dtype == np.float32
    assert batch.arrays().keys() == {"tokens", "targets", "weights"}


def test_padding_is_the_pad_token():
    batch = batches.materialise(table_of([[1, 2]]), np.asarray([0]), length=3, size=2, pad=9)
    np.testing.assert_array_equal(batch.tokens, [[1, 2, 9], [9, 9, 9]])
    np.testing.assert_array_equal(batch.targets, [[2, 9, 9], [9, 9, 9]])


def test_a_sequence_fills_its_batch_exactly():
    batch = batches.materialise(table_of([[1, 5, 6, 2]]), np.asarray([0]), length=3, size=1, pad=0)
    np.testing.assert_array_equal(batch.tokens, [[1, 5, 6]])
    np.testing.assert_array_equal(batch.targets, [[5, 6, 2]])
    np.testing.assert_array_equal(batch.weights, [[1, 1, 1]])


def test_too_many_rows_are_refused():
    with pytest.raises(ValueError, match="3 rows do not fit a batch of 2"):
        batches.materialise(table_of([[1, 2]] * 3), np.arange(3), length=1, size=2, pad=0)


def test_batches_hold_the_tables_tokens_and_start_anywhere():
    """Guards: an iterator restarted at every loop."""
    rng = np.random.default_rng(0)
    sequences = [rng.integers(1, 99, rng.integers(2, 18)).tolist() for _ in range(60)]
    table = table_of(sequences)
    planned = BatchLayout(BUCKETS, 48, pad=0).batches(table, seed=5)
    everything = list(planned)
    assert len(everything) == len(planned) == len(planned.plan)
    for batch in everything:
        for i, row in enumerate(batch.rows):
            n = len(sequences[row]) - 1
            assert batch.tokens[i, :n].tolist() == sequences[row][:-1]
            assert batch.targets[i, :n].tolist() == sequences[row][1:]
            assert batch.weights[i].tolist() == [1.0] * n + [0.0] * (len(batch.weights[i]) - n)
        assert not batch.weights[len(batch.rows) :].any()
    scored = sum(float(b.weights.sum()) for b in everything)
    assert scored == table.scored.sum()
    again = planned[3]
    np.testing.assert_array_equal(again.tokens, everything[3].tokens)
    np.testing.assert_array_equal(again.rows, everything[3].rows)


def test_batches_of_some_rows_know_their_places():
    table = table_of([[1] * n for n in (9, 2, 5, 3, 7, 4)])
    rows = np.asarray([4, 1, 3, 0])
    for batch in BatchLayout(BUCKETS, 16, pad=0).batches(table, rows):
        np.testing.assert_array_equal(rows[batch.places], batch.rows)


def test_the_devices_of_a_mesh_divide_every_batch():
    mesh = sharding.make_mesh(data=4, devices=jax.devices()[:4])
    planned = BatchLayout(BUCKETS, 16, 0, mesh).batches(table_of([[1, 2, 3]] * 5))
    assert (planned.plan.sizes % 4 == 0).all()
