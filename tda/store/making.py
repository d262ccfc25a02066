"""Making a store, appending to one, opening one; and the refusal of one that does not fit."""

from collections.abc import Iterator, Sequence

from tda.runtime import processes
from tda.store import passages, rows, segment
from tda.store.gradient_store import FORMAT, GradientStore, read_manifest
from tda.store.location import Location, StoreError
from tda.store.segment import Form

SHARD_BYTES = 256 << 20


def create(
    path,
    ids: Sequence[str],
    blocks: dict[str, int],
    fingerprint: dict,
    dtype: str = "float32",
    shard_bytes: int = SHARD_BYTES,
    *,
    documents: Sequence[str] | None = None,
    texts: Sequence[str] | None = None,
    corpus=None,
) -> GradientStore:
    """Makes a store, or opens the unfinished or finished one that is there already.

    Of several processes the first makes it, and the others open it when it is there.

    Args:
        path: a directory, local or `gs://`, `s3://`: empty or absent, or a store's. Nothing is
            removed from it but what a killed creation left.
        ids: of the rows.
        blocks: name and width of each block of a row, in order.
        fingerprint: JSON values that say what the rows were made with.
        dtype: of the numbers on disk: "float32", "bfloat16", or "int8" with a scale for each block
            of a row.
        shard_bytes: size of a shard, about; what is lost at most by a kill.
        documents: id of each row's document; the row's own by default.
        texts: of the rows; left out by default.
        corpus: a JSON value that says what text the rows are of.

    Raises:
        StoreError: another store is there, or anything else; the corpus is empty, two ids are the
            same, or the directory is not writable.
    """
    if not len(ids):
        raise StoreError("there are no rows to store: the corpus is empty")
    if dtype not in rows.DTYPES:
        raise StoreError(f"unknown dtype {dtype!r}; use {', '.join(rows.DTYPES)}")
    documents = ids if documents is None else documents
    form, location = Form(dtype, tuple(blocks.values())), Location(path)
    described = segment.about(form, ids, documents, shard_bytes, corpus)
    manifest = {
        "format": FORMAT,
        "width": form.width,
        "dtype": dtype,
        "blocks": list(blocks),
        "block_widths": list(form.widths),
        "fingerprint": fingerprint,
        "segments": [described],
    }

    def make():
        if location.read("manifest.json") is None:
            if other := _cleared(location, "", "0"):
                raise StoreError(
                    f"{location.name} is not empty and is no store: it has {other} and no "
                    "manifest.json. Nothing was removed; choose another directory, or move away "
                    "what is in it"
                )
            segment.make(location / "0", form, described, ids, documents, texts)
            # The manifest comes last: a directory without one is not a store yet.
            location.write_json("manifest.json", manifest)
            return
        there = read_manifest(location)
        # What was appended since is no difference.
        _check(location.name, there | {"segments": there["segments"][:1]}, manifest)
        passages.write(location / "0", ids, documents, texts)

    processes.on_first_process(f"make the store {location.name}", make)
    return GradientStore(location)


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
    """Adds rows behind those of a store, which are not touched; the new shards are missing then.

    Where these rows were appended before, nothing is added, and files of their passages that lack
    are written again: a killed run goes on.

    Args:
        path: the store.
        ids, shard_bytes, documents, texts, corpus: of the new rows, as for `create`.
        fingerprint: what the new rows are made with: the same as the store's.

    Raises:
        StoreError: the fingerprint differs, an id is in the store already, there are no rows, or
            where they belong there is something else.
    """
    if not len(ids):
        raise StoreError("there are no rows to append")
    documents = ids if documents is None else documents

    def make():
        store = open_store(path, fingerprint)
        segments = store.manifest["segments"]
        described = segment.about(store.form, ids, documents, shard_bytes, corpus)
        if described in segments[1:]:
            number = segments.index(described, 1)
            passages.write(store.location / str(number), ids, documents, texts)
            return
        for name in ids:
            if _has(store, name):
                raise StoreError(f"{store.path} has a passage {name!r} already")
        number = str(len(segments))
        if other := _cleared(store.location, number, number):
            raise StoreError(
                f"{store.path} cannot be appended to: the new rows belong in {number}/, and "
                f"{other} is no file of theirs. Nothing was removed; move away what is in {number}/"
            )
        there = store.location / number
        segment.make(there, store.form, described, ids, documents, texts)
        longer = store.manifest | {"segments": [*segments, described]}
        store.location.write_json("manifest.json", longer)

    processes.on_first_process(f"append to the store {path}", make)
    return open_store(path)


def _cleared(location: Location, folder: str, number: str) -> str | None:
    """Removes what a killed run left of the segment of that number, where there is nothing else.

    Args:
        location: of the store.
        folder: where nothing else may be; "" of all of the store.
        number: of the segment, one that no manifest names.

    Returns:
        None, or a file that is something else; nothing is removed then.
    """
    names, start = location.names(folder), f"{number}/"
    for name in names:
        if not (name.startswith(start) and segment.is_made(name.removeprefix(start))):
            return name
    # One by one, and not the directory: what another puts there meanwhile stays.
    for name in names:
        location.remove(name)
    return None


def _has(store: GradientStore, name: str) -> bool:
    try:
        store.row_of(name)
    except KeyError:
        return False
    return True


def open_store(path, fingerprint: dict | None = None) -> GradientStore:
    """Opens a store.

    Args:
        path: its directory.
        fingerprint: what its rows must have been made with; only the keys given are compared.

    Raises:
        StoreError: there is none, its format is unknown, or it differs; the message says in what.
    """
    store = GradientStore(Location(path))
    if fingerprint is not None:
        there = store.manifest["fingerprint"]
        _check(store.path, {k: there.get(k) for k in fingerprint}, fingerprint)
    return store


def check_same_kind(one: GradientStore, other: GradientStore) -> None:
    """Nothing, where the rows of two stores may be compared: queries with passages.

    Raises:
        StoreError: they were not made with the same; the message says what differs.
    """
    keys = ("width", "blocks", "block_widths", "fingerprint")
    _check(one.path, *({k: s.manifest[k] for k in keys} for s in (one, other)))


def finished(path) -> bool:
    """Whether there is a store at `path` that lacks no shard."""
    location = Location(path)
    there = location.read("manifest.json") is not None
    return there and not GradientStore(location).missing()


def _check(path, there: dict, wanted: dict) -> None:
    differing = list(_differences("", there, wanted))
    if differing:
        raise StoreError(
            f"{path} was not made with what it is used with:\n  "
            + "\n  ".join(differing)
            + "\nremove it, or use what it was made with"
        )


def _differences(name: str, there, wanted) -> Iterator[str]:
    if isinstance(there, list) and isinstance(wanted, list) and len(there) == len(wanted):
        there, wanted = dict(enumerate(there)), dict(enumerate(wanted))
    if isinstance(there, dict) and isinstance(wanted, dict):
        for key in sorted(there.keys() | wanted.keys()):
            inner = f"{name}.{key}" if name else str(key)
            yield from _differences(inner, there.get(key), wanted.get(key))
    elif there != wanted:
        yield f"{name}: {there} in the store, {wanted} wanted"
