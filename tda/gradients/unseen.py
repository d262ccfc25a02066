"""Finds uses of a layer's parameter in a loss that the layer's tap does not see.

A tap sees what the layer's known class does with its parameter, for inputs whose first axis is the
batch. It misses a part of the gradient where the model reads the parameter directly
(`x @ layer.kernel[...]`), where a subclass multiplies by it without calling the known class, and
where the layer is called with other inputs: under `jax.vmap`, time-major, with the positions
`arange(T)`. The size of an axis does not tell that, since T may equal B. So the loss is traced once
more, by shape only and of a larger batch, with the parameter replaced by zeros wherever a tap sees
it: if the loss still depends on the parameter, a part of its gradient is unseen.
"""

import itertools
from collections.abc import Callable, Mapping

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


def make_search(model: nnx.Module, chosen: Mapping[sites.Site, object] | list[sites.Site]):
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
        larger = _enlarge(batch, variables)

        def missed_by_taps(only_batches: bool) -> list[sites.Site]:
            """Returns the missed sites; taps see the first axis as the batch, whatever it is."""

            def blind_loss(variables, batch):
                own_model = nnx.merge(graphdef, variables)
                modules = dict(nnx.iter_modules(own_model))
                for site in chosen:
                    modules[site.module].examples_seen = (
                        count_examples(batch) if only_batches else None
                    )
                return loss(own_model, batch)

            traced = _trace(blind_loss, variables, batch, larger)
            # jax has no public way to drop dead code from a jaxpr, hence `jax.interpreters`.
            # Nothing else will do: the gradient of a scan carries zeros along that look like a
            # dependence on the parameter, and only dead code elimination recognises them.
            _, used = partial_eval.dce_jaxpr(traced.jaxpr, [True])
            used = {path for path, is_used in zip(paths, used, strict=False) if is_used}
            missed = [s for s in chosen if s.path in used]
            # A parameter that is read but not differentiated contributes nothing to the gradient.
            return _differentiated(missed, blind_loss, variables, larger) if missed else []

        missed = missed_by_taps(only_batches=True)
        read = missed_by_taps(only_batches=False) if missed else []
        return {site: _READ if site in read else _OTHER_AXIS for site in missed}

    return search


def count_examples(batch) -> int:
    """Returns the length of the first axis, which all arrays of a batch must share.

    Raises:
        ValueError: they do not.
    """
    shapes = [np.shape(x) for x in jax.tree.leaves(batch)]
    lengths = {s[0] if s else None for s in shapes}
    if len(lengths) != 1 or None in lengths:
        raise ValueError(
            f"every array of a batch must have the examples as its first axis; got shapes {shapes}"
        )
    return lengths.pop()


def _enlarge(batch, variables):
    """Returns the shapes of a batch with some times as many examples.

    A multiple, so that devices can still share the examples; and one that is the length of no other
    axis, so that no other axis is taken for the batch.
    """
    count = count_examples(batch)
    others = {n for x in jax.tree.leaves(batch) for n in np.shape(x)[1:]}
    others |= {n for x in jax.tree.leaves(variables) for n in x.shape}
    times = next(n for n in itertools.count(2) if n * count not in others)
    return jax.tree.map(
        lambda x: jax.ShapeDtypeStruct((times * count, *jnp.shape(x)[1:]), jnp.result_type(x)),
        batch,
    )


def _trace(loss: Callable, variables, batch, larger):
    """Traces the loss of a larger batch.

    Raises:
        ValueError: that fails, although the batch itself can be traced.
    """
    try:
        return jax.make_jaxpr(loss)(variables, larger)
    except Exception as error:
        # A fault that does not come from the number of examples is raised as it is.
        jax.eval_shape(loss, variables, batch)
        raise ValueError(
            f"the loss of {count_examples(batch)} examples cannot be computed of "
            f"{count_examples(larger)}, by which the axis of the examples is told from others: "
            f"{error}; write it for any number of examples"
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
    if layer.examples_seen is not None and jnp.shape(inputs)[:1] != (layer.examples_seen,):
        return call(layer, inputs)  # no tap can tell the examples apart here
    parameter = layers.product(layer).parameter
    graphdef, state = nnx.split(layer)
    old = state[parameter]
    state[parameter] = old.replace(jnp.zeros(old.shape, old.dtype))
    return call(nnx.merge(graphdef, state), inputs)
