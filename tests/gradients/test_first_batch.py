"""Losses whose gradients taps take for others in ways that no trace shows."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from tda.gradients import reference
from tda.gradients.encoder import make_encoder
from tda.gradients.factors import GradientFactors
from tda.gradients.projection import Projection
from tda.gradients.sites import find_sites
from tda.model.decoder import Decoder
from tda.model.settings import DecoderSettings
from tests.conftest import TINY
from tests.gradients.test_batch_axis import assert_equal_to_the_reference

D, P = 4, Projection(side=3, pooling="matrix")


class Model(nnx.Module):
    def __init__(self, rngs):
        self.first = nnx.Linear(D, D, rngs=rngs)
        self.second = nnx.Linear(D, 3, rngs=rngs)

    def __call__(self, x):
        return self.second(jnp.tanh(self.first(x)))


def squares(model, batch):
    return jnp.sum(model(batch["x"]) ** 2, axis=-1)


def with_parameters(change):
    """The loss of a model whose parameters are all changed on the way."""

    def loss(model, batch):
        graphdef, parameters, rest = nnx.split(model, nnx.Param, ...)
        return squares(nnx.merge(graphdef, jax.tree.map(change, parameters), rest), batch)

    return loss


def fake_quantised(x):
    return x + jax.lax.stop_gradient(jnp.round(2 * x) / 2 - x)


def normalised(model, batch):
    """Weight normalisation by hand, of one layer."""
    kernel = model.first.kernel
    kernel[...] = kernel[...] / jnp.linalg.norm(kernel[...], axis=0)
    return squares(model, batch)


def exchanged(model, batch):
    """Also an error that leaves the summed gradient of both layers as large as it is."""
    graphdef, state = nnx.split(model.first)
    state["kernel"] = state["kernel"].replace(state["kernel"][...].T)
    model.first = nnx.merge(graphdef, state)
    return squares(model, batch)


def frozen(model, batch):
    model.first.kernel[...] = jax.lax.stop_gradient(model.first.kernel[...])
    return squares(model, batch)


def penalised(model, batch):
    """A gradient penalty: the layers are used once more, in the derivative."""
    slope = jax.grad(lambda x: jnp.sum(jnp.sin(model(x))))(batch["x"])
    return squares(model, batch) + jnp.sum(slope**2, axis=-1)


def descended(model, batch):
    """Steps downhill with respect to the inputs, inside a scan (an energy-based model)."""

    def step(x, _):
        return x - 0.1 * jax.grad(lambda x: jnp.sum(jnp.sin(model(x))))(x), None

    return jnp.sum(jax.lax.scan(step, batch["x"], length=2)[0] ** 2, axis=-1)


def directional(model, batch):
    """Forward mode, in which a tap has no derivative."""
    y, slope = jax.jvp(model, (batch["x"],), (jnp.ones_like(batch["x"]),))
    return jnp.sum(y**2 + slope**2, axis=-1)


LOSSES = {
    "doubled": (with_parameters(lambda x: 2 * x), "first/kernel, second/kernel"),
    "squashed": (with_parameters(jnp.tanh), "first/kernel, second/kernel"),
    "normalised": (normalised, "first/kernel"),
    "exchanged": (exchanged, "first/kernel"),
    "frozen": (frozen, "first/kernel"),
    "penalised": (penalised, "first/kernel, second/kernel"),
    "descended": (descended, "first/kernel, second/kernel"),
    "mean": (lambda m, b: squares(m, b) / len(b["x"]), "first/kernel, second/kernel"),
    "directional": (directional, "first/kernel, second/kernel"),
}


@pytest.fixture(scope="module")
def batch():
    return {"x": np.random.default_rng(0).normal(size=(5, D)).astype(np.float32)}


@pytest.mark.parametrize(("loss", "paths"), LOSSES.values(), ids=LOSSES)
def test_a_loss_that_uses_a_parameter_otherwise_is_refused(batch, loss, paths):
    """Guards: gradients 0.2 to 3 times their size off, without a word."""
    model = Model(nnx.Rngs(0))
    with pytest.raises(ValueError, match=f"do not give the gradient of {paths}: .*'reference'"):
        make_encoder(model, P, output=loss)(batch)


@pytest.mark.parametrize("loss", [normalised, penalised, directional])
def test_the_reference_path_takes_over(batch, loss):
    model, scope = Model(nnx.Rngs(0)), dict(output=loss, untapped="reference", include="kernel")
    encode = make_encoder(model, P, **scope)
    first, again = encode(batch), encode(batch)
    np.testing.assert_array_equal(first, again)
    expected = reference.encode(model, batch, P, **scope)
    np.testing.assert_allclose(first, expected, rtol=0, atol=1e-5 * np.abs(expected).max())


def test_a_change_of_a_parameter_with_its_own_gradient_is_tapped(batch):
    """Guards: rounding taken for a fault. Quantised weights pass their gradient straight on."""
    for change in (fake_quantised, lambda x: x.astype(jnp.bfloat16).astype(x.dtype), lambda x: x):
        loss = with_parameters(change)
        assert np.isfinite(make_encoder(Model(nnx.Rngs(0)), P, output=loss)(batch)).all()


def tripled(x, y, *args, out_sharding=None, **kwargs):
    return 3 * jax.lax.dot_general(x, y, *args, **kwargs)


def promoted(arrays, **kwargs):
    return tuple(x if x is None else 3 * x for x in arrays)


@pytest.mark.parametrize("own", [{"dot_general": tripled}, {"promote_dtype": promoted}])
def test_a_layer_with_a_product_of_its_own_is_refused(batch, own):
    """Guards: the gradient of a quantised or scaled product taken for a plain one's."""
    model = Model(nnx.Rngs(0))
    model.first = nnx.Linear(D, D, rngs=nnx.Rngs(0), **own)
    with pytest.raises(
        ValueError, match="the gradient of first/kernel: .*product is not its class"
    ):
        make_encoder(model, P, output=squares)(batch)


def share_mlp(model):
    model.layers[1].mlp = model.layers[0].mlp


def own_product(model):
    model.layers[0].mlp.up.dot_general = tripled


def own_product_of_a_subclass(model):
    class Own(Decoder):
        pass

    own_product(model)
    object.__setattr__(model, "__class__", Own)


@pytest.mark.parametrize("change", [share_mlp, own_product, own_product_of_a_subclass])
def test_a_changed_decoder_is_checked_as_any_model(random_batch, change):
    """Guards: a decoder's class taken for proof of what its layers compute."""
    model = Decoder(DecoderSettings(**TINY, scan=False), rngs=nnx.Rngs(0))
    change(model)
    batch = random_batch([5, 4], 5)
    factors = GradientFactors(model, find_sites(model, "mlp/up"))
    with pytest.raises(ValueError, match="of layers/0/mlp/up/kernel do not give its gradient"):
        factors(batch)
    if change is share_mlp:  # a tap takes both of a layer's calls
        assert_equal_to_the_reference(model, batch, include="mlp/up")
        return
    with pytest.raises(ValueError, match="the gradient of layers/0/mlp/up/kernel"):
        make_encoder(model, P, include="mlp/up")(batch)


def test_a_layer_may_be_called_by_keyword(batch):
    class ByName(Model):
        def __init__(self, rngs):
            super().__init__(rngs)
            self.embed = nnx.Embed(7, D, rngs=rngs)

        def __call__(self, x):
            y = self.second(inputs=jnp.tanh(self.first(inputs=x)))
            return y + self.embed.attend(query=x).sum(-1, keepdims=True)

    assert_equal_to_the_reference(ByName(nnx.Rngs(0)), batch, output=squares)


@pytest.mark.parametrize("of", [jnp.mean, lambda x: x[:, None], lambda x: x[:-1]])
def test_a_loss_that_is_not_one_number_an_example_is_refused(batch, of):
    """Guards: gradients divided by the size of the batch."""
    encode = make_encoder(Model(nnx.Rngs(0)), P, output=lambda m, b: of(squares(m, b)))
    with pytest.raises(ValueError, match=r"the loss of 5 examples has the shape .*, not \(5,\)"):
        encode(batch)


def test_a_batch_without_gradients_tells_nothing(batch):
    """Guards: a first batch whose examples all weigh 0, after which nothing was compared."""

    def loss(model, batch):
        return with_parameters(lambda x: 2 * x)(model, batch) * batch["weight"]

    encode = make_encoder(Model(nnx.Rngs(0)), P, output=loss)
    weighted = batch | {"weight": np.zeros(5, np.float32)}
    assert not np.asarray(encode(weighted)).any()
    with pytest.raises(ValueError, match="do not give the gradient of first/kernel, second/kernel"):
        encode(weighted | {"weight": np.ones(5, np.float32)})


def test_a_batch_of_one_example_does_not_tell_what_several_do(batch):
    """Mistake: one query asked first, after which a loss over the batch's size passed unseen."""
    encode = make_encoder(Model(nnx.Rngs(0)), P, output=LOSSES["mean"][0])
    for i in range(2):
        encode({"x": batch["x"][i : i + 1]})
    with pytest.raises(ValueError, match="do not give the gradient of first/kernel, second/kernel"):
        encode(batch)


class Experts(Model):
    """Its second layer is called for negative inputs only, and has a product of its own."""

    def __init__(self, rngs):
        super().__init__(rngs)
        self.second = nnx.Linear(D, D, rngs=rngs, dot_general=tripled)

    def __call__(self, x):
        return jnp.where(x[:, :1] < 0, self.second(x), self.first(x))


@pytest.mark.parametrize("untapped", ["leave", "reference"])
def test_a_block_is_compared_where_it_first_has_a_gradient(batch, untapped):
    """Guards: an expert that no example of the first batch reached."""
    model, scope = Experts(nnx.Rngs(0)), dict(output=squares, untapped=untapped, include="kernel")
    encode = make_encoder(model, P, **scope)
    positive = {"x": np.abs(batch["x"])}
    encode(positive)
    if untapped == "leave":
        with pytest.raises(ValueError, match="do not give the gradient of second/kernel:"):
            encode(batch)
        return
    for each in (batch, positive, batch):
        expected = reference.encode(model, each, P, **scope)
        close = dict(rtol=0, atol=1e-5 * np.abs(expected).max())
        np.testing.assert_allclose(encode(each), expected, **close)


def test_a_block_of_small_gradients_is_compared(batch):
    class Scaled(Model):
        def __init__(self, rngs):
            super().__init__(rngs)
            self.small = nnx.Linear(D, 3, rngs=rngs, dot_general=tripled)

        def __call__(self, x):
            return super().__call__(x) + 1e-4 * self.small(x)

    with pytest.raises(ValueError, match="do not give the gradient of small/kernel:"):
        make_encoder(Scaled(nnx.Rngs(0)), P, output=squares)(batch)


class Splits(Model):
    """Splits a layer into its parameters and nothing else, where taps are something else."""

    def __call__(self, x):
        graphdef, parameters = nnx.split(self.first, nnx.Param)
        return self.second(jnp.tanh(nnx.merge(graphdef, parameters)(x)))


def test_a_model_that_fails_with_taps_alone_names_them(batch):
    model, scope = Splits(nnx.Rngs(0)), dict(output=squares, include="kernel")
    with pytest.raises(ValueError, match="with taps on first/kernel, second/kernel the loss fails"):
        make_encoder(model, P, **scope)(batch)
    assert_equal_to_the_reference(model, batch, untapped="reference", **scope)
    with pytest.raises(KeyError, match="mask"):
        make_encoder(model, P, output=lambda model, batch: batch["mask"])(batch)


@pytest.mark.parametrize("dtype", [np.int8, np.int32, bool])
def test_a_layer_may_be_called_with_integers(batch, dtype):
    whole = {"x": (batch["x"] > -1).astype(dtype)}
    assert_equal_to_the_reference(Model(nnx.Rngs(0)), whole, output=squares)


def test_a_loss_that_returns_more_than_the_loss_is_refused(batch):
    encode = make_encoder(Model(nnx.Rngs(0)), P, output=lambda m, b: (squares(m, b), {}))
    with pytest.raises(ValueError, match=r"returns a tuple, not an array of shape \(5,\)"):
        encode(batch)


def test_a_batch_without_examples_is_refused():
    encode = make_encoder(Model(nnx.Rngs(0)), P, output=squares)
    with pytest.raises(ValueError, match="no examples .*leave it out"):
        encode({"x": np.zeros((0, D), np.float32), "y": np.zeros((0, 0))})
