"""Tokenised sequences in flat arrays, and the splitting of long documents into passages."""

import dataclasses
import itertools
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import TypeVar

import numpy as np

from tda.data import long_texts
from tda.data.jsonl import half_character
from tda.data.rows import Query
from tda.data.tokenizer import Tokenizer
from tda.runtime.fingerprint import fingerprint_parts

T = TypeVar("T")


@dataclasses.dataclass(frozen=True)
class TokenTable:
    """N sequences of token ids, one after the other.

    Attributes:
        ids: the sequences' ids, length N.
        documents: the id of the document that each sequence is (a part of), length N.
        tokens: all sequences' tokens in order, int32.
        starts: int64 [N + 1]; sequence i is `tokens[starts[i]:starts[i + 1]]`.
        scored: whether the loss counts the prediction *of* a token, bool like `tokens`.
    """

    ids: Sequence[str]
    documents: Sequence[str]
    tokens: np.ndarray
    starts: np.ndarray
    scored: np.ndarray

    def __len__(self) -> int:
        return len(self.starts) - 1

    @property
    def lengths(self) -> np.ndarray:
        """Tokens of each sequence, int64 [N]."""
        return np.diff(self.starts)

    def lengths_of(self, rows: np.ndarray) -> np.ndarray:
        """Returns the number of tokens of some sequences, int64 [R]."""
        return self.starts[rows + 1] - self.starts[rows]

    def sequence(self, row: int) -> tuple[np.ndarray, np.ndarray]:
        """Returns a sequence's tokens, int32 [T], and which of them the loss counts, bool [T]."""
        begin, end = self.starts[row], self.starts[row + 1]
        return self.tokens[begin:end], self.scored[begin:end]

    @property
    def token_count(self) -> int:
        """The number of all tokens."""
        return len(self.tokens)

    @property
    def token_range(self) -> tuple[int, int]:
        """The smallest and the largest token id."""
        return int(self.tokens.min()), int(self.tokens.max())

    @property
    def longest(self) -> int:
        """The first of the longest sequences."""
        return int(self.lengths.argmax())

    @property
    def shortest(self) -> int:
        """The first of the shortest sequences."""
        return int(self.lengths.argmin())

    def count_scored(self, first: int = 0, stop: int | None = None) -> int:
        """Returns the number of tokens that the loss counts in sequences [first, stop)."""
        stop = len(self) if stop is None else stop
        return int(self.scored[self.starts[first] : self.starts[stop]].sum())

    @property
    def scored_lengths(self) -> np.ndarray:
        """Tokens that the loss counts of each sequence, int64 [N]."""
        before = np.concatenate([[0], np.cumsum(self.scored)])
        return np.diff(before[self.starts])

    def fingerprint(self) -> str:
        """Returns a hash of tokens, scored positions and ids.

        Nothing predicts the first token of a sequence, so it is never scored: the scored positions
        say where passages end, and the same text cut in other places has another hash.
        """
        ids = itertools.chain.from_iterable(
            ("\0", name) if i else (name,) for i, name in enumerate(self.ids)
        )
        return fingerprint_parts(itertools.chain((self.tokens, self.scored), ids))


class PassageTexts(Sequence):
    """The texts of a table's sequences, decoded on demand.

    Args:
        table: the sequences.
        tokenizer: the tokenizer that made them.
    """

    def __init__(self, table: TokenTable, tokenizer):
        self._table, self._tokenizer = table, tokenizer

    def __len__(self) -> int:
        return len(self._table)

    def __getitem__(self, row: int) -> str:
        tokens, _ = self._table.sequence(row)
        return self._tokenizer.decode(tokens).strip()


def _table(ids, documents, sequences, scored) -> TokenTable:
    starts = np.concatenate([[0], np.cumsum([len(s) for s in sequences], dtype=np.int64)])
    flat = np.concatenate(sequences) if sequences else np.zeros(0)
    flags = np.concatenate(scored) if scored else np.zeros(0)
    return TokenTable(
        ids, documents, flat.astype(np.int32), starts.astype(np.int64), flags.astype(bool)
    )


def cut(tokens: Sequence[int], tokenizer, context: int) -> list[tuple[int, int]]:
    """Returns the ranges [first, stop) of a document's tokens that become passages.

    Args:
        tokens: the document's tokens with the tokenizer's `end`, without its `begin`.
        tokenizer: the tokenizer; every passage starts with its `begin`.
        context: the most positions that a passage may have.

    Raises:
        ValueError: the context has no room for a text.
    """
    end = list(tokenizer.end)
    step, size = window(tokenizer, context)
    last = max(1, len(tokens) - (size - step))
    ranges = [(i, min(i + size, len(tokens))) for i in range(0, last, step)]
    if len(ranges) > 1 and len(tokens) - ranges[-1][0] <= len(end):
        ranges.pop()  # the text just fills its passages: no passage of <eos> alone
    return ranges


def window(tokenizer, context: int) -> tuple[int, int]:
    """Returns how many tokens of a document lie between passages' beginnings, and in a passage.

    Raises:
        ValueError: the context has no room for a text.
    """
    # A sequence of n tokens has n − 1 positions, as the last token is only ever predicted.
    begin = len(tokenizer.begin)
    if begin:
        step = size = context + 1 - begin
    else:
        # Passages overlap by a token: the last one of a passage predicts the first of the next.
        step, size = context, context + 1
    if step < 1:
        raise ValueError(
            f"context={context} holds only the tokens before every text; use a longer context"
        )
    return step, size


def by_characters(items: Iterable[T], length: Callable[[T], int], most: int) -> Iterator[list[T]]:
    """Yields lists of at most `most` items, and of few characters (but at least one item)."""
    batch: list[T] = []
    total = 0
    for item in items:
        if batch and (len(batch) == most or total + length(item) > long_texts.PIECE):
            yield batch
            batch, total = [], 0
        batch.append(item)
        total += length(item)
    if batch:
        yield batch


def tokenise_queries(
    queries: Iterable[Query | tuple[str, str, str]],
    tokenizer: Tokenizer,
    context: int,
    joiner: str | None = None,
) -> TokenTable:
    """Tokenises queries; only their target tokens carry a loss.

    Args:
        queries: queries, or (query id, prompt, target) triples.
        tokenizer: the model's tokenizer.
        context: the model's positions.
        joiner: the text between prompt and target; by default a space where one belongs
            (`tda.data.joining.choose_joiner`).

    Raises:
        ValueError: a target has no token, a text is not Unicode, or prompt and target do not fit
            the context; the message names the query.
    """
    ids, sequences, scored = [], [], []
    for query in queries:
        query = query if isinstance(query, Query) else Query(*query)
        name = query.id
        tokens, is_target = _encode_query(query, tokenizer, joiner)
        if len(tokens) - 1 > context:
            raise ValueError(
                f"query {name!r} needs {len(tokens) - 1} positions, the context has {context}; "
                "shorten the prompt or raise the context"
            )
        ids.append(name)
        sequences.append(tokens)
        scored.append(is_target)
    return _table(ids, ids, sequences, scored)


def _encode_query(query: Query, tokenizer, joiner: str | None) -> tuple[np.ndarray, np.ndarray]:
    if query.tokens is not None:
        prompt, target = query.tokens
        if not prompt or not target:
            raise ValueError(f"query {query.id!r}: tokens needs ids of both prompt and target")
        scored = np.arange(len(prompt) + len(target)) >= len(prompt)
        return np.asarray([*prompt, *target], np.int32), scored
    for field, text in (("prompt", query.prompt), ("target", query.target)):
        if half := half_character(text):
            raise ValueError(f"query {query.id!r}: the {field} has {half}")
    # A user's own tokenizer need not support joiners: it gets one only if one is given.
    options = {} if joiner is None else {"joiner": joiner}
    try:
        return tokenizer.encode_query(query.prompt, query.target, **options)
    except ValueError as error:
        raise ValueError(f"query {query.id!r}: {error}") from error
