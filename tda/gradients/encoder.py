"""The encoder: projected per-example gradients of a batch in one backward pass."""

import dataclasses
import functools
import operator
from collections.abc import Callable

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from tda import loss as losses
from tda import sharding
from tda.gradients import projection as projections
from tda.gradients import sites, taps, whole_gradients
from tda.gradients.second_moments import Scale
from tda.model import functional


@dataclasses.dataclass(frozen=True)
class Encoder:
    """Encodes batches with one set of parameters.

    Attributes:
        layout: which matrices are pooled into which block.
        chosen: the sites whose gradients are taken.
        arrays: what `compiled` takes first: parameters and projections.
        axes: logical axes of the variables among them, by path name.
        compiled: the jitted function of (arrays, batch, scored=None).
    """

    layout: projections.Layout
    chosen: tuple[sites.Site, ...]
    arrays: tuple
    axes: dict[str, tuple]
    compiled: Callable

    def __call__(self, batch: dict, scored: int | None = None) -> jax.Array:
        """Encodings of a batch {"tokens", "targets", "weights"}, each [B, T]: float32 [B, E].

        Args:
            batch: the batch; compiled once for every shape.
            scored: positions that logits are computed at, from `scored_positions`; None for all.
        """
        return self.compiled(self.arrays, batch, scored)


def scored_positions(weights_BxT: np.ndarray) -> int | None:
    """The most positions that an example scores, as a power of two; None if that spares nothing."""
    most = int(np.count_nonzero(weights_BxT, axis=1).max(initial=1))
    rounded = 1 << (max(1, most) - 1).bit_length()
    return rounded if rounded <= weights_BxT.shape[1] // 2 else None


def ends_of(
    chosen: list[sites.Site], projection: projections.Projection, scales: dict[str, Scale] | None
) -> dict[sites.Site, taps.End]:
    """What the tap of every site multiplies by, outer products of scales folded into A and B."""
    ends = {}
    for site in chosen:
        left, right = map(jnp.asarray, projections.matrices(site, projection))
        scale = scales[site.path] if scales else None
        if scale is not None and scale.full is None:
            left, right = _copies(left, scale.left), _copies(right, scale.right)
        full = None if scale is None else scale.full
        ends[site] = taps.End(left, right, projection.side, full)
    return ends


def _copies(matrix, scales):
    """A scaled by each of R rows: [(L,) M, R·k] of [(L,) M, k] and [(L,) R, M]."""
    copies = jnp.swapaxes(scales, -1, -2)[..., None] * matrix[..., None, :]
    return copies.reshape(*matrix.shape[:-1], -1)


def make_encoder(
    model: nnx.Module,
    projection: projections.Projection,
    scales: dict[str, Scale] | None = None,
    output: str | Callable = "loss",
    include: str | None = None,
    exclude: str | None = None,
    untapped: str = "leave",
    mesh: jax.sharding.Mesh | None = None,
) -> Encoder:
    """An encoder of P·(∇L/√V) (Chang et al. 2024, eq. 3).

    Args:
        model: an NNX model that maps tokens [B, T] to logits [B, T, V].
        projection: P.
        scales: 1/√V by path of parameter (`tda.gradients.second_moments`); None for no correction.
        output: the function L that is differentiated: "loss", "margin" or "logit" of the model's
            logits; or a function of (model, batch) to float32 [B], for a model that is called in
            another way.
        include, exclude: regular expressions on parameters' path names (`tda.gradients.sites`).
        untapped: what becomes of chosen parameters that no tap can be put on: "leave", "reference"
            (the gradient of each example is formed whole) or "error".
        mesh: where given, projections and scales are laid out on it as the parameters they belong
            to, by their logical axes; else they are replicated.

    Raises:
        ValueError: nothing is included, or `projection` does not fit the model.
        KeyError: `scales` lacks a parameter.
    """
    chosen = sites.find(model, include, exclude, untapped)
    ends = ends_of(chosen, projection, scales)
    encoder = build(model, chosen, projection, ends, output)
    if mesh is None:
        return encoder
    return dataclasses.replace(encoder, arrays=place(encoder, mesh))


def build(
    model: nnx.Module,
    chosen: list[sites.Site],
    projection: projections.Projection,
    ends: dict[sites.Site, taps.End],
    output: str | Callable = "loss",
) -> Encoder:
    """The encoder of given sites and ends, whose arrays may be abstract (shapes without data)."""
    plan = projections.layout(chosen, projection)
    output_fn = losses.output(output) if isinstance(output, str) else None
    tapped = [s for s in chosen if s.tapped]
    loose = [s for s in chosen if not s.tapped]
    graphdef, *states = nnx.split(taps.put_on(model, {s: ends[s] for s in tapped}), taps.Tap, ...)
    templates, variables = map(nnx.to_pure_dict, states)
    axes = functional.logical_axes(states[1])
    loose_ends = {s.path: (ends[s].left, ends[s].right, ends[s].scale) for s in loose}

    def summed(tap_arrays, variables, batch, scored):
        own = nnx.merge(graphdef, tap_arrays, variables)
        if output_fn is None:
            return jnp.sum(output(own, batch))
        return losses.total(own, batch, output_fn, scored)

    def batched(variables, batch, scored):
        found = jax.grad(summed)(zeros(templates, batch), variables, batch, scored)
        return {s: found_at(found, s) for s in tapped}

    def one_by_one(variables, loose_ends, batch, scored):
        rest, whole = whole_gradients.take(variables, loose)

        def alone(tap_arrays, whole, example):
            everything = whole_gradients.put(rest, whole)
            return summed(tap_arrays, everything, example, scored)

        def one(example):
            example = jax.tree.map(lambda x: x[None], example)
            return jax.grad(alone, argnums=(0, 1))(zeros(templates, example), whole, example)

        found, gradients = jax.vmap(one)(batch)
        projected = {s: _batch_first_no_more(found_at(found, s), s) for s in tapped}
        for site in loose:
            end = loose_ends[site.path]
            projected[site] = whole_gradients.project(
                site, gradients[(*site.module, site.parameter)], *end, projection.side
            )
        return projected

    def encode(arrays, batch, scored=None):
        variables, loose_ends = arrays
        if loose:
            projected = one_by_one(variables, loose_ends, batch, scored)
        else:
            projected = batched(variables, batch, scored)
        return pool(plan, projected)

    compiled = jax.jit(encode, static_argnums=2)
    return Encoder(plan, tuple(chosen), (variables, loose_ends), axes, compiled)


def layouts(encoder: Encoder, mesh: jax.sharding.Mesh):
    """The sharding of each of the encoder's arrays on `mesh`, by its logical axes."""
    variables, loose_ends = encoder.arrays
    by_path = functional.flat_parameters(variables)
    named = {p: sharding.named(mesh, encoder.axes[p], x.shape) for p, x in by_path.items()}
    replicated = sharding.named(mesh, ())
    return (
        jax.tree_util.tree_map_with_path(lambda p, _: named[functional.path_name(p)], variables),
        jax.tree.map(lambda _: replicated, loose_ends),
    )


def place(encoder: Encoder, mesh: jax.sharding.Mesh) -> tuple:
    """The encoder's arrays laid out on `mesh`."""
    return jax.tree.map(jax.device_put, encoder.arrays, layouts(encoder, mesh))


def zeros(templates: dict, batch: dict) -> dict:
    """Taps for every example of a batch, of templates [(L,) 1, k, k]."""
    count = jax.tree.leaves(batch)[0].shape[0]

    def one(template):
        *stack, _, p, q = template.shape
        return jnp.zeros((*stack, count, p, q), jnp.float32)

    return jax.tree.map(one, templates)


def module_at(tree: dict, site: sites.Site) -> dict:
    """What a nested dict of variables holds of a site's module."""
    return functools.reduce(operator.getitem, site.module, tree)


def found_at(cotangents: dict, site: sites.Site):
    """The tap's cotangent at a site."""
    return module_at(cotangents, site)["tap"]


def _batch_first_no_more(x, site: sites.Site):
    """Taps of examples taken one by one, [B, (L,) 1, k, k], as [(L,) B, k, k]."""
    return x[:, 0] if site.stack is None else jnp.swapaxes(x[:, :, 0], 0, 1)


def pool(plan: projections.Layout, projected: dict[sites.Site, jax.Array]) -> jax.Array:
    """Adds up the projections of each block's matrices: float32 [B, E] of [(L,) B, k, k] each."""
    parts = [[] for _ in plan.blocks]
    for site, x in projected.items():
        x_LxBxPxP = x[None] if site.stack is None else x
        for block in sorted(set(plan.members[site.path])):
            layers = [i for i, b in enumerate(plan.members[site.path]) if b == block]
            parts[block].append(jnp.sum(x_LxBxPxP[jnp.asarray(layers)], axis=0))
    pooled = [sum(p) for p in parts]
    return jnp.concatenate([p.reshape(p.shape[0], -1) for p in pooled], axis=-1)
