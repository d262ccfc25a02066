"""Splits a passage's score over its positions: each position's part of an inner product.

A projected gradient is a sum over positions, Σ_t Aᵀ x_t δ_tᵀ B, in every layer, with the layer's
input x_t and output gradient δ_t at position t. So its inner product with a direction is a sum
over positions too, and the parts add up to the score exactly.
"""

import dataclasses
import functools
from collections.abc import Callable

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from tda import loss as losses
from tda.gradients import encoder as encoders
from tda.gradients import projection as projections
from tda.gradients import sites, taps, unseen
from tda.gradients.moments.scales import Scale
from tda.gradients.sites import find_sites
from tda.hessian import apply_root, apply_transposed_root


def make_contributions(
    model: nnx.Module,
    projection: projections.Projection,
    scales: dict[str, Scale] | None = None,
    output: str = "loss",
    include: str | None = None,
    exclude: str | None = None,
) -> Callable[[dict, jax.Array], jax.Array]:
    """Makes a function that splits ⟨direction, encoding⟩ over positions.

    The arguments are those of `tda.gradients.encoder.make_encoder`. The function takes a batch and
    a direction float32 [E] and returns float32 [B, T], whose sum over T is the inner product of the
    direction and the example's encoding. For a score ⟨N(W g_passage), N(W g_query)⟩ the direction
    is W N(W g_query) / ‖W g_passage‖ (`direction_of`).

    Raises:
        ValueError: the arguments are invalid (see `make_encoder`), or, when the function is called,
            the loss uses a parameter in a way that its tap does not see.
    """
    chosen = find_sites(model, include, exclude)
    plan = projections.layout(chosen, projection)
    output_fn = losses.output(output)
    site_taps = encoders.make_taps(chosen, projection, scales)
    side = projection.side

    def with_direction(direction_E):
        blocks = direction_E.reshape(len(plan.blocks), side, side)
        out = {}
        for site, tap in site_taps.items():
            W = blocks[jnp.asarray(plan.members[site.path])]
            W = W[0] if site.stack is None else W
            out[site] = dataclasses.replace(tap, direction=W)
        return out

    # This direction only fixes the shapes; each call replaces it by its own.
    undirected = with_direction(jnp.zeros(plan.width))
    example = taps.put_on(model, {s: (tap,) for s, tap in undirected.items()})
    graphdef, *states = nnx.split(example, taps.Zeros, ...)
    templates, variables = map(nnx.to_pure_dict, states)
    search = unseen.make_search(model, chosen, by_position=True)

    def total(own_model, batch):
        # All logits at once: a tap on the head needs the whole sequence, not a piece of it.
        return jnp.sum(output_fn(own_model(batch["tokens"]), batch["targets"], batch["weights"]))

    @jax.jit
    def contributions(variables, batch, direction_E):
        unseen.refuse(search(total, batch))
        B, T = batch["tokens"].shape
        variables = jax.tree.map(lambda x: x, variables)
        for site, tap in with_direction(direction_E).items():
            sites.module_at(variables, site)["tda_taps"][0]["direction"] = tap.direction

        def summed(tap_arrays):
            return total(nnx.merge(graphdef, tap_arrays, variables), batch)

        zeros = jax.tree.map(lambda t: jnp.zeros((*t.shape[:-2], B, T), jnp.float32), templates)
        cotangents = jax.grad(summed)(zeros)
        parts = [taps.cotangents_at(cotangents, s)[0] for s in chosen]
        return sum(x if s.stack is None else x.sum(0) for s, x in zip(chosen, parts, strict=True))

    return functools.partial(contributions, variables)


def direction_of(query_E, passage_E, roots, slices, unit_norm: bool) -> np.ndarray:
    """Returns the direction whose inner product with a passage's gradient is its score.

    Args:
        query_E, passage_E: projected gradients, float32 [E].
        roots: W of each block (`tda.hessian.Root`), or None for the identity.
        slices: each block's slice of the E dimensions.
        unit_norm: whether both whitened gradients are divided by their norms.

    Returns:
        float64 [E].
    """

    def whiten(x_E):
        if roots is None:
            return x_E
        return np.concatenate([apply_root(W, x_E[s]) for s, W in zip(slices, roots, strict=True)])

    query_E = whiten(np.asarray(query_E, np.float64))
    direction_E = query_E
    if roots is not None:
        pairs = zip(slices, roots, strict=True)
        direction_E = np.concatenate([apply_transposed_root(W, query_E[s]) for s, W in pairs])
    if not unit_norm:
        return direction_E
    norms = np.linalg.norm(query_E) * np.linalg.norm(whiten(np.asarray(passage_E, np.float64)))
    return direction_E / norms if norms > 0 else np.zeros_like(direction_E)
