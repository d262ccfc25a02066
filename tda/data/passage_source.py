"""Passages from Python as a corpus in pieces: a Grain source, a `datasets.Dataset`, and the like.

No file tells whether they are those of an earlier call, so every call reads them once and keeps a
hash of each block. When they are read again to be tokenised, each block is compared with its hash
before it goes into a part.
"""

import dataclasses
import functools
import hashlib
import itertools
import json
from collections.abc import Iterable, Iterator, Mapping, Sized
from typing import Any

from tda.data.documents import Document
from tda.data.folders import CorpusError
from tda.data.pieces import BATCH, Piece
from tda.data.rows import parse_passages
from tda.data.tokens import by_characters
from tda.runtime import progress
from tda.runtime.fingerprint import fingerprint_parts


def can_be_read_again(passages: Any) -> bool:
    """Returns whether passages are a source with a length, not a list in memory or an iterator."""
    return isinstance(passages, Sized) and not isinstance(passages, list | tuple)


class PassageSource:
    """Passages that can be read again, as a corpus of one piece (`tda.data.pieces.Source`).

    Args:
        passages, text_field, id_field: as for `tda.data.rows.parse_passages`; with a length, which
            is only shown.
    """

    unit, skipped = "document", 0
    files: Mapping[str, str] = {}

    def __init__(self, passages: Any, text_field: str | None, id_field: str | None):
        self._arguments = passages, text_field, id_field
        self.pieces = [Piece((), len(passages))]

    @functools.cached_property
    def _hashes(self) -> list[bytes]:
        hashes = []
        with progress.bar(self.pieces[0].size, "read", "document") as bar:
            for block in self._blocks():
                hashes.append(_hash(block))
                bar.update(len(block))
        return hashes

    def describe(self) -> dict:
        """Returns a hash of all passages."""
        return {"passages": fingerprint_parts(self._hashes)}

    def read(self, piece: int) -> Iterator[Document]:
        """Yields the documents.

        Raises:
            CorpusError: they differ from those of the first reading.
        """
        for block, expected in itertools.zip_longest(self._blocks(), self._hashes):
            if block is None or expected is None or _hash(block) != expected:
                raise CorpusError(
                    f"passages is a {type(self._arguments[0]).__name__} that gave other passages "
                    "when it was read again; give one that always yields the same, or a list"
                )
            yield from block

    def _blocks(self) -> Iterator[list[Document]]:
        return by_characters(parse_passages(*self._arguments), _length, BATCH)


def _length(document: Document) -> int:
    return len(document.text or "")


def _hash(block: Iterable[Document]) -> bytes:
    digest = hashlib.blake2b(digest_size=16)
    for document in block:
        fields = [getattr(document, field.name) for field in dataclasses.fields(document)]
        digest.update(json.dumps(fields, default=lambda array: array.tolist()).encode())
    return digest.digest()
