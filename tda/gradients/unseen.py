"""Finds uses of a layer's parameter in a loss that the layer's tap does not see.

A tap sees what the layer's known class does with its parameter. Where the model also reads the
parameter directly (`x @ layer.kernel[...]`), or a subclass multiplies by it without calling the
known class, the tap misses a part of the gradient. To find such sites, the loss is traced once more
by shape only, with the parameter replaced by zeros wherever a tap sees it: if the loss still
depends on the parameter, a part of its gradient is unseen.
"""

from collections.abc import Callable, Iterable

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jax.extend.core import Literal
from jax.interpreters import partial_eval  # not public, but in jax 0.10.1 to 0.12

from tda.gradients import layers, sites
from tda.model import functional


def make_search(model: nnx.Module, chosen: Iterable[sites.Site]) -> Callable:
    """Makes a function that finds the sites whose gradient the taps would miss in part.

    The function takes the loss, a function from a model like `model` to a scalar, and returns the
    sites among `chosen` whose parameter the loss uses where no tap sees it. It does not return a
    parameter that the loss does not use, whose gradient is zero, or one that is read but not
    differentiated (`stop_gradient`). It returns every parameter passed to a `jax.custom_vjp`
    function, whatever its gradient there. It holds no arrays of `model`.

    Args:
        model: any NNX model; its arrays may be abstract (shapes only).
        chosen: the sites with taps.
    """
    chosen, blind = tuple(chosen), nnx.clone(model)
    modules = dict(nnx.iter_modules(blind))
    for site in chosen:
        layers.wrap_calls(modules[site.module], _with_zeros)
    graphdef, state = nnx.split(blind)
    variables = jax.eval_shape(lambda x: x, nnx.to_pure_dict(state))
    paths = list(functional.flat_parameters(variables))

    def search(loss: Callable) -> list[sites.Site]:
        if not chosen:
            return []
        traced = jax.make_jaxpr(lambda variables: loss(nnx.merge(graphdef, variables)))(variables)
        # jax has no public way to drop dead code from a jaxpr, hence `jax.interpreters`. Nothing
        # else will do: the gradient of a scan carries zeros along that look like a dependence on
        # the parameter, and only dead code elimination recognises them.
        _, used = partial_eval.dce_jaxpr(traced.jaxpr, [True])
        used = {path for path, is_used in zip(paths, used, strict=True) if is_used}
        missed = [s for s in chosen if s.path in used]
        # A parameter that is read but not differentiated contributes nothing to the gradient.
        return _differentiated(missed, loss, graphdef, variables) if missed else []

    return search


def _differentiated(missed: list[sites.Site], loss: Callable, graphdef, variables) -> list:
    """Returns the sites whose parameters have a gradient in the loss of the blind model."""

    def value(arrays, variables):
        variables = jax.tree.map(lambda x: x, variables)
        for site, x in zip(missed, arrays, strict=True):
            sites.module_at(variables, site)[site.parameter] = x
        return loss(nnx.merge(graphdef, variables))

    arrays = [sites.module_at(variables, s)[s.parameter] for s in missed]
    traced = jax.make_jaxpr(jax.grad(value))(arrays, variables).jaxpr
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


def refuse(missed: Iterable[sites.Site], remedy: str = "") -> None:
    """Raises an error if the taps miss a part of any site's gradient.

    Args:
        missed: the sites that `make_search`'s function returned.
        remedy: text appended to the message: an alternative to excluding the sites.

    Raises:
        ValueError: `missed` is not empty.
    """
    if missed := sorted({s.path for s in missed}):
        raise ValueError(
            f"taps miss a part of the gradient of {', '.join(missed)}: the model, or a subclass of "
            "the layer, reads these parameters directly, where no tap sees it; "
            f"exclude them{remedy}"
        )


def _with_zeros(layer, use, call, inputs):
    """Calls a layer with its parameter replaced by zeros (see `layers.wrap_calls`)."""
    del use
    parameter = layers.product(layer).parameter
    graphdef, state = nnx.split(layer)
    old = state[parameter]
    state[parameter] = old.replace(jnp.zeros(old.shape, old.dtype))
    return call(nnx.merge(graphdef, state), inputs)
