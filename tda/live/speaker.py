"""Completes a prompt with the model, and scores a target by its likelihood."""

import math
from collections.abc import Sequence

import jax
import numpy as np
from flax import nnx

from tda.data import batches, tokens
from tda.data.joining import choose_joiner, is_unspaced, is_word, join
from tda.data.rows import Query
from tda.data.tokenizer import Tokenizer
from tda.evaluation.likelihood import target_statistics
from tda.runtime.progress import Progress, silent

# Of an answer's first token; less likely ones are not worth a run of the model.
_LEAST_PROBABILITY = 1e-3


class Speaker:
    """A model that completes prompts and scores targets, one at a time.

    Args:
        model: maps tokens [B, T] to logits [B, T, V].
        tokenizer: its tokenizer.
        context: the most positions of a sequence.
        joiner: the text between prompt and target; None: `tda.data.joining.choose_joiner`.
    """

    def __init__(
        self, model: nnx.Module, tokenizer: Tokenizer, context: int, joiner: str | None = None
    ):
        self.tokenizer, self.context, self.joiner = tokenizer, context, joiner
        graphdef, state = nnx.split(model)
        compiled = jax.jit(lambda state, tokens_BxT: nnx.merge(graphdef, state)(tokens_BxT))
        self._logits = lambda tokens_BxT: compiled(state, tokens_BxT)

    def complete(
        self, prompt: str, count: int, alternatives: int = 5, on_progress: Progress = silent
    ) -> list[dict]:
        """Returns the model's greedy completion of a prompt, token by token.

        Args:
            prompt: the text to complete.
            count: the most tokens; fewer if the model ends the passage.
            alternatives: how many of the next likeliest tokens to list for each step.
            on_progress: called with the number of tokens so far.

        Returns:
            For each step {"id", "token", "probability", "others"}: the token's id, the text that it
            adds, and the alternatives, each with its "token" and "probability". A character of
            several tokens stands at the last of them.

        Raises:
            ValueError: the prompt does not fit the context, or is empty and the tokenizer has no
                token that begins a text.
        """
        start = self.ids_of(prompt)
        ids, steps = list(start), []
        while len(steps) < count and len(ids) <= self.context:
            on_progress("completing", len(steps), count)
            p_V = _softmax(self._logits_of(ids)[-1])
            order = np.argsort(-p_V, kind="stable")[: alternatives + 1].tolist()
            candidates = [{"token": self.shown(i), "probability": float(p_V[i])} for i in order]
            steps.append(candidates[0] | {"id": order[0], "others": candidates[1:]})
            if order[0] == self.tokenizer.eos:
                break
            ids.append(order[0])
        said = [step["id"] for step in steps]
        for step, text in zip(steps, self._texts_of(start, said), strict=True):
            step["token"] = text
        return steps

    def _texts_of(self, before: list[int], said: list[int]) -> list[str]:
        """Returns the text that each token adds to those before it."""
        texts, shown, ids = [], self.tokenizer.decode(before), list(before)
        for token in said:
            ids.append(token)
            text = self.tokenizer.decode(ids)
            # U+FFFD: the first bytes of a character whose others are in the next token.
            is_part = text.endswith("\ufffd") and token not in self._special
            texts.append(self._special.get(token) or ("" if is_part else text[len(shown) :]))
            shown = shown if is_part else text
        return texts

    def answers(self, prompt: str, count: int = 4, longest: int = 12) -> list[dict]:
        """Returns whole words that the model may say next, likeliest first.

        Each begins with one of the likeliest tokens that begin a word and continues greedily to the
        end of the word, or of a name of several words.

        Args:
            prompt: the text to complete.
            count: the most answers; four times as many first tokens are tried.
            longest: the most tokens up to the end of a word.

        Returns:
            [{"target", "probability", "ids"}]: a target that, joined to the prompt, gives the text
            that the model produced, p(target | prompt), and its tokens.
        """
        start = self.ids_of(prompt)
        first_V = _softmax(self._logits_of(start)[-1])
        answers: dict[str, dict] = {}
        for token in np.argsort(-first_V, kind="stable")[: 4 * count].tolist():
            if len(answers) == count or (answers and first_V[token] < _LEAST_PROBABILITY):
                break
            word = self._say_word(prompt, start, token, longest)
            if word is not None:
                text, ids, rest = word
                target, probability = self._target(prompt, text), float(first_V[token]) * rest
                answer = {"target": target, "probability": probability, "ids": ids}
                answers.setdefault(target, answer)
        return sorted(answers.values(), key=lambda answer: -answer["probability"])

    def _say_word(
        self, prompt: str, start: list[int], token: int, longest: int
    ) -> tuple[str, list[int], float] | None:
        """Returns the word that begins with a token, its tokens, and p(the others | the first).

        None if the token begins no word, or the word has no end within `longest` tokens.
        """
        ids, probabilities = [token], [1.0]
        while True:
            # A special token is no text, and nothing goes on behind it.
            said = zip(ids, self._texts_of(start, ids), strict=True)
            pieces = ["\n" if i in self._special else piece for i, piece in said]
            text = "".join(pieces)
            if not may_begin_word(prompt, text):
                return None
            end = _end_of_word(text)
            if end is not None:
                break
            if ids[-1] in self._special:
                return None
            if len(ids) == longest or len(start) + len(ids) > self.context:
                # In a script without spaces any token may end a word.
                if not is_unspaced(text[-1:] or " "):
                    return None
                end = len(text)
                break
            p_V = _softmax(self._logits_of([*start, *ids])[-1])
            ids.append(int(p_V.argmax()))
            probabilities.append(float(p_V[ids[-1]]))
        stops = np.cumsum(list(map(len, pieces)))
        n = int(np.searchsorted(stops, end)) + 1
        return "".join(pieces[:n]), ids[:n], math.prod(probabilities[:n])

    def ids_of(self, prompt: str) -> list[int]:
        """Returns the tokens of a prompt that is to be completed.

        Raises:
            ValueError: as for `complete`.
        """
        (ids,) = self.tokenizer.encode([prompt.rstrip()]) if prompt.strip() else ([],)
        ids = [*self.tokenizer.begin, *ids]
        if not ids:
            raise ValueError("type a prompt: this model has no token that begins a text")
        if len(ids) > self.context:
            raise ValueError(f"the prompt has {len(ids)} tokens, the context {self.context}")
        return ids

    def _target(self, prompt: str, text: str) -> str:
        """Returns the target that, joined to a prompt, gives the prompt with its completion."""
        word = text.strip()
        if join(prompt, word, self.joiner) == prompt.rstrip() + text.rstrip():
            return word
        return text.rstrip() or text

    def shown(self, token: int) -> str:
        """Returns a token's text, for a special token its name in angle brackets."""
        return self._special.get(token) or self.tokenizer.decode([token])

    @property
    def _special(self) -> dict[int | None, str]:
        return {getattr(self.tokenizer, n, None): f"<{n}>" for n in ("pad", "bos", "eos")}

    def pieces(self, text: str) -> tuple[list[int], list[str]]:
        """Returns a text's token ids, without special tokens, and the piece of text of each."""
        ((ids, spans),) = self.tokenizer.encode_spans([text])
        parts, begun = [], 0
        # Spans may overlap (several tokens of one character): a character belongs to the first.
        for _, stop in spans:
            parts.append(text[begun:stop])
            begun = max(begun, stop)
        return list(ids), parts

    def _logits_of(self, ids: Sequence[int]) -> np.ndarray:
        """Returns the logits after each token, float32 [T, V]."""
        length = self.layout.padded_length(len(ids))
        padded = np.full((1, length), self.tokenizer.pad, np.int32)
        padded[0, : len(ids)] = ids
        return np.asarray(self._logits(padded), np.float32)[0, : len(ids)]

    @property
    def layout(self) -> batches.BatchLayout:
        """The layout of batches of one question."""
        return batches.BatchLayout(batches.buckets(self.context), 1, self.tokenizer.pad)

    def likelihood(self, query: Query) -> dict:
        """Returns {"nats", "rank"} of a target; see `tda.evaluation.likelihood`."""
        table = self.table(query)
        length = self.layout.padded_length(int(table.lengths[0]) - 1)
        batch = batches.materialise(table, np.arange(1), length, 1, self.tokenizer.pad)
        # The same program completes prompts, so it is usually compiled already.
        logits_1xTxV = self._logits(batch.tokens)
        (nats,), (rank,) = target_statistics(logits_1xTxV, batch.targets, batch.weights)
        return {"nats": float(nats), "rank": int(rank)}

    def table(self, query: Query) -> tokens.TokenTable:
        """Returns a question as a table of one sequence.

        Raises:
            ValueError: it does not fit the context, the target has no token, or the tokenizer has
                no such token id.
        """
        ids = [] if query.tokens is None else [i for part in query.tokens for i in part]
        size = self.tokenizer.vocab_size
        if unknown := [i for i in ids if not 0 <= i < size]:
            raise ValueError(f"{unknown[0]} is not a token id; this tokenizer's are below {size}")
        return tokens.tokenise_queries([query], self.tokenizer, self.context, self.joiner)


def may_begin_word(prompt: str, text: str) -> bool:
    """Returns whether a text after a prompt begins with a word of its own, or may yet do so."""
    word, last = text.lstrip(), prompt.rstrip()[-1:]
    if not word or not is_word(word[0]):
        # A mark alone does not tell: `-` may begin `-3`.
        return len(word) < 2 or choose_joiner("a", word) == " "
    goes_on = text[0] == word[0] and bool(last) and is_word(last)
    return not goes_on or is_unspaced(last) or is_unspaced(word[0])


def _end_of_word(text: str) -> int | None:
    """Returns where a text's first word ends, or the name that begins there; None if it may go on.

    Hyphens and apostrophes are inside of words (Guinea-Bissau, d'Ivoire), and points of numbers.
    """
    at = next((i for i, c in enumerate(text) if is_word(c)), len(text))
    is_name = text[at : at + 1].isupper()
    for i in range(at, len(text)):
        before, c, after = text[max(0, i - 1)], text[i], text[i + 1 : i + 2]
        if is_word(c):
            continue
        joins = c in "-'’" or (c in ".,:" and before.isdigit()) or (c == " " and is_name)
        if not joins or (after and not _goes_on(c, after)):
            return i
    return None


def _goes_on(mark: str, after: str) -> bool:
    """Returns whether a character after a mark in a word goes on with the word."""
    if mark == " ":
        return after.isupper()
    return after.isdigit() if mark in ".,:" else is_word(after)


def _softmax(x_V: np.ndarray) -> np.ndarray:
    shifted = np.exp(x_V.astype(np.float64) - x_V.max())
    return shifted / shifted.sum()
