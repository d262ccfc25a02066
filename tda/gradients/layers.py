"""What the encoder knows of layer classes: how a layer's output is a product with its parameter.

A layer is known by the axes of its parameter that are summed over (the rows of a weight matrix) and
those that appear in its output (the columns), and by how its input and output are laid out. Layers
of other classes are not lost: `tda.gradients.sites` reports their parameters by name, and the
reference path takes them if asked.

A subclass of a known class is known by what it asks of that class (`super().__call__(x)`), so that
what it does before and after is its own affair: see `wrap_calls`.
"""

import dataclasses
import functools
import math
import types
from collections.abc import Callable

import jax.numpy as jnp
from flax import nnx


@dataclasses.dataclass(frozen=True)
class Product:
    """A layer's product with its parameter, the batch being the input's first axis.

    Attributes:
        parameter: the parameter's name in the layer.
        rows: its own axes that are summed over, in the order in which they are flattened.
        columns: its own axes that the output has, in order.
        inputs: the layer's input to [B, T', M].
        outputs: the layer's output to [B, T', N], and a function that turns that back.
    """

    parameter: str
    rows: tuple[int, ...]
    columns: tuple[int, ...]
    inputs: Callable
    outputs: Callable

    @property
    def ndim(self) -> int:
        """Axes that the parameter has in one layer."""
        return len(self.rows) + len(self.columns)


@dataclasses.dataclass(frozen=True)
class Table:
    """What an embedding calls its parts: see `register_embedding`."""

    parameter: str
    look_up: str
    attend: str | None


# What is known of each class. Of those that multiply by jnp.einsum: (parameter, attribute).
_KNOWN: dict[type, Table | tuple[str, str] | None] = {
    nnx.Linear: None,
    nnx.LinearGeneral: None,
    nnx.Einsum: ("kernel", "einsum_str"),
    nnx.Embed: Table("embedding", "__call__", "attend"),
}

_VECTORS = (nnx.RMSNorm, nnx.LayerNorm, nnx.GroupNorm, nnx.BatchNorm, nnx.InstanceNorm)
# They put other numbers in the place of a layer's parameters before they call it.
_CHANGING = (nnx.WeightNorm, nnx.SpectralNorm)


def register_einsum(kind: type, parameter: str, equation: str) -> None:
    """Makes a layer class known whose call is `jnp.einsum(equation, inputs, parameter)`.

    Args:
        kind: the class; its `__call__` takes the input first.
        parameter: the name of its parameter.
        equation: the name of the attribute that holds the equation.
    """
    _KNOWN[kind] = parameter, equation


def register_embedding(
    kind: type, parameter: str, look_up: str = "__call__", attend: str | None = None
) -> None:
    """Makes a class known that holds a table [V, D] and looks up rows of it.

    Args:
        kind: the class.
        parameter: the name of the table.
        look_up: the method that takes row numbers [B, …] first, looks these rows up, and does what
            it likes with them (scales them, say) but nothing else with the numbers.
        attend: the method of tied models that takes states [B, …, D] first and gives states ·
            tableᵀ, neither scaled nor shifted; None where there is none.
    """
    _KNOWN[kind] = Table(parameter, look_up, attend)


def known(kind: type) -> type | None:
    """The class whose product is known: `kind` itself, or the first that it derives from."""
    return next((k for k in kind.__mro__ if k in _KNOWN), None)


def table(kind: type) -> Table | None:
    """What an embedding class calls its parts; None where `kind` is not known as one."""
    parts = _KNOWN.get(known(kind))
    return parts if isinstance(parts, Table) else None


def wrap_calls(module: nnx.Module, around: Callable) -> None:
    """Puts a function around everything that a layer's known class does with its parameter.

    The layer's class becomes a subclass of it, in which a subclass of the known class stands before
    that. So whatever the layer's own class asks of the known class (`super().__call__(x)`) passes
    through `around`, and what it does before and after runs unchanged.

    Args:
        module: a layer of a known class, or of a subclass of one; changed in place.
        around: a function at module level, of (layer, use, call, inputs): `use` is "product",
            "look_up" or "attend" (of an embedding), `call(layer, inputs)` is the known class's own
            method. It returns the output.
    """
    kind = type(module)
    object.__setattr__(module, "__class__", _wrapped(kind, known(kind), around))


@functools.cache
def _wrapped(kind: type, base: type, around: Callable) -> type:
    parts = table(base)
    uses = {"__call__": "product"}
    if parts is not None:
        uses = {parts.look_up: "look_up"} | ({parts.attend: "attend"} if parts.attend else {})
    methods = {name: _around(getattr(base, name), use, around) for name, use in uses.items()}
    wrapped = types.new_class(f"Wrapped{base.__name__}", (base,), {}, lambda ns: ns.update(methods))
    if kind is base:
        return wrapped
    # Python's method resolution puts `wrapped` right before `base`, after all of `kind`'s own
    # classes.
    return types.new_class(f"Wrapped{kind.__name__}", (kind, wrapped))


def _around(method: Callable, use: str, around: Callable) -> Callable:
    def wrapped(self, inputs, *args, **kwargs):
        return around(self, use, lambda layer, x: method(layer, x, *args, **kwargs), inputs)

    return wrapped


def change_product(layer: nnx.Module, call: Callable, inputs, change: Callable):
    """Calls a layer and changes its product: `change` maps [B, T', N] and [B, T', M] to the former.

    Args:
        layer: a layer of a known class.
        call, inputs: as `wrap_calls` hands them over.
        change: a function of the layer's output and its input.
    """
    known_product = product(layer)
    y_BxTxN, back = known_product.outputs(call(layer, inputs))
    return back(change(y_BxTxN, known_product.inputs(inputs)))


def changes_parameters(module: nnx.Module) -> bool:
    """Whether `module` changes the parameters of the layers in it before it calls them."""
    return isinstance(module, _CHANGING)


def product(module: nnx.Module) -> Product | None:
    """How `module` multiplies by its parameter; None where that is not known."""
    kind = known(type(module))
    if kind is None:
        return None
    if kind is nnx.Linear:
        return Product("kernel", (0,), (1,), _positions, _flattened(1))
    if kind is nnx.LinearGeneral:
        return _linear_general(module)
    parts = _KNOWN[kind]
    if isinstance(parts, Table):
        return Product(parts.parameter, (0,), (1,), _positions, _flattened(1))
    parameter, equation = parts
    text = getattr(module, equation, None)
    return _einsum(parameter, text) if text else None


def own_ndim(module: nnx.Module, parameter: str) -> int | None:
    """How many axes a layer's parameter has where the layer is not stacked; None if not known."""
    known = product(module)
    if known is not None and parameter == known.parameter:
        return known.ndim
    if isinstance(module, _VECTORS):
        return 1
    if parameter == "bias":
        if isinstance(module, nnx.Linear):
            return 1
        if isinstance(module, nnx.LinearGeneral):
            return len(module.out_features) + len(module.batch_axis)
        if isinstance(module, nnx.Einsum):
            return len(module.bias_shape)
    return None


def _positions(x):
    """`x` with exactly one axis of positions between batch and features."""
    return x.reshape(x.shape[0], -1, x.shape[-1])


def _flattened(features: int):
    """Outputs [B, …, features] as [B, T', N]."""

    def outputs(y):
        width = math.prod(y.shape[y.ndim - features :])
        return y.reshape(y.shape[0], -1, width), lambda flat: flat.reshape(y.shape)

    return outputs


def _linear_general(module: nnx.LinearGeneral) -> Product | None:
    if module.batch_axis:
        return None  # one matrix for every index of the batch axes
    summed, outputs = len(module.in_features), len(module.out_features)

    def inputs(x):
        axes = sorted(a % x.ndim for a in module.axis)  # NNX sorts them too
        if 0 in axes:
            raise ValueError(f"a layer sums over the batch: axis={module.axis} of {x.shape}")
        x = jnp.moveaxis(x, axes, range(-summed, 0))
        return x.reshape(x.shape[0], -1, math.prod(module.in_features))

    rows = tuple(range(summed))
    return Product(
        "kernel", rows, tuple(range(summed, summed + outputs)), inputs, _flattened(outputs)
    )


def _einsum(parameter: str, equation: str) -> Product | None:
    """The product that an einsum's equation describes; None where it is not a matrix product."""
    left, out = equation.replace(" ", "").split("->")
    x, w = left.split(",")
    if "..." in w or any(len(set(t)) < len(t.replace("...", "")) for t in (x, w, out)):
        return None
    has_batch = "..." in out if x.startswith("...") else x[0] in out and x[0] not in w
    rows = [c for c in w if c in x and c not in out]
    columns = [c for c in w if c in out and c not in x]
    if not has_batch or len(rows) + len(columns) < len(w):
        return None  # a matrix for every index of a shared axis, or no batch in front

    def letters(text, ndim):
        """One letter for each axis; those of an ellipsis are upper Greek."""
        count = ndim - len(text.replace("...", ""))
        greek = [chr(0x391 + i) for i in range(count)]
        if "..." not in text:
            return list(text)
        before, after = text.split("...")
        return [*before, *greek, *after]

    def inputs(a):
        named = letters(x, a.ndim)
        # An axis that neither the parameter nor the output has is summed over before the product.
        lost = [i for i, c in enumerate(named) if c not in w and c not in out and c.isascii()]
        a = jnp.sum(a, axis=tuple(lost)) if lost else a
        named = [c for i, c in enumerate(named) if i not in lost]
        order = [named.index(c) for c in (*(c for c in named if c not in rows), *rows)]
        a = jnp.transpose(a, order)
        return a.reshape(a.shape[0], -1, math.prod(a.shape[a.ndim - len(rows) :]))

    def outputs(y):
        named = letters(out, y.ndim)
        # Positions in the input's order, so that they meet the input's.
        shared = [c for c in letters(x, _ndim(x, out, y.ndim)) if c in named and c not in w]
        order = [named.index(c) for c in (*shared, *columns)]
        turned = jnp.transpose(y, order)
        width = math.prod(turned.shape[turned.ndim - len(columns) :])

        def back(flat):
            return jnp.transpose(
                flat.reshape(turned.shape), [order.index(i) for i in range(y.ndim)]
            )

        return turned.reshape(turned.shape[0], -1, width), back

    position = {c: i for i, c in enumerate(w)}
    axes = (tuple(position[c] for c in rows), tuple(position[c] for c in columns))
    return Product(parameter, *axes, inputs, outputs)


def _ndim(x: str, out: str, out_ndim: int) -> int:
    """Axes of the input, from those of the output: an ellipsis stands for as many in both."""
    return len(x.replace("...", "")) + out_ndim - len(out.replace("...", ""))
