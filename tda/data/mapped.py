"""A table of tokens that is read in place from the files of its parts.

Only a few numbers for each part are in memory. Ids, hashes and lengths of all passages are read on
demand, never when a table is opened. An array is compared with its checksum when it is first read,
so that opening a table, which reads little, also checks little; a damaged part is made again.
"""

import collections
import functools
import pathlib
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import numpy as np

from tda.data import part_files
from tda.data.folders import CorpusError
from tda.data.names import Names, Strings
from tda.data.part_files import PartInfo
from tda.data.parts import name_passage
from tda.data.tokens import TokenTable
from tda.runtime.fingerprint import fingerprint

# Parts that are mapped at a time: each takes a file handle, and a process has about 1,000 of them.
_OPEN_PARTS = 256


class MappedTable(TokenTable):
    """N sequences of token ids in the files of some parts.

    `tokens`, `starts` and `scored` are copied into memory, for tables that fit there.

    Args:
        folder: the parts' folder.
        parts: the parts, in order.
        make_again: writes the part of that number again; None if the corpus is not available.

    Raises:
        CorpusError: on reading, if a part is damaged and cannot be made again.
    """

    def __init__(
        self,
        folder: pathlib.Path,
        parts: Sequence[PartInfo],
        make_again: Callable[[int], None] | None = None,
    ):
        bounds = np.cumsum([0, *(part.rows for part in parts)], dtype=np.int64)
        values: dict[str, Any] = {
            "_folder": folder,
            "_parts": list(parts),
            # The first row of every part, and the number of rows.
            "_bounds": bounds,
            "_open": functools.lru_cache(_OPEN_PARTS)(self._map),
            "_make_again": make_again,
            # Names of the arrays whose checksums were compared, by part.
            "_checked": collections.defaultdict(set),
        }
        values["ids"] = MappedNames(self, is_document=False)
        values["documents"] = values["ids"]
        if any(part.is_split for part in parts):
            values["documents"] = MappedNames(self, is_document=True)
        for name, value in values.items():
            object.__setattr__(self, name, value)  # the class is frozen

    def _map(self, part: int) -> dict[str, np.ndarray]:
        path = self._folder / self._parts[part].name
        try:
            arrays = part_files.map_arrays(path)
            if arrays.keys() == self._parts[part].checksums.keys():
                return arrays
        except CorpusError:
            pass
        self._repair(part)
        return part_files.map_arrays(path)

    def _array(self, part: int, name: str) -> np.ndarray:
        """Returns an array of a part; compares its checksum at the first reading."""
        array = self._open(part)[name]
        if name not in self._checked[part]:
            if part_files.checksum(array) != self._parts[part].checksums[name]:
                self._repair(part)
                self._open.cache_clear()  # which maps the file that was replaced
                array = self._open(part)[name]
            self._checked[part].add(name)
        return array

    def _repair(self, part: int) -> None:
        if self._make_again is None:
            raise CorpusError(
                f"{self._folder / self._parts[part].name} is missing or damaged; repeat the "
                "command that tokenised the corpus, which makes it again"
            )
        self._make_again(part)

    def _starts(self, part: int) -> np.ndarray:
        """Returns the start of each passage of a part, and the end of the last one."""
        ends, arrays = self._array(part, "ends"), self._open(part)
        if "starts" not in arrays:
            arrays["starts"] = np.concatenate([[0], ends])
        return arrays["starts"]

    def __len__(self) -> int:
        return int(self._bounds[-1])

    def _place(self, row: int) -> tuple[int, int]:
        """Returns the part of a row, and the row's number in that part."""
        if not 0 <= row < len(self):
            raise IndexError(f"there is no row {row}, there are {len(self)}")
        part = int(np.searchsorted(self._bounds, row, "right")) - 1
        return part, int(row - self._bounds[part])

    @property
    def tokens(self) -> np.ndarray:
        """All tokens, int32, copied into memory."""
        parts = (self._array(i, "tokens") for i in range(len(self._parts)))
        return np.concatenate([np.zeros(0, np.int32), *parts])

    @property
    def starts(self) -> np.ndarray:
        """Where each sequence starts, int64 [N + 1], copied into memory."""
        return np.concatenate([[0], np.cumsum(self.lengths)])

    @property
    def scored(self) -> np.ndarray:
        """Whether the loss counts each token, bool, copied into memory."""
        pieces = [self._scored(i, 0, part.rows) for i, part in enumerate(self._parts)]
        return np.concatenate(pieces)

    def _scored(self, part: int, first: int, stop: int) -> np.ndarray:
        """Returns which tokens the loss counts, of rows [first, stop) of a part."""
        lead, bounds = self._parts[part].lead, self._starts(part)[first : stop + 1]
        if lead:
            starts = bounds - bounds[0]
            return part_files.derive_scored(starts[:-1], starts[1:], lead)
        return self._array(part, "scored")[bounds[0] : bounds[-1]]

    @property
    def lengths(self) -> np.ndarray:
        """Tokens of each sequence, int64 [N]."""
        parts = [np.diff(self._starts(i)) for i in range(len(self._parts))]
        return np.concatenate(parts)

    def lengths_of(self, rows: np.ndarray) -> np.ndarray:
        """Returns the number of tokens of some sequences, int64 [R]."""
        rows = np.asarray(rows, np.int64)
        numbers = np.searchsorted(self._bounds, rows, "right") - 1
        out = np.empty(rows.shape, np.int64)
        for part in np.unique(numbers):
            at = numbers == part
            starts, local = self._starts(int(part)), rows[at] - self._bounds[part]
            out[at] = starts[local + 1] - starts[local]
        return out

    def sequence(self, row: int) -> tuple[np.ndarray, np.ndarray]:
        """Returns a sequence's tokens, int32 [T], and which of them the loss counts, bool [T]."""
        part, local = self._place(row)
        begin, end = self._starts(part)[local : local + 2]
        return self._array(part, "tokens")[begin:end], self._scored(part, local, local + 1)

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
            else int(self._scored_lengths(i, start, stop).sum())
            for i, start, stop in self._ranges(first, len(self) if stop is None else stop)
        )

    def _scored_lengths(self, part: int, first: int, stop: int) -> np.ndarray:
        lead, bounds = self._parts[part].lead, self._starts(part)[first : stop + 1]
        if lead:
            return np.maximum(np.diff(bounds) - lead, 0)
        scored = self._array(part, "scored")[bounds[0] : bounds[-1]]
        return np.diff(np.concatenate([[0], np.cumsum(scored)])[bounds - bounds[0]])

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
        parts = [self._scored_lengths(i, 0, part.rows) for i, part in enumerate(self._parts)]
        return np.concatenate(parts)

    def fingerprint(self) -> str:
        """Returns a hash of tokens, scored positions and ids: of the digests of the parts."""
        return fingerprint([part.digest for part in self._parts])

    def name(self, row: int, is_document: bool) -> str:
        """Returns the id of a passage, or of its document."""
        part, local = self._place(row)
        names = Strings(self._array(part, "names"), self._array(part, "name_ends"))
        name = names[int(self._array(part, "owners")[local])]
        if is_document or not self._parts[part].is_split:
            return name
        return name_passage(name, *map(int, self._array(part, "spans")[local]))

    def hashes(self, is_document: bool) -> Iterator[np.ndarray]:
        """Yields `hash_64_bits` of the passages' ids, or of their documents', uint64, by part."""
        for i in range(len(self._parts)):
            if is_document:
                yield self._array(i, "name_hashes")[self._array(i, "owners")]
            else:
                yield self._array(i, "id_hashes")


class MappedNames(Names):
    """The ids of a table's passages, or of their documents.

    Args:
        table: the table.
        is_document: whether the names are those of the documents.
    """

    def __init__(self, table: MappedTable, is_document: bool):
        self.table, self.is_document = table, is_document

    def __len__(self) -> int:
        return len(self.table)

    def _name(self, i):
        return self.table.name(i, self.is_document)

    def hashes(self) -> np.ndarray:
        """Returns `tda.runtime.fingerprint.hash_64_bits` of every name, uint64 [N]."""
        return np.concatenate([np.zeros(0, np.uint64), *self.table.hashes(self.is_document)])

    def digest(self) -> str:
        """Returns a hash of all names."""
        return self.table.fingerprint()
