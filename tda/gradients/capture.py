"""Projected gradients of the examples that a training step trains on, from its own backward pass.

A training step computes every layer's inputs and the gradients of its outputs anyway. With taps on
(`tda.gradients.taps`) the backward pass that gives the gradient of the weights also gives the
projected part of every example in it, at the cost of two thin products a layer.
"""

import functools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from tda.gradients import argument_checks, batch_mates, full_gradients, taps, unseen
from tda.gradients import projection as projections
from tda.gradients.encoder import check_blocks, make_taps
from tda.gradients.projection import Layout, Projection
from tda.gradients.sites import find_sites, module_at, tell_coverage
from tda.model import functional

# The largest difference that rounding explains, as a share of the norm of all parts of a block.
# Accelerators round float32 products to TF32 or bfloat16.
_ROUNDING = 0.03


class Capture:
    """Differentiates a training loss, and keeps each example's part of the gradient.

    In a training loop it takes the place of `nnx.value_and_grad`:

    capture = tda.Capture(model, tda.Projection(side=16, pooling="matrix"))

    @nnx.jit
    def step(model, optimizer, batch):
        loss, gradients, encodings = capture(mean_loss, model, batch)
        optimizer.update(model, gradients)
        return loss, encodings

    The rows of `encodings` are of the examples in the order in which the loss gives them to the
    model. So a loss must not sort or shuffle its examples: sort or shuffle batches before the step.
    `check` finds that out if it gets the loss.

    Args:
        model: the model, for its structure; its parameters are those of each call.
        projection: P.
        include, exclude: the parameters that are captured (`tda.gradients.sites.find_sites`); those
            that no tap fits are left out.
        tell: whether the share of the parameters that is captured is printed.

    Attributes:
        layout: which matrices are pooled into which block of an encoding.

    Raises:
        ValueError: nothing is included, or the projection does not fit the model.
    """

    def __init__(
        self,
        model: nnx.Module,
        projection: Projection,
        include: str | None = None,
        exclude: str | None = None,
        tell: bool = True,
    ):
        # A model with dropout is allowed: the step trains on what dropout keeps.
        evaluated = nnx.clone(model)
        evaluated.eval()
        sites = find_sites(evaluated, include, exclude, "leave")
        check_blocks(model, projection)
        if tell:
            tell_coverage(model, sites, is_default=include is None and exclude is None)
        self.layout: Layout = projections.layout(sites, projection)
        self._taps = {s: (tap,) for s, tap in make_taps(sites, projection, None).items()}

    def __call__(
        self, loss: Callable, model: nnx.Module, *batch: Any, has_aux: bool = False
    ) -> tuple[Any, nnx.State, jax.Array]:
        """Differentiates a loss; inside of `nnx.jit`, as a part of a training step.

        Args:
            loss: a function of the model and `batch` to a scalar, such as the mean of the examples'
                losses.
            model: the model; the loss's changes to it stay (counts of dropout, statistics).
            batch: the loss's other arguments: trees of arrays with the examples first.
            has_aux: whether the loss returns a pair: the scalar and anything else.

        Returns:
            The loss, or the pair that it returned; its gradient with respect to the parameters, as
            `nnx.value_and_grad` returns it; and float32 [B, E]: P of each example's part of that
            gradient. The parts add up to P of the whole. If the loss is a mean, each is the
            example's own gradient over B.

        Raises:
            ValueError: the loss uses a captured parameter where no tap sees it, and the message
                names the parameter; the loss is no scalar; or the model is not like the one that
                the capture was made with.
        """
        self._check_model(model)
        tapped = taps.put_on(model, self._taps)
        graphdef, *states = nnx.split(tapped, taps.Zeros, nnx.Param, ...)
        # Pure dicts: merging makes variables of its own of them, which a trace may change.
        templates, params, rest = map(nnx.to_pure_dict, states)
        search = unseen.make_search(model, list(self._taps))

        def scalar(own_model: nnx.Module, batch: tuple) -> jax.Array:
            return _scalar(loss(own_model, *batch), has_aux)

        unseen.refuse(search(scalar, batch))

        def total(zeros: dict, params: dict) -> tuple[jax.Array, tuple]:
            own_model = nnx.merge(graphdef, zeros, params, rest)
            value = loss(own_model, *batch)
            changed = nnx.state(own_model, nnx.Not(nnx.Any(taps.Zeros, nnx.Param)))
            return _scalar(value, has_aux), (value, changed)

        differentiate = jax.value_and_grad(total, argnums=(0, 1), has_aux=True)
        (_, (value, changed)), (cotangents, gradients) = differentiate(
            taps.zeros_for(templates, batch), params
        )
        nnx.update(model, _without_taps(changed, model))
        parts = {s: taps.cotangents_at(cotangents, s)[0] for s in self._taps}
        state = jax.tree.map(lambda x: x, nnx.state(model, nnx.Param))
        nnx.replace_by_pure_dict(state, gradients)
        return value, state, projections.pool(self.layout, parts)

    def _check_model(self, model: nnx.Module) -> None:
        argument_checks.check_model(model)
        arrays = functional.flat_parameters(nnx.to_pure_dict(nnx.state(model, nnx.Param)))
        shapes = {path: tuple(x.shape) for path, x in arrays.items()}
        for site in self._taps:
            if shapes.get(site.path) != tuple(site.shape):
                raise ValueError(
                    f"the capture was made with a model whose {site.path} has the shape "
                    f"{tuple(site.shape)}, and this model's is {shapes.get(site.path, 'missing')}; "
                    "make a tda.Capture of the model that you train"
                )

    def check(
        self,
        gradients: nnx.State,
        encodings_BxE: jax.Array,
        loss: Callable | None = None,
        model: nnx.Module | None = None,
        *batch: Any,
        has_aux: bool = False,
    ) -> None:
        """Checks the results of a call; call it after the first step.

        The parts must add up to the whole. They do not where the loss changes parameters before it
        uses them (noise, a scale), or a layer's product has a backward rule of its own.

        That leaves the order of the rows open, which are those of other examples where the loss
        sorts or shuffles its batch. With the loss, three or more examples are captured in three
        orders, on a copy of the model in evaluation mode: each row must move with its example.

        Args:
            gradients, encodings_BxE: results of a call.
            loss, model, batch, has_aux: arguments of a call; None to leave the order unchecked.

        Raises:
            ValueError: the parts do not add up, and the message names the blocks; or the loss
                reorders its examples.
        """
        shape = jnp.shape(encodings_BxE) if isinstance(gradients, nnx.State) else None
        if shape is None or len(shape) != 2 or shape[1] != self.layout.slices[-1].stop:
            raise ValueError(
                f"check got a {type(gradients).__name__} and a {type(encodings_BxE).__name__}; "
                "give the gradients and then the encodings, as a call returns them"
            )
        self._check_sum(gradients, encodings_BxE)
        if loss is None:
            return
        if model is None or not batch:
            raise ValueError("check got a loss alone; give the model and the batch after it, too")
        self._check_order(loss, model, batch, has_aux)

    def _check_order(self, loss: Callable, model: nnx.Module, batch: tuple, has_aux: bool) -> None:
        # Dropout draws another mask for another row.
        evaluated = nnx.clone(model)
        evaluated.eval()
        graphdef, state = nnx.split(evaluated)

        @jax.jit
        def encode(state: nnx.State, batch: tuple) -> jax.Array:
            return self(loss, nnx.merge(graphdef, state), *batch, has_aux=has_aux)[2]

        change = batch_mates.change_by_order(functools.partial(encode, state), batch)
        if change:
            raise ValueError(
                f"the loss {getattr(loss, '__name__', loss)!r} reorders its examples, so rows of "
                f"the encodings are those of other examples (they change by {change:.0%} where a "
                "batch's examples change places): sort or shuffle batches before the step, and not "
                "in the loss or the model"
            )

    def _check_sum(self, gradients: nnx.State, encodings_BxE: jax.Array) -> None:
        state = nnx.to_pure_dict(gradients)
        projected = {}
        for site, (tap,) in self._taps.items():
            gradient = module_at(state, site)[site.parameter][None]
            matrices = tap.left, tap.right, None
            projected[site] = full_gradients.project(site, gradient, *matrices, tap.side)
        sum_E = np.asarray(projections.pool(self.layout, projected)[0], np.float64)
        parts_BxE = np.asarray(encodings_BxE, np.float64)
        wrong = []
        for name, columns in zip(self.layout.blocks, self.layout.slices, strict=True):
            error = np.linalg.norm(parts_BxE[:, columns].sum(axis=0) - sum_E[columns])
            # The parts may cancel, so rounding is measured against them and not against their sum.
            if not error <= _ROUNDING * np.linalg.norm(parts_BxE[:, columns]):
                wrong.append(name)
        if wrong:
            raise ValueError(
                f"the examples' parts do not add up to the gradient of {', '.join(wrong)}: the "
                "loss changes these parameters before it uses them, or their layer's product has a "
                "backward rule of its own; leave them out with exclude="
            )


def _scalar(value: Any, has_aux: bool) -> jax.Array:
    """Returns the scalar that a loss returned, beside anything else if `has_aux`.

    Raises:
        ValueError: the loss returned something else.
    """
    is_pair = isinstance(value, tuple | list) and len(value) == 2
    if has_aux and not is_pair:
        raise ValueError(
            f"has_aux=True, but the loss returns {_describe(value)}; return the loss and anything "
            "else, or leave has_aux out"
        )
    loss = value[0] if has_aux else value
    if isinstance(loss, tuple | list):
        raise ValueError("the loss returns several values; pass has_aux=True, or return one number")
    if not hasattr(loss, "shape") or loss.shape != ():
        raise ValueError(
            f"the loss is {_describe(loss)}; return one number, such as the mean of the examples' "
            "losses"
        )
    return loss


def _describe(value: Any) -> str:
    kind = type(value).__name__
    return f"an array of the shape {value.shape}" if hasattr(value, "shape") else f"a {kind}"


def _without_taps(state: nnx.State, model: nnx.Module) -> nnx.State:
    """Returns the variables of a model's copy with taps that the model has too."""
    paths = {path for path, _ in nnx.to_flat_state(nnx.state(model))}
    return nnx.from_flat_state([(p, x) for p, x in nnx.to_flat_state(state) if p in paths])
