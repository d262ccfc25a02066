"""A table of tokens that is read in place from the files of its parts.

In memory are a few numbers for each part. Ids, hashes and lengths of all passages are read when
they are asked for as a whole, never by a start.
"""

import functools
import pathlib
from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np

from tda.data import part_files
from tda.data.part_files import PartInfo
from tda.data.parts import name_passage
from tda.data.tokens import TokenTable
from tda.runtime.fingerprint import fingerprint

# Parts that are mapped at a time: each takes a file handle, of which a process has about 1,000.
_OPEN_PARTS = 256


class MappedTable(TokenTable):
    """N sequences of token ids in the files of some parts.

    `tokens`, `starts` and `scored` are copied into memory as a whole: for tables that fit there.

    Args:
        folder: the parts' folder.
        parts: the parts, in order.
    """

    def __init__(self, folder: pathlib.Path, parts: Sequence[PartInfo]):
        bounds = np.cumsum([0, *(part.rows for part in parts)], dtype=np.int64)
        values: dict[str, Any] = {
            "_folder": folder,
            "_parts": list(parts),
            # The first row of every part, and the number of rows.
            "_bounds": bounds,
            "_open": functools.lru_cache(_OPEN_PARTS)(self._map),
        }
        values["ids"] = MappedNames(self, is_document=False)
        values["documents"] = values["ids"]
        if any(part.is_split for part in parts):
            values["documents"] = MappedNames(self, is_document=True)
        for name, value in values.items():
            object.__setattr__(self, name, value)  # the class is frozen

    def _map(self, part: int) -> dict[str, np.ndarray]:
        arrays = part_files.map_arrays(self._folder / self._parts[part].name)
        arrays["starts"] = np.concatenate([[0], arrays["ends"]])
        return arrays

    def __len__(self) -> int:
        return int(self._bounds[-1])

    def _place(self, row: int) -> tuple[int, int]:
        """Returns the part of a row, and its row there."""
        if not 0 <= row < len(self):
            raise IndexError(f"there is no row {row}, there are {len(self)}")
        part = int(np.searchsorted(self._bounds, row, "right")) - 1
        return part, int(row - self._bounds[part])

    @property
    def tokens(self) -> np.ndarray:
        """All tokens, int32, copied into memory."""
        return self._concatenated("tokens", np.int32)

    @property
    def starts(self) -> np.ndarray:
        """Where each sequence starts, int64 [N + 1], copied into memory."""
        return np.concatenate([[0], np.cumsum(self.lengths)])

    @property
    def scored(self) -> np.ndarray:
        """Whether the loss counts each token, bool, copied into memory."""
        pieces = [self._scored(i, 0, part.rows) for i, part in enumerate(self._parts)]
        return np.concatenate(pieces)

    def _concatenated(self, name: str, dtype) -> np.ndarray:
        parts = (self._open(i)[name] for i in range(len(self._parts)))
        return np.concatenate([np.zeros(0, dtype), *parts])

    def _scored(self, part: int, first: int, stop: int) -> np.ndarray:
        """Returns which tokens the loss counts, of rows [first, stop) of a part."""
        arrays, lead = self._open(part), self._parts[part].lead
        bounds = arrays["starts"][first : stop + 1]
        if lead:
            starts = bounds - bounds[0]
            return part_files.derive_scored(starts[:-1], starts[1:], lead)
        return arrays["scored"][bounds[0] : bounds[-1]]

    @property
    def lengths(self) -> np.ndarray:
        """Tokens of each sequence, int64 [N]."""
        parts = [np.diff(self._open(i)["starts"]) for i in range(len(self._parts))]
        return np.concatenate(parts)

    def lengths_of(self, rows: np.ndarray) -> np.ndarray:
        """Returns the number of tokens of some sequences, int64 [R]."""
        rows = np.asarray(rows, np.int64)
        numbers = np.searchsorted(self._bounds, rows, "right") - 1
        out = np.empty(rows.shape, np.int64)
        for part in np.unique(numbers):
            at = numbers == part
            starts, local = self._open(int(part))["starts"], rows[at] - self._bounds[part]
            out[at] = starts[local + 1] - starts[local]
        return out

    def sequence(self, row: int) -> tuple[np.ndarray, np.ndarray]:
        """Returns a sequence's tokens, int32 [T], and which of them the loss counts, bool [T]."""
        part, local = self._place(row)
        arrays = self._open(part)
        begin, end = arrays["starts"][local], arrays["starts"][local + 1]
        return arrays["tokens"][begin:end], self._scored(part, local, local + 1)

    @property
    def token_count(self) -> int:
        """The number of all tokens."""
        return sum(part.tokens for part in self._parts)

    @property
    def token_range(self) -> tuple[int, int]:
        """The smallest and the largest token id."""
        parts = [part for part in self._parts if part.rows]
        return min(part.smallest for part in parts), max(part.largest for part in parts)

    @property
    def longest(self) -> int:
        """The first of the longest sequences."""
        parts = [(i, part) for i, part in enumerate(self._parts) if part.rows]
        number, part = max(parts, key=lambda x: (x[1].longest[0], -x[0]))
        return int(self._bounds[number]) + part.longest[1]

    @property
    def shortest(self) -> int:
        """The first of the shortest sequences."""
        parts = [(i, part) for i, part in enumerate(self._parts) if part.rows]
        number, part = min(parts, key=lambda x: (x[1].shortest[0], x[0]))
        return int(self._bounds[number]) + part.shortest[1]

    def count_scored(self, first: int = 0, stop: int | None = None) -> int:
        """Returns the number of tokens that the loss counts in sequences [first, stop)."""
        return sum(
            self._parts[i].scored
            if stop - start == self._parts[i].rows
            else self._count_scored(i, start, stop)
            for i, start, stop in self._ranges(first, len(self) if stop is None else stop)
        )

    def _count_scored(self, part: int, first: int, stop: int) -> int:
        arrays, lead = self._open(part), self._parts[part].lead
        bounds = arrays["starts"][first : stop + 1]
        if lead:
            return int(np.maximum(np.diff(bounds) - lead, 0).sum())
        return int(arrays["scored"][bounds[0] : bounds[-1]].sum())

    def _ranges(self, first: int, stop: int) -> Iterator[tuple[int, int, int]]:
        """Yields the parts of rows [first, stop), with the rows [start, stop) in each."""
        if first >= stop:
            return
        for part in range(self._place(first)[0], self._place(stop - 1)[0] + 1):
            begin, end = int(self._bounds[part]), int(self._bounds[part + 1])
            if begin < end:
                yield part, max(first, begin) - begin, min(stop, end) - begin

    @property
    def scored_lengths(self) -> np.ndarray:
        """Tokens that the loss counts of each sequence, int64 [N]."""
        out = []
        for i, part in enumerate(self._parts):
            starts = self._open(i)["starts"]
            if part.lead:
                out.append(np.maximum(np.diff(starts) - part.lead, 0))
            else:
                before = np.concatenate([[0], np.cumsum(self._open(i)["scored"])])
                out.append(np.diff(before[starts]))
        return np.concatenate(out)

    def fingerprint(self) -> str:
        """Returns a hash of tokens, scored positions and ids: of the digests of the parts."""
        return fingerprint([part.digest for part in self._parts])

    def name(self, row: int, is_document: bool) -> str:
        """Returns the id of a passage, or of its document."""
        part, local = self._place(row)
        arrays = self._open(part)
        number = int(arrays["owners"][local])
        first = int(arrays["name_ends"][number - 1]) if number else 0
        raw = arrays["names"][first : int(arrays["name_ends"][number])]
        name = raw.tobytes().decode("utf-8")
        if is_document or not self._parts[part].is_split:
            return name
        return name_passage(name, *map(int, arrays["spans"][local]))

    def hashes(self, is_document: bool) -> Iterator[np.ndarray]:
        """Yields `hash_64_bits` of the passages' ids, or of their documents', uint64, by part."""
        for i in range(len(self._parts)):
            arrays = self._open(i)
            if is_document:
                yield arrays["name_hashes"][arrays["owners"]]
            else:
                yield arrays["id_hashes"]


class MappedNames(Sequence):
    """The ids of a table's passages, or of their documents.

    Args:
        table: the table.
        is_document: whether the names are those of the documents.
    """

    def __init__(self, table: MappedTable, is_document: bool):
        self.table, self.is_document = table, is_document

    def __len__(self) -> int:
        return len(self.table)

    def __getitem__(self, index):
        if isinstance(index, slice):
            return [self[i] for i in range(*index.indices(len(self)))]
        return self.table.name(range(len(self))[index], self.is_document)

    def hashes(self) -> np.ndarray:
        """Returns `tda.runtime.fingerprint.hash_64_bits` of every name, uint64 [N]."""
        return np.concatenate([np.zeros(0, np.uint64), *self.table.hashes(self.is_document)])

    def digest(self) -> str:
        """Returns a hash of all names."""
        return self.table.fingerprint()
