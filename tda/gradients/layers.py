"""The layer classes that taps support: how a layer multiplies its input by its parameter.

A layer is described by the axes of its parameter that are summed over (the rows of a weight
matrix), those that appear in its output (the columns), and the layout of its input and output.
Layers of other classes are not lost: `tda.gradients.sites` reports their parameters by name, and
the reference path can form their gradients.

In a subclass, taps see the calls to the known class (`super().__call__(x)`); whatever the subclass
does before and after runs unchanged: see `wrap_calls`.
"""

import dataclasses
import functools
import inspect
import math
import types
from collections.abc import Callable

import jax.numpy as jnp
from flax import nnx


@dataclasses.dataclass(frozen=True)
class Product:
    """A layer's product with its parameter; the batch is the input's first axis.

    Attributes:
        parameter: the parameter's name in the layer.
        rows: the parameter's axes that are summed over, in the order in which they are flattened.
        columns: the parameter's axes that appear in the output, in order.
        inputs: a function from the layer's input to [B, T', M].
        outputs: a function from the layer's output to [B, T', N] and a function that undoes it.
    """

    parameter: str
    rows: tuple[int, ...]
    columns: tuple[int, ...]
    inputs: Callable
    outputs: Callable

    @property
    def ndim(self) -> int:
        """The number of axes of one layer's parameter."""
        return len(self.rows) + len(self.columns)


@dataclasses.dataclass(frozen=True)
class Table:
    """The names of an embedding's table and methods: see `register_embedding`."""

    parameter: str
    look_up: str
    attend: str | None


# The known classes. Those that call jnp.einsum: (parameter, attribute that holds the equation).
_KNOWN: dict[type, Table | tuple[str, str] | None] = {
    nnx.Linear: None,
    nnx.LinearGeneral: None,
    nnx.Einsum: ("kernel", "einsum_str"),
    nnx.Embed: Table("embedding", "__call__", "attend"),
}

_VECTORS = (nnx.RMSNorm, nnx.LayerNorm, nnx.GroupNorm, nnx.BatchNorm, nnx.InstanceNorm)
# Classes that replace the parameters of the layer inside them before they call it.
_CHANGING = (nnx.WeightNorm, nnx.SpectralNorm)


def register_einsum(kind: type, parameter: str, equation: str) -> None:
    """Registers a layer class whose call is `jnp.einsum(equation, inputs, parameter)`.

    Args:
        kind: the class; its `__call__` takes the input first.
        parameter: the name of its parameter.
        equation: the name of the attribute that holds the equation.
    """
    _KNOWN[kind] = parameter, equation


def register_embedding(
    kind: type, parameter: str, look_up: str = "__call__", attend: str | None = None
) -> None:
    """Registers a class that holds a table [V, D] and looks up its rows.

    Args:
        kind: the class.
        parameter: the name of the table.
        look_up: the method whose first argument is row numbers [B, …] and that looks up these
            rows. It may change the rows (scale them, say), but must not use the numbers otherwise.
        attend: in tied models, the method whose first argument is states [B, …, D] and that
            returns states · tableᵀ, neither scaled nor shifted; None if there is none.
    """
    _KNOWN[kind] = Table(parameter, look_up, attend)


def known(kind: type) -> type | None:
    """Returns the first known class among `kind` and its base classes; None if there is none."""
    return next((k for k in kind.__mro__ if k in _KNOWN), None)


def table(kind: type) -> Table | None:
    """Returns the names of an embedding class's parts; None if `kind` is not an embedding."""
    parts = _KNOWN.get(known(kind))
    return parts if isinstance(parts, Table) else None


def wrap_calls(module: nnx.Module, around: Callable) -> None:
    """Puts a function around each use that a layer's known class makes of its parameter.

    The layer gets a new class, a subclass of its own, with a subclass of the known class placed
    right before the known class in Python's method resolution order. So every call of the layer's
    own class to the known class (`super().__call__(x)`) passes through `around`, and the rest of
    the layer's code runs unchanged.

    Args:
        module: a layer of a known class, or of a subclass of one; changed in place.
        around: a module-level function of (layer, use, call, inputs) that returns the output:
            `use` is "product", or an embedding's "look_up" or "attend"; `call(layer, inputs)` is
            the known class's own method.
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
    # Python's method resolution puts `wrapped` right before `base`, and after `kind` and the
    # classes between them.
    return types.new_class(f"Wrapped{kind.__name__}", (kind, wrapped))


def _around(method: Callable, use: str, around: Callable) -> Callable:
    _, first, *_ = inspect.signature(method).parameters

    def wrapped(self, *args, **kwargs):
        inputs, *args = args or (kwargs.pop(first),)
        # NNX's Einsum takes another equation than its own at a call, which no product describes.
        if any(isinstance(x, str) and "->" in x for x in (*args, *kwargs.values())):
            return method(self, inputs, *args, **kwargs)
        return around(self, use, lambda layer, x: method(layer, x, *args, **kwargs), inputs)

    return wrapped


def change_product(layer: nnx.Module, call: Callable, inputs, change: Callable):
    """Calls a layer and changes its product.

    Args:
        layer: a layer of a known class.
        call, inputs: the arguments that `wrap_calls` passes to `around`.
        change: a function from the output [B, T', N] and the input [B, T', M] to a new output.
    """
    known_product = product(layer)
    y_BxTxN, back = known_product.outputs(call(layer, inputs))
    return back(change(y_BxTxN, known_product.inputs(inputs)))


def change_rows(layer: nnx.Module, call: Callable, ids, change: Callable):
    """Calls an embedding and changes the rows that it looks up.

    Args:
        layer: a layer of a class that holds a table.
        call, ids: the arguments that `wrap_calls` passes to `around`; ids: row numbers [B, …].
        change: a function from rows [B, T', N] to new rows.
    """

    def changed(rows):
        y_BxTxN, back = product(layer).outputs(rows)
        return back(change(y_BxTxN))

    if known(type(layer)) is nnx.Embed:
        return changed(call(layer, ids))
    # Another class may scale or shift its rows, so it gets a table of just these rows, changed.
    parameter = table(type(layer)).parameter
    rows = changed(getattr(layer, parameter)[...][ids])
    graphdef, state = nnx.split(layer)
    state[parameter] = state[parameter].replace(rows.reshape(-1, rows.shape[-1]))
    return call(nnx.merge(graphdef, state), jnp.arange(ids.size).reshape(ids.shape))


def changes_parameters(module: nnx.Module) -> bool:
    """Returns whether `module` changes its layers' parameters before it calls them."""
    return isinstance(module, _CHANGING)


def is_training(module: nnx.Module) -> bool:
    """Returns whether `module` draws dropout or uses the statistics of the batch it is given."""
    rates = (getattr(module, name, None) for name in ("rate", "dropout_rate"))
    drops = any(isinstance(rate, int | float) and rate > 0 for rate in rates)
    if drops and getattr(module, "deterministic", None) is False:
        return True
    return isinstance(module, nnx.BatchNorm) and module.use_running_average is False


def product(module: nnx.Module) -> Product | None:
    """Returns how `module` multiplies by its parameter; None if its class is not known."""
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
    """Returns the number of axes of an unstacked layer's parameter; None if not known."""
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
    """Returns `x` with exactly one axis of positions between batch and features."""
    return x.reshape(x.shape[0], -1, x.shape[-1])


def _flattened(features: int):
    """Returns a function from outputs [B, …, *features] to [B, T', N] and its inverse."""

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
    """Returns the product that an equation describes; None if it is not a matrix product."""
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
        """Returns one letter per axis; an ellipsis's axes get capital Greek letters."""
        count = ndim - len(text.replace("...", ""))
        greek = [chr(0x391 + i) for i in range(count)]
        if "..." not in text:
            return list(text)
        before, after = text.split("...")
        return [*before, *greek, *after]

    def inputs(a):
        named = letters(x, a.ndim)
        # An axis of the input alone is summed over before the product.
        lost = [i for i, c in enumerate(named) if c not in w and c not in out and c.isascii()]
        a = jnp.sum(a, axis=tuple(lost)) if lost else a
        named = [c for i, c in enumerate(named) if i not in lost]
        order = [named.index(c) for c in (*(c for c in named if c not in rows), *rows)]
        a = jnp.transpose(a, order)
        return a.reshape(a.shape[0], -1, math.prod(a.shape[a.ndim - len(rows) :]))

    def outputs(y):
        named = letters(out, y.ndim)
        # Positions in the input's order, so that they line up with the input's positions.
        shared = [c for c in letters(x, _ndim(x, out, y.ndim)) if c in named and c not in w]
        order = [named.index(c) for c in (*shared, *columns)]
        ordered = jnp.transpose(y, order)
        width = math.prod(ordered.shape[ordered.ndim - len(columns) :])

        def back(flat):
            return jnp.transpose(
                flat.reshape(ordered.shape), [order.index(i) for i in range(y.ndim)]
            )

        return ordered.reshape(ordered.shape[0], -1, width), back

    position = {c: i for i, c in enumerate(w)}
    axes = (tuple(position[c] for c in rows), tuple(position[c] for c in columns))
    return Product(parameter, *axes, inputs, outputs)


def _ndim(x: str, out: str, out_ndim: int) -> int:
    """Returns the input's number of axes: an ellipsis means equally many in input and output."""
    return len(x.replace("...", "")) + out_ndim - len(out.replace("...", ""))
