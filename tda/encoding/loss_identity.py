"""A hash that identifies the loss whose gradients are stored, kept beside them.

The parameters alone do not identify it: a model's settings (the base of its rotations, an epsilon,
the dtype it computes in) and the body of a loss decide gradients as much.
"""

import hashlib
import json
import os
import pathlib
import re
from collections.abc import Callable, Iterator

import flax
import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jax.extend.core import ClosedJaxpr, Jaxpr
from jax.interpreters import partial_eval  # not public, but in jax 0.10.1 to 0.12

from tda.model import functional
from tda.runtime import atomic_file

# Positions of the batch that is traced: the shortest that texts are padded to.
_POSITIONS = 8
_FILE = "loss.json"
_VERSIONS = {"jax": jax.__version__, "flax": flax.__version__}


def identify_or_load(loss: Callable, model: nnx.Module, directory: str | os.PathLike) -> str:
    """Returns the hash of `identify`, or the one that other versions of jax or flax left.

    Other versions trace the same function to other steps, so their hash cannot be compared.

    Args:
        loss: as `identify` takes it.
        model: as `identify` takes it.
        directory: where `save` wrote, if it did.
    """
    record = _load(directory)
    if record is not None and record["versions"] != _VERSIONS:
        return record["loss"]
    return identify(loss, model)


def save(identity: str, directory: str | os.PathLike) -> None:
    """Writes the hash that `identify_or_load` returned, once gradients of that loss are stored."""
    record = _load(directory)
    if record is None or record["versions"] == _VERSIONS:
        with atomic_file.open_atomic(pathlib.Path(directory) / _FILE) as out:
            json.dump({"versions": _VERSIONS, "loss": identity}, out)


def _load(directory) -> dict | None:
    file = pathlib.Path(directory) / _FILE
    return json.loads(file.read_text(encoding="utf-8")) if file.exists() else None


def identify(loss: Callable, model: nnx.Module) -> str:
    """A hash of the steps that jax traces a loss's gradient to, and of the constants in them.

    What the gradient does not depend on has no part in it, nor have the names of functions.

    Args:
        loss: of the model and a batch of tokens, targets and weights, each [B, T], to [B].
        model: whose parameters' values do not count.
    """
    model_fn, params = functional.split(model)
    shapes = jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype), params)
    dtypes = {"tokens": jnp.int32, "targets": jnp.int32, "weights": jnp.float32}
    batch = {k: jax.ShapeDtypeStruct((1, _POSITIONS), dtype) for k, dtype in dtypes.items()}
    # A function may have a gradient of its own, which its steps forward do not show.
    gradient = jax.grad(lambda p, b: loss(model_fn.merge(p), b).sum(), allow_int=True)
    traced = jax.make_jaxpr(gradient)(shapes, batch)
    steps, used, _ = partial_eval.dce_jaxpr_consts(traced.jaxpr, [True] * len(traced.jaxpr.outvars))
    text = re.sub(r"\b(name|jvp|fwd|bwd)=\S+", "", str(steps))
    hashed = hashlib.blake2b(text.encode(), digest_size=8)
    constants = [x for x, is_used in zip(traced.consts, used, strict=True) if is_used]
    for constant in (*constants, *_constants(steps)):
        if jnp.issubdtype(constant.dtype, jax.dtypes.prng_key):
            constant = jax.random.key_data(constant)
        x = np.asarray(constant)
        hashed.update(f"{x.shape} {x.dtype}\0".encode() + x.tobytes())
    return hashed.hexdigest()


def _constants(steps: Jaxpr) -> Iterator:
    """Arrays in the traces inside a trace."""
    for step in steps.eqns:
        for value in jax.tree.leaves(
            list(step.params.values()), is_leaf=lambda x: isinstance(x, Jaxpr | ClosedJaxpr)
        ):
            if isinstance(value, ClosedJaxpr):
                yield from value.consts
                value = value.jaxpr
            if isinstance(value, Jaxpr):
                yield from _constants(value)
