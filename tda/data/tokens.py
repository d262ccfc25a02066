"""Tokenised sequences in two flat arrays, and the splitting of long documents into passages."""

import collections
import dataclasses
from collections.abc import Iterable, Sequence

import numpy as np

from tda.data.jsonl import half_character
from tda.data.tokenizer import Tokenizer


@dataclasses.dataclass(frozen=True)
class TokenTable:
    """N sequences of token ids, one after the other.

    Attributes:
        ids: of the sequences, length N.
        documents: id of the document each sequence is (a part of), length N.
        tokens: int32, all sequences' tokens in order.
        starts: int64 [N + 1]; sequence i is `tokens[starts[i]:starts[i + 1]]`.
        scored: bool like `tokens`: whether the loss counts the prediction *of* this token.
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


def _table(ids, documents, sequences, scored) -> TokenTable:
    starts = np.concatenate([[0], np.cumsum([len(s) for s in sequences], dtype=np.int64)])
    flat = np.concatenate(sequences) if sequences else np.zeros(0)
    flags = np.concatenate(scored) if scored else np.zeros(0)
    return TokenTable(
        ids, documents, flat.astype(np.int32), starts.astype(np.int64), flags.astype(bool)
    )


def cut(tokens: Sequence[int], tokenizer, context: int) -> list[tuple[int, int]]:
    """Where a document's tokens [first, stop) become passages of at most `context` positions.

    Args:
        tokens: of the document, what stands after it included and what stands before it not.
        tokenizer: says what stands before and after.
        context: positions a passage may have at most.
    """
    # A sequence of n tokens has n − 1 positions, as the last token is only ever predicted.
    begin, end = len(tokenizer.begin), list(tokenizer.end)
    if begin:
        step = long = context + 1 - begin
    else:
        # The token before a passage predicts its first one.
        step, long = context, context + 1
    if step < 1:
        raise ValueError(f"context={context} holds no more than what stands before every text")
    last = max(1, len(tokens) - (0 if begin else 1))
    parts = [(i, min(i + long, len(tokens))) for i in range(0, last, step)]
    if len(parts) > 1 and end and list(tokens[parts[-1][0] :]) == end:
        parts.pop()  # the text just fills its passages: no passage of <eos> alone
    return parts


def tokenise_passages(
    texts: Iterable[tuple[str, str]], tokenizer: Tokenizer, context: int
) -> tuple[TokenTable, dict[str, int]]:
    """Tokenises documents into passages of at most `context` positions each.

    A passage is `<bos> … <eos>`; a document that is longer is cut into consecutive passages, each
    starting with `<bos>` and only the last ending with `<eos>`. Their ids are the document's id, or
    `ID#0`, `ID#1`, … where there are several. Nothing is dropped. Where the tokenizer puts nothing
    before a text, a passage begins with the last token of the one before it, which is not scored.

    Args:
        texts: (document id, text) pairs.
        tokenizer: the model's tokenizer.
        context: positions a passage may have at most.

    Returns:
        The table, and counts {"documents", "passages", "split"}.

    Raises:
        ValueError: a text is empty or no Unicode, or two passages get the same id; the message
            names it.
    """
    ids, documents, sequences = [], [], []
    split = 0
    texts = list(texts)
    for document, text in texts:
        if half := half_character(text):
            raise ValueError(f"document {document!r}: the text has {half}")
    for (document, text), tokens in zip(
        texts, tokenizer.encode([t for _, t in texts]), strict=True
    ):
        if not text.strip():
            raise ValueError(f"document {document!r} has an empty text; remove it from the corpus")
        tokens = [*tokens, *tokenizer.end]
        parts = cut(tokens, tokenizer, context)
        split += len(parts) > 1
        for i, (first, stop) in enumerate(parts):
            ids.append(document if len(parts) == 1 else f"{document}#{i}")
            documents.append(document)
            sequences.append(np.asarray([*tokenizer.begin, *tokens[first:stop]], np.int32))
    if len(set(ids)) < len(ids):
        twice = next(i for i, n in collections.Counter(ids).items() if n > 1)
        raise ValueError(f"two passages have the id {twice!r}; give documents other ids")
    scored = [np.arange(len(s)) > 0 for s in sequences]
    counts = {"documents": len(texts), "passages": len(ids), "split": split}
    return _table(ids, documents, sequences, scored), counts


def tokenise_queries(
    prompts: Iterable[tuple[str, str, str]], tokenizer: Tokenizer, context: int
) -> TokenTable:
    """Tokenises queries; only their target tokens carry a loss.

    Args:
        prompts: (query id, prompt, target) triples.
        tokenizer: the model's tokenizer.
        context: positions the model has.

    Raises:
        ValueError: a target has no token, a text is no Unicode, or prompt and target do not fit the
            context; the message names the query.
    """
    ids, sequences, scored = [], [], []
    for name, prompt, target in prompts:
        for what, text in (("prompt", prompt), ("target", target)):
            if half := half_character(text):
                raise ValueError(f"query {name!r}: the {what} has {half}")
        try:
            tokens, is_target = tokenizer.encode_query(prompt, target)
        except ValueError as error:
            raise ValueError(f"query {name!r}: {error}") from error
        if len(tokens) - 1 > context:
            raise ValueError(
                f"query {name!r} needs {len(tokens) - 1} positions, the context has {context}; "
                "shorten the prompt or raise the context"
            )
        ids.append(name)
        sequences.append(tokens)
        scored.append(is_target)
    return _table(ids, ids, sequences, scored)
