"""The gradient store: rows by number, shards to write, passages by name."""

import functools
from collections import deque
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor

import numpy as np

from tda.runtime import preemption, processes
from tda.runtime.command import of_main
from tda.store import codec, shard_file
from tda.store.codec import Form
from tda.store.location import Location, StoreError
from tda.store.passages import Passage, PassageList
from tda.store.rows import Rows
from tda.store.segment import Segment, Span

FORMAT = 3
# Bytes read at a time, in spans of whole chunks, and the number of spans read ahead.
_SPAN_BYTES = 64 << 20
_SPANS_AHEAD = 3
# One reader waits for the disk while the other checks checksums.
_READERS = 2


class GradientStore:
    """Rows of projected gradients with their passages. Returned by `create` and `open_store`.

    Attributes:
        location: its directory.
        path: the directory as a string.
        manifest: the JSON value that describes its rows.
        form: dtype and block widths of its rows.
        rows: C, the number of rows of the finished store, withdrawn rows included.
    """

    def __init__(self, location: Location):
        self.location, self.path = location, location.name
        self.manifest = read_manifest(location)
        m = self.manifest
        self.form = Form(m["dtype"], tuple(m["block_widths"]), m.get("rank", 0))
        # Shared by the segments, so that a scan needs no more memory when rows were appended.
        buffers = shard_file.Buffers()
        # Every segment with the number of its first row.
        self._segments: list[tuple[int, Segment]] = []
        self.rows = 0
        for i, described in enumerate(self.manifest["segments"]):
            segment = Segment(location / str(i), self.form, described, buffers)
            self._segments.append((self.rows, segment))
            self.rows += segment.rows

    @property
    def width(self) -> int:
        """E, the numbers in a row."""
        return self.form.width

    def passages(self, numbers: Sequence[int]) -> list[Passage]:
        """Reads id, document and text of rows, in the order of `numbers`.

        Raises:
            IndexError: there is no such row.
        """
        numbers = self._checked(numbers)
        out: list = [None] * len(numbers)
        for segment, at, local in self._split(numbers):
            for i, passage in zip(at, segment.passages.read(local), strict=True):
                out[i] = passage
        return out

    def _checked(self, numbers) -> np.ndarray:
        """Returns row numbers as int64; raises an IndexError if there is no such row."""
        numbers = np.asarray(numbers, np.int64)
        outside = numbers[(numbers < 0) | (numbers >= self.rows)]
        if len(outside):
            raise IndexError(f"{self.path} has rows 0 to {self.rows - 1}, not {outside[0]}")
        return numbers

    def row_of(self, name: str) -> int:
        """Returns the row of the passage with this id, withdrawn or not.

        Raises:
            KeyError: there is no such passage.
        """
        for row in self.rows_of(name):
            return row
        raise KeyError(f"{self.path} has no passage {name!r}")

    def rows_of(self, name: str) -> list[int]:
        """Returns the row of the passage with this id, as a list of one row or none."""
        return [first + r for first, s in self._segments for r in s.passages.rows_of(name)]

    def rows_of_document(self, name: str) -> list[int]:
        """Returns the rows of a document's passages; empty if there is no such document."""
        rows_by_segment = (
            (first, s.passages.rows_of_document(name)) for first, s in self._segments
        )
        return [first + row for first, rows in rows_by_segment for row in rows]

    @functools.cached_property
    def withdrawn(self) -> np.ndarray:
        """Rows that were withdrawn, int64, ascending."""
        return read_withdrawn(self.location)

    def withdraw(self, ids: Sequence[str] = (), documents: Sequence[str] = ()) -> int:
        """Withdraws passages, or all of documents; returns the number of rows that this adds.

        From now on they take no part in R and are never retrieved; their gradients stay on disk
        until the store is removed. Process 0 writes the list. Concurrent withdrawals are both kept;
        stores that are open elsewhere keep the list that they have read.

        Raises:
            StoreError: there is no such passage or document; then nothing is withdrawn.
        """
        count = processes.on_first_process(
            "withdraw passages", lambda: self._withdraw(ids, documents)
        )
        # Drops the cached property, so that the list is read again.
        self.__dict__.pop("withdrawn", None)
        return count

    def _withdraw(self, ids, documents) -> int:
        """Writes the list; returns the number of new rows."""
        rows = {f"passage {name!r}": self.rows_of(name) for name in ids}
        rows |= {f"document {name!r}": self.rows_of_document(name) for name in documents}
        absent = [name for name, numbers in rows.items() if not numbers]
        if absent:
            raise StoreError(f"{self.path} has no {', no '.join(absent[:5])}; nothing is withdrawn")
        numbers, before = set().union(*rows.values()), set()

        def add(stored):
            # Called again with the newer list if another process wrote one meanwhile.
            nonlocal before
            before = set(stored["rows"] if stored else [])
            return {"rows": sorted(numbers | before)}

        self.location.update_json("withdrawn.json", add)
        return len(numbers - before)

    @functools.cached_property
    def _shards(self) -> list[tuple[Segment, int, int]]:
        """The segment of every shard, the segment's first row, and the shard's number in it."""
        return [(s, first, i) for first, s in self._segments for i in range(s.shards)]

    @functools.cached_property
    def _shard_starts(self) -> np.ndarray:
        """The first row of every shard, int64, ascending."""
        return np.array([rows.start for rows in self.shards()], np.int64)

    def shards(self) -> list[slice]:
        """Returns the rows of every shard."""
        rows = ((first, segment.rows_of(i)) for segment, first, i in self._shards)
        return [slice(first + local.start, first + local.stop) for first, local in rows]

    def missing(self) -> list[int]:
        """Returns the numbers of the shards that are not written yet."""
        written = {segment: segment.written() for _, segment in self._segments}
        shards = enumerate(self._shards)
        return [number for number, (segment, _, i) in shards if i not in written[segment]]

    def _split(self, numbers: np.ndarray) -> Iterator[tuple[Segment, np.ndarray, np.ndarray]]:
        """Yields each segment with the positions in `numbers` and the local numbers of its rows."""
        for first, segment in self._segments:
            at = np.flatnonzero((numbers >= first) & (numbers < first + segment.rows))
            if len(at):
                yield segment, at, numbers[at] - first

    def write(self, shard: int, encodings: np.ndarray) -> list[str]:
        """Writes a whole shard, atomically; returns the ids of its invalid rows.

        A row with a number that is not finite is stored as invalid: it takes no part in R and is
        never retrieved.

        Args:
            shard: its number.
            encodings: the rows, float32 [R, E], or as stored (`tda.store.codec.encode`).

        Raises:
            StoreError: the rows are not the shard's, or cannot be written.
        """
        segment, _, number = self._shards[shard]
        rows = segment.rows_of(number)
        is_stored = encodings.dtype != np.float32 or encodings.shape[1] != self.width
        columns = self.form.columns if is_stored else self.width
        shape, dtype = (rows.stop - rows.start, columns), self.form.array_dtype
        if encodings.shape != shape or (is_stored and encodings.dtype != dtype):
            raise StoreError(
                f"shard {shard} takes rows of shape {shape} in float32 or as stored, not "
                f"{encodings.shape} in {encodings.dtype}"
            )
        try:
            values = encodings if is_stored else codec.encode_on_host(encodings, self.form)
            bad = segment.write(number, values)
        except (ValueError, OSError) as error:
            raise StoreError(f"cannot write shard {shard} of {self.path}: {error}") from error
        invalid = rows.start + np.flatnonzero(bad)
        if segment.new_passages is not None:
            return [segment.new_passages.ids[int(row)] for row in invalid]
        return [p.id for p in segment.passages.read(invalid)]

    def read(self, numbers) -> np.ndarray:
        """Reads rows by slice or by an array of row numbers: float32 [R, E].

        A row that holds no finite gradient, or was withdrawn, is infinite throughout.

        Raises:
            IndexError: there is no such row.
            StoreError: a row is not written, or a checksum is wrong.
        """
        if isinstance(numbers, slice):
            numbers = np.arange(self.rows)[numbers]
        numbers = self._checked(numbers)
        out = np.empty((len(numbers), self.width), np.float32)
        for segment, at, local in self._split(numbers):
            out[at] = self._read_advising(segment.read, local).decoded(self.form)
        out[np.isin(numbers, self.withdrawn)] = np.inf
        return out

    def scan(self, step: int, rows: range | None = None) -> Iterator[Rows]:
        """Reads rows in order, at most `step` at a time; files are read ahead.

        Args:
            step: rows at a time, a power of two.
            rows: the range of rows to read; by default all.

        Raises:
            StoreError: a shard is missing or damaged.
        """
        rows = range(self.rows) if rows is None else rows
        waiting: deque = deque()
        with ThreadPoolExecutor(_READERS, "read ahead") as ahead:
            for segment, first, span in self._spans(step, rows):
                waiting.append(ahead.submit(self._read_span, segment, first, span, rows))
                if len(waiting) > _SPANS_AHEAD:
                    yield from _pieces(waiting.popleft().result(), step)
            while waiting:
                yield from _pieces(waiting.popleft().result(), step)

    def _spans(self, step: int, rows: range) -> Iterator[tuple[Segment, int, Span]]:
        """Yields the spans of whole chunks that hold a range of rows."""
        # A range of rows is in few shards, and there may be 100,000 of them.
        start = max(0, int(np.searchsorted(self._shard_starts, rows.start, "right")) - 1)
        stop = int(np.searchsorted(self._shard_starts, rows.stop))
        for segment, first, i in self._shards[start:stop]:
            preemption.check()
            length = max(step, segment.chunk_rows, _SPAN_BYTES // self.form.row_bytes)
            # A power of two is a multiple of both the step and the chunk, which are powers too.
            for span in segment.spans(i, 1 << (length.bit_length() - 1)):
                if rows.start < first + span.stop and first + span.start < rows.stop:
                    yield segment, first, span

    def _read_span(self, segment: Segment, first: int, span: Span, within: range) -> Rows:
        rows = self._read_advising(segment.read_span, span)
        start, stop = first + span.start, first + span.stop
        withdrawn = self.withdrawn[slice(*np.searchsorted(self.withdrawn, [start, stop]))]
        rows.valid[withdrawn - start] = False
        rows = Rows(start, rows.values, rows.valid)
        return rows[max(0, within.start - start) : min(stop, within.stop) - start]

    def _read_advising(self, read, index) -> Rows:
        """Returns `read(index)`; adds to an error about damage the command that repairs it."""
        try:
            return read(index)
        except StoreError as error:
            if "damaged" not in str(error):
                raise
            command = of_main("store", "verify", self.path)
            raise StoreError(
                f"{error}; {command} finds all damaged files and removes them"
            ) from error

    def damage(self, shard: int) -> str | None:
        """Reads a whole shard; returns its error if it is damaged, else None."""
        segment, _, number = self._shards[shard]
        if number not in segment.written():
            return None
        try:
            for span in segment.spans(number, segment.chunk_rows):
                segment.read_span(span)
        except StoreError as error:
            return str(error)
        return None

    def damaged_passages(self) -> dict[str, str]:
        """Reads all files of passages; returns the error of each damaged one, by file name."""
        out = {}
        for i, (_, segment) in enumerate(self._segments):
            out |= {f"{i}/{name}": e for name, e in segment.damaged_passages().items()}
        return out

    def add_passages(self, number: int, passages: PassageList) -> None:
        """Sets the passages of a segment, which are written with its shards.

        Args:
            number: the number of the segment.
            passages: its passages.
        """
        self._segments[number][1].new_passages = passages

    def restore_passages(self, number: int, passages: PassageList) -> None:
        """Writes the missing passages of a segment's written shards, and the indices of all."""
        self._segments[number][1].restore_passages(passages)

    def remove_passages(self, file: str) -> None:
        """Removes a file that `damaged_passages` named.

        Creating the store again, or appending the passages again, writes it again.
        """
        number, _, name = file.partition("/")
        self._segments[int(number)][1].passages.remove(name)

    def remove(self, shard: int) -> None:
        """Removes a shard, which the next run writes again."""
        segment, _, number = self._shards[shard]
        segment.remove(number)


def _pieces(rows: Rows, step: int) -> Iterator[Rows]:
    for start in range(0, len(rows), step):
        yield rows[start : start + step]


def read_withdrawn(location: Location) -> np.ndarray:
    """Returns the withdrawn rows of the store at a location, int64, ascending."""
    stored = location.read_json("withdrawn.json")
    return np.asarray(stored["rows"] if stored else [], np.int64)


def read_manifest(location: Location) -> dict:
    """Returns the manifest of the store at a location.

    Raises:
        StoreError: there is none, or one of another format.
    """
    manifest = location.read_json("manifest.json")
    if manifest is None:
        raise StoreError(f"no store at {location.name} (it has no manifest.json)")
    stored = manifest.get("format") if isinstance(manifest, dict) else None
    if stored != FORMAT:
        raise StoreError(
            f"{location.name} has format {stored}, this version reads {FORMAT}; "
            "remove it, and the next run builds it again"
        )
    return manifest
