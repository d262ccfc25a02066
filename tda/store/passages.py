"""The passages of a store's rows: id, document and text, by row or by name without a scan.

Records lie in array_record files of `FILE_ROWS` rows each. Names are found through two sorted
arrays, the hashes of all names and the rows that they belong to.
"""

import dataclasses
import functools
import hashlib
import json
import math
import pathlib
import shutil
import tempfile
import weakref
from collections.abc import Iterator, Sequence

import numpy as np
import tensorstore as ts
from array_record.python.array_record_module import ArrayRecordReader, ArrayRecordWriter

from tda.runtime import progress
from tda.runtime.fingerprint import hash_64_bits
from tda.store.location import Location, StoreError

FILE_ROWS = 1 << 16
_INDEX_CHUNK, _INDEX_SHARD = 1 << 16, 1 << 22
# With fewer passages, writing takes too short a time for a progress bar.
_MANY = 1_000_000


@dataclasses.dataclass(frozen=True, slots=True)
class Passage:
    """The passage whose gradient a row is.

    Attributes:
        id: id of the passage, unique in the store.
        document: id of the document that the passage is, or is a part of.
        text: its text; None where the store has no texts.
    """

    id: str
    document: str
    text: str | None = None


def digest(ids: Sequence[str], documents: Sequence[str]) -> str:
    """Returns a hash that identifies the passages."""
    out = hashlib.sha256()
    for pair in zip(ids, documents, strict=True):
        out.update("\0".join(pair).encode() + b"\1")
    return out.hexdigest()[:32]


def write(
    location: Location,
    ids: Sequence[str],
    documents: Sequence[str],
    texts: Sequence[str] | None,
) -> None:
    """Writes the passages of rows 0, 1, …, and their index by name; only the missing files.

    Raises:
        StoreError: two passages have the same id.
    """
    files = set(location.names())
    if not _has_index(files, "ids", len(ids)):
        _write_index(location / "ids", ids, unique=True)
    same = documents is ids or list(documents) == list(ids)
    if not same and not _has_index(files, "documents", len(ids)):
        _write_index(location / "documents", documents, unique=False)
    numbers = [n for n in range(_files(len(ids))) if f"passages/{_file_name(n)}" not in files]
    quiet = len(numbers) * FILE_ROWS < _MANY
    with progress.bar(len(numbers), "write passages", "file", quiet=quiet) as bar:
        for number in numbers:
            rows = range(number * FILE_ROWS, min(len(ids), (number + 1) * FILE_ROWS))
            records = ([ids[r], documents[r], texts[r] if texts else None] for r in rows)
            _write_file(location / "passages", _file_name(number), records)
            bar.update()


def _missing(folder: Location, name: str) -> str:
    return f"{folder.name}/{name} is missing; make the store, or append these passages, again"


def _files(count: int) -> int:
    return math.ceil(count / FILE_ROWS)


def _file_name(number: int) -> str:
    return f"{number:06d}.array_record"


def _write_file(folder: Location, name: str, records) -> None:
    """Writes one file of records; for a remote folder, to a local file first."""
    with tempfile.TemporaryDirectory() as directory:
        local = pathlib.Path(directory) if folder.path is None else folder.path
        local.mkdir(parents=True, exist_ok=True)
        part = local / f"{name}.part"
        # Groups of one record: each is read without decoding its neighbours.
        writer = ArrayRecordWriter(str(part), "group_size:1")
        for record in records:
            writer.write(json.dumps(record, ensure_ascii=False).encode())
        writer.close()
        if folder.path is None:
            folder.write(name, part.read_bytes())
        else:
            part.rename(local / name)


class Passages:
    """The passages of rows 0, 1, …

    Args:
        location: the directory that `write` wrote to.
        count: number of rows.
    """

    def __init__(self, location: Location, count: int):
        self._location, self._count = location, count
        self._readers: dict[int, ArrayRecordReader] = {}
        self._fetched: pathlib.Path | None = None

    def __len__(self) -> int:
        return self._count

    def __getitem__(self, row: int) -> Passage:
        return self.read([row])[0]

    def __iter__(self) -> Iterator[Passage]:
        for start in range(0, self._count, 4096):
            yield from self.read(range(start, min(self._count, start + 4096)))

    def read(self, rows: Sequence[int]) -> list[Passage]:
        """Reads the passages of some rows, in that order.

        Raises:
            IndexError: there is no such row.
            StoreError: a file is missing or damaged.
        """
        rows = np.asarray(rows, np.int64)
        if len(rows) and not 0 <= rows.min() <= rows.max() < self._count:
            raise IndexError(f"rows are from 0 to {self._count - 1}, not {rows.max()}")
        out: list[Passage | None] = [None] * len(rows)
        for number in np.unique(rows // FILE_ROWS):
            at = np.flatnonzero(rows // FILE_ROWS == number)
            for i, raw in zip(at, self._records(int(number), rows[at] % FILE_ROWS), strict=True):
                out[i] = Passage(*json.loads(raw))
        return out

    def _records(self, number: int, within: np.ndarray) -> Sequence[bytes]:
        try:
            if number not in self._readers:
                self._readers[number] = ArrayRecordReader(str(self._file(number)))
            return self._readers[number].read(within.tolist())
        except (RuntimeError, ValueError, IndexError, OSError) as error:
            folder = self._location / "passages"
            raise StoreError(f"{folder.name}/{_file_name(number)} is damaged: {error}") from error

    def _file(self, number: int) -> pathlib.Path:
        """Returns the local path of a file of records; a remote one is fetched once."""
        folder, name = self._location / "passages", _file_name(number)
        if folder.path is not None:
            if not (folder.path / name).exists():
                raise StoreError(_missing(folder, name))
            return folder.path / name
        if self._fetched is None:
            self._fetched = pathlib.Path(tempfile.mkdtemp(prefix="passages-"))
            weakref.finalize(self, shutil.rmtree, self._fetched, ignore_errors=True)
        contents = folder.read(name)
        if contents is None:
            raise StoreError(_missing(folder, name))
        (self._fetched / name).write_bytes(contents)
        return self._fetched / name

    def rows_of(self, name: str) -> list[int]:
        """Returns the row of the passage with this id, as a list of one row or none."""
        return [r for r in self._ids.rows(name) if self[r].id == name]

    def rows_of_document(self, name: str) -> list[int]:
        """Returns the rows of a document's passages, in order."""
        return sorted(r for r in self._documents.rows(name) if self[r].document == name)

    @functools.cached_property
    def _ids(self) -> "_Index":
        return _Index(self._location / "ids", self._count)

    @functools.cached_property
    def _documents(self) -> "_Index":
        # Where every document is one passage, the index of ids serves for both.
        name = "documents" if self._has_documents() else "ids"
        return _Index(self._location / name, self._count)

    def _has_documents(self) -> bool:
        return self._location.read("documents/hashes/zarr.json") is not None

    def damage(self) -> dict[str, str]:
        """Reads everything; returns the error of each damaged file, by its name."""
        wrong = {}
        for number in range(_files(self._count)):
            count = min(FILE_ROWS, self._count - number * FILE_ROWS)
            try:
                self._records(number, np.arange(count))
            except StoreError as error:
                wrong[f"passages/{_file_name(number)}"] = str(error)
        for name in ("ids", "documents"):
            try:
                if name == "ids" or self._has_documents():
                    _Index(self._location / name, self._count).read_all()
            except (StoreError, ValueError) as error:
                wrong[name] = str(error)
        return wrong

    def remove(self, name: str) -> None:
        """Removes a file that `damage` named; creating the store again writes it again."""
        folder = not name.endswith(".array_record")
        for file in self._location.names(name) if folder else [name]:
            self._location.remove(file)


class _Index:
    """From a name to rows, by sorted hashes: they are uniform, so a position is easily guessed."""

    def __init__(self, location: Location, count: int):
        self._count = count
        self._hashes, self._rows = (_open_index(location, n, count) for n in ("hashes", "rows"))

    def rows(self, name: str) -> list[int]:
        """Returns the rows whose name has the same hash."""
        key = np.uint64(hash_64_bits(name))
        guess = int(float(key) / 2.0**64 * self._count)
        # The rank of a uniform number deviates by about √count, so this window rarely misses it.
        reach = 64 + 8 * math.isqrt(self._count)
        while True:
            low, high = max(0, guess - reach), min(self._count, guess + reach)
            part = self._hashes[low:high].read().result()
            first, last = np.searchsorted(part, key), np.searchsorted(part, key, "right")
            # A run of equal hashes that touches the window's end may go on beyond it.
            if (low == 0 or first > 0) and (high == self._count or last < len(part)):
                return self._rows[low + first : low + last].read().result().tolist()
            reach *= 4

    def read_all(self) -> None:
        """Reads both arrays; raises a ValueError where one is damaged."""
        for array in (self._hashes, self._rows):
            for start in range(0, self._count, _INDEX_SHARD):
                array[start : min(self._count, start + _INDEX_SHARD)].read().result()


def _write_index(location: Location, names: Sequence[str], unique: bool) -> None:
    hashes = np.fromiter(map(hash_64_bits, names), np.uint64, len(names))
    rows = np.argsort(hashes, kind="stable")
    hashes = hashes[rows]
    if unique:
        for i in np.flatnonzero(hashes[1:] == hashes[:-1]):
            if names[rows[i]] == names[rows[i + 1]]:
                raise StoreError(f"two passages have the id {names[rows[i]]!r}")
    for name, numbers in (("hashes", hashes), ("rows", rows)):
        _open_index(location, name, len(names), create=True).write(numbers).result()


def _has_index(names: set[str], folder: str, count: int) -> bool:
    files = [f"c/{i}" for i in range(math.ceil(count / _INDEX_SHARD))] + ["zarr.json"]
    return all(f"{folder}/{n}/{f}" in names for n in ("hashes", "rows") for f in files)


def _open_index(location: Location, name: str, count: int, create: bool = False):
    chunk = min(_INDEX_CHUNK, count)
    inner = [{"name": "bytes", "configuration": {"endian": "little"}}, {"name": "crc32c"}]
    codec = {"chunk_shape": [chunk], "codecs": inner}
    shard = min(_INDEX_SHARD, chunk * math.ceil(count / chunk))
    spec = {
        "driver": "zarr3",
        "kvstore": (location / name).spec(),
        "metadata": {
            "shape": [count],
            "data_type": {"hashes": "uint64", "rows": "int64"}[name],
            "chunk_grid": {"name": "regular", "configuration": {"chunk_shape": [shard]}},
            "codecs": [{"name": "sharding_indexed", "configuration": codec}],
        },
    }
    mode = dict(create=True, delete_existing=True) if create else dict(open=True)
    try:
        return ts.open(spec, **mode).result()
    except (ValueError, OSError) as error:
        raise StoreError(f"{location.name}/{name}: {error}") from error
