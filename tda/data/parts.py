"""A part of a corpus: the passages of some documents, in flat arrays."""

import array
import dataclasses
import types
from collections.abc import Iterable, Iterator
from typing import Any, NamedTuple

import numpy as np

from tda.data import long_texts
from tda.data.documents import Document
from tda.data.folders import CorpusError
from tda.data.joining import join
from tda.data.jsonl import half_character
from tda.data.tokens import cut, window
from tda.runtime.fingerprint import hash_64_bits

# The arrays of a part and of the joined table: the tokens of all passages, which of them the loss
# counts, where each passage ends, its document's number and characters (−1 for a whole document),
# and the documents' names, with hashes of the passages' ids and of the names.
ARRAYS = {
    "tokens": np.int32,
    "scored": np.bool_,
    "ends": np.int64,
    "owners": np.int64,
    "spans": np.int64,
    "id_hashes": np.uint64,
    "names": np.uint8,
    "name_ends": np.int64,
    "name_hashes": np.uint64,
}
# The same as codes of Python's arrays, for those of numbers.
_CODE_OF = {np.int32: "i", np.int64: "q", np.uint64: "Q", np.bool_: "B"}
_CODES = {k: _CODE_OF[d] for k, d in ARRAYS.items() if d in _CODE_OF}

# Tokens after which a part ends even within a document: they take 42 MB.
PART_TOKENS = 1 << 23

# Stands for a tokenizer that puts nothing before and after a text, for token ids.
_AS_IT_IS = types.SimpleNamespace(begin=(), end=())


@dataclasses.dataclass(frozen=True)
class Counts:
    """Numbers of documents.

    Attributes:
        documents: all documents.
        blank: those without a token to predict, which became no passage.
        split: those that became several passages.
    """

    documents: int
    blank: int
    split: int


class _Sequence(NamedTuple):
    """Consecutive tokens of a document."""

    ids: np.ndarray
    """Token ids, int32 [T]."""
    places: np.ndarray
    """The characters [start, stop) of each token, int64 [T, 2]; those after a text have none."""
    scored: np.ndarray
    """Whether the loss counts a token, bool [T]."""


class Part:
    """The passages of some documents, in flat arrays that grow: Python's lists of numbers and of
    pairs take 70 to 660 bytes a token, these take 5 to 10.

    Attributes:
        is_open: whether the last document continues in the next part, which has its name again.
    """

    def __init__(self, tokenizer, context: int):
        self._tokenizer, self._context = tokenizer, context
        self.clear()

    def clear(self) -> None:
        """Removes everything, also in the middle of a document."""
        self._documents = self._blank = self._split = 0
        self.is_open = False
        self._numbers = {k: array.array(code) for k, code in _CODES.items()}
        self._names = bytearray()

    def add(self, documents: list[Document]) -> Iterator[None]:
        """Cuts documents into passages and appends these.

        Yields when the part is full; the caller then stores and clears it.
        """
        for document in documents:
            _check_characters(document)
        texts = [join(d.prompt, d.text) for d in documents]
        encoded = self._encode(texts)
        for document, text, pieces in zip(documents, texts, encoded, strict=True):
            if document.tokens:
                yield from self._add(document, [_given_tokens(document)], _AS_IT_IS)
            elif document.messages:
                yield from self._add(document, [self._chat_tokens(document)], _AS_IT_IS)
            elif document.text.strip():
                # A token across the border belongs to the text, as in queries.
                border = len(text) - len(document.text) if document.prompt else -1
                sequences = (_Sequence(p.ids, p.places, p.places[:, 1] > border) for p in pieces)
                yield from self._add(document, sequences, self._tokenizer)
            else:
                self._blank += 1
            self._documents += 1

    def _encode(self, texts: list[str]) -> Iterator[Iterable[long_texts.Tokens]]:
        """Yields the tokens of each text; a long one, which is the only one, in pieces."""
        if len(texts) == 1 and len(texts[0]) > long_texts.PIECE:
            yield long_texts.encode_pieces(self._tokenizer, texts[0])
            return
        for ids, places in self._tokenizer.encode_spans(texts):
            yield [long_texts.as_tokens(ids, places)]

    def _chat_tokens(self, document: Document) -> _Sequence:
        try:
            ids, places, scored = self._tokenizer.encode_chat(document.messages)
        except ValueError as error:
            raise CorpusError(f"document {document.id!r}: {error}") from error
        return _Sequence(np.asarray(ids, np.int32), places, scored)

    def _add(
        self, document: Document, pieces: Iterable[_Sequence], tokenizer: Any
    ) -> Iterator[None]:
        has_several, is_empty = False, True
        name_hash = hash_64_bits(document.id)
        for passage, has_several in _passages(pieces, tokenizer, self._context):
            # Nothing predicts the first token of a sequence.
            if not passage.scored[0 if tokenizer.begin else 1 :].any():
                continue  # nothing but prompts, or a single token: its gradient is zero
            is_empty = False
            if len(self._numbers["tokens"]) >= PART_TOKENS:
                self._append_name(document.id, name_hash)
                self.is_open = True
                yield
            out = self._numbers
            out["tokens"].extend(tokenizer.begin)
            out["tokens"].frombytes(passage.ids.tobytes())
            out["scored"].frombytes(bytes(len(tokenizer.begin)) + passage.scored.tobytes())
            out["ends"].append(len(out["tokens"]))
            out["owners"].append(len(out["name_ends"]))
            span = _characters(passage.places) if has_several else (-1, -1)
            out["spans"].extend(span)
            out["id_hashes"].append(
                hash_64_bits(name_passage(document.id, *span)) if has_several else name_hash
            )
        self._split += has_several
        self._blank += is_empty
        self._append_name(document.id, name_hash)

    def _append_name(self, name: str, name_hash: int) -> None:
        self._names += name.encode()
        self._numbers["name_ends"].append(len(self._names))
        self._numbers["name_hashes"].append(name_hash)

    def arrays(self) -> dict[str, np.ndarray]:
        """Returns the arrays of the part, by the names of `ARRAYS`."""
        flat = {k: _as_array(x, ARRAYS[k]) for k, x in self._numbers.items()}
        names = _as_array(self._names, np.uint8)
        return flat | {"spans": flat["spans"].reshape(-1, 2), "names": names}

    def counts(self) -> Counts:
        """Returns the numbers of the part's documents."""
        return Counts(self._documents, self._blank, self._split)


def _as_array(buffer: array.array | bytearray, dtype) -> np.ndarray:
    return np.frombuffer(buffer, dtype) if len(buffer) else np.zeros(0, dtype)


def name_passage(document: str, start: int, stop: int) -> str:
    """Returns the id of a passage: characters [start, stop) of a document; all of it if −1."""
    return document if start < 0 else f"{document}#{start}-{stop}"


def count_characters(document: Document) -> int:
    """Returns how many characters a document's texts have."""
    chat = sum(len(message["content"]) for message in document.messages)
    return len(document.text or "") + len(document.prompt) + chat


def _given_tokens(document: Document) -> _Sequence:
    # Given ids already have any tokens before and after the text; a passage's place is counted in
    # tokens.
    ids = np.asarray(document.tokens, np.int32)
    numbers = np.arange(len(ids))
    scored = np.ones(len(ids), bool) if document.scored is None else document.scored
    return _Sequence(ids, np.stack([numbers, numbers + 1], axis=1), np.asarray(scored, bool))


def _passages(
    pieces: Iterable[_Sequence], tokenizer: Any, context: int
) -> Iterator[tuple[_Sequence, bool]]:
    """Yields a document's passages, as `cut` makes them, and whether there are several.

    Args:
        pieces: the document's tokens in order, without the tokenizer's `begin` and `end`.
        tokenizer: the tokenizer; `begin` is left out of the passages.
        context: the most positions that a passage may have.
    """
    step, size = window(tokenizer, context)
    rest: _Sequence | None = None
    has_several = False
    for piece in pieces:
        rest = piece if rest is None else _concatenate(rest, piece)
        first = 0
        # Passages that lie completely in these tokens, with enough after them for another.
        while len(rest.ids) - first > size + step:
            yield _slice(rest, first, first + size), True
            first, has_several = first + step, True
        rest = _slice(rest, first, len(rest.ids))
    if rest is None:
        return
    end = np.asarray(tokenizer.end, np.int32)
    ids = np.concatenate([rest.ids, end])
    rest = _Sequence(ids, rest.places, np.concatenate([rest.scored, np.ones(len(end), bool)]))
    ranges = cut(ids, tokenizer, context)
    for first, stop in ranges:
        yield _slice(rest, first, stop), has_several or len(ranges) > 1


def _slice(tokens: _Sequence, first: int, stop: int) -> _Sequence:
    return _Sequence(*(x[first:stop] for x in tokens))


def _concatenate(a: _Sequence, b: _Sequence) -> _Sequence:
    return _Sequence(*(np.concatenate(pair) for pair in zip(a, b, strict=True)))


def _characters(places_Tx2: np.ndarray) -> tuple[int, int]:
    """Returns the characters of a passage's tokens."""
    return int(places_Tx2[:, 0].min()), int(places_Tx2[:, 1].max())


def _check_characters(document: Document) -> None:
    """Checks a document's texts, which a tokenizer would refuse without naming the document."""
    if not isinstance(document.text, str):
        kind = type(document.text).__name__
        raise CorpusError(f"document {document.id!r}: the text is {kind}, not a string")
    for field in ("id", "text", "prompt"):
        value = getattr(document, field)
        if half := half_character(value):
            raise CorpusError(f"document {document.id!r}: the {field} has {half}")
