"""Shard files against TensorStore and zarr, which write and read the same format."""

import contextlib
import threading
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pytest
import tensorstore as ts
import zarr

from tda import store as stores
from tda.store import passages, segment, shard_file
from tda.store.codec import Form, encode_on_host
from tda.store.location import Location

FORM = Form("float32", (4, 4))


def make(path, count=11, dtype="float32"):
    form = Form(dtype, FORM.widths)
    ids = [str(i) for i in range(count)]
    names = passages.PassageList(ids, ids, None)
    described = segment.describe(form, names, 4 * form.row_bytes, None)
    assert described["shard_rows"] == 4
    described["chunk_rows"] = 2  # as in a large shard, several chunks
    segment.make(Location(path), form, described, names)
    return segment.Segment(Location(path), form, described, shard_file.Buffers())


def rows(count=11):
    return np.random.default_rng(0).normal(size=(count, 8)).astype(np.float32)


@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "3bit"])
def test_files_are_those_that_tensorstore_writes(tmp_path, dtype):
    """Guards: a format of our own. The last chunk is partial, the last shard lacks one."""
    ours, theirs = (make(tmp_path / n, dtype=dtype) for n in ("ours", "theirs"))
    data = rows()
    for i in range(ours.shards):
        part = data[ours.rows_of(i)]
        encoded = encode_on_host(part, ours.form)
        ours.write(i, encoded)
        theirs._array[theirs.rows_of(i)].write(encoded).result()
    files = sorted(p.relative_to(tmp_path / "ours") for p in tmp_path.glob("ours/*/c.*"))
    assert len(files) == 3
    for file in files:
        assert (tmp_path / "ours" / file).read_bytes() == (tmp_path / "theirs" / file).read_bytes()
    assert not list(tmp_path.rglob("*.part"))


def test_reading_equals_tensorstore_for_every_span(tmp_path):
    written = make(tmp_path / "s")
    data = rows()
    for i in range(3):
        written.write(i, data[written.rows_of(i)])
    for length in (2, 4):
        spans = [s for i in range(3) for s in written.spans(i, length)]
        assert [s.start for s in spans] == list(range(0, 11, length))
        for span in spans:
            part = written.read_span(span).values
            np.testing.assert_array_equal(part, data[span.start : span.stop])


def test_a_file_of_another_layout_is_read_by_tensorstore(tmp_path):
    written = make(tmp_path / "s")
    data = rows()
    array = zarr.open_array(tmp_path / "s" / "gradients", mode="r+")
    for first in (2, 0):  # in this order the chunks stand in the file, if the writer wants
        array[first : first + 2] = data[first : first + 2]
    span = written.spans(0, 4)[0]
    np.testing.assert_array_equal(written.read_span(span).values, data[:4])
    path = str(tmp_path / "s" / "gradients" / "c.0.0")
    index = np.frombuffer(open(path, "rb").read()[-36:-4], "<u8").reshape(2, 2)
    swapped = open(path, "rb").read()
    # Chunk 1 in front of chunk 0.
    raw = swapped[:-36]
    parts = [raw[o : o + n] for o, n in index]
    new = np.array([[len(parts[1]), len(parts[0])], [0, len(parts[1])]], "<u8").tobytes()
    crc = shard_file.google_crc32c.value(new).to_bytes(4, "little")
    open(path, "wb").write(parts[1] + parts[0] + new + crc)
    layout = shard_file.Layout(chunk_bytes=64, chunks=2)
    assert shard_file.read(path, layout, 0, 2, shard_file.Buffers()) is None
    np.testing.assert_array_equal(written.read_span(span).values, data[:4])


@pytest.mark.parametrize("at", [0, 70, -1, -8, -36, "cut", "empty"])
def test_damage_anywhere_is_found(tmp_path, at):
    """In a chunk, in another, in the checksum of the index, in the index; a file cut short."""
    written = make(tmp_path / "s")
    written.write(0, rows()[:4])
    path = tmp_path / "s" / "gradients" / "c.0.0"
    raw = bytearray(path.read_bytes())
    if at == "cut":
        raw = raw[:-10]
    elif at == "empty":
        raw = bytearray()
    else:
        raw[at] ^= 4
    path.write_bytes(raw)
    with pytest.raises(stores.StoreError, match=r"c\.0\.0 is damaged"):
        written.read_span(written.spans(0, 4)[0])


def test_a_buffer_is_reused_only_when_nothing_refers_to_it():
    buffers = shard_file.Buffers()
    first = buffers.take(1000)
    first[:] = 1
    view = first.view(np.float32)[5:10].reshape(5, 1)
    address = first.ctypes.data
    del first
    second = buffers.take(1000)
    second[:] = 2
    assert (view.view(np.uint8) == 1).all() and second.ctypes.data != address
    del view
    third = buffers.take(900)
    assert third.ctypes.data == address and address % 64 == 0
    assert buffers.take(5000).ctypes.data not in (address, second.ctypes.data)


def test_readers_side_by_side_never_share_memory(monkeypatch):
    """Guards: two threads that find the same memory free."""
    buffers = shard_file.Buffers()
    # Both look before either takes.
    looked, holders = threading.Barrier(2), shard_file._holders

    def look(buffers, i):
        count = holders(buffers, i)
        with contextlib.suppress(threading.BrokenBarrierError):
            looked.wait(0.2)
        return count

    buffers.take(1000)  # nobody holds it
    monkeypatch.setattr(shard_file, "_holders", look)
    with ThreadPoolExecutor(2) as pool:
        first, second = pool.map(buffers.take, (1000, 1000))
    assert first.ctypes.data != second.ctypes.data


def test_a_write_that_fails_leaves_nothing(tmp_path):
    with pytest.raises(RuntimeError), shard_file.writing(Location(tmp_path), "c.0.0", 2) as out:
        out.add(np.ones(4), 0)
        raise RuntimeError("disk")
    assert list(tmp_path.iterdir()) == []


def test_a_shard_of_zeros_counts_as_written(tmp_path):
    """Guards: zeros look like rows that are missing, and are not stored."""
    written = make(tmp_path / "s", dtype="2bit")
    assert written.written() == set()
    zeros = encode_on_host(np.zeros((4, 8), np.float32), written.form)
    written.write(0, zeros)
    assert written.written() == {0}
    part = written.read_span(written.spans(0, 2)[0])
    assert part.valid.all() and (part.decoded(written.form) == 0).all()
    array = ts.open(written._array.spec(), open=True).result()
    assert (array[:4].read().result() == zeros).all() and (array[4:].read().result() == 255).all()
    # The same through TensorStore, as for a store that is not on this machine.
    written._array[4:8].write(zeros).result()
    assert written.written() == {0, 1}
