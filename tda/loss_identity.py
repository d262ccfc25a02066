"""Which function of its parameters and a batch a model's loss is: a hash, kept beside gradients.

Parameters alone do not say it: a model's settings (the base of its rotations, an epsilon, what it
computes in) and the body of a loss decide gradients as much.
"""

import hashlib
import json
import os
import pathlib
from collections.abc import Callable, Iterator

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jax.extend.core import ClosedJaxpr

from tda import whole_file
from tda.model import functional

# Positions of the batch that is traced: the shortest that texts are padded to.
_POSITIONS = 8
_FILE = "loss.json"


def kept(loss: Callable, model: nnx.Module, directory: str | os.PathLike) -> str:
    """The hash of `of`; where another version of jax left one in `directory`, that one.

    Versions trace the same function to other steps, so what they left cannot be compared.

    Args:
        loss: as `of` takes it.
        model: as `of` takes it.
        directory: where `loss.json` is, or is written.
    """
    file = pathlib.Path(directory) / _FILE
    if file.exists():
        there = json.loads(file.read_text(encoding="utf-8"))
        if there["jax"] != jax.__version__:
            return there["loss"]
    found = of(loss, model)
    if not file.exists():
        file.parent.mkdir(parents=True, exist_ok=True)
        with whole_file.written(file) as out:
            json.dump({"jax": jax.__version__, "loss": found}, out)
    return found


def of(loss: Callable, model: nnx.Module) -> str:
    """A hash of the steps that jax traces a loss's gradient to, and of the constants in them.

    Args:
        loss: of the model and a batch of tokens, targets and weights, each [B, T], to [B].
        model: whose parameters' values do not count.
    """
    made, params = functional.split(model)
    shapes = jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype), params)
    dtypes = {"tokens": jnp.int32, "targets": jnp.int32, "weights": jnp.float32}
    batch = {k: jax.ShapeDtypeStruct((1, _POSITIONS), dtype) for k, dtype in dtypes.items()}
    # A function may have a gradient of its own, which its steps forward do not show.
    gradient = jax.grad(lambda p, b: loss(made.merge(p), b).sum(), allow_int=True)
    traced = jax.make_jaxpr(gradient)(shapes, batch)
    found = hashlib.blake2b(str(traced.jaxpr).encode(), digest_size=8)
    for constant in _constants(traced):
        if jnp.issubdtype(constant.dtype, jax.dtypes.prng_key):
            constant = jax.random.key_data(constant)
        x = np.asarray(constant)
        found.update(f"{x.shape} {x.dtype}\0".encode() + x.tobytes())
    return found.hexdigest()


def _constants(traced: ClosedJaxpr) -> Iterator:
    """Arrays that a trace holds, those of the traces inside too."""
    yield from traced.consts
    for step in traced.jaxpr.eqns:
        for value in jax.tree.leaves(
            list(step.params.values()), is_leaf=lambda x: isinstance(x, ClosedJaxpr)
        ):
            if isinstance(value, ClosedJaxpr):
                yield from _constants(value)
