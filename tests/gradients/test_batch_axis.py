"""Layers called with other first axes than the batch: the reference's gradient, or an error.

The batches have as many examples as positions, so no size tells the two apart.
"""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from tda.gradients import contributions, kronecker, reference, unseen
from tda.gradients.encoder import make_encoder
from tda.gradients.projection import Projection
from tda.gradients.sites import find_sites
from tests.gradients.test_layers import D, V

B = T = 4
P = Projection(side=3, pooling="matrix")


def assert_equal_to_the_reference(model, batch, **scope):
    scope = dict(include=".") | scope
    got = make_encoder(model, P, **scope)(batch)
    expected = np.asarray(jax.jit(lambda b: reference.encode(model, b, P, **scope))(batch))
    assert np.linalg.norm(expected, axis=-1).min() > 0
    np.testing.assert_allclose(got, expected, rtol=0, atol=1e-5 * np.abs(expected).max())


class Model(nnx.Module):
    """Layers of every tapped kind in a row; subclasses differ in how `use` calls them."""

    def __init__(self, rngs):
        self.embed = nnx.Embed(V, D, rngs=rngs)
        self.position = nnx.Embed(9, D, rngs=rngs)
        self.plain = nnx.Linear(D, D, rngs=rngs)
        self.general = nnx.LinearGeneral(D, (2, 3), rngs=rngs)
        self.equation = nnx.Einsum("...d,df->...f", (D, D), rngs=rngs)
        self.lm_head = nnx.Linear(D, V, rngs=rngs)

    def layers(self, x):
        x = x + jnp.tanh(self.plain(x))
        x = x + jnp.tanh(self.general(x)).reshape(x.shape)
        x = x + jnp.tanh(self.equation(x))
        return x + jnp.tanh(self.embed.attend(x)) @ jnp.ones((V, D)) / V

    def use(self, x):
        return self.layers(x)

    def __call__(self, tokens):
        return self.lm_head(self.use(self.embed(tokens)))


class Vmapped(Model):
    def use(self, x):
        return jax.vmap(self.layers)(x)


class NnxVmapped(Model):
    def use(self, x):
        return nnx.vmap(lambda m, x: m.layers(x), in_axes=(None, 0))(self, x)


class TimeMajor(Model):
    def use(self, x):
        return jnp.swapaxes(self.layers(jnp.swapaxes(x, 0, 1)), 0, 1)


class Positions(Model):
    def use(self, x):
        return x + self.layers(self.position(jnp.arange(x.shape[1])))


class OneForAll(Model):
    def use(self, x):
        return x + self.layers(self.position(jnp.arange(x.shape[1]))[None])


class Folded(Model):
    def use(self, x):
        return self.layers(x.reshape(-1, D)).reshape(x.shape)


class OneAtATime(Model):
    def use(self, x):
        return jax.lax.map(lambda one: self.layers(one[None])[0], x)


class OfPairs(Model):
    """Examples in groups of four, each of which looks like a batch of four."""

    def use(self, x):
        pairs = jnp.concatenate([x, 2 * x], 1).reshape(-1, 4, 2, D)
        return jax.lax.map(self.layers, pairs).reshape(x.shape[0], 2, T, D).sum(1)


class Doubled(Model):
    def use(self, x):
        return sum(jnp.split(self.layers(jnp.concatenate([x, 2 * x])), 2))


class Twice(Model):
    """Called once as it should be."""

    def use(self, x):
        return jax.vmap(self.layers)(jnp.tanh(self.layers(x)))


ELSEWHERE = [
    Vmapped,
    NnxVmapped,
    TimeMajor,
    Positions,
    OneForAll,
    Folded,
    OneAtATime,
    OfPairs,
    Doubled,
    Twice,
]


@pytest.mark.parametrize("kind", ELSEWHERE)
def test_another_first_axis_is_named_and_taken_by_the_reference(kind, random_batch):
    """Guards: gradients of other examples, where positions are taken for the batch."""
    model, batch = kind(nnx.Rngs(0)), random_batch([4, 2, 4, 3], T)
    layers = ("embed/embedding", "equation/kernel", "general/kernel", "plain/kernel")
    named = ", ".join(layers[1:])
    with pytest.raises(ValueError, match=f"{named}: its layer is called with inputs whose first"):
        make_encoder(model, P)(batch)
    search = unseen.make_search(model, find_sites(model, "."))
    missed = {s.path for s in search(lambda m, b: m(b["tokens"]).sum(), batch)}
    assert missed >= set(layers) and "lm_head/kernel" not in missed
    assert_equal_to_the_reference(model, batch, untapped="reference")


class VmappedInside(Model):
    """Mapped over another axis than the batch: a tap adds up what comes back along it."""

    def use(self, x):
        return jax.vmap(self.layers, in_axes=1, out_axes=1)(x)


class Recurrent(Model):
    def use(self, x):
        def step(carried, x_BxD):
            carried = jnp.tanh(self.layers(carried + x_BxD))
            return carried, carried

        return jnp.swapaxes(jax.lax.scan(step, 0 * x[:, 0], jnp.swapaxes(x, 0, 1))[1], 0, 1)


class Ensemble(Model):
    def __init__(self, rngs):
        super().__init__(rngs)
        self.members = nnx.vmap(lambda r: nnx.Linear(D, D, rngs=r))(rngs.fork(split=3))

    def use(self, x):
        return nnx.vmap(lambda m, x: m(x), in_axes=(0, None))(self.members, x).sum(0)


class EveryPosition(Model):
    def use(self, x):
        at = jnp.broadcast_to(jnp.arange(x.shape[1]), x.shape[:2])
        return self.layers(x + self.position(at))


@pytest.mark.parametrize("kind", [Model, VmappedInside, Recurrent, Ensemble, EveryPosition])
def test_batches_in_front_are_tapped_whatever_follows(kind, random_batch):
    """Guards: layers refused that are called as they should be."""
    model, batch = kind(nnx.Rngs(0)), random_batch([4, 2, 4, 3], T)
    search = unseen.make_search(model, find_sites(model, "."))
    assert not search(lambda m, b: m(b["tokens"]).sum(), batch)
    assert_equal_to_the_reference(model, batch)


def squares(model, batch):
    return jnp.sum(jax.vmap(model)(batch["x"]) ** 2, axis=-1)


def test_a_model_mapped_inside_the_loss():
    """Guards: features of the length of the batch taken for it."""
    model = nnx.Sequential(nnx.Linear(B, B, rngs=nnx.Rngs(0)), nnx.Linear(B, 3, rngs=nnx.Rngs(1)))
    batch = {"x": np.random.default_rng(0).normal(size=(B, B)).astype(np.float32)}
    with pytest.raises(ValueError, match="layers/0/kernel, layers/1/kernel: its layer is called"):
        make_encoder(model, P, output=squares)(batch)
    assert_equal_to_the_reference(model, batch, output=squares, untapped="reference")


def test_a_jitted_loss_is_searched_for_every_batch():
    """Guards: traces that jax keeps of one batch and uses for another."""
    model = nnx.Linear(D, 3, rngs=nnx.Rngs(0))

    @nnx.jit
    def jitted(model, batch):
        return jnp.sum(model(batch["x"].reshape(-1, D)).reshape(batch["x"].shape[0], -1), axis=-1)

    flat, deep = ({"x": np.ones((B, *more, D), np.float32)} for more in ((), (3,)))
    encode = make_encoder(model, P, output=jitted)
    for _ in range(2):
        assert np.isfinite(encode(flat)).all()
        with pytest.raises(ValueError, match="kernel: its layer is called"):
            encode(deep)


def test_another_equation_at_the_call_is_seen(random_batch):
    """Guards: an Einsum's gradient by an equation that it was not called with."""

    class Turned(Model):
        def layers(self, x):
            return self.equation(x, "...d,fd->...f")

    model, batch = Turned(nnx.Rngs(0)), random_batch([4, 2, 4, 3], T)
    with pytest.raises(ValueError, match="equation/kernel: the model, or a subclass"):
        make_encoder(model, P, include="equation")(batch)
    scope = dict(untapped="reference", exclude="plain|general|position|equation/bias")
    assert_equal_to_the_reference(model, batch, **scope)


def test_a_loss_of_a_fixed_number_of_examples_is_refused(random_batch):
    class Fixed(Model):
        def use(self, x):
            return self.layers(x + jnp.ones((B, T, D)))

    with pytest.raises(ValueError, match=r"of 4 examples cannot be computed for \d+, .*any number"):
        make_encoder(Fixed(nnx.Rngs(0)), P)(random_batch([4, 2, 4, 3], T))


def test_a_fault_of_the_loss_is_told_as_it_is(random_batch):
    class Broken(Model):
        def use(self, x):
            raise RuntimeError(f"{x.shape[0]} examples do not work")

    with pytest.raises(RuntimeError, match="4 examples do not work"):
        make_encoder(Broken(nnx.Rngs(0)), P)(random_batch([4, 2, 4, 3], T))


def test_contributions_and_curvature_refuse_other_axes(random_batch):
    model, batch = Vmapped(nnx.Rngs(0)), random_batch([4, 2, 4, 3], T)
    split = contributions.make_contributions(model, P, include="plain/kernel")
    with pytest.raises(ValueError, match="plain/kernel: its layer is called"):
        split(batch, jnp.zeros(P.side**2))
    chosen = kronecker.factored(find_sites(model, "plain/kernel"))
    with pytest.raises(ValueError, match="plain/kernel: its layer is called"):
        kronecker.covariances(model, chosen, [batch], "data")


def test_a_stack_whose_taps_are_not_mapped_is_refused(random_batch):
    class Partly(Model):
        def __init__(self, rngs):
            super().__init__(rngs)
            self.layers = nnx.vmap(lambda r: nnx.Linear(D, D, rngs=r))(rngs.fork(split=B))

        def use(self, x):
            axes = nnx.StateAxes({nnx.Param: 0, ...: None})

            @nnx.scan(in_axes=(nnx.Carry, axes), out_axes=nnx.Carry)
            def step(x, layer):
                return jnp.tanh(layer(x))

            return step(x, self.layers)

    with pytest.raises(ValueError, match="a layer of shape 6 × 6 got the taps of its whole stack"):
        make_encoder(Partly(nnx.Rngs(0)), P, include="layers")(random_batch([4, 2, 4, 3], T))
