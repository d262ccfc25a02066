"""The passages of a store's rows: id, document and text, by row or by name without a scan.

Records are in array_record files of `FILE_ROWS` rows each. A file is written by the process that
writes the shard of its first row, before that shard, so that the work is shared: decoding the texts
of a large corpus takes one processor a day.
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
from collections.abc import Iterable, Sequence

import numpy as np
from array_record.python.array_record_module import ArrayRecordReader, ArrayRecordWriter

from tda.runtime import atomic_file
from tda.store import name_index
from tda.store.location import Location, StoreError
from tda.store.name_index import HashedNames, NameIndex

FILE_ROWS = 1 << 16


@dataclasses.dataclass(frozen=True, slots=True)
class Passage:
    """The passage whose gradient a row is."""

    id: str
    """Unique in the store."""
    document: str
    """Id of the document that the passage is, or is a part of."""
    text: str | None = None
    """None if the store has no texts."""


@dataclasses.dataclass(frozen=True)
class PassageList:
    """The passages of new rows, in order."""

    ids: Sequence[str]
    """Unique; `HashedNames` save hashing the names of a large corpus."""
    documents: Sequence[str]
    texts: Sequence[str] | None
    """None to store none."""

    def digest(self) -> str:
        """Returns a hash that identifies the passages by ids and documents."""
        if isinstance(self.ids, HashedNames):
            return self.ids.digest()
        out = hashlib.sha256()
        for pair in zip(self.ids, self.documents, strict=True):
            out.update("\0".join(pair).encode() + b"\1")
        return out.hexdigest()[:32]

    def write_indices(self, location: Location) -> None:
        """Writes the passages' indices by name; only the missing files.

        Raises:
            StoreError: two passages have the same id.
        """
        files, count = set(location.names()), len(self.ids)
        if not name_index.exists(files, "ids", count):
            name_index.write(location / "ids", self.ids, unique=True)
        if not self._are_documents() and not name_index.exists(files, "documents", count):
            name_index.write(location / "documents", self.documents, unique=False)

    def _are_documents(self) -> bool:
        """Returns whether every document is one passage, so that the index of ids serves both."""
        if self.documents is self.ids:
            return True
        return not isinstance(self.ids, HashedNames) and list(self.documents) == list(self.ids)

    def write_records(self, location: Location, rows: slice) -> None:
        """Writes those missing files of passages whose first row is in a range of rows."""
        folder = location / "passages"
        for number in _files_beginning(rows):
            if folder.path is None or not (folder.path / _file_name(number)).exists():
                self._write_file(folder, number)

    def _write_file(self, folder: Location, number: int) -> None:
        """Writes one file of records; for a remote folder, to a local file first."""
        name = _file_name(number)
        if folder.path is not None:
            folder.path.mkdir(parents=True, exist_ok=True)
            with atomic_file.replacing(folder.path / name) as part:
                self._write_records(part, number)
            return
        with tempfile.TemporaryDirectory() as directory:
            local = pathlib.Path(directory) / name
            self._write_records(local, number)
            folder.write(name, local.read_bytes())

    def _write_records(self, path: pathlib.Path, number: int) -> None:
        # Groups of one record: each is read without decoding its neighbours.
        writer = ArrayRecordWriter(str(path), "group_size:1")
        for r in range(number * FILE_ROWS, min(len(self.ids), (number + 1) * FILE_ROWS)):
            record = [self.ids[r], self.documents[r], self.texts[r] if self.texts else None]
            writer.write(json.dumps(record, ensure_ascii=False).encode())
        writer.close()


def _files_beginning(rows: slice) -> range:
    """Returns the numbers of the files whose first row is in a range of rows."""
    return range(math.ceil(rows.start / FILE_ROWS), math.ceil(rows.stop / FILE_ROWS))


def _file_name(number: int) -> str:
    return f"{number:06d}.array_record"


class Passages:
    """The passages of rows 0, 1, …

    Args:
        location: the directory that `PassageList` wrote to.
        count: number of rows.
    """

    def __init__(self, location: Location, count: int):
        self._location, self._folder, self._count = location, location / "passages", count
        self._readers: dict[int, ArrayRecordReader] = {}
        self._fetched: pathlib.Path | None = None

    def read(self, rows: Sequence[int]) -> list[Passage]:
        """Reads the passages of some rows, in that order.

        Raises:
            StoreError: a file is missing or damaged.
        """
        rows = np.asarray(rows, np.int64)
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
            name = f"{self._folder.name}/{_file_name(number)}"
            raise StoreError(f"{name} is damaged: {error}") from error

    def _file(self, number: int) -> pathlib.Path:
        """Returns the local path of a file of records; a remote one is fetched once."""
        name, contents = _file_name(number), None
        if self._folder.path is not None:
            if (self._folder.path / name).exists():
                return self._folder.path / name
        else:
            contents = self._folder.read(name)
        if contents is None:
            raise StoreError(
                f"{self._folder.name}/{name} is missing; build the store again, or append these "
                "passages again"
            )
        if self._fetched is None:
            self._fetched = pathlib.Path(tempfile.mkdtemp(prefix="passages-"))
            weakref.finalize(self, shutil.rmtree, self._fetched, ignore_errors=True)
        (self._fetched / name).write_bytes(contents)
        return self._fetched / name

    def rows_of(self, name: str) -> list[int]:
        """Returns the row of the passage with this id, as a list of one row or none."""
        return [r for r in self._ids.rows(name) if self.read([r])[0].id == name]

    def rows_of_document(self, name: str) -> list[int]:
        """Returns the rows of a document's passages, in order."""
        return sorted(r for r in self._documents.rows(name) if self.read([r])[0].document == name)

    @functools.cached_property
    def _ids(self) -> NameIndex:
        return NameIndex(self._location / "ids", self._count)

    @functools.cached_property
    def _documents(self) -> NameIndex:
        name = "documents" if self._has_documents() else "ids"
        return NameIndex(self._location / name, self._count)

    def _has_documents(self) -> bool:
        return self._location.read("documents/hashes/zarr.json") is not None

    def damage(self, shards: Iterable[slice]) -> dict[str, str]:
        """Reads everything; returns the error of each damaged file, by its name.

        Args:
            shards: the rows of the shards that are written, whose passages are there.
        """
        errors = {}
        for number in sorted(n for rows in shards for n in _files_beginning(rows)):
            count = min(FILE_ROWS, self._count - number * FILE_ROWS)
            try:
                self._records(number, np.arange(count))
            except StoreError as error:
                errors[f"passages/{_file_name(number)}"] = str(error)
        for name in ("ids", *(["documents"] if self._has_documents() else [])):
            try:
                NameIndex(self._location / name, self._count).read_all()
            except ValueError as error:
                errors[name] = str(error)
        return errors

    def remove(self, name: str) -> None:
        """Removes a file that `damage` named; creating the store again writes it again."""
        is_folder = not name.endswith(".array_record")
        for file in self._location.names(name) if is_folder else [name]:
            self._location.remove(file)
