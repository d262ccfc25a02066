"""A hash that identifies the loss whose gradients are stored, kept beside them.

The parameters alone do not identify the loss: gradients also depend on the model's settings (the
base of its rotary embedding, an epsilon, the compute dtype) and on the body of the loss function.
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
from jax.extend.core import ClosedJaxpr, Jaxpr, Var

from tda.model import functional
from tda.runtime import atomic_file

# Length of the batch that is traced: the shortest length that texts are padded to.
_POSITIONS = 8
_FILE = "loss.json"
_VERSIONS = {"jax": jax.__version__, "flax": flax.__version__}


def identify_or_load(loss: Callable, model: nnx.Module, directory: str | os.PathLike) -> str:
    """Returns the hash of `identify`, or the saved hash if other versions of jax or flax wrote it.

    Other versions may trace the same function to different steps, so their hashes cannot be
    compared, and the saved one is trusted.

    Args:
        loss, model: as for `identify`.
        directory: the directory that `save` writes to; it may hold no hash yet.
    """
    record = _load(directory)
    if record is not None and record["versions"] != _VERSIONS:
        return record["loss"]
    return identify(loss, model)


def save(identity: str, directory: str | os.PathLike) -> None:
    """Writes the hash from `identify_or_load`; call it once the loss's gradients are stored.

    A hash that other versions of jax or flax wrote is kept.
    """
    record = _load(directory)
    if record is None or record["versions"] == _VERSIONS:
        with atomic_file.open_atomic(pathlib.Path(directory) / _FILE) as out:
            json.dump({"versions": _VERSIONS, "loss": identity}, out)


def _load(directory) -> dict | None:
    file = pathlib.Path(directory) / _FILE
    return atomic_file.read_json(file) if file.exists() else None


def identify(loss: Callable, model: nnx.Module) -> str:
    """Returns a hash of the jaxpr of a loss's gradient and of the constants in it.

    Code that the gradient does not depend on does not change the hash, nor do function names.

    Args:
        loss: a function of the model and a batch {"tokens", "targets", "weights"}, each [B, T],
            that returns one number per example, [B].
        model: the model; the values of its parameters do not matter.
    """
    model_fn, params = functional.split(model)
    shapes = jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype), params)
    dtypes = {"tokens": jnp.int32, "targets": jnp.int32, "weights": jnp.float32}
    batch = {k: jax.ShapeDtypeStruct((1, _POSITIONS), dtype) for k, dtype in dtypes.items()}
    # The gradient is traced, not the loss: a custom gradient does not show in the forward steps.
    gradient = jax.grad(lambda p, b: loss(model_fn.merge(p), b).sum(), allow_int=True)
    traced = jax.make_jaxpr(gradient)(shapes, batch)
    steps = _without_dead_code(traced.jaxpr)
    text = re.sub(r"\b(name|jvp|fwd|bwd)=\S+", "", str(steps))
    hashed = hashlib.blake2b(text.encode(), digest_size=8)
    values = dict(zip(traced.jaxpr.constvars, traced.consts, strict=True))
    constants = [values[v] for v in steps.constvars]
    for constant in (*constants, *_constants(steps)):
        if jnp.issubdtype(constant.dtype, jax.dtypes.prng_key):
            constant = jax.random.key_data(constant)
        x = np.asarray(constant)
        hashed.update(f"{x.shape} {x.dtype}\0".encode() + x.tobytes())
    return hashed.hexdigest()


def _without_dead_code(jaxpr: Jaxpr) -> Jaxpr:
    """Returns a jaxpr without the steps and constants that its outputs do not depend on.

    Those of loops, branches and jitted calls stay whole. (jax has no public function for it.)
    """
    needed, steps = {v for v in jaxpr.outvars if isinstance(v, Var)}, []
    for step in reversed(jaxpr.eqns):
        if step.effects or not needed.isdisjoint(step.outvars):
            steps.append(step)
            needed.update(v for v in step.invars if isinstance(v, Var))
    constants = [v for v in jaxpr.constvars if v in needed]
    return jaxpr.replace(constvars=constants, eqns=steps[::-1])


def _constants(steps: Jaxpr) -> Iterator:
    """Yields the constants of the jaxprs nested in a jaxpr (loops, branches, jitted calls)."""
    for step in steps.eqns:
        for value in jax.tree.leaves(
            list(step.params.values()), is_leaf=lambda x: isinstance(x, Jaxpr | ClosedJaxpr)
        ):
            if isinstance(value, ClosedJaxpr):
                yield from value.consts
                value = value.jaxpr
            if isinstance(value, Jaxpr):
                yield from _constants(value)
