"""Short hashes that identify the inputs of a computation.

They identify finished work on disk (stages of a run, stores, rankings): the same input must give
the same hash in every version, or finished work is done again.
"""

import hashlib
import json
import os
from collections.abc import Iterable, Mapping
from typing import Any

import jax
import numpy as np

# Bytes of an array that are hashed at a time: a table of tokens may be larger than memory.
_CHUNK = 16 << 20


def plain(value: Any) -> Any:
    """Returns a value after a round trip through JSON, so that it equals the value read later."""
    return json.loads(json.dumps(value))


def python_value(value: Any) -> Any:
    """Returns a number of numpy as Python's, which JSON and configs take; all else as it is."""
    return value.item() if isinstance(value, np.generic) else value


def fingerprint(value: Any) -> str:
    """Returns a hash of a JSON value, 12 hexadecimal digits; the order of keys does not matter."""
    return hashlib.sha256(json.dumps(value, sort_keys=True).encode()).hexdigest()[:12]


def fingerprint_parts(parts: Iterable[str | bytes | np.ndarray]) -> str:
    """Returns a hash of strings, bytes and arrays one after the other, 16 hexadecimal digits.

    Boundaries between parts are not hashed: where parts vary in length, the caller adds separators.
    Arrays may be memory maps; they are read a chunk at a time.
    """
    digest = hashlib.sha256()
    for part in parts:
        if isinstance(part, np.ndarray):
            step = max(1, _CHUNK // max(1, part.itemsize))
            for start in range(0, len(part), step):
                digest.update(np.ascontiguousarray(part[start : start + step]).tobytes())
        else:
            digest.update(part.encode() if isinstance(part, str) else part)
    return digest.hexdigest()[:16]


def fingerprint_texts(texts: Iterable[str]) -> str:
    """Returns a hash of texts in their order, 16 hexadecimal digits."""
    # A null byte separates them, so that ["ab", "c"] and ["a", "bc"] differ.
    return fingerprint_parts(f"{text}\0" for text in texts)


def fingerprint_files(paths: Iterable[str | os.PathLike[str]]) -> str:
    """Returns a hash of the contents of some files in their order, 16 hexadecimal digits."""
    digest = hashlib.sha256()
    for path in paths:
        with open(path, "rb") as file:
            digest.update(hashlib.file_digest(file, "sha256").digest())
    return digest.hexdigest()[:16]


def fingerprint_arrays(arrays: Mapping[str, np.ndarray | jax.Array]) -> str:
    """Returns a hash of named arrays that are in this process's memory, 16 hexadecimal digits."""
    digest = hashlib.blake2b(digest_size=8)
    for name in sorted(arrays):
        x = np.ascontiguousarray(arrays[name])
        digest.update(f"{name} {x.shape} {x.dtype}\0".encode())
        digest.update(x.view(np.uint8).reshape(-1).data)
    return digest.hexdigest()


def hash_64_bits(text: str, byteorder: str = "little") -> int:
    """Returns a hash of a text, a number below 2^64 that is spread evenly."""
    digest = hashlib.blake2b(text.encode(), digest_size=8).digest()
    return int.from_bytes(digest, byteorder)


def seed_of(data: bytes) -> np.ndarray:
    """Returns a seed for `numpy.random.default_rng` from these bytes alone: uint32 [8]."""
    return np.frombuffer(hashlib.sha256(data).digest(), np.uint32)
