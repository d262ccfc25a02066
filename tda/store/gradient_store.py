"""The gradient store as its users see it: rows by number, shards to write, passages by name."""

import functools
from collections import deque
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor

import numpy as np

from tda.runtime import processes
from tda.store import shard_file
from tda.store.location import Location, StoreError
from tda.store.passages import Passage
from tda.store.rows import Rows
from tda.store.segment import Form, Segment, Span

FORMAT = 2
_SPAN_BYTES = 64 << 20
_SPANS_AHEAD = 3
# One waits for the disk while another checks what it has read.
_READERS = 2


class GradientStore:
    """Rows of projected gradients with their passages. Made by `create` or `open_store`.

    Attributes:
        location: where it is.
        path: the same as a string.
        manifest: what its rows are.
        form: dtype and widths of its rows.
    """

    def __init__(self, location: Location):
        self.location, self.path = location, location.name
        self.manifest = read_manifest(location)
        self.form = Form(self.manifest["dtype"], tuple(self.manifest["block_widths"]))
        buffers = shard_file.Buffers()
        self._segments = [
            Segment(location / str(i), self.form, described, buffers)
            for i, described in enumerate(self.manifest["segments"])
        ]
        self._firsts = np.cumsum([0, *(s.rows for s in self._segments)]).tolist()

    @property
    def rows(self) -> int:
        """C, the number of rows when finished; withdrawn ones count too."""
        return self._firsts[-1]

    @property
    def width(self) -> int:
        """E, the numbers in a row."""
        return self.form.width

    @property
    def slices(self) -> list[slice]:
        """Where each block stands in a row."""
        ends = np.cumsum([0, *self.form.widths])
        return [slice(int(a), int(b)) for a, b in zip(ends[:-1], ends[1:], strict=True)]

    @property
    def ids(self) -> list[str]:
        """The ids of all rows, in order: every record is read."""
        return [p.id for s in self._segments for p in s.passages]

    def passages(self, numbers: Sequence[int]) -> list[Passage]:
        """Id, document and text of some rows, read at random.

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
        """Numbers of rows, int64; an IndexError where there is no such row."""
        numbers = np.asarray(numbers, np.int64)
        outside = numbers[(numbers < 0) | (numbers >= self.rows)]
        if len(outside):
            raise IndexError(f"{self.path} has rows 0 to {self.rows - 1}, not {outside[0]}")
        return numbers

    def row_of(self, name: str) -> int:
        """The row of the passage with this id, withdrawn or not.

        Raises:
            KeyError: there is none.
        """
        for segment, first in zip(self._segments, self._firsts, strict=False):
            for row in segment.passages.rows_of(name):
                return first + row
        raise KeyError(f"{self.path} has no passage {name!r}")

    def rows_of_document(self, name: str) -> list[int]:
        """The rows of a document's passages; empty where there is no such document."""
        pairs = zip(self._segments, self._firsts, strict=False)
        return [first + r for s, first in pairs for r in s.passages.rows_of_document(name)]

    @functools.cached_property
    def withdrawn(self) -> np.ndarray:
        """Rows that were withdrawn, int64, rising."""
        there = self.location.read_json("withdrawn.json")
        return np.asarray(there["rows"] if there else [], np.int64)

    def withdraw(self, ids: Sequence[str] = (), documents: Sequence[str] = ()) -> int:
        """Withdraws passages: from now on they take no part in R and are never retrieved.

        Their gradients stay on disk until the store is removed. Of several processes the first
        writes it down. What others withdrew stays withdrawn, even where two do it at once; stores
        that are open elsewhere keep the list that they have read.

        Args:
            ids: of passages.
            documents: whose passages are all withdrawn.

        Returns:
            How many rows were withdrawn that had not been before, by anybody.

        Raises:
            StoreError: there is no such passage or document; nothing is withdrawn then.
        """
        more = processes.on_first_process(
            "withdraw passages", lambda: self._withdraw(ids, documents)
        )
        # It is read again when it is asked for.
        self.__dict__.pop("withdrawn", None)
        return more

    def _withdraw(self, ids, documents) -> int:
        """Writes it down; returns how many rows were not there before."""
        numbers, absent, more = set(), [], 0
        for name in ids:
            try:
                numbers.add(self.row_of(name))
            except KeyError:
                absent.append(f"passage {name!r}")
        for name in documents:
            found = self.rows_of_document(name)
            numbers.update(found)
            if not found:
                absent.append(f"document {name!r}")
        if absent:
            raise StoreError(f"{self.path} has no {', no '.join(absent[:5])}; nothing is withdrawn")

        def joined(there):
            nonlocal more
            before = set(there["rows"] if there else [])
            more = len(numbers - before)
            return {"rows": sorted(numbers | before)}

        self.location.update_json("withdrawn.json", joined)
        return more

    def shards(self) -> list[slice]:
        """The rows of every shard."""
        out = []
        for segment, first in zip(self._segments, self._firsts, strict=False):
            own = map(segment.rows_of, range(segment.shards))
            out += [slice(first + s.start, first + s.stop) for s in own]
        return out

    def missing(self) -> list[int]:
        """Numbers of the shards that are not written yet."""
        out, before = [], 0
        for segment in self._segments:
            there = segment.written()
            out += [before + i for i in range(segment.shards) if i not in there]
            before += segment.shards
        return out

    def _place(self, shard: int) -> tuple[Segment, int]:
        """The segment of a shard, and the shard's number in it."""
        for segment in self._segments:
            if shard < segment.shards:
                return segment, shard
            shard -= segment.shards
        raise IndexError(f"{self.path} has no shard of that number")

    def _split(self, numbers: np.ndarray) -> Iterator[tuple[Segment, np.ndarray, np.ndarray]]:
        """Rows by segment: which of the numbers, and what they are in it."""
        for segment, first in zip(self._segments, self._firsts, strict=False):
            at = np.flatnonzero((numbers >= first) & (numbers < first + segment.rows))
            if len(at):
                yield segment, at, numbers[at] - first

    def write(self, shard: int, encodings_RxE: np.ndarray) -> list[str]:
        """Writes a whole shard, atomically.

        A row with a number that is not finite is stored as invalid. It takes no part in R and is
        never retrieved.

        Returns:
            The ids of the invalid rows.

        Raises:
            StoreError: the rows are not the shard's, or cannot be written.
        """
        segment, number = self._place(shard)
        own = segment.rows_of(number)
        wanted = (own.stop - own.start, self.width)
        if encodings_RxE.shape != wanted:
            raise StoreError(
                f"shard {shard} takes rows of shape {wanted}, not {encodings_RxE.shape}"
            )
        try:
            bad = segment.write(number, encodings_RxE)
        except (ValueError, OSError) as error:
            raise StoreError(f"cannot write shard {shard} of {self.path}: {error}") from error
        return [p.id for p in segment.passages.read(own.start + np.flatnonzero(bad))]

    def read(self, numbers) -> np.ndarray:
        """Rows by slice or by an array of row numbers: float32 [R, E].

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
            out[at] = self._advised(segment.read, local).decoded(self.form.widths)
        out[np.isin(numbers, self.withdrawn)] = np.inf
        return out

    def scan(self, step: int, part: tuple[int, int] = (0, 1)) -> Iterator[Rows]:
        """All rows in order, at most `step` at a time; files are read ahead.

        Args:
            step: rows at a time, a power of two.
            part: (i, n): only the i-th of n equal parts of the shards, for n readers.

        Raises:
            StoreError: a shard is missing or damaged.
        """
        waiting: deque = deque()
        with ThreadPoolExecutor(_READERS, "read ahead") as ahead:
            for segment, first, span in self._spans(step, part):
                waiting.append(ahead.submit(self._read_span, segment, first, span))
                if len(waiting) > _SPANS_AHEAD:
                    yield from _pieces(waiting.popleft().result(), step)
            while waiting:
                yield from _pieces(waiting.popleft().result(), step)

    def _spans(self, step: int, part: tuple[int, int]) -> Iterator[tuple[Segment, int, Span]]:
        number = 0
        for segment, first in zip(self._segments, self._firsts, strict=False):
            wanted = max(step, segment.chunk_rows, _SPAN_BYTES // self.form.row_bytes)
            length = 1 << (wanted.bit_length() - 1)
            for shard in range(segment.shards):
                if number % part[1] == part[0]:
                    for span in segment.spans(shard, length):
                        yield segment, first, span
                number += 1

    def _read_span(self, segment: Segment, first: int, span: Span) -> Rows:
        found = self._advised(segment.read_span, span)
        start, stop = first + span.start, first + span.stop
        gone = self.withdrawn[slice(*np.searchsorted(self.withdrawn, [start, stop]))]
        found.valid[gone - start] = False
        return Rows(start, found.values, found.scales, found.valid)

    def _advised(self, read, what) -> Rows:
        """`read(what)`; where that is damaged, it is told how to find all that is."""
        try:
            return read(what)
        except StoreError as error:
            if "damaged" not in str(error):
                raise
            command = f"python -m experiments.store verify {self.path}"
            raise StoreError(f"{error}; {command} finds all that is, and removes it") from error

    def chunks(self, step: int = 0) -> Iterator[tuple[int, np.ndarray]]:
        """All rows in order as (first row, float32 [≤ step, E]); the next are read ahead.

        By default a chunk has 4096 rows, or fewer where these would take more than 64 MiB.
        """
        largest = max(1, min(4096, _SPAN_BYTES // (4 * self.width)))
        for found in self.scan(step or 1 << (largest.bit_length() - 1)):
            yield found.first, found.decoded(self.form.widths)

    def damage(self, shard: int) -> str | None:
        """What is wrong with a shard that is there: all of it is read.

        None where nothing is, or the shard is missing.
        """
        segment, number = self._place(shard)
        if number not in segment.written():
            return None
        try:
            for span in segment.spans(number, segment.chunk_rows):
                segment.read_span(span)
        except StoreError as error:
            return str(error)
        return None

    def damaged_passages(self) -> dict[str, str]:
        """What is wrong with the files of passages, by file below the store: all are read."""
        out = {}
        for i, segment in enumerate(self._segments):
            out |= {f"{i}/{name}": e for name, e in segment.passages.damage().items()}
        return out

    def remove_passages(self, file: str) -> None:
        """Removes what `damaged_passages` named.

        Making the store again writes it again; for passages that were appended, appending them.
        """
        number, _, name = file.partition("/")
        self._segments[int(number)].passages.remove(name)

    def remove(self, shard: int) -> None:
        """Removes a shard: it is missing from now on, and the next run writes it again."""
        segment, number = self._place(shard)
        segment.remove(number)


def _pieces(found: Rows, step: int) -> Iterator[Rows]:
    for start in range(0, len(found), step):
        yield found[start : start + step]


def read_manifest(location: Location) -> dict:
    """The manifest of the store at a location.

    Raises:
        StoreError: there is none, or of another format.
    """
    manifest = location.read_json("manifest.json")
    if manifest is None:
        raise StoreError(f"no store at {location.name} (it has no manifest.json)")
    there = manifest.get("format") if isinstance(manifest, dict) else None
    if there != FORMAT:
        raise StoreError(
            f"{location.name} has format {there}, this version reads {FORMAT}; "
            "remove it, and it is made again"
        )
    return manifest
