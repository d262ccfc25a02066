"""Tokenises a long text in pieces, into the same ids as in one call.

A call of a tokenizer takes some 60 bytes a character, so one call for a long text would take
gigabytes. Pieces overlap. Two of them are joined where both have the same run of tokens, cut into
the same words (as the tokenizer's pre-tokenizer cuts them), at the beginning of a word: the tokens
from there on do not depend on the text before. With a tokenizer without words, such as Llama 2's,
pieces may be joined at any token of such a run: a sequence of tokens is BPE's encoding of its text
if each pair of neighbours is BPE's encoding of their text, and each pair here lies in one piece.
Where two pieces share no such run, as in a word of a million letters, the overlap grows, and then
the piece.
"""

from collections.abc import Iterator, Sequence
from typing import Any, NamedTuple

import numpy as np

# Characters of a piece, and of an overlap at first and at most.
PIECE = 1 << 20
_OVERLAP, _LONGEST_OVERLAP = 1 << 12, 1 << 18
# Tokens that both pieces must share in the inner half of an overlap. The outer quarters do not
# count, since a piece's ends may change the tokens there.
_SHARED_TOKENS = 16


class Tokens(NamedTuple):
    """Consecutive tokens of a text."""

    ids: np.ndarray
    """Token ids, int32 [T]."""
    places: np.ndarray
    """The characters [start, stop) of each token, int64 [T, 2]."""
    begins_word: np.ndarray
    """Whether a token is the first of a word of the pre-tokenizer, bool [T]."""

    def slice(self, first: int, stop: int | None = None) -> "Tokens":
        """Returns tokens [first, stop)."""
        return Tokens(*(x[first:stop] for x in self))


def encode_pieces(tokenizer: Any, text: str) -> Iterator[Tokens]:
    """Yields the tokens of a text in order, equal to `tokenizer.encode_spans`, in pieces.

    Args:
        tokenizer: the tokenizer; one without the method `encode_words` takes the text in one call.
        text: the text.

    Raises:
        ValueError: tokens at the beginning of a piece depend on the piece's end, so that the text
            cannot be cut.
    """
    if not hasattr(tokenizer, "encode_words"):
        ((ids, places),) = tokenizer.encode_spans([text])
        yield as_tokens(ids, places)
        return
    start, stop, first = 0, min(len(text), PIECE), 0
    tokens = _encode(tokenizer, text, start, stop)
    while stop < len(text):
        joint = _find_joint(tokenizer, text, tokens, stop)
        if joint is None:
            stop = min(len(text), 2 * stop - start)
            longer = _encode(tokenizer, text, start, stop)
            if not _are_equal(longer.slice(0, first), tokens.slice(0, first)):
                raise ValueError(
                    f"this tokenizer has no fixed tokens at character {start} of a text of "
                    f"{len(text):,} characters, which is too long for one call; cut the text"
                )
            tokens = longer
            continue
        last, start, following, next_first = joint
        yield tokens.slice(first, last)
        tokens, first, stop = following, next_first, min(len(text), start + PIECE)
    yield tokens.slice(first)


def as_tokens(ids: Sequence[int], places: Sequence[tuple[int, int]]) -> Tokens:
    """Returns the tokens of a text from lists, as if they were one word."""
    places_Tx2 = np.asarray(places, np.int64).reshape(-1, 2)
    return Tokens(np.asarray(ids, np.int32), places_Tx2, np.arange(len(ids)) == 0)


def _find_joint(
    tokenizer: Any, text: str, tokens: Tokens, stop: int
) -> tuple[int, int, Tokens, int] | None:
    """Finds where a piece that ends at character `stop` can be joined to a following one.

    Returns:
        The number of the piece's tokens before the joint; the following piece's first character,
        its tokens, and their number before the joint. None if no overlap has a joint.
    """
    overlap = min(_OVERLAP, PIECE // 4)
    while overlap <= min(_LONGEST_OVERLAP, PIECE // 2):
        begin = stop - overlap
        following = _encode(tokenizer, text, begin, min(len(text), begin + PIECE))
        low, high = begin + overlap // 4, stop - overlap // 4
        (first, shared), (next_first, same) = (_between(t, low, high) for t in (tokens, following))
        if len(shared.ids) >= _SHARED_TOKENS and _are_equal(shared, same):
            has_words = tokens.begins_word[1:].any() or following.begins_word[1:].any()
            joints = np.flatnonzero(shared.begins_word) if has_words else [len(shared.ids) // 2]
            if len(joints):
                joint = int(joints[len(joints) // 2])
                return first + joint, begin, following, next_first + joint
        overlap *= 4
    return None


def _between(tokens: Tokens, low: int, high: int) -> tuple[int, Tokens]:
    """Returns the tokens within characters [low, high), and the number of the first of them."""
    places_Tx2 = tokens.places
    within = np.flatnonzero((places_Tx2[:, 0] >= low) & (places_Tx2[:, 1] <= high))
    # None if their places have no order.
    if not len(within) or within[-1] - within[0] + 1 != len(within):
        return 0, tokens.slice(0, 0)
    return int(within[0]), tokens.slice(int(within[0]), int(within[-1]) + 1)


def _are_equal(a: Tokens, b: Tokens) -> bool:
    return all(np.array_equal(x, y) for x, y in zip(a, b, strict=True))


def _encode(tokenizer: Any, text: str, start: int, stop: int) -> Tokens:
    ids, places_Tx2, words_T = tokenizer.encode_words(text[start:stop])
    begins_word = np.diff(words_T, prepend=-2) != 0
    return Tokens(ids, places_Tx2 + start, begins_word)
