"""Finds rows by name without a scan, in two arrays: sorted hashes of all names, and their rows."""

import math
from collections.abc import Sequence
from typing import Protocol, runtime_checkable

import numpy as np

from tda.runtime.fingerprint import hash_64_bits
from tda.store import arrays
from tda.store.location import Location, StoreError

# Numbers in a chunk, the unit that a look-up reads (512 KiB), and in a file (32 MiB).
_CHUNK, _SHARD = 1 << 16, 1 << 22


@runtime_checkable
class HashedNames(Protocol):
    """Names whose hashes are known, so that they need not be read one by one."""

    def hashes(self) -> np.ndarray:
        """Returns `tda.runtime.fingerprint.hash_64_bits` of every name, uint64 [N]."""

    def digest(self) -> str:
        """Returns a hash that identifies the names, and those of their documents."""

    def __getitem__(self, row: int) -> str: ...

    def __len__(self) -> int: ...


class NameIndex:
    """Finds the rows that a name may belong to.

    Args:
        location: the directory that `write` wrote to.
        count: number of rows.
    """

    def __init__(self, location: Location, count: int):
        self._count = count
        self._hashes, self._rows = (_open(location, n, count) for n in ("hashes", "rows"))

    def rows(self, name: str) -> list[int]:
        """Returns the rows whose name has the same hash."""
        key = np.uint64(hash_64_bits(name))
        # Hashes are uniform numbers, so a hash's place follows from its value: the rank of a
        # uniform number deviates by about √count, and this window rarely misses it.
        guess = int(float(key) / 2.0**64 * self._count)
        reach = 64 + 8 * math.isqrt(self._count)
        while True:
            low, high = max(0, guess - reach), min(self._count, guess + reach)
            part = self._hashes[low:high].read().result()
            first, last = np.searchsorted(part, key), np.searchsorted(part, key, "right")
            # A run of equal hashes that touches the window's end may continue beyond it.
            if (low == 0 or first > 0) and (high == self._count or last < len(part)):
                return self._rows[low + first : low + last].read().result().tolist()
            reach *= 4

    def read_all(self) -> None:
        """Reads both arrays; raises a ValueError if one is damaged."""
        for array in (self._hashes, self._rows):
            for start in range(0, self._count, _SHARD):
                array[start : min(self._count, start + _SHARD)].read().result()


def write(location: Location, names: Sequence[str] | HashedNames, unique: bool) -> None:
    """Writes the index of the names of rows 0, 1, ….

    Raises:
        StoreError: names must be unique, and two are the same.
    """
    if isinstance(names, HashedNames):
        hashes = names.hashes()
    else:
        hashes = np.fromiter(map(hash_64_bits, names), np.uint64, len(names))
    rows = sort_hashes(hashes)
    hashes = hashes[rows]
    if unique:
        for i in np.flatnonzero(hashes[1:] == hashes[:-1]):
            first, second = (names[int(row)] for row in rows[i : i + 2])
            if first == second:
                raise StoreError(f"two passages have the id {first!r}")
    for name, numbers in (("hashes", hashes), ("rows", rows)):
        _open(location, name, len(names), create=True).write(numbers).result()


def sort_hashes(hashes: np.ndarray) -> np.ndarray:
    """Returns the order that sorts hashes, equal ones by row, int64 [N].

    Args:
        hashes: uint64 [N], uniform numbers.
    """
    # Row numbers replace the lowest bits: sorting numbers in place takes about half the time of
    # `argsort`.
    bits = np.uint64(max(1, len(hashes) - 1).bit_length())
    keys = hashes >> bits << bits
    keys |= np.arange(len(hashes), dtype=np.uint64)
    keys.sort()
    keys &= (np.uint64(1) << bits) - np.uint64(1)
    rows = keys.view(np.int64)
    # Sorts the few that differ only in the lowest bits; numpy's stable sort is fast on the rest.
    return rows[np.argsort(hashes[rows], kind="stable")]


def exists(files: set[str], folder: str, count: int) -> bool:
    """Returns whether the index in a folder has all of its files."""
    names = [f"c/{i}" for i in range(math.ceil(count / _SHARD))] + ["zarr.json"]
    return all(f"{folder}/{array}/{n}" in files for array in ("hashes", "rows") for n in names)


def _open(location: Location, name: str, count: int, create: bool = False):
    chunk = min(_CHUNK, count)
    shard = min(_SHARD, chunk * math.ceil(count / chunk))
    dtype = {"hashes": "uint64", "rows": "int64"}[name]
    metadata = arrays.metadata([count], np.dtype(dtype), chunk, shard)
    return arrays.open_array(location / name, metadata, create)
