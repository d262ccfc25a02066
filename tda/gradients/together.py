"""Projected per-example gradients of several kinds in one backward pass.

The kinds differ in correction, sites or projection, but are of the same function: what a layer is
given, and what the loss asks of its output, are computed once, and projected for each.
"""

import dataclasses
from collections.abc import Callable

import jax
import jax.numpy as jnp
from flax import nnx

from tda import loss as losses
from tda.gradients import projection as projections
from tda.gradients import sites, taps, unseen, whole_gradients
from tda.model import functional
from tda.runtime import sharding


@dataclasses.dataclass(frozen=True)
class Part:
    """One kind of gradients.

    Attributes:
        chosen: the sites whose gradients are taken.
        projection: P.
        ends: what the sites' taps multiply by.
    """

    chosen: list[sites.Site]
    projection: projections.Projection
    ends: dict[sites.Site, taps.End]


@dataclasses.dataclass(frozen=True)
class Together:
    """Encodes batches in several ways, with one set of parameters.

    Attributes:
        layouts: which matrices are pooled into which block, of each kind.
        arrays: what `compiled` takes first: parameters and projections.
        axes: logical axes of the variables among them, by path name.
        compiled: the jitted function of (arrays, batch, scored=None), which gives a tuple.
    """

    layouts: tuple[projections.Layout, ...]
    arrays: tuple
    axes: dict[str, tuple]
    compiled: Callable

    def all(self, batch: dict, scored: int | None = None) -> tuple[jax.Array, ...]:
        """Encodings of each kind: float32 [B, E]; arguments as of `encoder.Encoder`."""
        return self.compiled(self.arrays, batch, scored)


def build(
    model: nnx.Module,
    parts: list[Part],
    output: str | Callable = "loss",
    mesh: jax.sharding.Mesh | None = None,
) -> Together:
    """An encoder of all `parts`, in their order; `output` and `mesh` as for `make_encoder`."""
    taken = take(model, parts, output)
    compiled = jax.jit(taken.encode, static_argnums=2)
    found = Together(taken.layouts, taken.arrays, taken.axes, compiled)
    return found if mesh is None else dataclasses.replace(found, arrays=place(found, mesh))


@dataclasses.dataclass(frozen=True)
class Taken:
    """What an encoder is made of.

    Attributes:
        layouts, arrays, axes: see `Together`.
        encode: the function of (arrays, batch, scored=None), not yet compiled.
    """

    layouts: tuple[projections.Layout, ...]
    arrays: tuple
    axes: dict[str, tuple]
    encode: Callable


def take(model: nnx.Module, parts: list[Part], output: str | Callable) -> Taken:
    """Taps of all parts on a model, and the function that reads them off in one pass.

    Where the taps turn out to miss a part of a parameter's gradient, once the function is traced,
    it is formed whole for every example, if all parts that take it allow that; else an error says.
    """
    plans = tuple(projections.layout(p.chosen, p.projection) for p in parts)
    output_fn = losses.output(output) if isinstance(output, str) else None
    # By site: the parts that take it, in the order of its taps.
    takers: dict[sites.Site, list[int]] = {}
    for i, part in enumerate(parts):
        for site in part.chosen:
            takers.setdefault(site, []).append(i)
    tapped = [s for s in takers if s.tapped]
    loose = [s for s in takers if not s.tapped]
    ends = {s: tuple(parts[i].ends[s] for i in of) for s, of in takers.items()}
    on_model = taps.put_on(model, {s: ends[s] for s in tapped})
    graphdef, *states = nnx.split(on_model, taps.Tap, ...)
    templates, variables = map(nnx.to_pure_dict, states)
    axes = functional.logical_axes(states[1])
    loose_ends = {s.path: tuple((e.left, e.right, e.scale) for e in ends[s]) for s in loose}
    search = unseen.make_search(model, tapped)
    # Turned gradients cannot be formed whole.
    fixed = {s for s, found in ends.items() if any(e.bases is not None for e in found)}

    def total(own, batch, scored):
        if output_fn is None:
            return jnp.sum(output(own, batch))
        return losses.total(own, batch, output_fn, scored)

    def summed(tap_arrays, variables, batch, scored):
        return total(nnx.merge(graphdef, tap_arrays, variables), batch, scored)

    def missed_by_taps(batch, scored):
        missed = search(lambda own: total(own, batch, scored))
        refused = [
            s for p in parts for s in p.chosen if s in missed and (s in fixed or not s.whole)
        ]
        unseen.refuse(refused, ", or take them with untapped='reference'")
        return missed

    def batched(variables, batch, scored):
        found = jax.grad(summed)(zeros(templates, batch), variables, batch, scored)
        return {s: found_at(found, s) for s in tapped}

    def one_by_one(variables, loose, loose_ends, batch, scored):
        rest, whole = whole_gradients.take(variables, loose)

        def alone(tap_arrays, whole, example):
            everything = whole_gradients.put(rest, whole)
            return summed(tap_arrays, everything, example, scored)

        def one(example):
            example = jax.tree.map(lambda x: x[None], example)
            return jax.grad(alone, argnums=(0, 1))(zeros(templates, example), whole, example)

        found, gradients = jax.vmap(one)(batch)
        projected = {s: [_batch_first_no_more(x, s) for x in found_at(found, s)] for s in tapped}
        for site in loose:
            gradient = gradients[(*site.module, site.parameter)]
            sides = (parts[i].projection.side for i in takers[site])
            projected[site] = [
                whole_gradients.project(site, gradient, *end, side)
                for end, side in zip(loose_ends[site.path], sides, strict=True)
            ]
        return projected

    def encode(arrays, batch, scored=None):
        variables, loose_ends = arrays
        missed = missed_by_taps(batch, scored)
        if loose or missed:
            loose_ends = loose_ends | {s.path: _ends_at(variables, s) for s in missed}
            projected = one_by_one(variables, [*loose, *missed], loose_ends, batch, scored)
        else:
            projected = batched(variables, batch, scored)
        return tuple(
            pool(plan, {s: projected[s][takers[s].index(i)] for s in part.chosen})
            for i, (plan, part) in enumerate(zip(plans, parts, strict=True))
        )

    return Taken(plans, (variables, loose_ends), axes, encode)


def shardings(encoder, mesh: jax.sharding.Mesh):
    """The sharding of each of the encoder's arrays on `mesh`, by its logical axes."""
    variables, loose_ends = encoder.arrays
    by_path = functional.flat_parameters(variables)
    named = {p: sharding.named(mesh, encoder.axes[p], x.shape) for p, x in by_path.items()}
    replicated = sharding.named(mesh, ())
    return (
        jax.tree_util.tree_map_with_path(lambda p, _: named[functional.path_name(p)], variables),
        jax.tree.map(lambda _: replicated, loose_ends),
    )


def place(encoder, mesh: jax.sharding.Mesh) -> tuple:
    """The encoder's arrays laid out on `mesh`."""
    return jax.tree.map(jax.device_put, encoder.arrays, shardings(encoder, mesh))


def zeros(templates: dict, batch: dict) -> dict:
    """Taps for every example of a batch, of templates [(L,) 1, k, k]."""
    count = jax.tree.leaves(batch)[0].shape[0]

    def one(template):
        *stack, _, p, q = template.shape
        return jnp.zeros((*stack, count, p, q), jnp.float32)

    return jax.tree.map(one, templates)


def found_at(cotangents: dict, site: sites.Site) -> list:
    """The cotangents of a site's taps."""
    of = sites.module_at(cotangents, site)["taps"]
    return [of[i]["tap"] for i in range(len(of))]


def _ends_at(variables: dict, site: sites.Site) -> tuple:
    """A, B and the scale (or None) of each of a site's taps."""
    of = sites.module_at(variables, site)["taps"]
    each = (of[i] for i in range(len(of)))
    return tuple((tap["left"], tap["right"], tap.get("scale")) for tap in each)


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
