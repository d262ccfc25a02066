"""Creates a store, appends to one, opens one, and refuses one built with other settings."""

import functools
import uuid
from collections.abc import Sequence

import numpy as np

from tda.runtime import code_version, processes
from tda.runtime.differences import check_same
from tda.store import segment
from tda.store.codec import DTYPES, Form
from tda.store.gradient_store import FORMAT, GradientStore, read_manifest, read_withdrawn
from tda.store.location import Location, StoreError
from tda.store.passages import PassageList

# Large enough for the disk's full rate, and small enough for a killed run to lose little.
SHARD_BYTES = 256 << 20
_check_same = functools.partial(check_same, error=StoreError)


def create(
    path,
    ids: Sequence[str],
    blocks: dict[str, int],
    fingerprint: dict,
    dtype: str = "float32",
    shard_bytes: int = SHARD_BYTES,
    *,
    rank: int = 0,
    documents: Sequence[str] | None = None,
    texts: Sequence[str] | None = None,
    corpus=None,
) -> GradientStore:
    """Creates a store, or opens the unfinished or finished one that exists already.

    Process 0 creates it, and the others then open it.

    Args:
        path: a directory, local or `gs://`, `s3://`: empty, absent, or a store's. Only files that
            a killed creation left are removed from it.
        ids: ids of the rows.
        blocks: name and width of each block of a row, in order.
        fingerprint: JSON values that identify the inputs of the rows.
        dtype: dtype of the numbers on disk, of `DTYPES` (`tda.store.codec`).
        shard_bytes: approximate size of a shard, the most that a killed run loses.
        rank: pairs of vectors that each block is stored as (`tda.store.vector_pairs`); 0 stores
            its numbers themselves.
        documents: id of each row's document; None for the row's own id.
        texts: texts of the rows; None to store none.
        corpus: a JSON value that identifies the text of the rows.

    Raises:
        StoreError: the directory holds another store or other files; the corpus is empty, two ids
            are the same, or the directory is not writable.
        ValueError: the blocks cannot be stored as pairs of vectors.
    """
    if not len(ids):
        raise StoreError("there are no rows to store: the corpus is empty")
    if dtype not in DTYPES:
        raise StoreError(f"unknown dtype {dtype!r}; use {', '.join(DTYPES)}")
    passages = PassageList(ids, ids if documents is None else documents, texts)
    form, location = Form(dtype, tuple(blocks.values()), rank), Location(path)
    described = segment.describe(form, passages, shard_bytes, corpus)
    manifest = {
        "format": FORMAT,
        "width": form.width,
        "dtype": dtype,
        "blocks": list(blocks),
        "block_widths": list(form.widths),
        **form.describe(),
        "fingerprint": fingerprint,
        "code": code_version.describe(),
        "segments": [described],
    }

    def make():
        if location.read("manifest.json") is None:
            if other := _clear_leftovers(location, "", "0"):
                raise StoreError(
                    f"{location.name} is not empty and is no store: it has {other} and no "
                    "manifest.json. Nothing was removed; choose another directory, or move away "
                    "what is in it"
                )
            segment.make(location / "0", form, described, passages)
            # The manifest is written last: a directory without one is not a store yet.
            location.write_json("manifest.json", manifest)
            return
        stored = read_manifest(location)
        # Segments that were appended later do not count as differences; nor does other code, as
        # long as it gives the same rows (`tda.encoding.table.check_stored_rows`).
        same = {"segments": stored["segments"][:1], "code": manifest["code"]}
        _check_same(location.name, stored | same, manifest)
        GradientStore(location).restore_passages(0, passages)

    processes.on_first_process(f"make the store {location.name}", make)
    store = GradientStore(location)
    store.add_passages(0, passages)
    return store


def append(
    path,
    ids: Sequence[str],
    fingerprint: dict,
    shard_bytes: int = SHARD_BYTES,
    *,
    documents: Sequence[str] | None = None,
    texts: Sequence[str] | None = None,
    corpus=None,
) -> GradientStore:
    """Adds rows after those of a store, as shards that are still to be written.

    Rows that were appended before are not added again; missing files of their passages are written
    again, so that a killed run resumes.

    Args:
        path: the store.
        ids, shard_bytes, documents, texts, corpus: the new rows, as for `create`.
        fingerprint: identifies the inputs of the new rows; must equal the store's.

    Raises:
        StoreError: the fingerprint differs, an id is in the store already, there are no rows, or
            the new segment's directory holds other files.
    """
    if not len(ids):
        raise StoreError("there are no rows to append")
    passages = PassageList(ids, ids if documents is None else documents, texts)

    def make():
        store = open_store(path, fingerprint)
        segments = store.manifest["segments"]
        described = segment.describe(store.form, passages, shard_bytes, corpus)
        if described in segments[1:]:
            number = segments.index(described, 1)
            store.restore_passages(number, passages)
            return number
        for name in ids:
            if store.rows_of(name):
                raise StoreError(f"{store.path} has a passage {name!r} already")
        number = len(segments)
        folder = str(number)
        if other := _clear_leftovers(store.location, folder, folder):
            raise StoreError(
                f"{store.path} cannot be appended to: the new rows belong in {folder}/, and "
                f"{other} is no file of theirs. Nothing was removed; move away what is in {folder}/"
            )
        segment.make(store.location / folder, store.form, described, passages)
        # Written last: until then the new rows do not belong to the store.
        longer = store.manifest | {"segments": [*segments, described]}
        store.location.write_json("manifest.json", longer)
        return number

    number = processes.on_first_process(f"append to the store {path}", make)
    store = open_store(path)
    store.add_passages(number, passages)
    return store


def _clear_leftovers(location: Location, folder: str, number: str) -> str | None:
    """Removes the files that a killed run left of a segment that no manifest names.

    If the folder ("" is the whole store) holds a file that is no part of the segment, returns its
    name and removes nothing.
    """
    names, start = location.names(folder), f"{number}/"
    for name in names:
        if not (name.startswith(start) and segment.is_made(name.removeprefix(start))):
            return name
    # File by file, so that files that another process adds meanwhile stay.
    for name in names:
        location.remove(name)
    return None


def open_store(path, fingerprint: dict | None = None) -> GradientStore:
    """Opens a store.

    Args:
        path: its directory.
        fingerprint: the required fingerprint of its rows; only these keys are compared.

    Raises:
        StoreError: there is no store, its format is unknown, or its fingerprint differs; the
            message lists the differences.
    """
    store = GradientStore(Location(path))
    if fingerprint is not None:
        stored = store.manifest["fingerprint"]
        _check_same(store.path, {k: stored.get(k) for k in fingerprint}, fingerprint)
    return store


def exists(path) -> bool:
    """Returns whether there is a store at `path`, finished or not."""
    return Location(path).read("manifest.json") is not None


def finished(path) -> bool:
    """Returns whether there is a store at `path` with all of its shards."""
    return exists(path) and not GradientStore(Location(path)).missing()


def withdrawn(path) -> np.ndarray:
    """Returns the rows withdrawn from the store at `path`, int64; none if there is no store."""
    return read_withdrawn(Location(path))


def remove(path) -> None:
    """Removes the store at `path`, if there is one."""
    if exists(path):
        Location(path).remove_all()


def check_root(path) -> None:
    """Checks that stores can be written below a directory, local or in object storage.

    Raises:
        StoreError: they cannot; the message says why.
    """
    location, name = Location(path), f".writable-{uuid.uuid4().hex}"
    location.write(name, b"")
    location.remove(name)
