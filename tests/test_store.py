"""The gradient store: round trips, refusals, kills."""

import json
import os
import signal
import subprocess
import sys

import numpy as np
import pytest
import zarr

from tda import store as stores

BLOCKS = {"0/attention": 4, "0/mlp": 4}
MADE = {"checkpoint": "a", "projection": {"seed": 0, "side": 2}}


def rows(count=10, seed=0):
    return np.random.default_rng(seed).normal(size=(count, 8)).astype(np.float32)


def filled(path, data, shard_rows=4, dtype="float32"):
    size = stores.DTYPES[dtype].itemsize
    ids = [f"p{i}" for i in range(len(data))]
    store = stores.create(path, ids, BLOCKS, MADE, dtype, shard_bytes=shard_rows * 8 * size)
    for shard in store.missing():
        store.write(shard, data[store.shards()[shard]])
    return store


def test_round_trip_by_slice_by_row_and_in_chunks(tmp_path):
    data = rows()
    store = filled(tmp_path / "s", data)
    assert len(store.shards()) == 3 and store.missing() == []
    again = stores.open_store(tmp_path / "s", MADE)
    np.testing.assert_array_equal(again.read(slice(0, 10)), data)
    np.testing.assert_array_equal(again.read([7, 0, 9]), data[[7, 0, 9]])
    pieces = list(again.chunks(2))
    assert [start for start, _ in pieces] == [0, 2, 4, 6, 8]
    np.testing.assert_array_equal(np.concatenate([x for _, x in pieces]), data)
    assert again.ids == [f"p{i}" for i in range(10)]
    assert again.slices == [slice(0, 4), slice(4, 8)]


def test_a_store_is_finished_when_no_shard_is_missing(tmp_path):
    assert not stores.finished(tmp_path / "s")
    store = stores.create(tmp_path / "s", ["a", "b"], BLOCKS, MADE)
    assert not stores.finished(tmp_path / "s")
    store.write(0, rows(2))
    assert stores.finished(tmp_path / "s")


def test_a_relative_path_is_taken_from_the_working_directory(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    filled("here/s", rows())
    np.testing.assert_array_equal(stores.open_store("here/s").read(slice(0, 10)), rows())
    assert (tmp_path / "here" / "s" / "0" / "gradients" / "c.0.0").exists()


def test_bfloat16_rounds_to_eight_bits(tmp_path):
    data = rows()
    store = filled(tmp_path / "s", data, dtype="bfloat16")
    error = np.abs(store.read(slice(0, 10)) - data) / np.abs(data)
    assert 0 < error.max() <= 2**-8


def test_plain_zarr_opens_it(tmp_path):
    data = rows()
    filled(tmp_path / "s", data)
    np.testing.assert_array_equal(
        zarr.open_array(tmp_path / "s" / "0" / "gradients", mode="r")[:], data
    )


def test_a_missing_shard_is_an_error_and_not_zeros(tmp_path):
    data = rows()
    store = stores.create(tmp_path / "s", list("abcdefghij"), BLOCKS, MADE, shard_bytes=128)
    store.write(0, data[:4])
    store.write(2, data[8:])
    assert store.missing() == [1]
    with pytest.raises(stores.StoreError, match=r"unfinished.*\[1\]"):
        store.read(slice(3, 6))
    with pytest.raises(stores.StoreError, match="unfinished"):
        list(store.chunks(4))
    np.testing.assert_array_equal(store.read(slice(0, 4)), data[:4])


def test_a_flipped_bit_is_found(tmp_path):
    store = filled(tmp_path / "s", rows())
    shard = tmp_path / "s" / "0" / "gradients" / "c.1.0"
    raw = bytearray(shard.read_bytes())
    raw[5] ^= 1
    shard.write_bytes(raw)
    with pytest.raises(stores.StoreError, match="damaged"):
        store.read(slice(4, 8))


def test_what_differs_is_named(tmp_path):
    filled(tmp_path / "s", rows())
    wanted = {"checkpoint": "a", "projection": {"seed": 1, "side": 2}}
    with pytest.raises(stores.StoreError, match="projection.seed: 0 in the store, 1 wanted"):
        stores.open_store(tmp_path / "s", wanted)
    with pytest.raises(stores.StoreError, match="segments.0.rows: 10 in the store, 9 wanted"):
        stores.create(tmp_path / "s", [f"p{i}" for i in range(9)], BLOCKS, MADE, shard_bytes=128)
    with pytest.raises(stores.StoreError, match="segments.0.passages"):
        stores.create(tmp_path / "s", [f"q{i}" for i in range(10)], BLOCKS, MADE, shard_bytes=128)


@pytest.mark.parametrize("number", [np.nan, np.inf, -np.inf])
def test_a_row_that_is_not_finite_is_kept_as_invalid(tmp_path, number):
    """Guards: a non-finite gradient that stops the run, or is lost without a word."""
    data = rows()
    data[5, 3] = number
    ids = [f"p{i}" for i in range(10)]
    store = stores.create(tmp_path / "s", ids, BLOCKS, MADE, shard_bytes=4 * 8 * 4)
    assert [store.write(i, data[s]) for i, s in enumerate(store.shards())] == [[], ["p5"], []]
    back = stores.open_store(tmp_path / "s").read(slice(0, 10))
    np.testing.assert_array_equal(stores.valid(back), np.arange(10) != 5)
    np.testing.assert_array_equal(back[stores.valid(back)], np.delete(data, 5, axis=0))


def test_refusals(tmp_path):
    with pytest.raises(stores.StoreError, match="empty"):
        stores.create(tmp_path / "s", [], BLOCKS, MADE)
    with pytest.raises(stores.StoreError, match="no store at"):
        stores.open_store(tmp_path / "nothing")
    store = stores.create(tmp_path / "s", ["a", "b"], BLOCKS, MADE)
    with pytest.raises(stores.StoreError, match="takes rows of shape"):
        store.write(0, rows(1))
    (tmp_path / "s" / "manifest.json").write_text("{")
    with pytest.raises(stores.StoreError, match="manifest.json is not JSON"):
        stores.open_store(tmp_path / "s")
    (tmp_path / "s" / "manifest.json").write_text(json.dumps({"format": 99}))
    with pytest.raises(stores.StoreError, match="format 99"):
        stores.open_store(tmp_path / "s")


def test_killed_while_writing_it_ends_in_the_same_bytes(tmp_path):
    program = """
import sys, time, numpy as np
from tests.test_store import filled, rows
from tda import store as stores
data = rows(64)
write = stores.GradientStore.write
def slow(self, shard, x):
    write(self, shard, x)
    print(shard, flush=True)
    time.sleep(0.05)
stores.GradientStore.write = slow
filled(sys.argv[1], data)
"""
    filled(tmp_path / "whole", rows(64))
    done = 0
    for stop_after in (2, 3, 100):
        run = subprocess.Popen(
            [sys.executable, "-c", program, str(tmp_path / "killed")],
            stdout=subprocess.PIPE,
            text=True,
            env=os.environ | {"PYTHONPATH": os.getcwd()},
        )
        for number, _ in enumerate(run.stdout, 1):
            done += 1
            if number == stop_after:
                run.send_signal(signal.SIGKILL)
                break
        run.wait()
    assert run.returncode == 0 and done == 16  # every shard was written once
    files = sorted(p.relative_to(tmp_path / "whole") for p in (tmp_path / "whole").rglob("*"))
    for name in files:
        if (tmp_path / "whole" / name).is_file():
            whole = (tmp_path / "whole" / name).read_bytes()
            assert (tmp_path / "killed" / name).read_bytes() == whole, name
