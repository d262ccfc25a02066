"""How the exact correction's weight gradients are formed: a few examples at a time."""

import re

import jax
import numpy as np
import pytest
from flax import nnx

from tda import loss as losses
from tda.gradients import program, reference, taps
from tda.gradients.encoder import make_encoder
from tda.gradients.projection import Projection
from tda.model import functional
from tda.runtime import sharding
from tests.gradients.test_encoder import scales_of

P = Projection(side=4, blocks=2)


@pytest.fixture(autouse=True)
def traced_anew():
    """Encoders of one program share what is traced, and the limits are read while tracing."""
    yield
    program.compile_shared.cache_clear()


@pytest.mark.parametrize("at_once", [0, 16 * 24, 5 * 16 * 24])
def test_examples_in_turns_keep_their_order(decoder, random_batch, monkeypatch, at_once):
    """Guards: rows that trade places; the layers' matrices take from one to six examples a turn."""
    monkeypatch.setattr(taps, "_AT_ONCE", at_once)
    model = decoder()
    scales, batch = scales_of(model), random_batch([6, 4, 2, 5, 1, 3], 6)
    got = make_encoder(model, P, scales)(batch)
    expected = np.asarray(reference.encode(model, batch, P, scales))
    np.testing.assert_allclose(got, expected, rtol=0, atol=1e-5 * np.abs(expected).max())


def test_accelerators_take_more_examples_and_logits_at_once(decoder, random_batch, monkeypatch):
    """Their turns are launches; a loss in pieces is a scan, and examples in turns are one too."""
    monkeypatch.setattr(taps, "_AT_ONCE", 0)
    monkeypatch.setattr(losses, "_CHUNK", 50 * 4)
    model = decoder()
    scales, batch = scales_of(model), random_batch([6, 4, 2, 5], 6)

    def count_turns():
        program.compile_shared.cache_clear()
        graphdef, state = nnx.split(model)
        encode = make_encoder(model, P, scales)

        def loss(state):
            return losses.total(nnx.merge(graphdef, state), batch, losses.cross_entropy)

        traces = jax.make_jaxpr(encode)(batch), jax.make_jaxpr(loss)(state)
        return [sum(map(int, re.findall(r" length=(\d+)", str(trace)))) for trace in traces]

    in_turns = count_turns()
    monkeypatch.setattr(jax, "default_backend", lambda: "gpu")
    at_once = count_turns()
    assert all(a < t for a, t in zip(at_once, in_turns, strict=True)), (at_once, in_turns)


def test_devices_take_turns_over_their_own_examples(decoder, random_batch, monkeypatch):
    monkeypatch.setattr(taps, "_AT_ONCE", 0)
    model = decoder()
    scales, batch = scales_of(model), random_batch([6, 4, 2, 5, 1, 3, 6, 2], 6)
    expected = np.asarray(make_encoder(model, P, scales)(batch))
    mesh = sharding.make_mesh(data=2, fsdp=2, tensor=2)
    fn, params = functional.split(model)
    model = fn.merge(functional.place(params, fn.axes, mesh))
    with jax.set_mesh(mesh):
        got = make_encoder(model, P, scales, mesh=mesh)(sharding.put_batch(mesh, batch))
    np.testing.assert_allclose(got, expected, rtol=0, atol=1e-5 * np.abs(expected).max())
