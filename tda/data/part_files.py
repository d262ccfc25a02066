"""A part of a corpus as a safetensors file, whose arrays are read through a memory map.

Arrays that follow from the others are left out: `scored` if the loss counts all tokens but the
first of every passage, and `spans` if every passage is a whole document.
"""

import dataclasses
import json
import pathlib
from collections.abc import Mapping

import google_crc32c
import numpy as np
import safetensors.numpy

from tda.data.folders import CorpusError
from tda.data.parts import ARRAYS
from tda.runtime import atomic_file
from tda.runtime.fingerprint import fingerprint_parts

# The names of dtypes in safetensors.
_DTYPES = {"I32": np.int32, "I64": np.int64, "U64": np.uint64, "U8": np.uint8, "BOOL": np.bool_}


@dataclasses.dataclass(frozen=True)
class PartInfo:
    """A part's entry in the corpus's index, so that opening a corpus opens no part."""

    name: str
    """The file."""
    rows: int
    """Passages."""
    tokens: int
    scored: int
    """Tokens that the loss counts."""
    lead: int
    """The number of tokens at the beginning of every passage that the loss leaves out; 0 if the
    array `scored` is stored."""
    smallest: int
    """The smallest token id; `largest` is the largest."""
    largest: int
    shortest: tuple[int, int]
    """Tokens of the shortest passage, and its row; `longest` is the longest."""
    longest: tuple[int, int]
    names: int
    """Documents."""
    is_open: bool
    """Whether the last document continues in the next part."""
    is_split: bool
    """Whether a passage is a piece of a document."""
    files_before: int
    """The number of files before this one: a part that is too large for a file has several."""
    counts: tuple[int, int, int]
    """The fields of `tda.data.parts.Counts`."""
    digest: str
    """A hash of passages and ids."""
    checksums: dict[str, int]
    """CRC-32C of each array's bytes."""


def write(
    path: pathlib.Path,
    arrays: Mapping[str, np.ndarray],
    lead: int,
    counts: tuple[int, int, int],
    is_open: bool,
    files_before: int = 0,
) -> PartInfo:
    """Writes the arrays of a part, atomically; returns the part's entry in the index.

    Args:
        path: the file.
        arrays: by the names of `ARRAYS`.
        lead: the number of tokens that the tokenizer puts before a text.
        counts, is_open, files_before: see `PartInfo`.
    """
    ends, scored = arrays["ends"], np.array(arrays["scored"])
    starts = np.concatenate([[0], ends[:-1]]).astype(np.int64)[: len(ends)]
    scored[starts] = False  # nothing predicts the first token
    lead = max(1, lead)
    stored = dict(arrays) | {"scored": scored}
    if np.array_equal(scored, derive_scored(starts, ends, lead)):
        del stored["scored"]
    else:
        lead = 0
    is_split = bool((arrays["spans"][:, 0] >= 0).any())
    if not is_split:
        del stored["spans"]
    tokens, lengths = arrays["tokens"], ends - starts
    has_rows = len(ends) > 0
    extremes = (
        [(int(lengths[i]), int(i)) for i in (lengths.argmin(), lengths.argmax())]
        if has_rows
        else [(0, 0), (0, 0)]
    )
    sizes = json.dumps([lead, {k: len(x) for k, x in stored.items()}], sort_keys=True)
    info = PartInfo(
        name=path.name,
        rows=len(ends),
        tokens=len(tokens),
        scored=int(scored.sum()),
        lead=lead,
        smallest=int(tokens.min()) if has_rows else 0,
        largest=int(tokens.max()) if has_rows else 0,
        shortest=extremes[0],
        longest=extremes[1],
        names=len(arrays["name_ends"]),
        is_open=is_open,
        is_split=is_split,
        files_before=files_before,
        counts=counts,
        digest=fingerprint_parts([sizes, *(stored[k] for k in ARRAYS if k in stored)]),
        checksums={k: checksum(x) for k, x in stored.items()},
    )
    text = json.dumps(dataclasses.asdict(info))
    # One field with its own checksum in front: safetensors does not keep the order of several.
    described = {"part": f"{google_crc32c.value(text.encode()):08x}{text}"}
    with atomic_file.replacing(path) as part:
        safetensors.numpy.save_file(stored, part, described)
    return info


def checksum(array: np.ndarray) -> int:
    """Returns the CRC-32C of an array's bytes, which is ten times as fast as SHA-256."""
    return google_crc32c.value(np.ascontiguousarray(array).reshape(-1).view(np.uint8))


def derive_scored(starts: np.ndarray, ends: np.ndarray, lead: int) -> np.ndarray:
    """Returns which tokens the loss counts: all but the first `lead` of every passage, bool."""
    scored = np.ones(int(ends[-1]) if len(ends) else 0, bool)
    for i in range(lead):
        scored[(starts + i)[starts + i < ends]] = False
    return scored


def read_info(path: pathlib.Path) -> PartInfo | None:
    """Returns a part's entry in the index; None if its file is damaged."""
    try:
        header, data_start = _read_header(path)
        end = max((x["data_offsets"][1] for k, x in header.items() if k in ARRAYS), default=0)
        if path.stat().st_size != data_start + end:
            return None
        text = header["__metadata__"]["part"]
        if f"{google_crc32c.value(text[8:].encode()):08x}" != text[:8]:
            return None
        return info_from_json(json.loads(text[8:]))
    except (OSError, ValueError, KeyError):
        return None


def info_from_json(fields: dict) -> PartInfo:
    """Returns a `PartInfo` from its fields in JSON."""
    lists = ("shortest", "longest", "counts")
    return PartInfo(**fields | {k: tuple(fields[k]) for k in lists})


def map_arrays(path: pathlib.Path) -> dict[str, np.ndarray]:
    """Returns the arrays of a part, read from its file on demand.

    Raises:
        CorpusError: the file is missing or damaged.
    """
    try:
        header, data_start = _read_header(path)
        mapped = np.memmap(path, np.uint8, "r")
        arrays = {}
        for name, described in header.items():
            if name != "__metadata__":
                first, stop = (data_start + x for x in described["data_offsets"])
                if stop > len(mapped):
                    raise ValueError(f"it ends at byte {len(mapped)}")
                array = mapped[first:stop].view(_DTYPES[described["dtype"]])
                arrays[name] = array.reshape(described["shape"])
        return arrays
    except (OSError, ValueError, KeyError) as error:
        raise CorpusError(
            f"{path} is missing or damaged ({error}); repeat the command that tokenised the "
            "corpus, which makes it again"
        ) from error


def _read_header(path: pathlib.Path) -> tuple[dict, int]:
    """Returns the header of a safetensors file, and where its data start."""
    with open(path, "rb") as file:
        size = int.from_bytes(file.read(8), "little")
        return json.loads(file.read(size)), 8 + size
