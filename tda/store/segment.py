"""A segment of a store: rows that were added together, in zarr arrays of one file a shard."""

import dataclasses
import math
import re
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import tensorstore as ts

from tda.store import arrays, codec, shard_file
from tda.store.codec import Form
from tda.store.location import Location, StoreError
from tda.store.passages import PassageList, Passages
from tda.store.rows import Rows

# As large as a reader's step on a CPU, and small compared with a shard.
_CHUNK_BYTES = 4 << 20


@dataclasses.dataclass(frozen=True)
class Span:
    """Consecutive rows of one shard, by their numbers in the segment."""

    shard: int
    start: int
    stop: int


def describe(form: Form, passages: PassageList, shard_bytes: int, corpus) -> dict:
    """Returns a segment's entry in the manifest: its rows, their layout in files, their passages.

    A chunk, which has its own checksum, has a power of two of rows, so that readers' steps fit.
    """
    count = len(passages.ids)
    shard = max(1, shard_bytes // form.row_bytes)
    # A chunk is no larger than a shard, nor than a small corpus needs.
    chunk = min(map(_power, (_CHUNK_BYTES // form.row_bytes, 2 * count - 1, shard)))
    return {
        "rows": count,
        "shard_rows": min(shard // chunk, math.ceil(count / chunk)) * chunk,
        "chunk_rows": chunk,
        "passages": passages.digest(),
        "corpus": corpus,
    }


def _power(n: int) -> int:
    """Returns the largest power of two up to n, at least 1."""
    return 1 << (max(1, n).bit_length() - 1)


def make(location: Location, form: Form, described: dict, passages: PassageList) -> None:
    """Writes the indices of a segment's passages, and its array, which has no shard yet."""
    passages.write_indices(location)
    _open_array(location, form, described, create=True)


# All files that `make` and `write` make: a folder with any other file is never cleared.
_MADE = re.compile(
    r"(ids|documents)/(hashes|rows)/(zarr\.json|c/\d+)"
    r"|passages/\d+\.array_record(\.[\w-]+\.[0-9a-f]{12}\.part)?"
    r"|gradients/zarr\.json"
)


def is_made(file: str) -> bool:
    """Returns whether a file, by its path below a segment, is one that a segment writes."""
    return _MADE.fullmatch(file) is not None


class Segment:
    """The rows of a segment; their numbers start at 0 here.

    Args:
        location: its directory.
        form: dtype and block widths of its rows.
        described: its entry in the manifest.
        buffers: memory for reading.

    Attributes:
        new_passages: its passages, which are written with its shards; None if it is only read.
    """

    def __init__(self, location: Location, form: Form, described: dict, buffers):
        self.new_passages: PassageList | None = None
        self.location, self.form, self._buffers = location, form, buffers
        self.rows: int = described["rows"]
        self.shard_rows: int = described["shard_rows"]
        self.chunk_rows: int = described["chunk_rows"]
        self.passages = Passages(location, self.rows)
        self._array = _open_array(location, form, described)
        self._layout = shard_file.Layout(
            self.chunk_rows * form.row_bytes, self.shard_rows // self.chunk_rows
        )

    @property
    def shards(self) -> int:
        """Number of shards."""
        return math.ceil(self.rows / self.shard_rows)

    def rows_of(self, shard: int) -> slice:
        """Returns the rows of a shard."""
        start = shard * self.shard_rows
        return slice(start, min(self.rows, start + self.shard_rows))

    def written(self) -> set[int]:
        """Returns the numbers of the shards that are written."""
        keys = (k.split(".") for k in (self.location / "gradients").names())
        return {int(k[1]) for k in keys if k[0] == "c" and len(k) == 3}

    def write(self, shard: int, values: np.ndarray) -> np.ndarray:
        """Writes a shard of rows as stored, atomically; returns which are invalid, bool [R].

        The passages come first: a written shard has them.
        """
        if self.new_passages is not None:
            self.new_passages.write_records(self.location, self.rows_of(shard))
        starts = range(0, len(values), self.chunk_rows)
        chunks = (values[start : start + self.chunk_rows] for start in starts)
        name = f"c.{shard}.0"
        with (
            shard_file.writing(self.location / "gradients", name, self._layout.chunks) as file,
            ThreadPoolExecutor(2) as ahead,
        ):
            # The checksums of the next chunks are computed while one is written.
            for chunk_and_checksum in ahead.map(self._chunk, chunks):
                file.add(*chunk_and_checksum)
        return ~np.isfinite(codec.marks(values, self.form))

    def _chunk(self, values: np.ndarray) -> tuple[np.ndarray, int]:
        """Returns the values of a chunk and their checksum.

        The corpus's last chunk is padded with the array's fill value, as TensorStore does.
        """
        if lacking := self.chunk_rows - len(values):
            fill = arrays.fill_value(values.dtype)
            values = np.concatenate(
                [values, np.full((lacking, values.shape[1]), fill, values.dtype)]
            )
        values = np.ascontiguousarray(values)
        return values, shard_file.checksum(values)

    def restore_passages(self, passages: PassageList) -> None:
        """Writes the missing files of passages, except for shards that are yet to be written."""
        passages.write_indices(self.location)
        for shard in sorted(self.written()):
            passages.write_records(self.location, self.rows_of(shard))

    def damaged_passages(self) -> dict[str, str]:
        """Reads all passages; returns the error of each damaged file, by its name."""
        return self.passages.damage(self.rows_of(shard) for shard in sorted(self.written()))

    def remove(self, shard: int) -> None:
        """Removes a shard."""
        (self.location / "gradients").remove(f"c.{shard}.0")

    def read(self, local: np.ndarray) -> Rows:
        """Reads rows, in the order of their numbers.

        Raises:
            StoreError: a row is not written, or a checksum is wrong.
        """
        # A run of rows is read as a slice, which TensorStore copies much faster.
        is_run = len(local) and (np.diff(local) == 1).all()
        return self._read(slice(int(local[0]), int(local[-1]) + 1) if is_run else local)

    def _read(self, index) -> Rows:
        try:
            values = self._array[index].read().result()
        except (ValueError, OSError) as error:
            raise StoreError(f"{self.location.name}/gradients is damaged: {error}") from error
        return self._checked(values)

    def spans(self, shard: int, length: int) -> list[Span]:
        """Cuts a shard into spans of `length` rows, a multiple of the rows of a chunk."""
        shard_rows = self.rows_of(shard)
        starts = range(shard_rows.start, shard_rows.stop, length)
        return [Span(shard, i, min(shard_rows.stop, i + length)) for i in starts]

    def read_span(self, span: Span) -> Rows:
        """Reads the rows of a span, straight from its file if the file is local.

        Raises:
            StoreError: a row is not written, or a checksum is wrong.
        """
        folder, index = (self.location / "gradients").path, slice(span.start, span.stop)
        if folder is None:
            return self._read(index)
        first = (span.start - span.shard * self.shard_rows) // self.chunk_rows
        count = math.ceil((span.stop - span.start) / self.chunk_rows)
        try:
            raw = shard_file.read(
                str(folder / f"c.{span.shard}.0"), self._layout, first, count, self._buffers
            )
        except FileNotFoundError:
            self._refuse_unfinished()
        if raw is None:
            return self._read(index)
        values = raw.view(self.form.array_dtype).reshape(-1, self.form.columns)
        return self._checked(values[: span.stop - span.start])

    def _checked(self, values: np.ndarray) -> Rows:
        """Returns the rows with the invalid ones marked."""
        marks = codec.marks(values, self.form)
        if np.isnan(marks).any():
            self._refuse_unfinished()
        return Rows(0, values, np.isfinite(marks))

    def _refuse_unfinished(self):
        missing = sorted(set(range(self.shards)) - self.written())
        raise StoreError(f"{self.location.name} is unfinished: shards {missing} are missing")


def _open_array(
    location: Location, form: Form, described: dict, create: bool = False
) -> ts.TensorStore:
    shape, dtype = [described["rows"], form.columns], form.array_dtype
    metadata = arrays.metadata(shape, dtype, described["chunk_rows"], described["shard_rows"])
    # All files in one folder, so that one listing shows which are written.
    metadata["chunk_key_encoding"] = {"name": "default", "configuration": {"separator": "."}}
    return arrays.open_array(location / "gradients", metadata, create)
