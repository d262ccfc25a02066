"""Reads and writes shard files of an array at the disk's rate.

A shard file (zarr v3, `sharding_indexed`) holds its chunks one after the other, each followed by
its CRC32C, and at its end an index of their offsets. TensorStore reads and writes the same bytes,
but several times slower, because it copies every chunk.
"""

import contextlib
import dataclasses
import io
import os
import sys
import threading
from collections.abc import Iterator

import google_crc32c
import numpy as np

from tda.runtime import atomic_file
from tda.store.location import Location, StoreError

_CHECKSUM = 4
# zarr's offset and length of a chunk that a shard does not have.
_ABSENT = np.uint64(2**64 - 1)


class Buffers:
    """Buffers reused once no array refers to them: fresh pages cost as much as reading."""

    def __init__(self):
        self._buffers: list[np.ndarray] = []
        self._lock = threading.Lock()

    def take(self, size: int) -> np.ndarray:
        """Returns uint8 [size], aligned to 64 bytes for accelerators and vector units."""
        # Two readers must not take the same free buffer.
        with self._lock:
            free = [i for i in range(len(self._buffers)) if _holders(self._buffers, i) == _UNUSED]
            large = [i for i in free if len(self._buffers[i]) >= size + 64]
            if large:
                buffer = self._buffers[large[0]]
            else:
                self._buffers = [b for i, b in enumerate(self._buffers) if i not in free]
                buffer = np.empty(size + 64, np.uint8)
                self._buffers.append(buffer)
            start = -buffer.ctypes.data % 64
            return buffer[start : start + size]


def _holders(buffers: list[np.ndarray], i: int) -> int:
    """Counts references to a buffer: by its views, and by jax arrays that share its memory."""
    return sys.getrefcount(buffers[i])


# Measured, since the interpreter's own references differ between versions of Python.
_UNUSED = _holders([np.empty(0, np.uint8)], 0)


@dataclasses.dataclass(frozen=True)
class Layout:
    """How the shards of an array are divided."""

    chunk_bytes: int
    """Bytes of one chunk, without its checksum."""
    chunks: int
    """Number of chunks in a whole shard."""


def read(path: str, layout: Layout, first: int, count: int, buffers: Buffers) -> np.ndarray | None:
    """Reads chunks `first` to `first + count` of a shard: uint8 [count × chunk_bytes].

    Args:
        path: the shard's file.
        layout: how the shard is divided.
        first, count: the first chunk and the number of chunks.
        buffers: source of the memory.

    Returns:
        The bytes; None if the file is not laid out as TensorStore lays it out.

    Raises:
        StoreError: a checksum is wrong, or the file is cut short.
        FileNotFoundError: there is no such shard.
    """
    chunk_bytes = layout.chunk_bytes
    with open(path, "rb", buffering=0) as file:
        if hasattr(os, "posix_fadvise"):
            # The kernel then reads further ahead, at three times the rate with a tenth of the work.
            os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_SEQUENTIAL)
        start = _start(file, layout, first, count)
        if start is None:
            return None
        out = buffers.take(count * chunk_bytes)
        checksums = np.empty(count, np.dtype("<u4"))
        for i in range(0, count, _MOST):
            part = slice(i, min(count, i + _MOST))
            # Chunks and checksums alternate in the file; each goes straight into its array.
            targets = []
            for k in range(part.start, part.stop):
                targets.append(memoryview(out[k * chunk_bytes : (k + 1) * chunk_bytes]))
                targets.append(memoryview(checksums[k : k + 1].view(np.uint8)))
            _fill(file, start + i * (chunk_bytes + _CHECKSUM), targets)
    for i, stored in enumerate(checksums):
        if google_crc32c.value(out[i * chunk_bytes : (i + 1) * chunk_bytes]) != stored:
            raise StoreError(f"{path} is damaged: the checksum of chunk {first + i} is wrong")
    return out


# Chunks per call of preadv, which fills two buffers for each; Linux allows 1,024 buffers.
_MOST = 512


def _start(file: io.FileIO, layout: Layout, first: int, count: int) -> int | None:
    """Returns the offset of chunk `first`; None unless the chunks lie one after the other."""
    size, length = os.fstat(file.fileno()).st_size, 16 * layout.chunks + _CHECKSUM
    raw = os.pread(file.fileno(), length, max(0, size - length))
    if len(raw) < length:
        raise StoreError(f"{file.name} is damaged: it is cut short")
    if google_crc32c.value(raw[:-_CHECKSUM]) != int.from_bytes(raw[-_CHECKSUM:], "little"):
        raise StoreError(f"{file.name} is damaged: the checksum of its index is wrong")
    index = np.frombuffer(raw[:-_CHECKSUM], "<u8").reshape(layout.chunks, 2)[first : first + count]
    if (index == _ABSENT).any():
        return None
    step = layout.chunk_bytes + _CHECKSUM
    expected = int(index[0, 0]) + step * np.arange(count, dtype=np.uint64)
    if (index[:, 1] != step).any() or (index[:, 0] != expected).any():
        return None
    return int(index[0, 0])


def _fill(file: io.FileIO, offset: int, targets: list[memoryview]) -> None:
    """Reads consecutive bytes from an offset into buffers, one after the other."""
    while targets:
        n_read = os.preadv(file.fileno(), targets, offset)
        if not n_read:
            raise StoreError(f"{file.name} is damaged: it is cut short")
        offset += n_read
        # A call may end in the middle of a buffer, where the next one continues.
        while targets and n_read >= len(targets[0]):
            n_read -= len(targets.pop(0))
        if n_read:
            targets[0] = targets[0][n_read:]


def checksum(chunk: np.ndarray) -> int:
    """Returns the CRC32C of a chunk's bytes."""
    return google_crc32c.value(chunk.reshape(-1).view(np.uint8))


class Writer:
    """Writes the chunks of a shard, in order. Yielded by `writing`."""

    def __init__(self, file, chunks: int):
        self._file, self._offset, self._count = file, 0, 0
        self._index = np.full((chunks, 2), _ABSENT, "<u8")

    def add(self, chunk: np.ndarray, checksum: int) -> None:
        """Writes a whole chunk, contiguous and of the array's dtype, and its `checksum`."""
        raw = chunk.reshape(-1).view(np.uint8)
        self._file.write(raw.data)
        self._file.write(checksum.to_bytes(_CHECKSUM, "little"))
        length = len(raw) + _CHECKSUM
        self._index[self._count] = self._offset, length
        self._offset, self._count = self._offset + length, self._count + 1

    def end(self) -> None:
        """Writes the index of the chunks' offsets."""
        raw = self._index.tobytes()
        self._file.write(raw + google_crc32c.value(raw).to_bytes(_CHECKSUM, "little"))


@contextlib.contextmanager
def writing(folder: Location, name: str, chunks: int) -> Iterator[Writer]:
    """Writes a shard file that appears, whole and synced, when the block ends without error.

    Args:
        folder: directory of the array; a remote one gets the file in one piece.
        name: name of the file.
        chunks: number of chunks in a whole shard; fewer may be added.
    """
    if folder.path is None:
        memory = io.BytesIO()
        writer = Writer(memory, chunks)
        yield writer
        writer.end()
        folder.write(name, memory.getvalue())
        return
    with atomic_file.replacing(folder.path / name) as part, open(part, "wb", buffering=0) as file:
        writer = Writer(file, chunks)
        yield writer
        writer.end()
        os.fsync(file.fileno())
