"""What a loss does with a layer's parameter that the layer's tap does not see.

A tap is at what the layer's class does with its parameter. Where the model also reads the parameter
itself (`x @ layer.kernel[...]`), or a subclass multiplies by it without asking the known class,
a part of the gradient is not there. So the loss is traced once more, by shapes alone, with zeros in
the parameter's place in all that a tap sees: what still depends on the parameter is unseen.
"""

from collections.abc import Callable, Iterable

import jax
import jax.numpy as jnp
from flax import nnx
from jax.interpreters import partial_eval

from tda.gradients import layers, sites
from tda.model import functional


def make_search(model: nnx.Module, chosen: Iterable[sites.Site]) -> Callable:
    """Makes a function that finds the sites of which taps would miss something.

    It takes the loss, a function of a model like `model` to a scalar, and gives those of `chosen`
    whose parameter has a part in it beside what a tap sees. A parameter without any part in the
    loss is not among them: its gradient is zero. One that is read under `stop_gradient`, or handed
    to a `jax.custom_vjp` function, is among them all the same. Arrays of `model` are not kept.

    Args:
        model: any NNX model; of shapes alone, if need be.
        chosen: the sites that taps are put on.
    """
    chosen, blind = tuple(chosen), nnx.clone(model)
    modules = dict(nnx.iter_modules(blind))
    for site in chosen:
        module = modules[site.module]
        object.__setattr__(module, "__class__", layers.with_known(type(module), _blind))
    graphdef, state = nnx.split(blind)
    variables = jax.eval_shape(lambda x: x, nnx.to_pure_dict(state))
    paths = list(functional.flat_parameters(variables))

    def search(loss: Callable) -> list[sites.Site]:
        if not chosen:
            return []
        traced = jax.make_jaxpr(lambda variables: loss(nnx.merge(graphdef, variables)))(variables)
        _, used = partial_eval.dce_jaxpr(traced.jaxpr, [True])
        used = {path for path, is_used in zip(paths, used, strict=True) if is_used}
        return [s for s in chosen if s.path in used]

    return search


def refuse(found: Iterable[sites.Site], remedy: str = "") -> None:
    """Refuses sites of which taps miss something.

    Args:
        found: the sites.
        remedy: what can be done other than excluding them.

    Raises:
        ValueError: there are any.
    """
    if found := sorted({s.path for s in found}):
        raise ValueError(
            f"taps miss a part of the gradient of {', '.join(found)}: the model reads them itself "
            "(or a layer's subclass does, beside what it asks of its class), where no tap is; "
            f"exclude them{remedy}"
        )


def _blind(base: type) -> type:
    class Blind(base):
        pass

    for name in layers.methods(base):
        setattr(Blind, name, _with_zeros(getattr(base, name)))
    return Blind


def _with_zeros(method: Callable) -> Callable:
    """The method of a layer, with zeros for the parameter."""

    def call(self, *args, **kwargs):
        parameter = layers.product(self).parameter
        graphdef, state = nnx.split(self)
        old = state[parameter]
        state[parameter] = old.replace(jnp.zeros(old.shape, old.dtype))
        return method(nnx.merge(graphdef, state), *args, **kwargs)

    return call
