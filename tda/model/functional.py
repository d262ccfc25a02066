"""An NNX model as a pure function of a nested dict of parameters, laid out on a mesh."""

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from tda.runtime import sharding


@dataclasses.dataclass(frozen=True)
class Functional:
    """A model taken apart: `merge(params)` is the model again, with these parameters."""

    graphdef: Any
    rest: Any
    """Variables that are not parameters."""
    axes: dict[str, tuple]
    """Logical axes of each parameter, by path name."""

    def merge(self, params: dict) -> nnx.Module:
        """Returns the model with parameters `params`, a nested dict of arrays."""
        return nnx.merge(self.graphdef, params, self.rest)

    def apply(self, params: dict, *args):
        """Returns the model's output for these parameters."""
        return self.merge(params)(*args)


def split(model: nnx.Module) -> tuple[Functional, dict]:
    """Takes a model apart into its structure and a nested dict of its parameters."""
    graphdef, state, rest = nnx.split(model, nnx.Param, ...)
    # Plain arrays, so that a model that changes its variables (a Linen model its keys) changes
    # copies.
    model_fn = Functional(graphdef, nnx.to_pure_dict(rest), logical_axes(state))
    # A parameter may be an array of NumPy's, or a number.
    return model_fn, jax.tree.map(
        lambda x: jnp.asarray(x) if isinstance(x, np.ndarray | float | int) else x,
        nnx.to_pure_dict(state),
    )


def logical_axes(state) -> dict[str, tuple]:
    """Returns the logical axes of every variable of an NNX state, by path name."""
    axes = {}
    for path, variable in nnx.to_flat_state(state):
        # A module's plain arrays (a mask, a table of positions) are in its state too.
        metadata = variable.get_metadata() if isinstance(variable, nnx.Variable) else {}
        stated = tuple(metadata.get("axes") or ())
        # A stacked parameter has one more axis in front, that of the layers.
        leaves = jax.tree.leaves(variable)
        ndim = np.ndim(leaves[0]) if len(leaves) == 1 else 0
        axes[path_name(path)] = (None,) * (ndim - len(stated)) + stated
    return axes


def path_name(path) -> str:
    """Returns a tree path as a name, such as `layers/attention/query/kernel`."""
    # jax's keys of dicts, sequences and attributes each name their value differently.
    return "/".join(str(getattr(k, "key", getattr(k, "idx", getattr(k, "name", k)))) for k in path)


def flat_parameters(params: dict) -> dict[str, jax.Array]:
    """Returns the leaves of a parameter tree by path name."""
    return {path_name(p): x for p, x in jax.tree_util.tree_flatten_with_path(params)[0]}


def abstract(params: dict, axes: dict[str, tuple], mesh) -> dict:
    """Returns shapes, dtypes and shardings of `params` on `mesh`, without data."""

    def shape(path, x):
        layout = sharding.named(mesh, axes[path_name(path)], x.shape)
        return jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=layout)

    return jax.tree_util.tree_map_with_path(shape, params)


def place(params: dict, axes: dict[str, tuple], mesh) -> dict:
    """Lays out `params` on `mesh` by the axis rules."""
    return jax.tree.map(
        lambda x, a: jax.device_put(x, a.sharding), params, abstract(params, axes, mesh)
    )
