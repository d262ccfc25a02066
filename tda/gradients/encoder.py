"""The encoder: projected per-example gradients of a batch in one backward pass."""

import dataclasses
from collections.abc import Callable

import jax
import jax.numpy as jnp
from flax import nnx

from tda import loss as losses
from tda.gradients import projection as projections
from tda.gradients import sites, taps
from tda.gradients.second_moments import Scale


@dataclasses.dataclass(frozen=True)
class Encoder:
    """Encodes batches with one set of parameters.

    Attributes:
        layout: which matrices are pooled into which block.
        encode: batch {"tokens", "targets", "weights"}, each [B, T], to encodings float32 [B, E].
    """

    layout: projections.Layout
    encode: Callable[[dict], jax.Array]

    def __call__(self, batch: dict) -> jax.Array:
        """`encode`, compiled once for every shape of batch."""
        return self.encode(batch)


def ends_of(
    chosen: list[sites.Site], projection: projections.Projection, scales: dict[str, Scale] | None
) -> dict[sites.Site, tuple]:
    """A, B and the exact scale of every site, an outer-product scale folded into A and B."""
    ends = {}
    for site in chosen:
        left, right = map(jnp.asarray, projections.matrices(site, projection))
        scale = scales[site.path] if scales else None
        if scale is not None and scale.full is None:
            left, right = left * scale.left[..., None], right * scale.right[..., None]
        ends[site] = (left, right, None if scale is None else scale.full)
    return ends


def make_encoder(
    model: nnx.Module,
    projection: projections.Projection,
    scales: dict[str, Scale] | None = None,
    output: str = "loss",
    include: str | None = None,
    exclude: str | None = None,
) -> Encoder:
    """An encoder of P·(∇L/√V) (Chang et al. 2024, eq. 3).

    Args:
        model: an NNX model that maps tokens [B, T] to logits [B, T, V].
        projection: P.
        scales: 1/√V by path of parameter (`tda.gradients.second_moments`); None for no correction.
        output: the function L that is differentiated: "loss", "margin" or "logit".
        include, exclude: regular expressions on parameters' path names (`tda.gradients.sites`).

    Raises:
        ValueError: nothing is included, or `projection` does not fit the model.
        KeyError: `scales` lacks a parameter.
    """
    chosen = sites.find(model, include, exclude)
    plan = projections.layout(chosen, projection)
    output_fn = losses.output(output)
    tapped = taps.put_on(model, ends_of(chosen, projection, scales))
    graphdef, *states = nnx.split(tapped, taps.Tap, ...)
    templates, variables = map(nnx.to_pure_dict, states)

    @jax.jit
    def encode(variables, batch):
        batch_size = batch["tokens"].shape[0]

        def zeros(template):
            *stack, _, p, q = template.shape
            return jnp.zeros((*stack, batch_size, p, q), jnp.float32)

        def total(tap_arrays):
            logits_BxTxV = nnx.merge(graphdef, tap_arrays, variables)(batch["tokens"])
            return jnp.sum(output_fn(logits_BxTxV, batch["targets"], batch["weights"]))

        cotangents = jax.grad(total)(jax.tree.map(zeros, templates))
        return pool(plan, {s: _at(cotangents, s) for s in chosen})

    return Encoder(plan, lambda batch: encode(variables, batch))


def _at(cotangents, site: sites.Site):
    node = cotangents
    for key in (*site.module, "tap"):
        node = node[key]
    return node


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
