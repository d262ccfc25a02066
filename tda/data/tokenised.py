"""A corpus of any size as a token table: streamed from its documents into files, read in place.

    DIR/corpus.json        what the table was made from, and counts; written last
    DIR/tokens.npy, …      the arrays of a `TokenTable`, opened as memory maps
    DIR/parts/             the finished parts, while the table is being made

A passage's id leads back to its place: it is the document's id if the passage is the whole
document, else `ID#START-END` for its characters START to END. A tokenisation that is killed resumes
after the last finished part and ends in the same bytes.
"""

import array
import collections
import dataclasses
import itertools
import json
import pathlib
import re
import shutil
import types
from collections.abc import Iterable, Iterator, Sequence

import numpy as np

from tda.data.documents import Document
from tda.data.folders import CorpusError
from tda.data.joining import join
from tda.data.jsonl import half_character
from tda.data.tokens import TokenTable, by_characters, cut
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
    arrays = {k: np.load(directory / f"{k}.npy", mmap_mode="r") for k in _ARRAYS}
    return _table(arrays), Counts(**_read_json(stamp)["counts"])


# The arrays of a part and of the joined table: the tokens of all passages, which of them the loss
# counts, where each passage ends,
# its document's number and characters (−1 for a whole document), and the documents' names.
_ARRAYS = {
    "tokens": np.int32,
    "scored": np.bool_,
    "ends": np.int64,
    "owners": np.int64,
    "spans": np.int64,
    "names": np.uint8,
    "name_ends": np.int64,
}
# The same as codes of Python's arrays, for those of numbers.
_CODE_OF = {np.int32: "i", np.int64: "q", np.bool_: "B"}
_CODES = {k: _CODE_OF[d] for k, d in _ARRAYS.items() if d in _CODE_OF}


def _none() -> dict[str, np.ndarray]:
    return {k: np.zeros((0, 2) if k == "spans" else 0, d) for k, d in _ARRAYS.items()}


def _parts(documents, tokenizer, context, quiet, first: int = 0) -> Iterator[tuple[dict, Counts]]:
    """Yields the parts of the corpus from document number `first` on."""
    documents = iter(documents)
    with progress.bar(None, "tokenise", "document", quiet=quiet) as bar:
        bar.update(sum(1 for _ in itertools.islice(documents, first)))
        part = _Part(tokenizer, context)
        for batch in by_characters(documents, _count_characters, _BATCH):
            part.add(batch)
            bar.update(len(batch))
            if part.batches == _BATCHES_A_PART or part.characters >= _PART_CHARACTERS:
                yield part.arrays(), part.counts()
                part = _Part(tokenizer, context)
        if part.batches:
            yield part.arrays(), part.counts()


def _count_characters(document: Document) -> int:
    chat = sum(len(message["content"]) for message in document.messages)
    return len(document.text or "") + len(document.prompt) + chat


# A tokenizer that puts nothing before and after a text, for token ids.
_AS_IT_IS = types.SimpleNamespace(begin=(), end=())


class _Part:
    """The passages of some documents, in flat arrays that grow: Python's lists of numbers and of
    pairs take 70 to 660 bytes a token, these take 5 to 10.
    """

    def __init__(self, tokenizer, context: int):
        self._tokenizer, self._context = tokenizer, context
        self.batches = self.characters = self._documents = self._blank = self._split = 0
        self._numbers = {k: array.array(code) for k, code in _CODES.items()}
        self._names = bytearray()

    def add(self, documents: list[Document]) -> None:
        """Cuts documents into passages and appends these."""
        for document in documents:
            _check_characters(document)
        texts = [join(d.prompt, d.text) for d in documents]
        encoded = self._tokenizer.encode_spans(texts)
        for document, text, (ids, places) in zip(documents, texts, encoded, strict=True):
            self._documents += 1
            self.characters += _count_characters(document) + 4 * len(document.tokens or ())
            if document.tokens:
                # Ids that come from elsewhere have what stands before and after them already; the
                # place of a passage is that of its tokens.
                numbers = np.arange(len(document.tokens))
                places = np.stack([numbers, numbers + 1], axis=1)
                scored = np.ones(len(numbers), bool)
                if document.scored is not None:
                    scored = np.asarray(document.scored, bool)
                self._add(document, document.tokens, places, scored, _AS_IT_IS)
            elif document.messages:
                try:
                    ids, places, scored = self._tokenizer.encode_chat(document.messages)
                except ValueError as error:
                    raise CorpusError(f"document {document.id!r}: {error}") from error
                self._add(document, ids, places, scored, _AS_IT_IS)
            elif document.text.strip():
                places = np.asarray(places, np.int64).reshape(-1, 2)
                # A token across the border is the text's, as in queries.
                scored = places[:, 1] > (len(text) - len(document.text) if document.prompt else -1)
                scored = np.concatenate([scored, np.ones(len(self._tokenizer.end), bool)])
                self._add(document, [*ids, *self._tokenizer.end], places, scored, self._tokenizer)
            else:
                self._blank += 1
        self.batches += 1

    def _add(self, document: Document, ids, places_Tx2, scored_T, tokenizer) -> None:
        sequence = np.asarray(ids, np.int32)
        ranges = cut(sequence, tokenizer, self._context)
        self._split += len(ranges) > 1
        out = self._numbers
        for first, stop in ranges:
            if not scored_T[first:stop].any():
                continue  # nothing but prompts, whose gradient is zero
            out["tokens"].extend(tokenizer.begin)
            out["tokens"].frombytes(sequence[first:stop].tobytes())
            out["scored"].frombytes(bytes(len(tokenizer.begin)) + scored_T[first:stop].tobytes())
            out["ends"].append(len(out["tokens"]))
            out["owners"].append(len(out["name_ends"]))
            out["spans"].extend(
                _characters(places_Tx2, first, stop) if len(ranges) > 1 else (-1, -1)
            )
        self._names += document.id.encode()
        out["name_ends"].append(len(self._names))

    def arrays(self) -> dict[str, np.ndarray]:
        """Returns the arrays of the part, by the names of `_ARRAYS`."""
        flat = {k: np.frombuffer(x, _ARRAYS[k]) for k, x in self._numbers.items()}
        names = np.frombuffer(self._names, np.uint8)
        return flat | {"spans": flat["spans"].reshape(-1, 2), "names": names}

    def counts(self) -> Counts:
        """Returns the numbers of the part's documents."""
        return Counts(self._documents, self._blank, self._split)


def _check_characters(document: Document) -> None:
    """Checks what a tokenizer would refuse without naming the document."""
    if not isinstance(document.text, str):
        kind = type(document.text).__name__
        raise CorpusError(f"document {document.id!r}: the text is {kind}, not a string")
    for field, value in (("id", document.id), ("text", document.text)):
        if half := half_character(value):
            raise CorpusError(f"document {document.id!r}: the {field} has {half}")


def _characters(places_Tx2: np.ndarray, first: int, stop: int) -> tuple[int, int]:
    """Returns the characters of tokens [first, stop); the tokens after a text have none."""
    spans = places_Tx2[first:stop]
    return int(spans[:, 0].min()), int(spans[:, 1].max())


def _fill(parts: pathlib.Path, documents, tokenizer, context, quiet) -> list[Counts]:
    """Writes the parts that are missing, each atomically; returns the counts of all parts."""
    counts: list[Counts] = []
    while (path := parts / f"{len(counts)}.npz").exists():
        with np.load(path) as part:
            counts.append(Counts(*map(int, part["counts"])))
    finished = sum(c.documents for c in counts)
    for part, count in _parts(documents, tokenizer, context, quiet, first=finished):
        with atomic_file.open_atomic(parts / f"{len(counts)}.npz", "wb") as out:
            np.savez(out, **part, counts=np.asarray(dataclasses.astuple(count)))
        counts.append(count)
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
