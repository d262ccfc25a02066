"""A corpus as passages of token ids: streamed from its documents into files, then read in place.

    DIR/corpus.json        what it was made from, and counts; written last
    DIR/tokens.npy, …      the arrays of a `TokenTable`, opened by memory map
    DIR/parts/             what is finished of it while it is being made

A passage's id leads back to its place: it is the document's id where it is the whole document, else
`ID#START-END`, characters START to END of it. Killed while it is made and started again, it goes on
behind the last finished part, to the same bytes.
"""

import collections
import dataclasses
import hashlib
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

# Documents that are tokenised together, and how many of these make a part.
_BATCH = 256
_BATCHES_A_PART = 64
_SPAN = re.compile(r"(.*)#(\d+)-(\d+)", re.DOTALL)


def place_of(passage: str, documents: Sequence[str] | None = None) -> tuple[str, slice | None]:
    """The document that a passage's id names, and the characters of it; None for all of them.

    Args:
        passage: the id.
        documents: names of documents, where one may itself end like a place.
    """
    found = _SPAN.fullmatch(passage)
    if found is None or (documents is not None and passage in documents):
        return passage, None
    return found[1], slice(int(found[2]), int(found[3]))


class Strings(Sequence):
    """Strings in one array of bytes, decoded when they are asked for.

    Args:
        bytes_: UTF-8 of all of them, uint8.
        ends: int64 [N], where each ends.
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
    """What became of the documents.

    Attributes:
        documents: how many there were.
        blank: how many of them had no text, and became no passage.
        split: how many became several passages.
    """

    documents: int
    blank: int
    split: int


def tokenise_in_memory(
    documents: Iterable[Document], tokenizer, context: int, quiet: bool = False
) -> tuple[TokenTable, Counts]:
    """The passages of a corpus that fits in memory; see `tokenise_on_disk`."""
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
    made_from: dict,
    quiet: bool = False,
) -> tuple[TokenTable, Counts]:
    """Tokenises a corpus into `directory`, or opens what is there already.

    Args:
        directory: of the files.
        documents: the corpus; the same in the same order whenever this is called.
        tokenizer: the model's.
        context: positions that a passage may have at most.
        made_from: JSON values that tell this corpus from others.
        quiet: shows no progress.

    Returns:
        The passages, read from disk as they are needed, and counts of documents.

    Raises:
        CorpusError: two passages have the same id, a text or an id is no Unicode, there is no text
            at all, or the directory was made from something else.
    """
    directory = pathlib.Path(directory)
    wanted = {"tokenizer": tokenizer.fingerprint(), "context": context} | made_from
    stamp, parts = directory / "corpus.json", directory / "parts"
    there = _read_json(stamp) or _read_json(parts / "made_from.json")
    if there is not None and there["made_from"] != json.loads(json.dumps(wanted)):
        differing = sorted(k for k in wanted if there["made_from"].get(k) != wanted[k])
        raise CorpusError(
            f"{directory} was made from another corpus; it differs in {', '.join(differing)}; "
            "remove it, or use another directory"
        )
    if not stamp.exists():
        parts.mkdir(parents=True, exist_ok=True)
        _write_json(parts / "made_from.json", {"made_from": wanted})
        counts = _fill(parts, documents, tokenizer, context, quiet)
        _join(directory, parts, len(counts))
        _write_json(stamp, {"made_from": wanted, "counts": dataclasses.asdict(_sum(counts))})
    shutil.rmtree(parts, ignore_errors=True)
    arrays = {k: np.load(directory / f"{k}.npy", mmap_mode="r") for k in _ARRAYS}
    return _table(arrays), Counts(**_read_json(stamp)["counts"])


def fingerprint(table: TokenTable) -> str:
    """A hash of the passages: ids and tokens."""
    found = hashlib.sha256()
    for start in range(0, len(table.tokens), 1 << 22):
        found.update(np.ascontiguousarray(table.tokens[start : start + (1 << 22)]).tobytes())
    for name in table.ids:
        found.update(name.encode() + b"\0")
    return found.hexdigest()[:16]


# What a part and the whole hold: tokens of all passages, where each ends, its document's number
# and characters (−1 for a whole document), and the documents' names.
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
    """Parts of the corpus behind the first so many."""
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
        some = batch[start : start + _BATCH]
        for document in some:
            _check_characters(document)
        for document, (ids, places) in zip(
            some, tokenizer.encode_spans([d.text for d in some]), strict=True
        ):
            if not document.text.strip():
                blank += 1
                continue
            whole = [*ids, *tokenizer.end]
            pieces = cut(whole, tokenizer, context)
            split += len(pieces) > 1
            for first, stop in pieces:
                tokens += [*tokenizer.begin, *whole[first:stop]]
                total += len(tokenizer.begin) + stop - first
                ends.append(total)
                owners.append(len(names))
                spans.append(_characters(places, first, stop) if len(pieces) > 1 else (-1, -1))
            names.append(document.id.encode())
        bar.update(len(some))
    found = {
        "tokens": tokens,
        "ends": ends,
        "owners": owners,
        "spans": np.reshape(spans, (-1, 2)),
        "names": np.frombuffer(b"".join(names), np.uint8),
        "name_ends": np.cumsum([len(n) for n in names]),
    }
    arrays = {k: np.asarray(found[k], dtype) for k, dtype in _ARRAYS.items()}
    return arrays, Counts(len(batch), blank, split)


def _check_characters(document: Document) -> None:
    """What a tokenizer would refuse without the document's name."""
    if not isinstance(document.text, str):
        kind = type(document.text).__name__
        raise CorpusError(f"document {document.id!r}: the text is {kind}, not a string")
    for what, value in (("id", document.id), ("text", document.text)):
        if half := half_character(value):
            raise CorpusError(f"document {document.id!r}: the {what} has {half}")


def _characters(places, first: int, stop: int) -> tuple[int, int]:
    """Characters that tokens [first, stop) are of; what stands behind a text is of none."""
    own = places[first : min(stop, len(places))]
    return min(a for a, _ in own), max(b for _, b in own)


def _fill(parts: pathlib.Path, documents, tokenizer, context, quiet) -> list[Counts]:
    """Writes the parts that are missing; each appears whole or not at all."""
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
    """The arrays of all parts, in memory."""
    out, shift = {k: [] for k in _ARRAYS}, collections.Counter()
    for part in parts:
        for k, x in part.items():
            out[k].append(x + shift[k] if k in _SHIFTED else x)
        shift.update({k: len(part[of]) for k, of in _SHIFTED.items()})
    return {k: np.concatenate(x) if x else _none()[k] for k, x in out.items()}


def _join(directory: pathlib.Path, parts: pathlib.Path, count: int) -> None:
    """One file for each array, of all parts, one part in memory at a time."""
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
            found = {k: part[k] for k in _ARRAYS}
        for k, x in found.items():
            out[k][at[k] : at[k] + len(x)] = x + shift[k] if k in _SHIFTED else x
        at.update({k: len(x) for k, x in found.items()})
        shift.update({k: len(found[of]) for k, of in _SHIFTED.items()})
    for x in out.values():
        x.flush()


# Numbers that count on behind the parts before, and what of these they count.
_SHIFTED = {"ends": "tokens", "owners": "name_ends", "name_ends": "names"}


class _Owners(Sequence):
    """The document's name of every passage."""

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
        raise CorpusError("the corpus has no text: no document, or blank ones alone")
    names = Strings(arrays["names"], arrays["name_ends"])
    ids = _Ids(names, arrays["owners"], arrays["spans"])
    _check_unique(names)
    starts = np.concatenate([[0], arrays["ends"]]).astype(np.int64)
    scored = np.ones(len(arrays["tokens"]), bool)
    scored[starts[:-1]] = False  # nothing predicts the first token
    return TokenTable(ids, _Owners(names, arrays["owners"]), arrays["tokens"], starts, scored)


def _check_unique(names: Strings) -> None:
    """No two documents have the same name. Hashes are compared first, they take less memory."""
    hashes = np.fromiter(
        (
            int.from_bytes(hashlib.blake2b(n.encode(), digest_size=8).digest(), "little")
            for n in names
        ),
        np.uint64,
        len(names),
    )
    order = np.argsort(hashes, kind="stable")
    same = np.flatnonzero(hashes[order][1:] == hashes[order][:-1])
    for i in same:
        a, b = names[int(order[i])], names[int(order[i + 1])]
        if a == b:
            raise CorpusError(f"two documents have the id {a!r}; give them other ids")


def _sum(counts: list[Counts]) -> Counts:
    return Counts(*(sum(getattr(c, f.name) for c in counts) for f in dataclasses.fields(Counts)))


def _read_json(path: pathlib.Path):
    return json.loads(path.read_text(encoding="utf-8")) if path.exists() else None


def _write_json(path: pathlib.Path, value) -> None:
    with atomic_file.open_atomic(path) as out:
        out.write(json.dumps(value, ensure_ascii=False, indent=1) + "\n")
