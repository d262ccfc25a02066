"""What encoding costs in memory, by the compiler's account, on meshes real and simulated."""

import functools

import jax
import jax.numpy as jnp
import optax
import pytest
from flax import nnx

from tda import sharding, train
from tda.gradients import planning
from tda.gradients.projection import Projection
from tda.model import functional
from tda.model.decoder import Decoder

SHAPE = dict(vocab_size=512, width=64, layers=4, heads=4, kv_heads=2, head_width=16, ff_width=192)


def abstract_model():
    return nnx.eval_shape(lambda: Decoder(**SHAPE, rngs=nnx.Rngs(0)))


def training_step(model, mesh, batch, length):
    tx = optax.adam(1e-3)
    model_fn, params = functional.split(model)
    state = jax.eval_shape(
        lambda p: {"params": p, "opt_state": tx.init(p), "step": jnp.int32(0)}, params
    )
    step = functools.partial(train.train_step, model_fn.merge, tx)
    with jax.set_mesh(mesh):
        lowered = jax.jit(step, donate_argnums=0).lower(
            train.abstract_state(state, model_fn, mesh),
            planning.abstract_batch(mesh, batch, length),
        )
        return planning.memory_of(lowered.compile())


@pytest.mark.parametrize("correction", ["none", "factored", "low_rank(4)", "adam"])
def test_encoding_needs_no_more_memory_than_training(one_device, correction):
    """For the same batch: no weight gradient of the batch, and never one for every example."""
    model, projection = abstract_model(), Projection(side=8, blocks=4)
    compiled = planning.compile_encoder(model, projection, one_device, 16, 64, correction)
    assert planning.memory_of(compiled).total <= training_step(model, one_device, 16, 64).total


def test_a_mesh_splits_what_a_device_holds(one_device):
    """Parameters and exact scales are split over fsdp and tensor; nothing is allocated."""
    model, projection = abstract_model(), Projection(side=8, blocks=4)
    mesh = sharding.make_mesh(data=1, fsdp=4, tensor=2)
    held = [
        planning.memory_of(planning.compile_encoder(model, projection, m, 8, 32, "adam")).arguments
        for m in (one_device, mesh)
    ]
    assert held[1] < held[0] / 6
