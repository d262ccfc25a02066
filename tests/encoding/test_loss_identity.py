"""The identity of a loss: the same for the same function, another for another."""

import functools
import os
import subprocess
import sys

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from tda import loss as losses
from tda.encoding import loss_identity
from tda.model.decoder import Decoder
from tda.model.settings import DecoderSettings

SIZES = dict(
    vocab_size=50, width=16, layers=2, heads=2, kv_heads=2, head_width=8, ff_width=32, scan=False
)


def decoder(seed=0, **how):
    return Decoder(DecoderSettings(**SIZES | how), rngs=nnx.Rngs(seed))


def cross_entropy(model, batch):
    return losses.output("loss")(model(batch["tokens"]), batch["targets"], batch["weights"])


def margin(model, batch):
    return losses.output("margin")(model(batch["tokens"]), batch["targets"], batch["weights"])


def test_parameters_do_not_count_and_settings_do():
    one = loss_identity.identify(cross_entropy, decoder())
    assert one == loss_identity.identify(cross_entropy, decoder(seed=1))
    others = [decoder(rope_base=50.0), decoder(dtype="bfloat16"), decoder(ff_width=16)]
    assert len({one, *(loss_identity.identify(cross_entropy, m) for m in others)}) == 4


def test_the_body_of_a_loss_counts_and_not_its_name():
    model = decoder()
    one = loss_identity.identify(cross_entropy, model)
    assert one == loss_identity.identify(lambda m, b: cross_entropy(m, b), model)
    assert one == loss_identity.identify(functools.partial(cross_entropy), model)
    assert one != loss_identity.identify(margin, model)
    assert one != loss_identity.identify(lambda m, b: 3 * cross_entropy(m, b), model)


@pytest.mark.parametrize("inside", [lambda f: f, jax.jit], ids=["outside", "inside a jit"])
def test_constants_that_a_loss_closes_over_count(inside):
    def loss(scale):
        held = np.linspace(1, scale, 300, dtype=np.float32)
        scaled = inside(lambda x: x * jnp.asarray(held).sum())
        return lambda model, batch: scaled(cross_entropy(model, batch))

    model = decoder()
    one, same, other = (loss_identity.identify(loss(s), model) for s in (2, 2, 3))
    assert one == same != other


def test_a_gradient_of_its_own_counts():
    def loss(scale):
        @jax.custom_vjp
        def same(x):
            return x

        same.defvjp(lambda x: (x, None), lambda _, g: (scale * g,))
        return lambda model, batch: same(cross_entropy(model, batch))

    model = decoder()
    assert loss_identity.identify(loss(1.0), model) != loss_identity.identify(loss(2.0), model)


def through_functions(model, batch):
    """A loss whose trace names functions by their addresses."""
    nats_B = jax.nn.relu(cross_entropy(model, batch))
    shape = jax.ShapeDtypeStruct(nats_B.shape, nats_B.dtype)
    one = jax.lax.stop_gradient(nats_B)
    return nats_B * jax.pure_callback(lambda x: np.ones_like(x), shape, one)


def test_another_process_finds_the_same():
    code = (
        "from tests.encoding.test_loss_identity import *\n"
        "print(loss_identity.identify(through_functions, decoder(scan=True, remat=True)))"
    )
    found = {
        subprocess.run(
            [sys.executable, "-c", code],
            env=os.environ | {"PYTHONHASHSEED": seed},
            capture_output=True,
            text=True,
            check=True,
        ).stdout
        for seed in ("1", "2")
    }
    here = loss_identity.identify(through_functions, decoder(scan=True, remat=True))
    assert found == {here + "\n"}


def test_other_versions_are_taken_at_their_word(tmp_path, monkeypatch):
    model = decoder()
    one, other = (
        loss_identity.identify_or_load(f, model, tmp_path) for f in (cross_entropy, margin)
    )
    assert one == loss_identity.identify(cross_entropy, model) != other
    loss_identity.save(one, tmp_path)
    # Of the store that is there last, whatever was tried before.
    loss_identity.save(other, tmp_path)
    assert loss_identity.identify_or_load(cross_entropy, model, tmp_path) == one
    monkeypatch.setattr(loss_identity, "_VERSIONS", {"jax": "9.9"})
    assert loss_identity.identify_or_load(cross_entropy, model, tmp_path) == other
    loss_identity.save(one, tmp_path)
    assert loss_identity.identify_or_load(margin, model, tmp_path) == other


def test_what_the_gradient_does_not_depend_on_does_not_count():
    """Guards: a store refused since the model was called, or a helper was named otherwise."""

    class Counting(nnx.Module):
        def __init__(self, count):
            self.inner = decoder()
            self.count = nnx.BatchStat(jnp.full(3, count))

        def __call__(self, tokens):
            self.count[...] = self.count[...] + tokens.sum()
            return self.inner(tokens)

    one, other = (loss_identity.identify(cross_entropy, Counting(n)) for n in (0.0, 5.0))
    assert one == other

    @jax.jit
    def twice(x):
        return 2 * x

    @jax.jit
    def double(x):
        return 2 * x

    one, other, more = (
        loss_identity.identify(lambda m, b, f=f: f(cross_entropy(m, b)), decoder())
        for f in (twice, double, jax.jit(lambda x: 3 * x))
    )
    assert one == other != more
