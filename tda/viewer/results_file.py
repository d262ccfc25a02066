"""A results file opened for reading at random: an index of its lines, its records read when asked.

Opening reads the file once and keeps a row for each record and where its line stands; the passages
stay on disk.
"""

import functools
import gzip
import hashlib
import json
import math
import os
import shutil
import tempfile
from collections.abc import Callable

import numpy as np

from tda.results import ResultsError
from tda.viewer import summary

# Of a summary chunk and of a chunk of records: what a page asks for at once.
SUMMARY_ROWS = 1000
RECORD_ROWS = 10
_SHOWN = 2000  # characters of a malformed line


class ResultsFile:
    """An opened results file.

    Args:
        path: JSON lines, in the release's format; `.gz` is decompressed to a temporary file.
        label: short name: in links, in the filter, over columns.
        title: what the method is called.
        on_bytes: told the bytes of some lines when they are indexed.

    Attributes:
        columns: for each field of `tda.viewer.summary.FIELDS` a list with a value a row.
        digest: tells this file's contents from others.

    Raises:
        OSError: the file cannot be read.
        ResultsError: it holds nothing, or no line of it is a record.
    """

    def __init__(
        self, path, label: str, title: str = "", on_bytes: Callable[[int], None] = lambda n: None
    ):
        self.path, self.label, self.title = os.fspath(path), label, title or label
        self.columns: dict[str, list] = {field: [] for field in summary.FIELDS}
        self._file = _opened(self.path)
        self._seen = _signature(self.path)
        starts, lengths, ids = [], [], []
        start, digest, name = 0, hashlib.sha256(), os.path.basename(self.path)
        told = 0
        for number, line in enumerate(self._file, 1):
            if line.strip():
                digest.update(line)
                row, found = _row(line, f"{name}, line {number}")
                for field, values in self.columns.items():
                    values.append(row[field])
                starts.append(start)
                lengths.append(len(line))
                ids.append(np.fromiter(map(_number_of, found), np.uint64, len(found)))
            start += len(line)
            if start - told > 1 << 22:
                on_bytes(start - told)
                told = start
        on_bytes(start - told)
        self._starts, self._lengths, self._ids = starts, lengths, ids
        self.digest = digest.hexdigest()[:16]
        if not starts:
            raise ResultsError(f"{self.path} is empty; give a results file (JSON lines)")
        if all(self.columns["error"]):
            raise ResultsError(f"no line of {self.path} is a record: {self.columns['error'][0]}")

    def __len__(self) -> int:
        return len(self._starts)

    @property
    def malformed(self) -> int:
        """Lines that are no record."""
        return sum(e is not None for e in self.columns["error"])

    def stale(self) -> bool:
        """Whether another file lies at the path by now."""
        return _signature(self.path) != self._seen

    def describe(self) -> dict:
        """What a page must know before it asks for rows."""
        present = [f for f, v in self.columns.items() if any(x is not None for x in v)]
        return {
            "label": self.label,
            "title": self.title,
            "name": os.path.basename(self.path),
            "digest": self.digest,
            "rows": len(self),
            "malformed": self.malformed,
            "fields": present,
            "longest": max((n for n in self.columns["n"] if n is not None), default=0),
        }

    def summaries(self, chunk: int) -> dict:
        """Some rows' columns, those that the file has.

        Raises:
            IndexError: there is no such chunk.
        """
        rows = _rows(chunk, SUMMARY_ROWS, len(self))
        parts = {f: v[rows] for f, v in self.columns.items()}
        return {f: v for f, v in parts.items() if any(x is not None for x in v)}

    def records(self, chunk: int) -> list:
        """Some records; a line that is none is {"malformed": why, "line": its beginning}.

        Raises:
            IndexError: there is no such chunk.
        """
        rows = _rows(chunk, RECORD_ROWS, len(self))
        return [self.record(i) for i in range(rows.start, rows.stop)]

    def record(self, row: int) -> dict:
        """One record; a number that is not finite becomes None, as JSON has no word for it."""
        line = os.pread(self._file.fileno(), self._lengths[row], self._starts[row])
        if self.columns["error"][row] is None:
            return plain(json.loads(line))
        shown = line.decode("utf-8", "replace").strip()
        return {"malformed": self.columns["error"][row], "line": shown[:_SHOWN]}

    def proponent_numbers(self, row: int) -> np.ndarray:
        """A number for each proponent's id, uint64, the same for the same id."""
        return self._ids[row]

    def ranks_of(self, row: int, passage: str) -> int:
        """The rank of a passage among a record's proponents, from 1; 0 where it is not."""
        at = np.flatnonzero(self._ids[row] == _number_of(passage))
        return int(at[0]) + 1 if len(at) else 0

    def row_of(self, example: str) -> int | None:
        """The first row with this id."""
        return self._rows_by_id.get(example)

    @functools.cached_property
    def _rows_by_id(self) -> dict[str, int]:
        ids = self.columns["id"]
        # Of equal ids the first row counts.
        return {ids[i]: i for i in range(len(ids) - 1, -1, -1) if ids[i] is not None}

    def close(self) -> None:
        """Closes the file."""
        self._file.close()


def overlap(one: ResultsFile, other: ResultsFile) -> list[int | None]:
    """For every row of `one`, how many of its proponents the other file has for the same query.

    None where the other file lacks the query, or either gives no ids.
    """
    out: list[int | None] = []
    for row, example in enumerate(one.columns["id"]):
        match = None if example is None else other.row_of(example)
        mine = one.proponent_numbers(row)
        theirs = None if match is None else other.proponent_numbers(match)
        lacking = theirs is None or not len(mine) or not len(theirs)
        out.append(None if lacking else len(set(mine.tolist()) & set(theirs.tolist())))
    return out


def plain(value):
    """A JSON value without numbers that are not finite: these become None."""
    try:
        json.dumps(value, allow_nan=False)
    except ValueError:
        return _plain(value)
    return value


def _plain(value):
    if isinstance(value, dict):
        return {k: _plain(v) for k, v in value.items()}
    if isinstance(value, list):
        return [_plain(v) for v in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value


def to_json(value) -> bytes:
    """A value as JSON in ASCII: whatever a text holds, a page can read it."""
    return json.dumps(value, allow_nan=False, separators=(",", ":")).encode("ascii")


def chunks(count: int, size: int) -> int:
    """How many chunks of `size` hold `count` rows."""
    return -(-count // size)


def _rows(chunk: int, size: int, count: int) -> slice:
    if not 0 <= chunk < chunks(count, size):
        raise IndexError(f"chunk {chunk} of {chunks(count, size)}")
    return slice(chunk * size, min(count, (chunk + 1) * size))


def _row(line: bytes, where: str) -> tuple[dict, list[str]]:
    """The row of a line, and its proponents' ids."""
    try:
        item = json.loads(line)
        return summary.summarise(item, where), item.get("proponent_ids") or []
    except ResultsError as error:
        return summary.malformed(str(error)), []
    except (ValueError, RecursionError) as error:
        return summary.malformed(f"{where}: not JSON ({error})"), []


def _number_of(name: str) -> int:
    # Within a process the same name has the same hash; 64 bits tell names apart.
    return hash(name) & (2**64 - 1)


def _opened(path: str):
    if not path.endswith(".gz"):
        return open(path, "rb")
    whole = tempfile.TemporaryFile()
    with gzip.open(path, "rb") as packed:
        try:
            shutil.copyfileobj(packed, whole, 1 << 20)
        except (EOFError, gzip.BadGzipFile) as error:
            raise ResultsError(f"{path} is not a whole gzip file: {error}") from error
    whole.seek(0)
    return whole


def _signature(path: str):
    try:
        found = os.stat(path)
    except OSError:
        return None
    return found.st_ino, found.st_size, found.st_mtime_ns
