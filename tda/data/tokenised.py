"""A corpus of any size as a token table: streamed from its documents into files, read in place.

    DIR/corpus.json        what the table was made from, and counts; written last
    DIR/tokens.npy, …      the arrays of a `TokenTable`, opened as memory maps
    DIR/parts/             the finished parts, while the table is being made

A passage's id leads back to its place: it is the document's id if the passage is the whole
document, else `ID#START-END` for its characters START to END. A tokenisation that is killed resumes
after the last finished part and ends in the same bytes.
"""

import collections
import dataclasses
import itertools
import json
import pathlib
import re
import shutil
from collections.abc import Iterable, Iterator, Sequence

import numpy as np

from tda.data.documents import Document
from tda.data.folders import CorpusError
from tda.data.parts import ARRAYS, Counts, Part, count_characters
from tda.data.tokens import TokenTable, by_characters
from tda.runtime import atomic_file, progress
from tda.runtime.fingerprint import fingerprint, hash_64_bits, plain

# Documents in one call of the tokenizer (which spreads them over threads), and calls for a part: a
# part is what a kill loses at most. Long documents end a part earlier, so that memory does not grow
# with their length: a part of so many characters has about 50 MB of arrays.
_BATCH = 256
_BATCHES_A_PART = 64
_PART_CHARACTERS = 1 << 25
_SPAN = re.compile(r"(.*)#(\d+)-(\d+)", re.DOTALL)


def place_of(passage: str, documents: Sequence[str] | None = None) -> tuple[str, slice | None]:
    """Returns a passage's document and its characters there; None for the whole document.

    Args:
        passage: the passage's id.
        documents: ids of documents, needed only if one of them itself ends in `#START-END`.
    """
    match = _SPAN.fullmatch(passage)
    if match is None or (documents is not None and passage in documents):
        return passage, None
    return match[1], slice(int(match[2]), int(match[3]))


class Strings(Sequence):
    """N strings in one array of bytes, decoded when they are asked for.

    Args:
        bytes_: the strings in UTF-8, one after the other, uint8.
        ends: where each string ends, int64 [N].
    """

    def __init__(self, bytes_: np.ndarray, ends: np.ndarray):
        self._bytes, self._ends = bytes_, ends

    def __len__(self) -> int:
        return len(self._ends)

    def __getitem__(self, index):
        if isinstance(index, slice):
            return [self[i] for i in range(*index.indices(len(self)))]
        i = range(len(self))[index]
        start = int(self._ends[i - 1]) if i else 0
        return self._bytes[start : int(self._ends[i])].tobytes().decode("utf-8")


def tokenise_in_memory(
    documents: Iterable[Document], tokenizer, context: int, quiet: bool = False
) -> tuple[TokenTable, Counts]:
    """Tokenises a corpus that fits in memory; see `tokenise_on_disk`."""
    parts, counts = [], []
    for part, count in _parts(documents, tokenizer, context, quiet):
        parts.append(part)
        counts.append(count)
    return _table(_joined(parts)), _sum(counts)


def tokenise_on_disk(
    directory,
    documents: Iterable[Document],
    tokenizer,
    context: int,
    provenance: dict,
    quiet: bool = False,
) -> tuple[TokenTable, Counts]:
    """Tokenises a corpus into `directory`, or opens the table that is there already.

    Args:
        directory: the directory of the files.
        documents: the corpus, the same documents in the same order in every call.
        tokenizer: the model's tokenizer.
        context: the most positions that a passage may have.
        provenance: JSON values that tell this corpus from others.
        quiet: whether no progress is shown.

    Returns:
        The passages, read from disk as they are needed, and counts of documents.

    Raises:
        CorpusError: two documents have the same id, a text or an id is not Unicode, there is no
            text at all, or the directory was made from another corpus.
    """
    directory = pathlib.Path(directory)
    provenance = provenance | {"tokenizer": tokenizer.fingerprint(), "context": context}
    if getattr(tokenizer, "chat", None) is not None:
        provenance["chat template"] = fingerprint(dataclasses.astuple(tokenizer.chat))
    provenance = plain(provenance)
    stamp, parts = directory / "corpus.json", directory / "parts"
    existing = _read_json(stamp) or _read_json(parts / "made_from.json")
    if existing is not None and existing["made_from"] != provenance:
        differing = sorted(k for k in provenance if existing["made_from"].get(k) != provenance[k])
        raise CorpusError(
            f"{directory} was made from another corpus; it differs in {', '.join(differing)}; "
            "remove it, or use another directory"
        )
    if not stamp.exists():
        parts.mkdir(parents=True, exist_ok=True)
        atomic_file.write_json(parts / "made_from.json", {"made_from": provenance})
        counts = _fill(parts, documents, tokenizer, context, quiet)
        _join(directory, parts, len(counts))
        # The stamp comes last: a directory without one is not finished.
        total = dataclasses.asdict(_sum(counts))
        atomic_file.write_json(stamp, {"made_from": provenance, "counts": total})
    shutil.rmtree(parts, ignore_errors=True)
    arrays = {k: np.load(directory / f"{k}.npy", mmap_mode="r") for k in ARRAYS}
    return _table(arrays), Counts(**_read_json(stamp)["counts"])


def _none() -> dict[str, np.ndarray]:
    return {k: np.zeros((0, 2) if k == "spans" else 0, d) for k, d in ARRAYS.items()}


def _parts(documents, tokenizer, context, quiet, first: int = 0) -> Iterator[tuple[dict, Counts]]:
    """Yields the parts of the corpus from document number `first` on."""
    documents = iter(documents)
    with progress.bar(None, "tokenise", "document", quiet=quiet) as bar:
        bar.update(sum(1 for _ in itertools.islice(documents, first)))
        part = Part(tokenizer, context)
        for batch in by_characters(documents, count_characters, _BATCH):
            for _ in part.add(batch):
                yield part.arrays(), part.counts()
                part.clear()
            bar.update(len(batch))
            if part.batches == _BATCHES_A_PART or part.characters >= _PART_CHARACTERS:
                yield part.arrays(), part.counts()
                part = Part(tokenizer, context)
        if part.batches:
            yield part.arrays(), part.counts()


def _fill(parts: pathlib.Path, documents, tokenizer, context, quiet) -> list[Counts]:
    """Writes the parts that are missing, each atomically; returns the counts of all parts."""
    counts: list[Counts] = []
    complete = 0
    while (path := parts / f"{len(counts)}.npz").exists():
        with np.load(path) as part:
            counts.append(Counts(*map(int, part["counts"])))
            # A part that a long document filled ends before the document's name.
            owners = part["owners"]
            if not len(owners) or owners[-1] < len(part["name_ends"]):
                complete = len(counts)
    # Its document is tokenised again from the beginning.
    del counts[complete:]
    finished = sum(c.documents for c in counts)
    for part, count in _parts(documents, tokenizer, context, quiet, first=finished):
        with atomic_file.open_atomic(parts / f"{len(counts)}.npz", "wb") as out:
            np.savez(out, **part, counts=np.asarray(dataclasses.astuple(count)))
        counts.append(count)
    return counts


def _joined(parts: list[dict]) -> dict[str, np.ndarray]:
    """Joins the arrays of all parts in memory."""
    out, shift = {k: [] for k in ARRAYS}, collections.Counter()
    for part in parts:
        for k, x in part.items():
            out[k].append(x + shift[k] if k in _SHIFTED else x)
        shift.update({k: len(part[target]) for k, target in _SHIFTED.items()})
    return {k: np.concatenate(x) if x else _none()[k] for k, x in out.items()}


def _join(directory: pathlib.Path, parts: pathlib.Path, count: int) -> None:
    """Joins all parts into one file for each array, with one of a part in memory at a time."""
    sizes = collections.Counter()
    for i in range(count):
        with np.load(parts / f"{i}.npz") as part:
            sizes.update({k: len(part[k]) for k in ARRAYS})
    # One array of one part in memory at a time; pages of a memory map would stay there.
    for k, dtype in ARRAYS.items():
        shape = (sizes[k], 2) if k == "spans" else (sizes[k],)
        header = {"descr": np.dtype(dtype).str, "fortran_order": False, "shape": shape}
        shift = 0
        with open(directory / f"{k}.npy", "wb") as out:
            np.lib.format.write_array_header_1_0(out, header)
            for i in range(count):
                with np.load(parts / f"{i}.npz") as part:
                    x = part[k]
                    (x + shift if k in _SHIFTED else x).astype(dtype, copy=False).tofile(out)
                    shift += len(part[_SHIFTED[k]]) if k in _SHIFTED else 0


# Arrays of offsets, which are shifted when parts are joined, and the arrays that they point into.
_SHIFTED = {"ends": "tokens", "owners": "name_ends", "name_ends": "names"}


class _Owners(Sequence):
    """The name of every passage's document."""

    def __init__(self, names: Strings, owners: np.ndarray):
        self._names, self._owners = names, owners

    def __len__(self) -> int:
        return len(self._owners)

    def __getitem__(self, index):
        if isinstance(index, slice):
            return [self[i] for i in range(*index.indices(len(self)))]
        return self._names[int(self._owners[index])]


class _Ids(_Owners):
    """The id of every passage."""

    def __init__(self, names: Strings, owners: np.ndarray, spans: np.ndarray):
        super().__init__(names, owners)
        self._spans = spans

    def __getitem__(self, index):
        if isinstance(index, slice):
            return super().__getitem__(index)
        start, end = map(int, self._spans[index])
        name = super().__getitem__(index)
        return name if start < 0 else f"{name}#{start}-{end}"


def _table(arrays: dict[str, np.ndarray]) -> TokenTable:
    if not len(arrays["ends"]):
        raise CorpusError(
            "the corpus has no text: it has no document, or only blank ones, or of a single token"
        )
    names = Strings(arrays["names"], arrays["name_ends"])
    ids = _Ids(names, arrays["owners"], arrays["spans"])
    _check_unique(names)
    starts = np.concatenate([[0], arrays["ends"]]).astype(np.int64)
    scored = np.array(arrays["scored"])
    scored[starts[:-1]] = False  # nothing predicts the first token
    return TokenTable(ids, _Owners(names, arrays["owners"]), arrays["tokens"], starts, scored)


def _check_unique(names: Strings) -> None:
    """Checks that no two documents have the same name.

    Compares hashes first: a set of the names themselves would take many times the memory.
    """
    hashes = np.fromiter(map(hash_64_bits, names), np.uint64, len(names))
    order = np.argsort(hashes, kind="stable")
    for i in np.flatnonzero(hashes[order][1:] == hashes[order][:-1]):
        a, b = names[int(order[i])], names[int(order[i + 1])]
        if a == b:
            raise CorpusError(f"two documents have the id {a!r}; give them other ids")


def _sum(counts: list[Counts]) -> Counts:
    return Counts(*(sum(getattr(c, f.name) for c in counts) for f in dataclasses.fields(Counts)))


def _read_json(path: pathlib.Path):
    return json.loads(path.read_text(encoding="utf-8")) if path.exists() else None
