"""The memory that encoding takes, by the compiler's account, on real and simulated meshes."""

import jax
import optax
import pytest
from flax import nnx

from benchmarks.ahead_of_time import compile_encoder, compile_training_step
from tda.gradients.projection import Projection
from tda.model.decoder import Decoder
from tda.model.settings import DecoderSettings
from tda.plan.calibration import memory_of
from tda.runtime import sharding

SHAPE = dict(vocab_size=512, width=64, layers=4, heads=4, kv_heads=2, head_width=16, ff_width=192)


def abstract_model():
    return nnx.eval_shape(lambda: Decoder(DecoderSettings(**SHAPE), rngs=nnx.Rngs(0)))


MESHES = {"one device": dict(devices=jax.devices()[:1]), "fsdp and tensor": dict(fsdp=4, tensor=2)}


@pytest.mark.parametrize("mesh", MESHES)
@pytest.mark.parametrize("correction", ["none", "factored", "low_rank(4)", "adam"])
def test_encoding_needs_no_more_memory_than_training(correction, mesh):
    """For the same batch: no weight gradient of the batch, and never one for every example.

    On a mesh a device forms those of its own examples, of its own part of the features.
    """
    model, projection = abstract_model(), Projection(side=8, blocks=4)
    mesh, B = sharding.make_mesh(**MESHES[mesh]), 16
    step = compile_training_step(model, optax.adam(1e-3), mesh, B, 64)
    compiled = compile_encoder(model, projection, mesh, B, 64, correction)
    assert memory_of(compiled).total <= memory_of(step).total


def test_a_mesh_splits_what_a_device_holds(one_device):
    """Parameters and exact scales are split over fsdp and tensor; nothing is allocated."""
    model, projection = abstract_model(), Projection(side=8, blocks=4)
    mesh = sharding.make_mesh(data=1, fsdp=4, tensor=2)
    held = [
        memory_of(compile_encoder(model, projection, m, 8, 32, "adam")).arguments
        for m in (one_device, mesh)
    ]
    assert held[1] < held[0] / 6
