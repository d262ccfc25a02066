"""Greedy continuation of a text."""

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from tda.data.rows import Query
from tda.model import functional

# The most tokens of a continuation, and the characters that end it earlier.
_TOKENS = 8
_ENDS = "\n.,;:!?()"


def greedy(model: nnx.Module, ids, count: int, stop: int | None = None) -> list[int]:
    """Returns the `count` likeliest tokens after `ids`, one by one; fewer if `stop` comes first.

    Every token takes a pass over all positions, which works with any causal model, from tokens
    [1, T] to logits [1, T, V], and is fast enough for a few tokens.

    Raises:
        ValueError: `ids` is empty.
    """
    ids = list(map(int, ids))
    if not ids:
        raise ValueError("there is no token to continue: give a prompt")
    model_fn, params = functional.split(model)
    run = jax.jit(lambda params, tokens, at: jnp.argmax(model_fn.apply(params, tokens)[0, at]))
    # One length for all steps, and so one compiled program; later positions have no effect.
    tokens_1xT = np.zeros((1, len(ids) + count), np.int32)
    tokens_1xT[0, : len(ids)] = ids
    for at in range(len(ids), len(ids) + count):
        token = int(run(params, tokens_1xT, at - 1))
        if token == stop:
            return tokens_1xT[0, len(ids) : at].tolist()
        tokens_1xT[0, at] = token
    return tokens_1xT[0, len(ids) :].tolist()


def continuation(model, tokenizer, prompt: str) -> Query:
    """Returns the model's continuation of a prompt, up to the end of the phrase, as a query.

    The query holds the token ids that the model produced, since encoding their text might give
    other ids. White space at the beginning belongs to the prompt.

    Raises:
        ValueError: the continuation is only white space.
    """
    ids = [*tokenizer.begin, *tokenizer.encode([prompt])[0]]
    said = greedy(model, ids, _TOKENS, tokenizer.eos)
    before = len(tokenizer.decode(ids[len(tokenizer.begin) :]))
    # The text after each token, decoded together with the prompt, since a tokenizer may drop white
    # space at the beginning of a text.
    texts = [
        tokenizer.decode(ids[len(tokenizer.begin) :] + said[:n])[before:]
        for n in range(len(said) + 1)
    ]
    text = texts[-1]
    if not text.strip():
        raise ValueError(f"the model says {text!r} to {prompt!r}; give a --target")
    first = len(text) - len(text.lstrip())
    end = next((i for i in range(first + 1, len(text)) if text[i] in _ENDS), len(text))
    start = next(n for n, t in enumerate(texts) if t.strip()) - 1
    # The token with the end is left out, unless it is also the first.
    stop = max(n for n, t in enumerate(texts) if len(t) <= end or n == start + 1)
    stop = next(n for n, t in enumerate(texts) if t.rstrip() == texts[stop].rstrip())
    target = tuple(said[start:stop])
    return Query("0", prompt, texts[stop].strip(), ((*ids, *said[:start]), target))
