"""Names of documents and passages: bytes and offsets in arrays, and hashes that find duplicates."""

import itertools
from collections.abc import Callable, Sequence

import numpy as np

from tda.data.folders import CorpusError
from tda.data.parts import name_passage

# Hashes that are sorted at a time: half a gigabyte.
_SORTED = 1 << 26


class Names(Sequence):
    """N names, each decoded on demand."""

    def _name(self, i: int) -> str:
        """Returns name i, from 0 to N − 1."""
        raise NotImplementedError

    def __getitem__(self, index):
        if isinstance(index, slice):
            return [self._name(i) for i in range(*index.indices(len(self)))]
        return self._name(range(len(self))[index])


class Strings(Names):
    """N strings in one array of bytes, decoded on demand.

    Args:
        bytes_: the strings in UTF-8, one after the other, uint8.
        ends: where each string ends, int64 [N].
    """

    def __init__(self, bytes_: np.ndarray, ends: np.ndarray):
        self._bytes, self._ends = bytes_, ends

    def __len__(self) -> int:
        return len(self._ends)

    def _name(self, i):
        start = int(self._ends[i - 1]) if i else 0
        return self._bytes[start : int(self._ends[i])].tobytes().decode("utf-8")


class DocumentNames(Names):
    """The name of every passage's document.

    Args:
        names: the documents' names.
        owners: the document of each passage, int64 [N].
    """

    def __init__(self, names: Strings, owners: np.ndarray):
        self._names, self._owners = names, owners

    def __len__(self) -> int:
        return len(self._owners)

    def _name(self, i):
        return self._names[int(self._owners[i])]


class PassageNames(DocumentNames):
    """The id of every passage.

    Args:
        names, owners: as for `DocumentNames`.
        spans: the characters of each passage, int64 [N, 2]; −1 for a whole document.
    """

    def __init__(self, names: Strings, owners: np.ndarray, spans: np.ndarray):
        super().__init__(names, owners)
        self._spans = spans

    def _name(self, i):
        return name_passage(super()._name(i), *map(int, self._spans[i]))


def check_unique(
    counts: Sequence[int],
    hashes_of: Callable[[int], np.ndarray],
    name_of: Callable[[int, int], str],
) -> None:
    """Checks that no two documents of some parts have the same name.

    Sorts hashes, since a set of the names would take many times the memory. Very many are sorted a
    range of hashes at a time.

    Args:
        counts: the number of names of each part.
        hashes_of: returns the hashes of a part's names, uint64.
        name_of: returns a name by the number of its part and its number in the part.

    Raises:
        CorpusError: two do.
    """
    parts = range(len(counts))
    bits = max(0, sum(counts) // _SORTED).bit_length()
    for bucket in range(1 << bits):
        ranges = []
        for part in parts:
            hashes = hashes_of(part)
            is_here = hashes >> np.uint64(64 - bits) == bucket if bits else slice(None)
            ranges.append(hashes[is_here])
        ordered = np.concatenate([np.zeros(0, np.uint64), *ranges])
        ordered.sort()
        for key in np.unique(ordered[1:][ordered[1:] == ordered[:-1]]):
            names = [
                name_of(part, int(i))
                for part in parts
                for i in np.flatnonzero(hashes_of(part) == key)
            ]
            for name, following in itertools.pairwise(sorted(names)):
                if name == following:
                    raise CorpusError(
                        f"two documents have the id {name!r}; give them other ids, or read them "
                        "in Python by Corpus(…, duplicate_ids='number')"
                    )
