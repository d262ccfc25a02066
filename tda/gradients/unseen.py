"""What a loss does with a layer's parameter that the layer's tap does not see.

A tap is at what the layer's class does with its parameter. Where the model also reads the parameter
itself (`x @ layer.kernel[...]`), or a subclass multiplies by it without asking the known class,
a part of the gradient is not there. So the loss is traced once more, by shapes alone, with zeros in
the parameter's place in all that a tap sees: what still depends on the parameter is unseen.
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
    """Makes a function that finds the sites of which taps would miss something.

    It takes the loss, a function of a model like `model` to a scalar, and gives those of `chosen`
    whose parameter has a part in it beside what a tap sees. A parameter without any part in the
    loss is not among them: its gradient is zero; nor is one that is read but not differentiated
    (`stop_gradient`). One that is handed to a `jax.custom_vjp` function is among them, whatever its
    gradient there. Arrays of `model` are not kept.

    Args:
        model: any NNX model; of shapes alone, if need be.
        chosen: the sites that taps are put on.
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
        # Only dropping dead code recognises the zeros that the gradient of a scan carries along,
        # and nothing public does that.
        _, used = partial_eval.dce_jaxpr(traced.jaxpr, [True])
        used = {path for path, is_used in zip(paths, used, strict=True) if is_used}
        missed = [s for s in chosen if s.path in used]
        # What is read, but not differentiated, is no part of the gradient.
        return _differentiated(missed, loss, graphdef, variables) if missed else []

    return search


def _differentiated(missed: list[sites.Site], loss: Callable, graphdef, variables) -> list:
    """Those of the sites by whose parameters the loss of a blind model has a gradient."""

    def value(arrays, variables):
        variables = jax.tree.map(lambda x: x, variables)
        for site, x in zip(missed, arrays, strict=True):
            sites.module_at(variables, site)[site.parameter] = x
        return loss(nnx.merge(graphdef, variables))

    arrays = [sites.module_at(variables, s)[s.parameter] for s in missed]
    traced = jax.make_jaxpr(jax.grad(value))(arrays, variables).jaxpr
    return [s for s, out in zip(missed, traced.outvars, strict=True) if not _is_zero(traced, out)]


def _is_zero(traced, out) -> bool:
    """Whether an output of a trace follows from zeros alone, as a gradient that is not there."""
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
    """Refuses sites of which taps miss something.

    Args:
        missed: the sites.
        remedy: what can be done other than excluding them.

    Raises:
        ValueError: there are any.
    """
    if missed := sorted({s.path for s in missed}):
        raise ValueError(
            f"taps miss a part of the gradient of {', '.join(missed)}: the model reads them itself "
            "(or a layer's subclass does, beside what it asks of its class), where no tap is; "
            f"exclude them{remedy}"
        )


def _with_zeros(layer, use, call, inputs):
    """Calls a layer with zeros in its parameter's place (`tda.gradients.layers.wrap_calls`)."""
    del use
    parameter = layers.product(layer).parameter
    graphdef, state = nnx.split(layer)
    old = state[parameter]
    state[parameter] = old.replace(jnp.zeros(old.shape, old.dtype))
    return call(nnx.merge(graphdef, state), inputs)
