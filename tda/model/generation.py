"""Greedy continuation of a text."""

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from tda.model import functional

# Tokens that the model says where no target is given, and what ends them before.
_TOKENS = 8
_ENDS = "\n.,;:!?()"


def greedy(model: nnx.Module, ids, count: int, stop: int | None = None) -> list[int]:
    """Continues `ids` with the most likely token, again and again.

    Every token takes a pass over all positions. That works on any causal model, and is fast enough
    for a few tokens.

    Args:
        model: maps tokens [1, T] to logits [1, T, V], causally.
        ids: the tokens to continue.
        count: largest number of tokens to add.
        stop: a token that ends the continuation, and is not returned.

    Returns:
        The added tokens.

    Raises:
        ValueError: `ids` is empty.
    """
    ids = list(map(int, ids))
    if not ids:
        raise ValueError("there is no token to continue: give a prompt")
    model_fn, params = functional.split(model)
    run = jax.jit(lambda params, tokens, at: jnp.argmax(model_fn.apply(params, tokens)[0, at]))
    tokens_1xT = np.zeros((1, len(ids) + count), np.int32)
    tokens_1xT[0, : len(ids)] = ids
    for at in range(len(ids), len(ids) + count):
        token = int(run(params, tokens_1xT, at - 1))
        if token == stop:
            return tokens_1xT[0, len(ids) : at].tolist()
        tokens_1xT[0, at] = token
    return tokens_1xT[0, len(ids) :].tolist()


def continuation(model, tokenizer, prompt: str) -> str:
    """What the model says next, up to the end of the phrase.

    Raises:
        ValueError: it says nothing but white space.
    """
    ids = [*tokenizer.begin, *tokenizer.encode([prompt])[0]]
    said = greedy(model, ids, _TOKENS, tokenizer.eos)
    text = tokenizer.decode(ids[len(tokenizer.begin) :] + said)[len(prompt) :]
    phrase = text.lstrip()
    ends = [i for i, c in enumerate(phrase) if c in _ENDS and i]
    phrase = phrase[: ends[0]] if ends else phrase
    if not phrase.strip():
        raise ValueError(f"the model says {text!r} to {prompt!r}; give a --target")
    return phrase.strip()
