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

from tda.data.corpora import CorpusError, Document
from tda.data.jsonl import half_character
from tda.data.tokens import TokenTable, cut
from tda.runtime import atomic_file, progress
from tda.runtime.fingerprint import hash_64_bits, plain

# Documents in one call of the tokenizer (which spreads them over threads), and calls for a part:
# a part is what a kill loses at most.
_BATCH = 256
_BATCHES_A_PART = 64
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


@dataclasses.dataclass(frozen=True)
class Counts:
    """Numbers of documents.

    Attributes:
        documents: all documents.
        blank: those without text, which became no passage.
        split: those that became several passages.
    """

    documents: int
    blank: int
    split: int


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
    provenance = plain({"tokenizer": tokenizer.fingerprint(), "context": context} | provenance)
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
    arrays = {k: np.load(directory / f"{k}.npy", mmap_mode="r") for k in _ARRAYS}
    return _table(arrays), Counts(**_read_json(stamp)["counts"])


# The arrays of a part and of the joined table: the tokens of all passages, where each passage ends,
# its document's number and characters (−1 for a whole document), and the documents' names.
_ARRAYS = {
    "tokens": np.int32,
    "ends": np.int64,
    "owners": np.int64,
    "spans": np.int64,
    "names": np.uint8,
    "name_ends": np.int64,
}


def _none() -> dict[str, np.ndarray]:
    return {k: np.zeros((0, 2) if k == "spans" else 0, d) for k, d in _ARRAYS.items()}


def _parts(documents, tokenizer, context, quiet, first: int = 0) -> Iterator[tuple[dict, Counts]]:
    """Yields the parts of the corpus from number `first` on."""
    documents = iter(documents)
    size = _BATCH * _BATCHES_A_PART
    with progress.bar(None, "tokenise", "document", quiet=quiet) as bar:
        skipped = sum(1 for _ in itertools.islice(documents, first * size))
        bar.update(skipped)
        while batch := list(itertools.islice(documents, size)):
            yield _part(batch, tokenizer, context, bar)


def _part(batch: list[Document], tokenizer, context: int, bar) -> tuple[dict, Counts]:
    tokens, ends, owners, spans, names = [], [], [], [], []
    blank = split = total = 0
    for start in range(0, len(batch), _BATCH):
        documents = batch[start : start + _BATCH]
        for document in documents:
            _check_characters(document)
        for document, (ids, places) in zip(
            documents, tokenizer.encode_spans([d.text for d in documents]), strict=True
        ):
            if not document.text.strip():
                blank += 1
                continue
            sequence = [*ids, *tokenizer.end]
            ranges = cut(sequence, tokenizer, context)
            split += len(ranges) > 1
            for first, stop in ranges:
                tokens += [*tokenizer.begin, *sequence[first:stop]]
                total += len(tokenizer.begin) + stop - first
                ends.append(total)
                owners.append(len(names))
                spans.append(_characters(places, first, stop) if len(ranges) > 1 else (-1, -1))
            names.append(document.id.encode())
        bar.update(len(documents))
    arrays = {
        "tokens": tokens,
        "ends": ends,
        "owners": owners,
        "spans": np.reshape(spans, (-1, 2)),
        "names": np.frombuffer(b"".join(names), np.uint8),
        "name_ends": np.cumsum([len(n) for n in names]),
    }
    arrays = {k: np.asarray(arrays[k], dtype) for k, dtype in _ARRAYS.items()}
    return arrays, Counts(len(batch), blank, split)


def _check_characters(document: Document) -> None:
    """Checks what a tokenizer would refuse without naming the document."""
    if not isinstance(document.text, str):
        kind = type(document.text).__name__
        raise CorpusError(f"document {document.id!r}: the text is {kind}, not a string")
    for field, value in (("id", document.id), ("text", document.text)):
        if half := half_character(value):
            raise CorpusError(f"document {document.id!r}: the {field} has {half}")


def _characters(places, first: int, stop: int) -> tuple[int, int]:
    """Returns the characters of tokens [first, stop); the tokens after a text have none."""
    spans = places[first : min(stop, len(places))]
    return min(a for a, _ in spans), max(b for _, b in spans)


def _fill(parts: pathlib.Path, documents, tokenizer, context, quiet) -> list[Counts]:
    """Writes the parts that are missing, each atomically; returns the counts of all parts."""
    done = 0
    while (parts / f"{done}.npz").exists():
        done += 1
    for i, (part, count) in enumerate(
        _parts(documents, tokenizer, context, quiet, first=done), start=done
    ):
        with atomic_file.open_atomic(parts / f"{i}.npz", "wb") as out:
            np.savez(out, **part, counts=np.asarray(dataclasses.astuple(count)))
        done = i + 1
    counts = []
    for i in range(done):
        with np.load(parts / f"{i}.npz") as part:
            counts.append(Counts(*map(int, part["counts"])))
    return counts


def _joined(parts: list[dict]) -> dict[str, np.ndarray]:
    """Joins the arrays of all parts in memory."""
    out, shift = {k: [] for k in _ARRAYS}, collections.Counter()
    for part in parts:
        for k, x in part.items():
            out[k].append(x + shift[k] if k in _SHIFTED else x)
        shift.update({k: len(part[target]) for k, target in _SHIFTED.items()})
    return {k: np.concatenate(x) if x else _none()[k] for k, x in out.items()}


def _join(directory: pathlib.Path, parts: pathlib.Path, count: int) -> None:
    """Joins all parts into one file for each array, with one part in memory at a time."""
    sizes = collections.Counter()
    for i in range(count):
        with np.load(parts / f"{i}.npz") as part:
            sizes.update({k: len(part[k]) for k in _ARRAYS})
    out = {
        k: np.lib.format.open_memmap(
            directory / f"{k}.npy", "w+", d, (sizes[k], 2) if k == "spans" else (sizes[k],)
        )
        for k, d in _ARRAYS.items()
    }
    at, shift = collections.Counter(), collections.Counter()
    for i in range(count):
        with np.load(parts / f"{i}.npz") as part:
            arrays = {k: part[k] for k in _ARRAYS}
        for k, x in arrays.items():
            out[k][at[k] : at[k] + len(x)] = x + shift[k] if k in _SHIFTED else x
        at.update({k: len(x) for k, x in arrays.items()})
        shift.update({k: len(arrays[target]) for k, target in _SHIFTED.items()})
    for x in out.values():
        x.flush()


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
        raise CorpusError("the corpus has no text: it has no document, or only blank ones")
    names = Strings(arrays["names"], arrays["name_ends"])
    ids = _Ids(names, arrays["owners"], arrays["spans"])
    _check_unique(names)
    starts = np.concatenate([[0], arrays["ends"]]).astype(np.int64)
    scored = np.ones(len(arrays["tokens"]), bool)
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
