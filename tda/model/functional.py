"""An NNX model as a pure function of a nested dict of parameters, laid out on a mesh."""

import dataclasses
from typing import Any

import jax
from flax import nnx

from tda.runtime import sharding


@dataclasses.dataclass(frozen=True)
class Functional:
    """A model taken apart: `merge(params)` is the model again, with these parameters.

    Attributes:
        graphdef: the model's structure.
        rest: variables that are not parameters.
        axes: logical axes of each parameter: a tree like the parameters', with tuples for leaves.
    """

    graphdef: Any
    rest: Any
    axes: dict

    def merge(self, params: dict) -> nnx.Module:
        """Returns the model with parameters `params`, a nested dict of arrays."""
        return nnx.merge(self.graphdef, params, self.rest)

    def apply(self, params: dict, *args):
        """Returns the model's output for these parameters."""
        return self.merge(params)(*args)


def split(model: nnx.Module) -> tuple[Functional, dict]:
    """Takes a model apart into its structure and a nested dict of its parameters."""
    graphdef, state, rest = nnx.split(model, nnx.Param, ...)
    axes = {path: _axes(variable) for path, variable in nnx.to_flat_state(state)}
    # Plain arrays, so that a model that writes to its variables (a Linen one to its keys) writes
    # to copies.
    return Functional(graphdef, nnx.to_pure_dict(rest), _nest(axes)), nnx.to_pure_dict(state)


def _axes(variable) -> tuple:
    stated = tuple(variable.get_metadata().get("axes") or ())
    # A stacked parameter has the axis of layers in front of the stated ones.
    return (None,) * (len(variable.shape) - len(stated)) + stated


def logical_axes(state) -> dict[str, tuple]:
    """Returns the logical axes of every variable of an NNX state, by path name."""
    return {path_name(path): _axes(variable) for path, variable in nnx.to_flat_state(state)}


def _nest(flat: dict) -> dict:
    tree: dict = {}
    for path, value in flat.items():
        node = tree
        for key in path[:-1]:
            node = node.setdefault(key, {})
        node[path[-1]] = value
    return tree


def path_name(path) -> str:
    """Returns a tree path as a name, such as `layers/attention/query/kernel`."""
    return "/".join(str(getattr(k, "key", getattr(k, "idx", getattr(k, "name", k)))) for k in path)


def flat_parameters(params: dict) -> dict[str, jax.Array]:
    """Returns the leaves of a parameter tree by path name."""
    return {path_name(p): x for p, x in jax.tree_util.tree_flatten_with_path(params)[0]}


def abstract(params: dict, axes: dict, mesh) -> dict:
    """Returns shapes, dtypes and shardings of `params` on `mesh`, without data."""

    def shape(x, a):
        return jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=sharding.named(mesh, a, x.shape))

    return jax.tree.map(shape, params, _like(axes, params))


def place(params: dict, axes: dict, mesh) -> dict:
    """Lays out `params` on `mesh` by the axis rules."""
    return jax.tree.map(
        lambda x, a: jax.device_put(x, a.sharding), params, abstract(params, axes, mesh)
    )


def _like(axes: dict, params: dict):
    """The axes as a tree of the structure of `params`, with leaves that jax takes for leaves."""
    flat, structure = jax.tree.flatten(params)
    leaves = jax.tree.flatten(axes, is_leaf=lambda a: isinstance(a, tuple))[0]
    assert len(leaves) == len(flat)
    return jax.tree.unflatten(structure, [_Leaf(a) for a in leaves])


class _Leaf(tuple):
    """A tuple that is a leaf of a tree (a plain tuple is a branch)."""
