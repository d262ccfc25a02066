"""A segment of a store: rows that were added together, in zarr arrays of one file a shard."""

import dataclasses
import math
import re
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import tensorstore as ts

from tda.store import passages, rows, shard_file
from tda.store.location import Location, StoreError
from tda.store.passages import Passages
from tda.store.rows import Rows

_CHUNK_BYTES = 4 << 20


@dataclasses.dataclass(frozen=True)
class Form:
    """What all rows of a store have in common.

    Attributes:
        dtype: dtype of the numbers on disk.
        widths: how many numbers each block of a row has.
    """

    dtype: str
    widths: tuple[int, ...]

    @property
    def width(self) -> int:
        """E, the numbers in a row."""
        return sum(self.widths)

    @property
    def row_bytes(self) -> int:
        """Bytes of a row on disk, without its scales."""
        return self.width * rows.DTYPES[self.dtype].itemsize

    @property
    def arrays(self) -> tuple[str, ...]:
        """The names of a segment's arrays, in the order in which they are written."""
        return ("scales", "gradients") if self.dtype == "int8" else ("gradients",)


@dataclasses.dataclass(frozen=True)
class Span:
    """Consecutive rows of one shard, by their numbers in the segment."""

    shard: int
    start: int
    stop: int


def about(form: Form, ids, documents, shard_bytes: int, corpus) -> dict:
    """Returns a segment's entry in the manifest: its rows, their layout in files, their passages.

    A chunk, which has its own checksum, has a power of two of rows, so that readers' steps fit.
    """
    count = len(ids)
    chunk = min(_power(_CHUNK_BYTES // form.row_bytes), _power(2 * count - 1))
    shard = max(1, shard_bytes // form.row_bytes)
    chunk = min(chunk, _power(shard))
    return {
        "rows": count,
        "shard_rows": min(shard // chunk, math.ceil(count / chunk)) * chunk,
        "chunk_rows": chunk,
        "passages": passages.digest(ids, documents),
        "corpus": corpus,
    }


def _power(n: int) -> int:
    """The largest power of two up to n, at least 1."""
    return 1 << (max(1, n).bit_length() - 1)


def make(location: Location, form: Form, described: dict, ids, documents, texts) -> None:
    """Writes a segment's passages and its arrays, which have no shard yet."""
    passages.write(location, ids, documents, texts)
    for name in form.arrays:
        _open_array(location, form, described, name, create=True)


# All files that `make` writes: what else there is, it did not.
_MADE = re.compile(
    r"(ids|documents)/(hashes|rows)/(zarr\.json|c/\d+)"
    r"|passages/\d+\.array_record(\.part)?"
    r"|(gradients|scales)/zarr\.json"
)


def is_made(file: str) -> bool:
    """Whether a file, named by its path below a segment, is one that `make` writes."""
    return _MADE.fullmatch(file) is not None


class Segment:
    """The rows of a segment; their numbers start at 0 here.

    Args:
        location: its directory.
        form: of its rows.
        described: what the manifest says of it.
        buffers: memory for reading.
    """

    def __init__(self, location: Location, form: Form, described: dict, buffers):
        self.location, self.form, self._buffers = location, form, buffers
        self.rows: int = described["rows"]
        self.shard_rows: int = described["shard_rows"]
        self.chunk_rows: int = described["chunk_rows"]
        self.passages = Passages(location, self.rows)
        self._arrays = {n: _open_array(location, form, described, n) for n in form.arrays}

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
        by_array = []
        for name in self.form.arrays:
            keys = (k.split(".") for k in (self.location / name).names())
            by_array.append({int(k[1]) for k in keys if k[0] == "c" and len(k) == 3})
        return set.intersection(*by_array)

    def write(self, shard: int, x_RxE: np.ndarray) -> np.ndarray:
        """Writes a shard, atomically: the values are written last, and complete it.

        Returns:
            Which rows are invalid, bool [R].
        """
        shard_rows, folder = self.rows_of(shard), (self.location / "gradients").path
        wrong: dict[int, np.ndarray] = {}
        scales: dict[int, np.ndarray] = {}

        def encode(start: int) -> np.ndarray:
            x = x_RxE[start : start + self.chunk_rows]
            bad = ~np.isfinite(x).all(axis=1)
            wrong[start] = bad
            x = np.where(bad[:, None], np.float32(np.inf), x) if bad.any() else x
            values, scales[start] = rows.encode(x, self.form.dtype, self.form.widths)
            return values

        def encode_chunk(start: int) -> tuple[np.ndarray, int]:
            values = self._filled(encode(start))
            return values, shard_file.checksum(values)

        def write_scales():
            if self.form.dtype == "int8":
                self._arrays["scales"][shard_rows].write(
                    np.concatenate([scales[i] for i in starts])
                ).result()

        starts = range(0, len(x_RxE), self.chunk_rows)
        if folder is None:
            values = np.concatenate([encode(i) for i in starts])
            write_scales()
            self._arrays["gradients"][shard_rows].write(values).result()
        else:
            chunks = self.shard_rows // self.chunk_rows
            path = str(folder / f"c.{shard}.0")
            with shard_file.writing(path, chunks) as out, ThreadPoolExecutor(2) as ahead:
                # The next chunks are encoded while one is written.
                for values, checksum in ahead.map(encode_chunk, starts):
                    out.add(values, checksum)
                write_scales()
        return np.concatenate([wrong[i] for i in starts])

    def _filled(self, values: np.ndarray) -> np.ndarray:
        """Returns the values of a chunk; the corpus's last is filled up as TensorStore fills it."""
        lacking = self.chunk_rows - len(values)
        if not lacking:
            return np.ascontiguousarray(values)
        fill = np.full((lacking, values.shape[1]), _fill_value(self.form.dtype), values.dtype)
        return np.concatenate([values, fill])

    def remove(self, shard: int) -> None:
        """Removes a shard."""
        for name in reversed(self.form.arrays):
            (self.location / name).remove(f"c.{shard}.0")

    def read(self, local: np.ndarray) -> Rows:
        """Reads rows, in the order of their numbers.

        Raises:
            StoreError: a row is not written, or a checksum is wrong.
        """
        # A run of rows is read as a slice.
        is_run = len(local) and (np.diff(local) == 1).all()
        return self._read(slice(int(local[0]), int(local[-1]) + 1) if is_run else local)

    def _read(self, index) -> Rows:
        try:
            reads = {n: a[index].read() for n, a in self._arrays.items()}
            values = reads["gradients"].result()
            scales = reads["scales"].result() if "scales" in reads else None
        except (ValueError, OSError) as error:
            raise StoreError(f"{self.location.name} is damaged: {error}") from error
        return self._checked(values, scales)

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
        dtype = rows.DTYPES[self.form.dtype]
        try:
            raw = shard_file.read(
                str(folder / f"c.{span.shard}.0"),
                (span.start - span.shard * self.shard_rows) // self.chunk_rows,
                math.ceil((span.stop - span.start) / self.chunk_rows),
                self.chunk_rows * self.form.row_bytes,
                self.shard_rows // self.chunk_rows,
                self._buffers,
            )
        except FileNotFoundError:
            self._refuse_unfinished()
        if raw is None:
            return self._read(index)
        values = raw.view(dtype).reshape(-1, self.form.width)[: span.stop - span.start]
        scales = None
        if "scales" in self._arrays:
            try:
                scales = self._arrays["scales"][index].read().result()
            except (ValueError, OSError) as error:
                raise StoreError(f"{self.location.name}/scales is damaged: {error}") from error
        return self._checked(values, scales)

    def _checked(self, values: np.ndarray, scales: np.ndarray | None) -> Rows:
        """Returns the rows with the invalid ones marked."""
        # An invalid row is infinite throughout, one never written NaN: the first number tells.
        first = (values if scales is None else scales)[:, 0].astype(np.float32)
        if np.isnan(first).any():
            self._refuse_unfinished()
        return Rows(0, values, scales, np.isfinite(first))

    def _refuse_unfinished(self):
        missing = sorted(set(range(self.shards)) - self.written())
        raise StoreError(f"{self.location.name} is unfinished: shards {missing} are missing")


def _fill_value(dtype: str):
    """A row that was never written reads as NaN (in int8 its scale), not as a gradient of zero."""
    return 0 if dtype == "int8" else np.nan


def _open_array(location: Location, form: Form, described: dict, name: str, create: bool = False):
    dtype, width = form.dtype, form.width
    if name == "scales":
        dtype, width = "float32", len(form.widths)
    inner = [{"name": "bytes", "configuration": {"endian": "little"}}, {"name": "crc32c"}]
    codec = {"chunk_shape": [described["chunk_rows"], width], "codecs": inner}
    spec = {
        "driver": "zarr3",
        "kvstore": (location / name).spec(),
        # A shard must appear even if all of its numbers equal the fill value.
        "store_data_equal_to_fill_value": True,
        "metadata": {
            "shape": [described["rows"], width],
            "data_type": dtype,
            "fill_value": 0 if dtype == "int8" else "NaN",
            "chunk_grid": {
                "name": "regular",
                "configuration": {"chunk_shape": [described["shard_rows"], width]},
            },
            # All files in one folder, so that one listing shows which are written.
            "chunk_key_encoding": {"name": "default", "configuration": {"separator": "."}},
            "codecs": [{"name": "sharding_indexed", "configuration": codec}],
        },
    }
    mode = dict(create=True, delete_existing=True) if create else dict(open=True)
    try:
        return ts.open(spec, **mode).result()
    except (ValueError, OSError) as error:
        raise StoreError(f"{location.name}/{name}: {error}") from error
