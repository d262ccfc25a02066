"""The gradient store: round trips, refusals, kills."""

import json
import os

import numpy as np
import pytest
import zarr

from tda import store as stores
from tda.runtime.fingerprint import hash_64_bits
from tda.store import arrays, codec, location, name_index, passages

BLOCKS = {"0/attention": 4, "0/mlp": 4}
MADE = {"checkpoint": "a", "projection": {"seed": 0, "side": 2}}


def rows(count=10, seed=0):
    return np.random.default_rng(seed).normal(size=(count, 8)).astype(np.float32)


def filled(path, data, shard_rows=4, dtype="float32"):
    row_bytes = stores.Form(dtype, tuple(BLOCKS.values())).row_bytes
    ids = [f"p{i}" for i in range(len(data))]
    store = stores.create(path, ids, BLOCKS, MADE, dtype, shard_bytes=shard_rows * row_bytes)
    for shard in store.missing():
        store.write(shard, data[store.shards()[shard]])
    return store


def chunks(store, step):
    return ((r.first, r.decoded(store.form)) for r in store.scan(step))


def test_rows_are_read_back_by_slice_by_number_and_in_chunks(tmp_path):
    data = rows()
    store = filled(tmp_path / "s", data)
    assert len(store.shards()) == 3 and store.missing() == []
    again = stores.open_store(tmp_path / "s", MADE)
    np.testing.assert_array_equal(again.read(slice(0, 10)), data)
    np.testing.assert_array_equal(again.read([7, 0, 9]), data[[7, 0, 9]])
    pieces = list(chunks(again, 2))
    assert [start for start, _ in pieces] == [0, 2, 4, 6, 8]
    np.testing.assert_array_equal(np.concatenate([x for _, x in pieces]), data)
    assert [p.id for p in again.passages(range(10))] == [f"p{i}" for i in range(10)]
    assert again.form.widths == (4, 4)


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


@pytest.mark.parametrize("absent", [-1, 10, 99])
def test_a_row_that_does_not_exist_is_an_error_and_not_what_lay_in_memory(tmp_path, absent):
    store = filled(tmp_path / "s", rows())
    with pytest.raises(IndexError, match=f"rows 0 to 9, not {absent}"):
        store.read([0, absent, 2])
    with pytest.raises(IndexError, match=f"rows 0 to 9, not {absent}"):
        store.passages([0, absent, 2])
    assert store.read([]).shape == store.read(slice(10, 20)).shape == (0, 8)


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
        list(chunks(store, 4))
    np.testing.assert_array_equal(store.read(slice(0, 4)), data[:4])


def test_differences_from_a_store_are_named(tmp_path):
    filled(tmp_path / "s", rows())
    expected = {"checkpoint": "a", "projection": {"seed": 1, "side": 2}}
    with pytest.raises(stores.StoreError, match="projection.seed: 0 → 1"):
        stores.open_store(tmp_path / "s", expected)
    with pytest.raises(stores.StoreError, match="segments.0.rows: 10 → 9"):
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


def test_stores_that_cannot_be_made_or_opened_are_refused(tmp_path):
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


@pytest.mark.parametrize("folder", [".", "0", "0/ids/hashes"])
@pytest.mark.parametrize("name", ["thesis.txt", "sub/results.npy", "c.0.0", "zarr.json.bak"])
def test_files_that_no_store_wrote_are_never_removed(tmp_path, folder, name):
    """Guards: a directory that is named by mistake, and emptied."""
    foreign = tmp_path / folder / name
    leftover = tmp_path / "0" / "ids" / "hashes" / "zarr.json"  # as by a killed creation
    for file in (foreign, leftover):
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_text("notes")
    before = contents(tmp_path)
    with pytest.raises(stores.StoreError, match="is not empty and is no store.*choose another dir"):
        stores.create(tmp_path, ["a", "b"], {"b": 4}, {})
    assert contents(tmp_path) == before


def test_a_store_that_lost_its_manifest_keeps_its_gradients(tmp_path):
    filled(tmp_path / "s", rows())
    (tmp_path / "s" / "manifest.json").unlink()
    before = contents(tmp_path / "s")
    with pytest.raises(stores.StoreError, match=r"no store: it has 0/gradients/c\.0\.0 and no man"):
        filled(tmp_path / "s", rows())
    assert contents(tmp_path / "s") == before


def test_an_empty_directory_becomes_a_store(tmp_path):
    (tmp_path / "s" / "0" / "sub").mkdir(parents=True)
    (tmp_path / "link").symlink_to(tmp_path / "s")
    filled(tmp_path / "link", rows())
    np.testing.assert_array_equal(stores.open_store(tmp_path / "s").read(slice(0, 10)), rows())


class Killed(BaseException):
    """Nothing in the package catches it."""


@pytest.fixture
def kill_after(monkeypatch):
    """Makes the process die, so to say, after that many steps of making a store."""
    left = 0

    def step(owner, name):
        original = getattr(owner, name)

        def call(*arguments, **keywords):
            nonlocal left
            out = original(*arguments, **keywords)
            left -= 1
            if left == 0:
                raise Killed
            return out

        monkeypatch.setattr(owner, name, call)

    # `replace` follows a record file that is written but has another name still.
    for owner, name in [
        (arrays, "open_array"),
        (passages, "ArrayRecordWriter"),
        (os, "replace"),
        (location.Location, "write"),
        (location.Location, "remove"),
    ]:
        step(owner, name)

    def kill_after(steps):
        nonlocal left
        left = steps

    return kill_after


def test_leftovers_of_a_killed_creation_make_room_for_another_store(tmp_path, kill_after):
    """Killed after every step; then the clearing is killed too; or something is put beside it."""

    def make(path, ids="abcd", documents="xxyy"):
        documents = list(documents)
        return stores.create(path, list(ids), BLOCKS, MADE, "int8", documents=documents)

    make(tmp_path / "complete", "efg", "efg")
    complete, last = contents(tmp_path / "complete"), 6
    for steps in range(1, last + 1):
        path = tmp_path / str(steps)
        kill_after(steps)
        with pytest.raises(Killed):
            make(path)
        if steps == last:  # the manifest, with which it is a store
            assert stores.open_store(path).rows == 4
            continue
        kill_after(0)
        (path / "0" / "passages").mkdir(exist_ok=True)
        (path / "0" / "passages" / "000000.array_record.a-host.0123456789ab.part").touch()
        left = contents(path)
        (path / "0" / "notes.txt").write_text("notes")
        with pytest.raises(stores.StoreError, match="it has 0/notes.txt"):
            make(path, "efg", "efg")
        (path / "0" / "notes.txt").unlink()
        assert contents(path) == left
        kill_after(1)
        with pytest.raises(Killed):
            make(path, "efg", "efg")
        assert len(contents(path)) == len(left) - 1
        kill_after(0)
        make(path, "efg", "efg")
        assert contents(path) == complete


def test_leftovers_of_a_killed_append_make_room_for_other_rows(tmp_path, kill_after):
    def make(path, steps):
        filled(path, rows())
        kill_after(steps)
        stores.append(path, ["a", "b"], MADE, documents=["x", "x"], texts=["1", "2"])

    filled(tmp_path / "complete", rows())
    stores.append(tmp_path / "complete", ["c"], MADE)
    # The first three open what is there; the ninth writes the manifest.
    for steps in range(4, 9):
        path = tmp_path / str(steps)
        with pytest.raises(Killed):
            make(path, steps)
        kill_after(0)
        assert (path / "1").exists() and stores.open_store(path).rows == 10
        stores.append(path, ["c"], MADE)
        assert contents(path) == contents(tmp_path / "complete")


@pytest.mark.parametrize("dtype", ["int8", "4bit", "3bit", "2bit"])
def test_codes_are_read_back_and_opened_by_zarr(tmp_path, dtype):
    data = rows()
    store = filled(tmp_path / "s", data, dtype=dtype)
    back = stores.open_store(tmp_path / "s").read(slice(0, 10))
    assert 0 < np.square(back - data).sum() / np.square(data).sum() < 0.15
    array = zarr.open_array(tmp_path / "s" / "0" / "gradients", mode="r")
    assert array.dtype == np.uint8 and array.shape == (10, store.form.columns)
    np.testing.assert_array_equal(codec.decode_on_host(array[:], store.form), back)
    for part in store.scan(2):
        np.testing.assert_array_equal(part.decoded(store.form), back[part.first : part.first + 2])
    # Rows that a device has encoded are written as they are.
    again = stores.create(tmp_path / "t", [f"p{i}" for i in range(10)], BLOCKS, MADE, dtype)
    again.write(0, array[:])
    np.testing.assert_array_equal(again.read(slice(0, 10)), back)
    for wrong in (array[:, 1:], array[:].astype(np.int8), data[:, 1:]):
        with pytest.raises(stores.StoreError, match="in float32 or as stored, not"):
            again.write(0, wrong)


@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "int8", "2bit"])
def test_invalid_rows_are_infinite_in_every_dtype(tmp_path, dtype):
    data = rows()
    data[5, 3] = np.nan
    store = filled(tmp_path / "s", data, dtype=dtype)
    for back in (store.read(slice(0, 10)), np.concatenate([x for _, x in chunks(store, 4)])):
        np.testing.assert_array_equal(stores.valid(back), np.arange(10) != 5)
        assert np.isinf(back[5]).all()


def write_zeros(store):
    """Writes all shards, and so all passages."""
    for i in store.missing():
        shard = store.shards()[i]
        store.write(i, np.zeros((shard.stop - shard.start, store.width), np.float32))


@pytest.mark.parametrize("file_rows", [2, 3, 10, 100])
def test_whoever_writes_a_shard_writes_the_passages_that_begin_there(
    tmp_path, monkeypatch, file_rows
):
    """Guards: texts written by one process for all, or by none; a shard without its passages."""
    monkeypatch.setattr(passages, "FILE_ROWS", file_rows)

    class Texts(list):
        """The texts, and which of them were read."""

        def __getitem__(self, row):
            read.append(row)
            return super().__getitem__(row)

    names, read = [f"p{i}" for i in range(23)], []
    arguments = (tmp_path / "s", names, BLOCKS, MADE)
    options = dict(
        shard_bytes=5 * 4 * sum(BLOCKS.values()), texts=Texts(f"t{i}" for i in range(23))
    )
    writers = [stores.create(*arguments, **options) for _ in range(2)]
    assert not read
    shards = writers[0].shards()
    assert len(shards) > 4
    for i in reversed(range(len(shards))):
        read.clear()
        x = np.full((shards[i].stop - shards[i].start, writers[0].width), np.nan, np.float32)
        assert writers[i % 2].write(i, x) == names[shards[i]]
        files = [f for f in range(0, 23, file_rows) if shards[i].start <= f < shards[i].stop]
        assert read == [r for f in files for r in range(f, min(23, f + file_rows))]
        # A killed run finds what it wrote, and writes no text again.
        stores.create(*arguments, **options)
        assert len(read) == len(set(read))
        assert stores.open_store(tmp_path / "s").damaged_passages() == {}
    store = stores.open_store(tmp_path / "s")
    assert [(p.id, p.text) for p in store.passages(range(23))] == [
        (f"p{i}", f"t{i}") for i in range(23)
    ]


def test_names_with_known_hashes_are_not_read(tmp_path):
    """Guards: a start that reads every id of a large corpus."""

    class Names(list):
        """Names that know their hashes."""

        def __iter__(self):
            raise AssertionError("read one by one")

        def hashes(self):
            return np.array([hash_64_bits(self[i]) for i in range(len(self))], np.uint64)

        def digest(self):
            return "5"

    ids, documents = (Names(f"{label}{i // 2}" for i in range(10)) for label in "pd")
    for i in range(0, 10, 2):
        ids[i] += "#0"
    for names, rows_of_7 in ((ids, [7]), (documents, [6, 7])):
        path = tmp_path / names[1]
        for _ in range(2):
            store = stores.create(path, ids, BLOCKS, MADE, documents=names)
            write_zeros(store)
        assert store.row_of("p3#0") == 6 and store.rows_of_document(names[7]) == rows_of_7
        assert store.manifest["segments"][0]["passages"] == "5"


def test_passages_are_found_by_row_by_id_and_by_document(tmp_path):
    ids = [f"d{i // 3}#{i % 3}" for i in range(30)]
    documents = [f"d{i // 3}" for i in range(30)]
    texts = [f"Text {i}: é\n" for i in range(30)]
    store = stores.create(tmp_path / "s", ids, BLOCKS, MADE, documents=documents, texts=texts)
    write_zeros(store)
    assert store.passages([7, 0]) == [
        stores.Passage("d2#1", "d2", "Text 7: é\n"),
        stores.Passage("d0#0", "d0", "Text 0: é\n"),
    ]
    assert store.row_of("d9#2") == 29 and store.rows_of_document("d4") == [12, 13, 14]
    with pytest.raises(KeyError, match="no passage 'd4'"):
        store.row_of("d4")
    assert store.rows_of_document("d4#0") == []
    with pytest.raises(IndexError, match="rows 0 to 29"):
        store.passages([30])
    with pytest.raises(IndexError):
        store.passages([-1])
    store = stores.create(tmp_path / "t", ["a"], BLOCKS, MADE)
    write_zeros(store)
    assert store.passages([0])[0].text is None


def test_a_name_is_found_without_a_scan(tmp_path, monkeypatch):
    """Of many rows one record is read, and a small part of the index."""
    monkeypatch.setattr(passages, "FILE_ROWS", 4096)
    count = 200_000
    ids = [f"id{i}" for i in range(count)]
    store = stores.create(tmp_path / "s", ids, BLOCKS, MADE)
    write_zeros(store)
    read = []
    original = passages.Passages._records
    monkeypatch.setattr(
        passages.Passages, "_records", lambda s, n, w: read.extend(w) or original(s, n, w)
    )
    index = name_index.NameIndex(store.location / "0" / "ids", count)
    windows = []

    class Spy:
        def __init__(self, array):
            self.array = array

        def __getitem__(self, part):
            windows.append(part.stop - part.start)
            return self.array[part]

    index._hashes = Spy(index._hashes)
    store._segments[0][1].passages.__dict__["_ids"] = index
    for row in (0, 77_777, count - 1):
        assert store.row_of(f"id{row}") == row
    assert len(read) == 3 and sum(windows) < count / 5
    with pytest.raises(KeyError):
        store.row_of("id200000")


@pytest.mark.parametrize("spread", [1 << 64, 1 << 12, 7, 1])
def test_hashes_are_ordered_as_by_a_stable_sort(spread):
    for count in (1, 2, 3, 1024, 5000):
        # Small numbers differ only in bits that row numbers take the place of.
        hashes = np.random.default_rng(count).integers(0, spread, count, np.uint64)
        order = name_index.sort_hashes(hashes)
        np.testing.assert_array_equal(order, np.argsort(hashes, kind="stable"))
        assert order.dtype == np.int64


def test_names_with_the_same_hash_are_told_apart(tmp_path, monkeypatch):
    monkeypatch.setattr(name_index, "hash_64_bits", lambda name: len(name))
    ids = ["a", "b", "cc", "dd", "e"]
    store = stores.create(tmp_path / "s", ids, BLOCKS, MADE)
    write_zeros(store)
    assert [store.row_of(n) for n in ids] == [0, 1, 2, 3, 4]
    with pytest.raises(KeyError):
        store.row_of("z")


def test_two_passages_with_the_same_id_are_refused(tmp_path):
    with pytest.raises(stores.StoreError, match="two passages have the id 'b'"):
        stores.create(tmp_path / "s", ["a", "b", "c", "b"], BLOCKS, MADE)
    with pytest.raises(stores.StoreError, match="no store at"):
        stores.open_store(tmp_path / "s")


def contents(path):
    return {p.relative_to(path): p.read_bytes() for p in path.rglob("*") if p.is_file()}


def test_appended_rows_stand_behind_and_touch_nothing(tmp_path):
    data, more = rows(), rows(7, seed=1)
    filled(tmp_path / "s", data)
    before = contents(tmp_path / "s" / "0")
    new = [f"q{i}" for i in range(7)]
    for _ in range(2):  # the second time, as after a kill, nothing is added
        store = stores.append(tmp_path / "s", new, MADE, shard_bytes=128, texts=list("abcdefg"))
        assert store.rows == 17 and store.missing() == [3, 4]
    assert store.shards()[3:] == [slice(10, 14), slice(14, 17)]
    for i in store.missing():
        store.write(i, np.concatenate([data, more])[store.shards()[i]])
    again = stores.open_store(tmp_path / "s", MADE)
    np.testing.assert_array_equal(again.read(slice(0, 17)), np.concatenate([data, more]))
    np.testing.assert_array_equal(
        np.concatenate([x for _, x in chunks(again, 4)]), np.concatenate([data, more])
    )
    assert [f for f, _ in chunks(again, 4)] == [0, 4, 8, 10, 14]
    assert again.row_of("q3") == 13 and again.passages([13, 2])[0].text == "d"
    assert [p.id for p in again.passages(range(17))] == [f"p{i}" for i in range(10)] + new
    assert contents(tmp_path / "s" / "0") == before
    # The corpus that it began with still opens it.
    ids = [f"p{i}" for i in range(10)]
    assert stores.create(tmp_path / "s", ids, BLOCKS, MADE, shard_bytes=128).rows == 17


def test_rows_that_do_not_belong_are_not_appended(tmp_path):
    filled(tmp_path / "s", rows())
    with pytest.raises(stores.StoreError, match="checkpoint: a → b"):
        stores.append(tmp_path / "s", ["q"], MADE | {"checkpoint": "b"})
    with pytest.raises(stores.StoreError, match="has a passage 'p3' already"):
        stores.append(tmp_path / "s", ["q", "p3"], MADE)
    with pytest.raises(stores.StoreError, match="no rows"):
        stores.append(tmp_path / "s", [], MADE)
    assert stores.open_store(tmp_path / "s").rows == 10
    foreign = tmp_path / "s" / "1" / "notes.txt"
    foreign.parent.mkdir()
    foreign.write_text("notes")
    with pytest.raises(stores.StoreError, match="1/notes.txt is no file of theirs.*move away"):
        stores.append(tmp_path / "s", ["q"], MADE)
    assert foreign.read_text() == "notes" and stores.open_store(tmp_path / "s").rows == 10
    foreign.unlink()
    assert stores.append(tmp_path / "s", ["q"], MADE).rows == 11


@pytest.mark.parametrize("dtype", ["float32", "2bit"])
def test_withdrawn_passages_count_for_nothing(tmp_path, dtype):
    data = rows()
    ids, documents = [f"p{i}" for i in range(10)], [f"d{i // 4}" for i in range(10)]
    shard_bytes = 4 * stores.Form(dtype, tuple(BLOCKS.values())).row_bytes
    store = stores.create(
        tmp_path / "s", ids, BLOCKS, MADE, dtype, shard_bytes, documents=documents
    )
    for i in store.missing():
        store.write(i, data[store.shards()[i]])
    before = store.read(slice(0, 10))
    assert store.withdraw(ids=["p1"]) == 1
    assert store.withdraw(ids=["p1"], documents=["d2"]) == 2
    again = stores.open_store(tmp_path / "s")
    for back in (
        again.read(slice(0, 10)),
        again.read(np.arange(10)),
        np.concatenate([x for _, x in chunks(again, 2)]),
    ):
        np.testing.assert_array_equal(np.flatnonzero(~stores.valid(back)), [1, 8, 9])
        np.testing.assert_array_equal(back[stores.valid(back)], before[[0, 2, 3, 4, 5, 6, 7]])
    with pytest.raises(stores.StoreError, match="no passage 'zz', no document 'd9'"):
        again.withdraw(ids=["p2", "zz"], documents=["d9"])
    assert stores.open_store(tmp_path / "s").withdrawn.tolist() == [1, 8, 9]


def test_withdrawals_of_stores_that_are_open_are_all_kept(tmp_path):
    """Guards: a passage that is retrieved again, for another store had read the list before."""
    filled(tmp_path / "s", rows())
    one, two = (stores.open_store(tmp_path / "s") for _ in range(2))
    one.read([0])
    assert two.withdraw(ids=["p1", "p3"]) == 2
    assert one.withdraw(ids=["p2", "p3"]) == 1
    for store in (one, stores.open_store(tmp_path / "s")):
        assert store.withdrawn.tolist() == [1, 2, 3]
        assert np.flatnonzero(~stores.valid(store.read(range(5)))).tolist() == [1, 2, 3]
    # A store keeps the list that it has read.
    assert two.withdrawn.tolist() == [1, 2, 3] and one.withdraw(ids=["p9"]) == 1
    assert two.withdrawn.tolist() == [1, 2, 3]


def test_of_two_withdrawals_at_the_same_time_none_is_lost(tmp_path, monkeypatch):
    """The other writes after the list was read, and before it is written."""
    filled(tmp_path / "s", rows())
    one, two = (stores.open_store(tmp_path / "s") for _ in range(2))
    update, pending = location.Location.update_json, ["p1", "p7"]

    def overtaken(self, name, change):
        def changed(stored):
            out = change(stored)
            if pending:
                monkeypatch.setattr(location.Location, "update_json", update)
                two.withdraw(ids=[pending.pop()])
            return out

        update(self, name, changed)

    monkeypatch.setattr(location.Location, "update_json", overtaken)
    assert one.withdraw(ids=["p0"]) == 1
    assert pending == [] and stores.open_store(tmp_path / "s").withdrawn.tolist() == [0, 1, 7]


@pytest.mark.parametrize("dtype", ["float32", "2bit"])
@pytest.mark.parametrize("at", [0, -1, -20, "cut", "empty"])
def test_damage_anywhere_in_a_shard_is_named_and_can_be_removed(tmp_path, at, dtype):
    store = filled(tmp_path / "s", rows(), dtype=dtype)
    data = store.read(slice(0, 10))
    file = tmp_path / "s" / "0" / "gradients" / "c.1.0"
    raw = bytearray(file.read_bytes())
    if at in ("cut", "empty"):
        raw = raw[:-10] if at == "cut" else bytearray()
    else:
        raw[at] ^= 1
    file.write_bytes(raw)
    assert [bool(store.damage(i)) for i in range(3)] == [False, True, False]
    with pytest.raises(stores.StoreError, match=r"c\.1\.0 is damaged.*store verify"):
        list(store.scan(4))
    with pytest.raises(stores.StoreError, match="damaged.*store verify"):
        store.read([5])
    store.remove(1)
    assert store.missing() == [1] and store.damage(1) is None
    store.write(1, rows()[4:8])
    np.testing.assert_array_equal(store.read(slice(0, 10)), data)


def test_damaged_passages_that_were_appended_are_written_again(tmp_path):
    filled(tmp_path / "s", rows())
    append = lambda names: stores.append(  # noqa: E731
        tmp_path / "s", list(names), MADE, documents=["x"] * len(names), texts=list(names)
    )
    for names in ("ab", "cde"):
        store = append(names)
        for i in store.missing():
            store.write(i, rows(len(names)))
    before = contents(tmp_path / "s")
    damaged = ["2/documents", "2/ids", "2/passages/000000.array_record"]
    for name in damaged:
        store.remove_passages(name)
    damaged_store = stores.open_store(tmp_path / "s")
    with pytest.raises(stores.StoreError, match="is missing; build the store again, or"):
        damaged_store.passages([12])
    assert damaged_store.missing() == []
    again = append("cde")
    assert contents(tmp_path / "s") == before
    assert again.passages([12, 14])[1].text == "e" and again.damaged_passages() == {}
    assert again.row_of("d") == 13 and again.rows_of_document("x") == [10, 11, 12, 13, 14]


def test_damaged_passages_are_named_and_written_again(tmp_path):
    make = lambda: stores.create(  # noqa: E731
        tmp_path / "s", list("abcd"), BLOCKS, MADE, documents=list("xxyy"), texts=list("1234")
    )
    store = make()
    store.write(0, rows(4))
    before = contents(tmp_path / "s")
    assert store.damaged_passages() == {}
    files = sorted(f for f in before if "passages" in str(f) or f.parts[-2:] == ("c", "0"))
    assert len(files) == 5  # records; hashes and rows of ids and of documents
    for file in files:
        raw = bytearray(before[file])
        raw[len(raw) // 2] ^= 1
        (tmp_path / "s" / file).write_bytes(raw)
    damaged = stores.open_store(tmp_path / "s").damaged_passages()
    assert sorted(damaged) == ["0/documents", "0/ids", "0/passages/000000.array_record"]
    for name in damaged:
        store.remove_passages(name)
    make()
    assert contents(tmp_path / "s") == before


@pytest.mark.parametrize("dtype", ["float32", "3bit"])
def test_scans_of_ranges_read_each_row_once(tmp_path, dtype):
    """Ranges that begin and end in the middle of shards, chunks and steps; rows appended later."""
    x = rows(30)
    store = filled(tmp_path / "s", x, dtype=dtype)
    expected = store.read(slice(None))
    for bounds in ([0, 30], [0, 7, 8, 16, 29, 30], [0, 0, 15, 30]):
        pieces = [
            piece
            for a, b in zip(bounds, bounds[1:], strict=False)
            for piece in store.scan(2, range(a, b))
        ]
        firsts = np.concatenate([p.first + np.arange(len(p)) for p in pieces])
        np.testing.assert_array_equal(firsts, np.arange(30))
        values = np.concatenate([p.decoded(store.form) for p in pieces])
        np.testing.assert_array_equal(values, expected)


def test_opening_reads_no_rows_of_a_large_store(tmp_path, monkeypatch):
    """Guards: a store that takes its whole corpus to be opened."""
    filled(tmp_path / "s", rows())
    monkeypatch.setattr(passages.Passages, "read", None)
    monkeypatch.setattr(stores.GradientStore, "scan", None)
    store = stores.open_store(tmp_path / "s", MADE)
    assert store.missing() == [] and store.rows == 10


def test_addresses_that_cannot_be_written_are_refused(tmp_path):
    with pytest.raises(stores.StoreError, match="use a local path, gs://"):
        stores.create("ftp://a/b", ["a"], BLOCKS, MADE)
    with pytest.raises(stores.StoreError, match="~/stores begins with ~"):
        stores.check_root("~/stores")
    (tmp_path / "file").write_text("")
    with pytest.raises(stores.StoreError, match="file"):
        stores.create(tmp_path / "file" / "s", ["a"], BLOCKS, MADE)
