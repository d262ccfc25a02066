"""Shards of a local array, read and written at the disk's rate.

A shard file (zarr v3, `sharding_indexed`) holds its chunks one after the other, each followed by
its CRC32C, and at its end where each of them begins. TensorStore writes the same bytes and reads
them, but several times slower, for it copies every chunk.
"""

import contextlib
import os
import sys
import threading
from collections.abc import Iterator

import google_crc32c
import numpy as np

from tda.store.location import StoreError

_CHECKSUM = 4
_ABSENT = np.uint64(2**64 - 1)


class Buffers:
    """Memory that is used again once nobody holds it: fresh pages cost as much as reading."""

    def __init__(self):
        self._kept: list[np.ndarray] = []
        self._lock = threading.Lock()

    def take(self, size: int) -> np.ndarray:
        """uint8 [size], at an address that accelerators and vector units like."""
        # Two readers must not find the same memory free.
        with self._lock:
            free = [i for i in range(len(self._kept)) if _holders(self._kept, i) == _NOBODY]
            large = [i for i in free if len(self._kept[i]) >= size + 64]
            if large:
                buffer = self._kept[large[0]]
            else:
                self._kept = [b for i, b in enumerate(self._kept) if i not in free]
                buffer = np.empty(size + 64, np.uint8)
                self._kept.append(buffer)
            start = -buffer.ctypes.data % 64
            return buffer[start : start + size]


def _holders(buffers: list[np.ndarray], i: int) -> int:
    """References to a buffer: of views of it, and of arrays of jax that share its memory."""
    return sys.getrefcount(buffers[i])


_NOBODY = _holders([np.empty(0, np.uint8)], 0)


def read(
    path: str, first: int, count: int, chunk_bytes: int, chunks: int, buffers: Buffers
) -> np.ndarray | None:
    """Chunks `first` to `first + count` of a shard, as they are: uint8 [count × chunk_bytes].

    Args:
        path: the shard's file.
        first, count: which of its chunks.
        chunk_bytes: of one chunk, without its checksum.
        chunks: how many chunks a whole shard has.
        buffers: where the memory is taken from.

    Returns:
        None where the file is laid out in another way than TensorStore does it.

    Raises:
        StoreError: a checksum is wrong, or the file is cut short.
        FileNotFoundError: there is no such shard.
    """
    with open(path, "rb", buffering=0) as file:
        if hasattr(os, "posix_fadvise"):
            # The kernel reads further ahead then: three times the rate, a tenth of its work.
            os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_SEQUENTIAL)
        start = _start(path, file, first, count, chunk_bytes, chunks)
        if start is None:
            return None
        out = buffers.take(count * chunk_bytes)
        checksums = np.empty(count, np.dtype("<u4"))
        for i in range(0, count, _MOST):
            here = slice(i, min(count, i + _MOST))
            _fill(path, file, start + i * (chunk_bytes + _CHECKSUM), out, checksums, here)
    for i, there in enumerate(checksums):
        if google_crc32c.value(out[i * chunk_bytes : (i + 1) * chunk_bytes]) != there:
            raise StoreError(f"{path} is damaged: the checksum of chunk {first + i} is wrong")
    return out


# Buffers that one call may fill, two for each chunk.
_MOST = 512


def _start(path, file, first, count, chunk_bytes, chunks) -> int | None:
    """Where chunk `first` begins, if the wanted ones lie one after the other."""
    size = os.fstat(file.fileno()).st_size
    length = 16 * chunks + _CHECKSUM
    raw = os.pread(file.fileno(), length, max(0, size - length))
    if len(raw) < length:
        raise StoreError(f"{path} is damaged: it is cut short")
    if google_crc32c.value(raw[:-_CHECKSUM]) != int.from_bytes(raw[-_CHECKSUM:], "little"):
        raise StoreError(f"{path} is damaged: the checksum of its index is wrong")
    index = np.frombuffer(raw[:-_CHECKSUM], "<u8").reshape(chunks, 2)[first : first + count]
    if (index == _ABSENT).any():
        return None
    step = chunk_bytes + _CHECKSUM
    expected = int(index[0, 0]) + step * np.arange(count, dtype=np.uint64)
    if (index[:, 1] != step).any() or (index[:, 0] != expected).any():
        return None
    return int(index[0, 0])


def _fill(path, file, offset: int, out: np.ndarray, checksums: np.ndarray, which: slice) -> None:
    """Reads chunks and checksums, which alternate in the file, each to where it belongs."""
    chunk_bytes = len(out) // len(checksums)
    targets = []
    for i in range(which.start, which.stop):
        targets.append(memoryview(out[i * chunk_bytes : (i + 1) * chunk_bytes]))
        targets.append(memoryview(checksums[i : i + 1].view(np.uint8)))
    while targets:
        got = os.preadv(file.fileno(), targets, offset)
        if not got:
            raise StoreError(f"{path} is damaged: it is cut short")
        offset += got
        while targets and got >= len(targets[0]):
            got -= len(targets.pop(0))
        if got:
            targets[0] = targets[0][got:]


def checksum(chunk: np.ndarray) -> int:
    """The CRC32C of a chunk's bytes."""
    return google_crc32c.value(chunk.reshape(-1).view(np.uint8))


class Writer:
    """The chunks of a shard that is being written, in order. Made by `writing`."""

    def __init__(self, file, chunks: int):
        self._file, self._offset, self._count = file, 0, 0
        self._index = np.full((chunks, 2), _ABSENT, "<u8")

    def add(self, chunk: np.ndarray, checksum: int) -> None:
        """Writes a whole chunk: contiguous numbers, of the array's dtype; and its `checksum`."""
        raw = chunk.reshape(-1).view(np.uint8)
        self._file.write(raw.data)
        self._file.write(checksum.to_bytes(_CHECKSUM, "little"))
        length = len(raw) + _CHECKSUM
        self._index[self._count] = self._offset, length
        self._offset, self._count = self._offset + length, self._count + 1

    def end(self) -> None:
        """Writes where each chunk begins."""
        raw = self._index.tobytes()
        self._file.write(raw + google_crc32c.value(raw).to_bytes(_CHECKSUM, "little"))


@contextlib.contextmanager
def writing(path: str, chunks: int) -> Iterator[Writer]:
    """Writes a shard file that appears, whole and on the disk, when the block ends without error.

    Args:
        path: the shard's file.
        chunks: how many chunks a whole shard has; fewer may be added.
    """
    part = f"{path}.part"
    try:
        with open(part, "wb", buffering=0) as file:
            writer = Writer(file, chunks)
            yield writer
            writer.end()
            os.fsync(file.fileno())
        os.replace(part, path)
    except BaseException:
        with contextlib.suppress(OSError):
            os.remove(part)
        raise
