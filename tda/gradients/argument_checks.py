"""Checks of a model, a projection and batches that a caller gives, before anything is computed."""

import os
from collections.abc import Iterable, Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from tda.gradients.projection import Projection
from tda.gradients.unseen import count_examples


def check_model(model: Any) -> None:
    """Checks that the model is an NNX module.

    Raises:
        ValueError: it is not; the message says how to get one, if that is possible.
    """
    if isinstance(model, nnx.Module):
        return
    if isinstance(model, type):
        raise ValueError(f"model is the class {model.__name__}; give an instance of it")
    modules = {c.__module__.partition(".")[0] for c in type(model).__mro__}
    if "flax" in modules:
        remedy = (
            "wrap a Linen module with its parameters: flax.nnx.bridge.ToNNX(module, rngs=nnx.Rngs(0"
            ")).lazy_init(x), and give untapped='reference'"
        )
    elif modules & {"torch", "transformers"}:
        remedy = "save its weights (save_pretrained) and load them with tda.load(directory)"
    else:
        remedy = "give a flax.nnx.Module, such as tda.load returns"
    raise ValueError(f"model is a {type(model).__name__}, not an NNX module; {remedy}")


def check_projection(projection: Any) -> None:
    """Checks that the projection is one.

    Raises:
        ValueError: it is not.
    """
    if not isinstance(projection, Projection):
        raise ValueError(
            f"projection={projection!r}; give tda.Projection(side=16, pooling='matrix')"
        )


def check_batches(label: str, batches: Any) -> None:
    """Checks that an argument may be an iterable of batches.

    Raises:
        ValueError: it is a path or a text, a single batch, or not iterable.
    """
    if isinstance(batches, str | os.PathLike):
        raise ValueError(f"{label} are a path; give the model's tokenizer too")
    if isinstance(batches, Mapping):
        raise ValueError(f"{label} is a single batch ({type(batches).__name__}); give [batch]")
    if not isinstance(batches, Iterable):
        raise ValueError(f"{label} is a {type(batches).__name__}; give an iterable of batches")


def check_batch(label: str, batch: Any, allow_keys: bool = False) -> None:
    """Checks that a batch is a tree of arrays of numbers with the examples first.

    Args:
        label: the batch's name in messages.
        batch: the batch.
        allow_keys: whether arrays of typed PRNG keys are allowed too.

    Raises:
        ValueError: it is not; the message names the array.
    """
    leaves = jax.tree_util.tree_leaves_with_path(batch)
    if not leaves:
        raise ValueError(f"{label} has no array: it is {type(batch).__name__}")
    for path, leaf in leaves:
        place = label + (f", at {jax.tree_util.keystr(path)}," if path else "")
        if isinstance(leaf, str):
            raise ValueError(
                f"{place} is the text {leaf[:40]!r}; give the model's tokenizer to trace texts, or "
                "leave texts out of the batches and give them as texts="
            )
        if not isinstance(leaf, np.ndarray | jax.Array):
            remedy = "x.numpy()" if type(leaf).__module__.startswith("torch") else "numpy.asarray"
            raise ValueError(
                f"{place} is a {type(leaf).__module__}.{type(leaf).__name__}, not an array; "
                f"convert it with {remedy}"
            )
        if allow_keys and jnp.issubdtype(leaf.dtype, jax.dtypes.prng_key):
            continue
        if not (jnp.issubdtype(leaf.dtype, jnp.number) or leaf.dtype == bool):
            raise ValueError(
                f"{place} is an array of {leaf.dtype}, not of numbers; leave it out, or convert it"
            )
    try:
        count_examples(batch)
    except ValueError as error:
        raise ValueError(f"{label}: {error}") from error
