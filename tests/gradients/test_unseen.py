"""Models that use a parameter in more ways than one: the reference's gradient, or an error."""

import gc
import weakref

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from tda.gradients import contributions, kronecker, layers, reference, sites, unseen
from tda.gradients.encoder import build_encoder, make_encoder, make_taps
from tda.gradients.projection import Projection
from tda.gradients.sites import find_sites
from tests.gradients.test_encoder import scales_of
from tests.gradients.test_layers import D, V, assert_equal_to_the_reference

P = Projection(side=3, pooling="matrix")


class Model(nnx.Module):
    """Two layers between an embedding and a head; what differs is what `make` and `use` do."""

    def __init__(self, rngs):
        self.embed = nnx.Embed(V, D, rngs=rngs)
        self.first = self.make(rngs)
        self.second = nnx.Linear(D, D, rngs=rngs)
        self.lm_head = nnx.Linear(D, V, rngs=rngs)

    def make(self, rngs):
        return nnx.Linear(D, D, rngs=rngs)

    def use(self, x):
        return self.second(jnp.tanh(self.first(x)))

    def __call__(self, tokens):
        return self.lm_head(jnp.tanh(self.use(self.embed(tokens))))


class Stack(Model):
    def make(self, rngs):
        return nnx.vmap(lambda r: nnx.Linear(D, D, rngs=r))(rngs.split(3))


def scan(step, x, stack):
    return nnx.scan(step, in_axes=(nnx.Carry, 0), out_axes=nnx.Carry)(x, stack)


def made(kind):
    return kind(nnx.Rngs(0))


def batch_of(random_batch):
    return random_batch([5, 3, 4], 5)


# One Variable in two layers.


class OneKernel(Model):
    def __init__(self, rngs):
        super().__init__(rngs)
        self.second.kernel = self.first.kernel


def test_a_parameter_of_two_layers_is_named_and_taken_whole(random_batch):
    """Guards: tied weights of which one layer's part is counted."""
    model, batch = made(OneKernel), batch_of(random_batch)
    assert "first/kernel" in sites.left_out(model, find_sites(model, "."))
    with pytest.raises(ValueError, match="no tap can be put on first/kernel"):
        find_sites(model, "kernel", untapped="error")
    assert_equal_to_the_reference(model, batch)
    assert_equal_to_the_reference(model, batch, untapped="reference")
    assert "first/kernel" in {s.path for s in find_sites(model, ".", untapped="reference")}


def test_a_layer_with_two_names_is_tapped(random_batch):
    class Twice(Model):
        def __init__(self, rngs):
            super().__init__(rngs)
            self.second = self.first

    model = made(Twice)
    assert all(s.tapped for s in find_sites(model, "kernel", untapped="reference"))
    assert_equal_to_the_reference(model, batch_of(random_batch))


def test_a_parameter_that_a_wrapper_changes_is_taken_whole(random_batch):
    """The layer multiplies by what the wrapper makes of its parameter."""

    class Wrapped(Model):
        def __init__(self, rngs):
            super().__init__(rngs)
            self.norm = nnx.SpectralNorm(self.first, rngs=rngs)
            del self.first

        def use(self, x):
            return self.second(jnp.tanh(self.norm(x, update_stats=False)))

    model, path = made(Wrapped), "norm/layer_instance/kernel"
    assert path in sites.left_out(model, find_sites(model, "."))
    scope = dict(untapped="reference")
    assert_equal_to_the_reference(model, batch_of(random_batch), **scope)
    assert path in {s.path for s in find_sites(model, ".", **scope)}


# Subclasses with a call of their own.


class Scaled(nnx.Linear):
    def __call__(self, x):
        return 3 * super().__call__(x)


class Around(Scaled):
    """What goes in is not what it was called with; called twice."""

    def __call__(self, x):
        return jnp.sin(super().__call__(x**2)) + super().__call__(x[:, ::-1])


class ScaledGeneral(nnx.LinearGeneral):
    def __call__(self, x):
        return super().__call__(2 * x).sum(-2)


class ScaledEinsum(nnx.Einsum):
    def __call__(self, x):
        return 3 * super().__call__(x)


class Unchanged(nnx.Linear):
    """No call of its own."""


LAYERS = {
    "scaled": lambda r: Scaled(D, D, rngs=r),
    "around": lambda r: Around(D, D, rngs=r),
    "general": lambda r: ScaledGeneral(D, (2, D), rngs=r),
    "einsum": lambda r: ScaledEinsum("btd,df->btf", (D, D), rngs=r),
    "unchanged": lambda r: Unchanged(D, D, rngs=r),
    "lora": lambda r: nnx.LoRALinear(
        D, D, lora_rank=2, b_initializer=nnx.initializers.normal(), rngs=r
    ),
}


@pytest.mark.parametrize("name", LAYERS)
def test_what_a_subclass_makes_of_its_class_counts(random_batch, name):
    """Guards: a factor left out of the gradient; an input that the layer was not given."""

    class Subclassed(Model):
        def make(self, rngs):
            return LAYERS[name](rngs)

    model = made(Subclassed)
    assert "first/kernel" in {s.path for s in find_sites(model) if s.tapped}
    assert_equal_to_the_reference(model, batch_of(random_batch))


def test_embeddings_have_subclasses_too(random_batch):
    class Embed(nnx.Embed):
        def __call__(self, tokens):
            return 3 * super().__call__(tokens)

        def attend(self, x):
            return super().attend(2 * x)

    class Tied(Model):
        def __init__(self, rngs):
            super().__init__(rngs)
            self.embed = Embed(V, D, rngs=rngs)
            del self.lm_head

        def __call__(self, tokens):
            return self.embed.attend(jnp.tanh(self.use(self.embed(tokens))))

    model = made(Tied)
    assert {s.path for s in find_sites(model, ".")} >= {"embed/embedding"}
    assert_equal_to_the_reference(model, batch_of(random_batch))


def test_what_is_made_known_may_be_subclassed_and_be_a_subclass(random_batch):
    """The nearest known class counts: one that is made known stands before what it is made of."""

    class Turned(nnx.Linear):
        equation = "btd,df->btf"

        def __call__(self, x):
            return jnp.einsum(self.equation, x, self.kernel[...])

    class Halved(Turned):
        def __call__(self, x):
            return super().__call__(x) / 2

    class Made(Model):
        def make(self, rngs):
            return Halved(D, D, rngs=rngs)

    model, batch = made(Made), batch_of(random_batch)
    with pytest.raises(ValueError, match="first/kernel"):
        make_encoder(model, P)(batch)
    layers.register_einsum(Turned, "kernel", "equation")
    assert_equal_to_the_reference(made(Made), batch)


# Uses that no tap sees.


class Direct(Model):
    """The layer itself is never called."""

    def use(self, x):
        return self.second(jnp.tanh(x @ self.first.kernel[...]))


class Tied(Model):
    """The embedding is looked up as it should be, and is the head by hand."""

    def __call__(self, tokens):
        return jnp.tanh(self.use(self.embed(tokens))) @ self.embed.embedding[...].T


class Alone(Model):
    """A subclass that does the product itself."""

    class Layer(nnx.Linear):
        def __call__(self, x):
            return 3 * (x @ self.kernel[...]) + self.bias[...]

    def make(self, rngs):
        return self.Layer(D, D, rngs=rngs)


class ByName(Alone):
    """A subclass that calls its class by name."""

    class Layer(nnx.Linear):
        def __call__(self, x):
            return 3 * nnx.Linear.__call__(self, x)


class Penalised(Model):
    """The loss has a part that no layer's output has."""

    def __call__(self, tokens):
        return super().__call__(tokens) * jnp.sum(self.first.kernel[...] ** 2)


class DirectlyScanned(Stack):
    def use(self, x):
        return self.second(scan(lambda x, layer: jnp.tanh(x @ layer.kernel[...]), x, self.first))


class AfterTheScan(Stack):
    def use(self, x):
        x = scan(lambda x, layer: jnp.tanh(layer(x)), x, self.first)
        return self.second(x @ self.first.kernel[...][0])


UNSEEN = (Direct, Tied, Alone, ByName, Penalised, DirectlyScanned, AfterTheScan)


@pytest.mark.parametrize("kind", UNSEEN)
def test_a_use_that_no_tap_sees_is_refused_or_taken_whole(random_batch, kind):
    """Guards: a gradient that is zero, or a part of itself, in silence."""
    model, batch = made(kind), batch_of(random_batch)
    path = "embed/embedding" if kind is Tied else "first/kernel"
    for untapped in ("leave", "error"):
        encoder = make_encoder(model, P, include="kernel|embedding", untapped=untapped)
        with pytest.raises(ValueError, match=f"gradient of {path}: .*untapped='reference'"):
            encoder(batch)
    assert_equal_to_the_reference(model, batch, untapped="reference")
    assert_equal_to_the_reference(model, batch, exclude=path)


LINEAR = {
    "sum": lambda kernel: kernel.sum(),
    "small": lambda kernel: 1e-3 * kernel.mean(),
    "compiled": jax.jit(lambda kernel: -kernel[0, 0]),
}


@pytest.mark.parametrize("name", LINEAR)
def test_a_part_of_the_loss_that_is_linear_in_a_parameter_is_refused(random_batch, name):
    """Guards: a gradient that is the same for all batches taken for one of zero."""

    def loss(model, batch):
        return model(batch["tokens"]).sum((1, 2)) + LINEAR[name](model.first.kernel[...])

    encoder = make_encoder(made(Model), P, output=loss)
    with pytest.raises(ValueError, match="gradient of first/kernel:"):
        encoder(batch_of(random_batch))


# Uses that taps see, however the model is compiled.


@nnx.jit
def compiled(layer, x):
    return jnp.tanh(layer(x))


class Compiled(Model):
    """Traced once: the second layer and the second model find it done."""

    def use(self, x):
        return compiled(self.second, compiled(self.first, x))


class CompiledCall(Model):
    class Layer(nnx.Linear):
        @nnx.jit
        def __call__(self, x):
            return 2 * super().__call__(x)

    def make(self, rngs):
        return self.Layer(D, D, rngs=rngs)


class Recomputed(Model):
    def use(self, x):
        again = nnx.remat(lambda layer, x: jnp.tanh(layer(x)))
        return jax.checkpoint(lambda x: self.second(x))(again(self.first, x))


class Undifferentiated(Model):
    """The parameter is read, and no gradient goes there."""

    def use(self, x):
        jax.debug.callback(lambda _: None, jnp.sum(self.first.kernel[...]))
        size = jax.lax.stop_gradient(jnp.linalg.norm(self.first.kernel[...]))
        return self.second(jnp.tanh(self.first(x) / size))


class Repeated(Model):
    def use(self, x):
        step = lambda x, _: (self.second(jnp.tanh(self.first(x))), None)  # noqa: E731
        return jax.lax.scan(step, x, None, length=3)[0]


class Scanned(Stack):
    """Scanned twice, compiled and recomputed."""

    def use(self, x):
        step = nnx.remat(lambda x, layer: jnp.tanh(layer(x)))
        go = nnx.jit(lambda x, stack: scan(step, x, stack))
        return self.second(go(go(x, self.first), self.first))


class Stacked(Model):
    """Layers that are stacked when they are called."""

    def use(self, x):
        stack = jax.tree.map(lambda *a: jnp.stack(a), self.first, self.second)
        return jax.lax.scan(lambda x, layer: (jnp.tanh(layer(x)), None), x, stack)[0]


class SideBySide(Stack):
    def use(self, x):
        each = nnx.vmap(lambda layer, x: jnp.tanh(layer(x)), in_axes=(0, None))
        return self.second(each(self.first, x).sum(0))


class Branched(Model):
    def use(self, x):
        one, other = lambda layer, x: layer(x), lambda layer, x: jnp.tanh(layer(x))
        return nnx.cond(jnp.asarray(True), one, other, self.first, self.second(x))


class Asked(Model):
    """The parameter is asked for its type alone."""

    def use(self, x):
        return super().use(x.astype(self.first.kernel.dtype))


SEEN = (
    Compiled,
    CompiledCall,
    Recomputed,
    Undifferentiated,
    Repeated,
    Scanned,
    Stacked,
    SideBySide,
    Branched,
    Asked,
)


# Several seconds each, for what Scanned, CompiledCall and Branched have too.
SLOW = (Repeated, Stacked, SideBySide)


@pytest.mark.parametrize(
    "kind", [pytest.param(k, marks=pytest.mark.slow if k in SLOW else ()) for k in SEEN]
)
def test_what_taps_see_is_not_refused(random_batch, kind):
    """Twice, so that what was compiled for another encoder is at hand."""
    batch = batch_of(random_batch)
    for _ in range(2):
        model = made(kind)
        chosen = find_sites(model, "kernel|embedding")
        search = unseen.make_search(model, chosen)
        assert not search(lambda own, batch: own(batch["tokens"]).sum(), batch)
        assert_equal_to_the_reference(model, batch)


def test_a_layer_without_a_part_in_the_loss_has_a_gradient_of_zeros(random_batch):
    class Skipped(Model):
        def use(self, x):
            self.first(x)
            return self.second(x)

    encoder = make_encoder(made(Skipped), P)
    got = np.asarray(encoder(batch_of(random_batch))).reshape(3, len(encoder.layout.blocks), 9)
    norms = dict(zip(encoder.layout.blocks, np.linalg.norm(got, axis=-1).min(0), strict=True))
    assert norms["first/kernel"] == 0 < norms["second/kernel"]


# The parts that are built on taps.


def test_each_kind_decides_for_itself(random_batch):
    """One kind of gradients may take whole ones, another may not; turned ones never."""
    model, batch = made(Direct), batch_of(random_batch)

    def part(include, untapped, scales=None):
        chosen = find_sites(model, include, untapped=untapped)
        return P, make_taps(chosen, P, scales)

    whole, plain = part("first/kernel", "reference"), part("second/kernel", "leave")
    exact = part(".", "reference", scales_of(model, include=".", untapped="reference"))
    got = build_encoder(model, [whole, plain, exact]).encode_all(batch)
    for x, one in zip(got, (whole, plain, exact), strict=True):
        scales = scales_of(model, include=".", untapped="reference") if one is exact else None
        gradients = reference.per_example_gradients(model, batch)
        expected = reference.project(list(one[1]), gradients, P, scales)
        np.testing.assert_allclose(x, expected, rtol=0, atol=1e-5 * np.abs(expected).max())
    with pytest.raises(ValueError, match="gradient of first/kernel:"):
        build_encoder(model, [whole, part("kernel", "leave")]).encode_all(batch)
    (site,) = whole[1]
    unit = kronecker.Curvature(np.eye(D), np.eye(D), np.ones((D, D)))
    turned = (P, kronecker.ekfac_taps([site], P, {site.path: unit}))
    with pytest.raises(ValueError, match="gradient of first/kernel:"):
        build_encoder(model, [turned]).encode_all(batch)


def test_contributions_and_curvature_refuse_it_too(random_batch):
    model, batch = made(Direct), batch_of(random_batch)
    chosen = find_sites(model, "kernel", "head")
    split = contributions.make_contributions(model, P, include="kernel")  # of three matrices
    with pytest.raises(ValueError, match=r"gradient of first/kernel: .*what is named(\n|$)"):
        split(batch, jnp.zeros(3 * P.side**2))
    with pytest.raises(ValueError, match=r"gradient of first/kernel: .*what is named(\n|$)"):
        kronecker.covariances(model, kronecker.factored(chosen), [batch], "data")


def test_curvature_is_of_what_a_subclass_asks_of_its_class(random_batch):
    """The same function by a subclass and by a plain layer has the same factors."""

    class Subclassed(Model):
        def make(self, rngs):
            return Around(D, D, rngs=rngs)

    class Plain(Model):
        def use(self, x):
            x = jnp.sin(3 * self.first(x**2)) + 3 * self.first(x[:, ::-1])
            return self.second(jnp.tanh(x))

    batch = random_batch([5, 5, 5], 5)
    found = []
    for kind in (Subclassed, Plain):
        model = made(kind)
        chosen = kronecker.factored(find_sites(model))
        found.append(kronecker.covariances(model, chosen, [batch], "data"))
    for path, factors in found[0].items():
        for got, expected in zip(factors, found[1][path], strict=True):
            np.testing.assert_allclose(got, expected, rtol=1e-4, atol=1e-7)


def test_the_search_keeps_no_arrays():
    """Guards: a second copy of the weights on the device once they are laid out on a mesh."""
    model = made(Model)
    search = unseen.make_search(model, find_sites(model))
    kept = weakref.ref(model.first.kernel.get_value())
    assert kept() is not None
    del model
    gc.collect()
    assert kept() is None
    assert not search(lambda own, tokens: own(tokens).sum(), jnp.zeros((1, 2), jnp.int32))
