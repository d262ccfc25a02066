"""The reference that the encoder is tested against: slow, obvious, right.

The gradient of each example with respect to every whole parameter, scaled weight by weight,
multiplied by the same A and B, added up by block.
"""

import functools
from collections.abc import Callable

import jax
import jax.numpy as jnp
from flax import nnx

from tda import loss as losses
from tda.gradients import projection as projections
from tda.gradients import sites
from tda.gradients.moments.scales import Scale
from tda.gradients.sites import find_sites
from tda.model import functional


def per_example_gradients(model: nnx.Module, batch: dict, output: str | Callable = "loss") -> dict:
    """Returns the gradient of every example: float32 [B, …] by path name of the parameter."""
    model_fn, params = functional.split(model)
    example_losses = losses.of_examples(output)

    def example_loss(params, example):
        example = jax.tree.map(lambda x: x[None], example)
        return example_losses(model_fn.merge(params), example)[0]

    gradients = jax.vmap(jax.grad(example_loss), in_axes=(None, 0))(params, batch)
    return functional.flat_parameters(gradients)


def encode(
    model: nnx.Module,
    batch: dict,
    projection: projections.Projection,
    scales: dict[str, Scale] | None = None,
    output: str | Callable = "loss",
    include: str | None = None,
    exclude: str | None = None,
    untapped: str = "leave",
) -> jax.Array:
    """Encodes a batch as the encoder of `tda.gradients.encoder.make_encoder`: float32 [B, E]."""
    chosen = find_sites(model, include, exclude, untapped)
    return project(chosen, per_example_gradients(model, batch, output), projection, scales)


def project(
    chosen: list[sites.Site],
    gradients: dict[str, jax.Array],
    projection: projections.Projection,
    scales: dict[str, Scale] | None = None,
) -> jax.Array:
    """Projects full gradients, float32 [B, …] by path, to float32 [B, E]."""
    einsum = functools.partial(jnp.einsum, precision="highest")
    projected = {}
    for site in chosen:
        G = jax.vmap(site.matrix)(gradients[site.path]).astype(jnp.float32)
        if scales:
            G = G * scales[site.path].dense()
        left, right = projections.matrices(site, projection)
        if site.stack is None:
            projected[site] = einsum("bmn,mp,nq->bpq", G, left, right)
        else:
            projected[site] = einsum("blmn,lmp,lnq->lbpq", G, left, right)
    return projections.pool(projections.layout(chosen, projection), projected)
