"""Finds uses of a layer's parameter in a loss that the layer's tap does not see.

A tap sees the uses of a parameter by the layer's known class, for inputs whose first axis is the
batch. It misses a part of the gradient where the model reads the parameter directly
(`x @ layer.kernel[...]`), where a subclass multiplies by it without calling the known class, and
where the layer is called with other inputs: under `jax.vmap`, time-major, with the positions
`arange(T)`. The size of an axis does not tell that, since T may equal B. So the loss is traced once
more, by shape only and of a larger batch, with the parameter replaced by zeros wherever a tap sees
it: if the loss still depends on the parameter, a part of its gradient is unseen.
"""

import itertools
from collections.abc import Callable, Iterable, Iterator, Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jax.extend.core import Literal
from jax.interpreters import partial_eval  # not public, but in jax 0.10.1 to 0.12

from tda.gradients import layers, sites
from tda.model import functional

_READ = "the model, or a subclass of the layer, reads it directly, where no tap sees it"
_OTHER_AXIS = (
    "its layer is called with inputs whose first axis is not the batch (under vmap, time-major, "
    "for positions alone)"
)
_OTHER_POSITIONS = (
    "its layer is called with inputs whose second axis is not the sequence (heads in front of it, "
    "one position at a time, a pooled state), so the positions cannot be told apart"
)


def make_search(
    model: nnx.Module,
    chosen: Mapping[sites.Site, object] | list[sites.Site],
    by_position: bool = False,
):
    """Makes a function that finds the sites whose gradient the taps would miss in part.

    The function takes the loss, a function from a model like `model` and a batch to a scalar, and a
    batch. It returns, with the reason of each, the sites among `chosen` whose parameter the loss
    uses where no tap sees it. It does not return a parameter that the loss does not use, whose
    gradient is zero, or one that is read but not differentiated (`stop_gradient`). It returns every
    parameter passed to a `jax.custom_vjp` function, whatever its gradient there. It holds no arrays
    of `model`, and raises a ValueError if the loss cannot be traced with more examples.

    Args:
        model: any NNX model; its arrays may be abstract (shapes only).
        chosen: the sites with taps.
        by_position: whether the taps tell the positions of a sequence apart, so that the second
            axis of a layer's inputs must be that of the batch's arrays, [B, T] each.
    """
    chosen, blind = tuple(chosen), nnx.clone(model)
    modules = dict(nnx.iter_modules(blind))
    for site in chosen:
        layers.wrap_calls(modules[site.module], _with_zeros)
    graphdef, state = nnx.split(blind)
    variables = jax.eval_shape(lambda x: x, nnx.to_pure_dict(state))
    paths = list(functional.flat_parameters(variables))

    def search(loss: Callable, batch) -> dict[sites.Site, str]:
        if not chosen:
            return {}
        batches = list(_larger_batches(batch, variables, axes=2 if by_position else 1))

        def missed_by_taps(axes: int) -> list[sites.Site]:
            """Returns the missed sites; taps see the first axes as the batch's, whatever follows.

            Args:
                axes: how many axes of a layer's inputs must be the batch's; 0: taps see any input.
            """

            def blind_loss(variables, batch):
                own_model = nnx.merge(graphdef, variables)
                modules = dict(nnx.iter_modules(own_model))
                for site in chosen:
                    modules[site.module].tda_axes_seen = jax.tree.leaves(batch)[0].shape[:axes]
                return loss(own_model, batch)

            larger, traced = _trace(blind_loss, variables, batch, batches)
            # jax has no public way to drop dead code from a jaxpr, hence `jax.interpreters`.
            # Nothing else will do: the gradient of a scan carries zeros along that look like a
            # dependence on the parameter, and only dead code elimination recognises them.
            _, used = partial_eval.dce_jaxpr(traced.jaxpr, [True])
            used = {path for path, is_used in zip(paths, used, strict=False) if is_used}
            missed = [s for s in chosen if s.path in used]
            # A parameter that is read but not differentiated contributes nothing to the gradient.
            return _differentiated(missed, blind_loss, variables, larger) if missed else []

        # From the strictest rule to the laxest: the last that a site fails gives the reason.
        reasons: dict[sites.Site, str] = {}
        for axes, reason in ((2, _OTHER_POSITIONS), (1, _OTHER_AXIS), (0, _READ)):
            if axes < 2 or by_position:
                missed = missed_by_taps(axes)
                if not missed:
                    break
                reasons |= dict.fromkeys(missed, reason)
        return reasons

    return search


def count_examples(batch) -> int:
    """Returns the length of the first axis, which all arrays of a batch must share.

    Raises:
        ValueError: they do not, or it is 0.
    """
    shapes = [np.shape(x) for x in jax.tree.leaves(batch)]
    lengths = {s[0] if s else None for s in shapes}
    if len(lengths) != 1 or None in lengths:
        raise ValueError(
            f"every array of a batch must have the examples as its first axis; got shapes {shapes}"
        )
    if 0 in lengths:
        raise ValueError(f"a batch has no examples (shapes {shapes}); leave it out")
    return lengths.pop()


def _larger_batches(batch, variables, axes: int) -> Iterator:
    """Yields the shapes of batches with more examples, and of other lengths if axes is 2.

    There are a multiple of the examples, so that devices can still share them. No length equals
    another axis's, so that no other axis is taken for the batch or the sequence. Longer sequences
    come before shorter ones, which serve a model with no more positions than the batch has.

    Args:
        batch: arrays [B, …], or [B, T] each if axes is 2.
        variables: the model's, whose axes count as others.
        axes: how many of the batch's axes change: 1 or 2.
    """
    count, arrays = count_examples(batch), jax.tree.leaves(batch)
    lengths = {n for x in arrays for n in np.shape(x)[axes:]}
    lengths |= {n for x in jax.tree.leaves(variables) for n in x.shape}
    examples = next(n * count for n in itertools.count(2) if n * count not in lengths)

    def resize(*lengths: int):
        return jax.tree.map(
            lambda x: jax.ShapeDtypeStruct(
                (examples, *lengths, *np.shape(x)[axes:]), jnp.result_type(x)
            ),
            batch,
        )

    if axes == 1:
        yield resize()
        return
    T = np.shape(arrays[0])[1]
    lengths |= {T, examples}
    longer = (n * T for n in itertools.count(2) if n * T not in lengths)
    shorter = (n for n in range(T - 1, 1, -1) if n not in lengths)
    for length in (next(longer), *itertools.islice(shorter, 1)):
        yield resize(length)


def _trace(loss: Callable, variables, batch, larger: Iterable) -> tuple[Any, Any]:
    """Returns the first of some larger batches with which the loss can be traced, and the trace.

    Raises:
        ValueError: it can be traced with none of them, although it can with the batch itself.
    """
    for refused in larger:
        try:
            return refused, jax.make_jaxpr(loss)(variables, refused)
        except Exception as failure:
            error = failure
    # A fault that the batch itself has too is raised unchanged.
    jax.eval_shape(loss, variables, batch)
    before, after = (jax.tree.leaves(x)[0].shape for x in (batch, refused))
    which, axes = ("examples", 1) if before[1:2] == after[1:2] else ("examples and positions", 2)
    listed = (" × ".join(map(str, shape[:axes])) for shape in (before, after))
    raise ValueError(
        f"the loss of {next(listed)} {which} cannot be computed for {next(listed)}, which tells "
        f"their axes from others: {error}; write it for any number of {which}"
    ) from error


def _differentiated(missed: list[sites.Site], loss: Callable, variables, batch) -> list:
    """Returns the sites whose parameters have a gradient in the loss of the blind model."""

    def value(arrays, variables, batch):
        variables = jax.tree.map(lambda x: x, variables)
        for site, x in zip(missed, arrays, strict=True):
            sites.module_at(variables, site)[site.parameter] = x
        return loss(variables, batch)

    arrays = [sites.module_at(variables, s)[s.parameter] for s in missed]
    traced = jax.make_jaxpr(jax.grad(value))(arrays, variables, batch).jaxpr
    return [s for s, out in zip(missed, traced.outvars, strict=True) if not _is_zero(traced, out)]


def _is_zero(traced, out) -> bool:
    """Returns whether an output of a trace depends on zeros only, as a missing gradient does."""
    made_of = {v: step.invars for step in traced.eqns for v in step.outvars}
    waiting, seen = [out], set()
    while waiting:
        v = waiting.pop()
        if isinstance(v, Literal):
            if np.any(v.val):
                return False
        elif not made_of.get(v):
            return False
        elif v not in seen:
            seen.add(v)
            waiting += made_of[v]
    return True


def refuse(missed: Mapping[sites.Site, str], remedy: str = "") -> None:
    """Raises an error if the taps miss a part of any site's gradient.

    Args:
        missed: the sites and reasons that `make_search`'s function returned.
        remedy: text appended to the message: an alternative to excluding the sites.

    Raises:
        ValueError: `missed` is not empty.
    """
    paths: dict[str, list[str]] = {}
    for site, reason in missed.items():
        paths.setdefault(reason, []).append(site.path)
    if paths:
        listed = "; ".join(f"{', '.join(sorted(p))}: {reason}" for reason, p in paths.items())
        raise ValueError(
            f"taps miss a part of the gradient of {listed}. Use exclude= to leave out what is "
            f"named{remedy}"
        )


def _with_zeros(layer, use, call, inputs):
    """Calls a layer with its parameter replaced by zeros (see `layers.wrap_calls`)."""
    del use
    if jnp.shape(inputs)[: len(layer.tda_axes_seen)] != layer.tda_axes_seen:
        return call(layer, inputs)  # no tap can tell the examples, or the positions, apart here
    parameter = layers.product(layer).parameter
    graphdef, state = nnx.split(layer)
    old = state[parameter]
    state[parameter] = old.replace(jnp.zeros(old.shape, old.dtype))
    return call(nnx.merge(graphdef, state), inputs)
