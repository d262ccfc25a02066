"""The encoder and a training step, compiled ahead of time from shapes alone.

Their memory on a large mesh is thus known without one: see `benchmarks.pod`.
"""

import functools

import jax
import jax.numpy as jnp
import optax
from flax import nnx

from tda.gradients import encoder as encoders
from tda.gradients import sites, taps
from tda.gradients.moments.scales import parse_correction
from tda.gradients.projection import Projection
from tda.gradients.sites import find_sites
from tda.model import functional
from tda.runtime import sharding
from tda.training import loop


def abstract_taps(
    chosen: list[sites.Site], projection: Projection, correction: str
) -> dict[sites.Site, taps.Tap]:
    """Returns the shapes of what `tda.gradients.encoder.make_taps` makes for a correction."""
    name, rank = parse_correction(correction)
    width = projection.side * (rank or 1)

    def shape(site, *axes):
        stack = () if site.stack is None else (site.stack,)
        return jax.ShapeDtypeStruct((*stack, *axes), jnp.float32)

    return {
        s: taps.Tap(
            shape(s, s.rows, width),
            shape(s, s.columns, width),
            projection.side,
            shape(s, s.rows, s.columns) if name == "adam" else None,
        )
        for s in chosen
    }


def compile_encoder(
    model: nnx.Module,
    projection: Projection,
    mesh: jax.sharding.Mesh,
    batch: int,
    length: int,
    correction: str = "factored",
):
    """Compiles the encoder of an abstract model for a mesh.

    Args:
        model: made under `nnx.eval_shape`.
        projection: the projection.
        mesh: of real or simulated devices.
        batch, length: B and T of a batch over all devices.
        correction: as `tda.gradients.moments.scales.parse_correction` takes it.

    Returns:
        The compiled computation.
    """
    chosen = find_sites(model)
    encoder = encoders.build_encoder(
        model, [(projection, abstract_taps(chosen, projection, correction))]
    )
    arrays = jax.tree.map(
        lambda x, s: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=s),
        encoder.arrays,
        encoder.shardings(mesh),
    )
    with jax.set_mesh(mesh):
        return encoder.compiled.lower(arrays, abstract_batch(mesh, batch, length)).compile()


def compile_training_step(
    model: nnx.Module,
    tx: optax.GradientTransformation,
    mesh: jax.sharding.Mesh,
    batch: int,
    length: int,
):
    """Compiles a training step of an abstract model, the yardstick of encoding.

    Its state is donated. The arguments are those of `compile_encoder`, and the optimizer.
    """
    model_fn, params = functional.split(model)

    def start(params):
        return {"params": params, "opt_state": tx.init(params), "step": jnp.int32(0)}

    state = loop.abstract_state(jax.eval_shape(start, params), model_fn, mesh)
    step = functools.partial(loop.train_step, model_fn.merge, tx)
    with jax.set_mesh(mesh):
        lowered = jax.jit(step, donate_argnums=0).lower(state, abstract_batch(mesh, batch, length))
        return lowered.compile()


def abstract_batch(mesh: jax.sharding.Mesh, batch: int, length: int) -> dict:
    """Returns the shapes of a batch, split over the mesh's batch devices."""
    layout = sharding.named(mesh, ("batch", None), (batch, length))

    def shape(dtype):
        return jax.ShapeDtypeStruct((batch, length), dtype, sharding=layout)

    return {"tokens": shape(jnp.int32), "targets": shape(jnp.int32), "weights": shape(jnp.float32)}
