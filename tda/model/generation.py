"""What a model says next: greedy continuation."""

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from tda.model import functional


def greedy(model: nnx.Module, ids, count: int, stop: int | None = None) -> list[int]:
    """The tokens that a model finds most likely after `ids`, one after the other.

    Every token takes a pass over all positions: for a few tokens, on any model.

    Args:
        model: maps tokens [1, T] to logits [1, T, V], causally.
        ids: the tokens before.
        count: how many tokens to add at most.
        stop: a token that ends it, and is not returned.

    Raises:
        ValueError: there is no token to go on from.
    """
    ids = list(map(int, ids))
    if not ids:
        raise ValueError("there is no token to go on from: give a prompt")
    model_fn, params = functional.split(model)
    run = jax.jit(lambda params, tokens, at: jnp.argmax(model_fn.apply(params, tokens)[0, at]))
    tokens_1xT = np.zeros((1, len(ids) + count), np.int32)
    tokens_1xT[0, : len(ids)] = ids
    for at in range(len(ids), len(ids) + count):
        found = int(run(params, tokens_1xT, at - 1))
        if found == stop:
            return tokens_1xT[0, len(ids) : at].tolist()
        tokens_1xT[0, at] = found
    return tokens_1xT[0, len(ids) :].tolist()
