"""Random access to a results file: its index in memory, its records on disk.

Opening a file reads it once and keeps a summary row and the position of each record. Passages are
read only when a page asks for them.
"""

import functools
import gzip
import hashlib
import json
import math
import os
import shutil
import tempfile
import zlib
from collections.abc import Callable
from typing import BinaryIO

import numpy as np

from tda.results import ResultsError, with_current_names
from tda.viewer import summary

# Rows of a chunk, the unit in which a page reads summaries and records. A record with its passages
# is about a hundred times as long as its summary.
SUMMARY_ROWS = 1000
RECORD_ROWS = 10
_SHOWN = 2000  # characters of a malformed line
_REPORT_BYTES = 4 << 20  # between two reports of progress


class ResultsFile:
    """An opened results file.

    Args:
        path: JSON lines, in the release's format; `.gz` is decompressed to a temporary file.
        label: a short name, for links and the filter.
        title: the method's name, for headings.
        on_bytes: called with the number of bytes read since the last call.

    Attributes:
        columns: for each field of `tda.viewer.summary.FIELDS`, a list with one value per row.
        digest: a hash of the file's contents.

    Raises:
        OSError: the file cannot be read.
        ResultsError: it is empty, or none of its lines is a record.
    """

    def __init__(
        self, path, label: str, title: str = "", on_bytes: Callable[[int], None] = lambda n: None
    ):
        self.path, self.label, self.title = os.fspath(path), label, title or label
        self.columns: dict[str, list] = {field: [] for field in summary.FIELDS}
        self._file = open_unpacked(self.path)
        self._seen = signature(self.path)
        starts, lengths, ids = [], [], []
        start, digest, name = 0, hashlib.sha256(), os.path.basename(self.path)
        reported = 0
        for number, line in enumerate(self._file, 1):
            if line.strip():
                digest.update(line)
                row, proponents = _row(line, f"{name}, line {number}")
                for field, values in self.columns.items():
                    values.append(row[field])
                starts.append(start)
                lengths.append(len(line))
                ids.append(np.fromiter(map(_number_of, proponents), np.uint64, len(proponents)))
            start += len(line)
            if start - reported > _REPORT_BYTES:
                on_bytes(start - reported)
                reported = start
        on_bytes(start - reported)
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
        """The number of lines that are not records."""
        return sum(e is not None for e in self.columns["error"])

    def stale(self) -> bool:
        """Returns whether the file at the path has changed since it was read."""
        return signature(self.path) != self._seen

    def describe(self) -> dict:
        """Returns the file's part of the index."""
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
        """Returns a chunk of summary rows by column; columns without any value are left out.

        Raises:
            IndexError: there is no such chunk.
        """
        rows = _rows(chunk, SUMMARY_ROWS, len(self))
        parts = {f: v[rows] for f, v in self.columns.items()}
        return {f: v for f, v in parts.items() if any(x is not None for x in v)}

    def records(self, chunk: int) -> list:
        """Returns a chunk of records; for a malformed line {"malformed": reason, "line": text}.

        Raises:
            IndexError: there is no such chunk.
        """
        rows = _rows(chunk, RECORD_ROWS, len(self))
        return [self.record(i) for i in range(rows.start, rows.stop)]

    def record(self, row: int) -> dict:
        """Returns one record; numbers that are not finite become None, since JSON lacks them."""
        # pread does not move the file's position, so that several threads can read at once.
        line = os.pread(self._file.fileno(), self._lengths[row], self._starts[row])
        if self.columns["error"][row] is None:
            item = json.loads(line, parse_float=finite, parse_constant=finite)
            return with_current_names(item)
        shown = line.decode("utf-8", "replace").strip()
        return {"malformed": self.columns["error"][row], "line": shown[:_SHOWN]}

    def ranks_of(self, row: int, passage: str) -> int:
        """Returns the rank of a passage among a record's proponents, from 1; 0 if it is not one."""
        at = np.flatnonzero(self._ids[row] == _number_of(passage))
        return int(at[0]) + 1 if len(at) else 0

    def row_of(self, query: str) -> int | None:
        """Returns the first row of the query with this key (`tda.viewer.summary`), or None."""
        return self._rows_by_query.get(query)

    @functools.cached_property
    def _rows_by_query(self) -> dict[str, int]:
        keys = self.columns["query"]
        # Of equal queries the first row counts.
        return {keys[i]: i for i in range(len(keys) - 1, -1, -1) if keys[i] is not None}


def overlap(one: ResultsFile, other: ResultsFile) -> list[int | None]:
    """Counts, for every row of `one`, the proponents that the other file has for the same query.

    The count is None if the other file lacks the query, or either file has no ids.
    """
    out: list[int | None] = []
    for row, query in enumerate(one.columns["query"]):
        match = None if query is None else other.row_of(query)
        numbers = one._ids[row]
        other_numbers = None if match is None else other._ids[match]
        lacking = other_numbers is None or not len(numbers) or not len(other_numbers)
        out.append(None if lacking else len(set(numbers.tolist()) & set(other_numbers.tolist())))
    return out


def finite(text: str) -> float | None:
    """Reads a number of JSON; NaN, Infinity and 1e999, which pages cannot read, become None."""
    value = float(text)
    return value if math.isfinite(value) else None


def to_json(value) -> bytes:
    """Encodes a value as ASCII JSON, which any page can read whatever its texts contain."""
    return json.dumps(value, allow_nan=False, separators=(",", ":")).encode("ascii")


def chunks(count: int, size: int) -> int:
    """Returns how many chunks of `size` hold `count` rows."""
    return -(-count // size)


def _rows(chunk: int, size: int, count: int) -> slice:
    if not 0 <= chunk < chunks(count, size):
        raise IndexError(f"chunk {chunk} of {chunks(count, size)}")
    return slice(chunk * size, min(count, (chunk + 1) * size))


def _row(line: bytes, where: str) -> tuple[dict, list[str]]:
    """Returns the summary row of a line, and its proponents' ids."""
    try:
        item = with_current_names(json.loads(line))
        return summary.summarise(item, where), item.get("proponent_ids") or []
    except ResultsError as error:
        return summary.malformed(str(error)), []
    except (ValueError, RecursionError) as error:
        return summary.malformed(f"{where}: not JSON ({error})"), []


def _number_of(name: str) -> int:
    # A hash is the same throughout a process, and 64 bits make collisions negligible.
    return hash(name) & (2**64 - 1)


def open_unpacked(path: str) -> BinaryIO:
    """Opens a file for reading, and decompresses one whose name ends in .gz."""
    if not path.endswith(".gz"):
        return open(path, "rb")
    # Without a name: its disk space is freed however the viewer ends.
    unpacked = tempfile.TemporaryFile()
    with gzip.open(path, "rb") as packed:
        try:
            shutil.copyfileobj(packed, unpacked, 1 << 20)
        except (EOFError, gzip.BadGzipFile, zlib.error) as error:
            raise ResultsError(f"{path} is not a complete gzip file: {error}") from error
    unpacked.seek(0)
    return unpacked


def signature(path: str | os.PathLike):
    """Returns what changes with a file's contents; None if there is no file."""
    try:
        status = os.stat(path)
    except OSError:
        return None
    # The inode too: a file that replaces another may have its size and time.
    return status.st_ino, status.st_size, status.st_mtime_ns
