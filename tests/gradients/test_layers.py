"""Layers of every known class, in models that the package has never seen, against the reference."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from tda.gradients import layers, reference, sites
from tda.gradients.encoder import make_encoder
from tda.gradients.projection import Projection
from tda.gradients.sites import find_sites
from tda.model import functional
from tests.gradients.test_encoder import scales_of

P = Projection(side=3, blocks=1)
V, D = 50, 6


def assert_equal_to_the_reference(model, batch, projection=P, **kwargs):
    exact = scales_of(model, include=".", untapped=kwargs.get("untapped", "leave"))
    for scales in (None, exact):
        got = make_encoder(model, projection, scales, include=".", **kwargs)(batch)
        expected = np.asarray(
            reference.encode(model, batch, projection, scales, include=".", **kwargs)
        )
        assert np.linalg.norm(expected, axis=-1).min() > 0
        np.testing.assert_allclose(got, expected, rtol=0, atol=1e-5 * np.abs(expected).max())


class General(nnx.Module):
    """LinearGeneral over several axes, Einsum in several spellings, attention as NNX has it."""

    def __init__(self, rngs):
        self.embed = nnx.Embed(V, D, rngs=rngs)
        self.split = nnx.LinearGeneral(D, (2, 3), rngs=rngs)
        self.join = nnx.LinearGeneral((2, 3), D, axis=(-1, -2), rngs=rngs)
        self.attention = nnx.MultiHeadAttention(
            num_heads=2, in_features=D, qkv_features=4, decode=False, rngs=rngs
        )
        self.heads = nnx.Einsum("BTD,NDH->BTNH", (2, D, 3), rngs=rngs)
        self.back = nnx.Einsum("...nh,nhd->...d", (2, 3, D), (D,), rngs=rngs)
        self.turned = nnx.Einsum("btd,cdk->cbtk", (2, D, 3), rngs=rngs)
        self.lm_head = nnx.Linear(D, V, rngs=rngs)

    def __call__(self, tokens):
        x = self.embed(tokens)
        x = x + jnp.tanh(self.join(jnp.tanh(self.split(x))))
        mask = nnx.make_causal_mask(tokens)
        x = x + self.attention(x, mask=mask)
        x = x + self.back(jnp.tanh(self.heads(x)))
        a, b = self.turned(x)
        return self.lm_head(x + jnp.concatenate([a, b], -1))


def test_general_layers_equal_the_reference(random_batch):
    """Guards: layers skipped in silence; axes flattened in another order on the two paths."""
    model = General(nnx.Rngs(0))
    found = {s.path for s in find_sites(model, ".")}
    assert found == {
        *(f"attention/{n}/kernel" for n in ("query", "key", "value", "out")),
        *(f"{n}/kernel" for n in ("split", "join", "heads", "back", "turned", "lm_head")),
        "embed/embedding",
    }
    assert_equal_to_the_reference(model, random_batch([5, 3, 4], 5))


def test_norms_and_biases_by_option(random_batch):
    """Guards: bias gradients summed over the batch."""
    model = General(nnx.Rngs(1))
    batch = random_batch([5, 3], 5)
    assert_equal_to_the_reference(model, batch, untapped="reference")
    loose = {s.path for s in find_sites(model, ".", untapped="reference") if not s.tapped}
    assert {"split/bias", "attention/query/bias", "back/bias", "lm_head/bias"} <= loose


@pytest.mark.slow
def test_the_decoders_norms_too(decoder, random_batch):
    """Every parameter of a scanned model, taps and whole gradients in one encoding."""
    for scan in (True, False):
        model = decoder(scan=scan)
        projection = Projection(side=4, blocks=2)
        assert_equal_to_the_reference(
            model, random_batch([5, 3], 5), projection, untapped="reference"
        )
        assert not sites.left_out(model, find_sites(model, ".", untapped="reference"))


def test_scanned_and_unrolled_norms_have_equal_encodings(decoder, random_batch):
    batch, projection = random_batch([5, 3], 5), Projection(side=4, blocks=2)
    a, b = (
        make_encoder(decoder(scan=s), projection, include="norm", untapped="reference")(batch)
        for s in (True, False)
    )
    np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-6 * np.abs(a).max())


class Experts(nnx.Module):
    """Weights that no known layer holds, and one matrix for every expert."""

    def __init__(self, rngs):
        self.embed = nnx.Embed(V, D, rngs=rngs)
        self.mlp_experts = nnx.Param(rngs.normal((2, D, D)))
        self.each = nnx.LinearGeneral(D, D, axis=-1, batch_axis={0: 2}, rngs=rngs)
        self.shared = nnx.Einsum("btd,tdk->btk", (5, D, D), rngs=rngs)
        self.lm_head = nnx.Linear(D, V, use_bias=False, rngs=rngs)

    def __call__(self, tokens):
        x = self.embed(tokens)
        x = x + jnp.einsum("btd,edf->btf", x, self.mlp_experts[...])
        x = x + self.shared(x)
        return self.lm_head(jnp.tanh(x))


def test_what_cannot_be_tapped_is_named_and_taken_if_asked(random_batch):
    """Guards: experts skipped in silence."""
    model, batch = Experts(nnx.Rngs(0)), random_batch([5, 3], 5)
    assert {"mlp_experts", "shared/kernel"} <= sites.left_out(model, find_sites(model, ".")).keys()
    with pytest.raises(ValueError, match=r"the model has .*mlp_experts \(no tap\)"):
        find_sites(model)
    with pytest.raises(ValueError, match="no tap can be put on .*mlp_experts"):
        find_sites(model, ".", untapped="error")
    with pytest.raises(ValueError, match="untapped is 'skip'"):
        find_sites(model, ".", untapped="skip")
    assert_equal_to_the_reference(model, batch, untapped="reference", exclude="each")


class PlainArrays(nnx.Module):
    """Arrays that are no variables: a table of angles, and the mask of a convolution."""

    def __init__(self, rngs):
        self.embed = nnx.Embed(V, D, rngs=rngs)
        self.angles = jnp.sin(jnp.arange(5.0 * D).reshape(5, D))
        mask = jnp.tril(jnp.ones((3, D, D)))
        self.conv = nnx.Conv(D, D, 3, padding="CAUSAL", mask=mask, rngs=rngs)
        self.lm_head = nnx.Linear(D, V, rngs=rngs)

    def __call__(self, tokens):
        return self.lm_head(jnp.tanh(self.conv(self.embed(tokens) + self.angles)))


def test_modules_may_hold_plain_arrays(random_batch):
    model, batch = PlainArrays(nnx.Rngs(0)), random_batch([5, 3], 5)
    assert_equal_to_the_reference(model, batch, untapped="reference")


class Padded(nnx.Module):
    """A table whose padding has a number beyond it, and is masked after the look-up."""

    def __init__(self, rngs):
        self.embed = nnx.Embed(V // 2, D, rngs=rngs)
        self.lm_head = nnx.Linear(D, V, rngs=rngs)

    def __call__(self, tokens):
        is_word = (tokens < V // 2)[..., None]
        return self.lm_head(jnp.tanh(jnp.where(is_word, self.embed(tokens), 0)))


def test_numbers_beyond_a_table_have_no_gradient(random_batch):
    """Guards: 0 · NaN, since jax looks up NaN there."""
    batch = random_batch([5, 3], 5)
    assert (batch["tokens"] >= V // 2).any()
    assert_equal_to_the_reference(Padded(nnx.Rngs(0)), batch)


class Scanned(nnx.Module):
    """A user's own stack of layers, with a layer shared by all of them."""

    def __init__(self, rngs):
        self.embed = nnx.Embed(V, D, rngs=rngs)
        self.layers = nnx.vmap(lambda r: nnx.LinearGeneral(D, (2, 3), rngs=r))(rngs.fork(split=3))
        self.shared = nnx.Linear(D, D, rngs=rngs)

    def __call__(self, tokens):
        x = self.embed(tokens)

        @nnx.remat
        def step(x, layer):
            return x + jnp.tanh(self.shared(jnp.tanh(layer(x)).reshape(x.shape)))

        for i in range(3):
            layer = jax.tree.map(lambda a, i=i: a[i], self.layers)
            x = step(x, layer)
        return self.embed.attend(x)


def test_shared_layers_add_up(random_batch):
    model = Scanned(nnx.Rngs(0))
    stacked = next(s for s in find_sites(model) if s.path == "layers/kernel")
    assert stacked.stack == 3 and stacked.names()[2] == "layers/2/kernel"
    assert_equal_to_the_reference(model, random_batch([5, 3], 5), Projection(side=3, blocks=3))


def test_a_users_einsum_class_can_be_made_known(random_batch):
    class Einsum(nnx.Module):
        def __init__(self, equation, shape, rngs):
            self.equation = equation
            self.w = nnx.Param(rngs.normal(shape))

        def __call__(self, x):
            return jnp.einsum(self.equation, x, self.w[...])

    class Model(nnx.Module):
        def __init__(self, rngs):
            self.embed = nnx.Embed(V, D, rngs=rngs)
            self.attn = Einsum("btd,dnh->btnh", (D, 2, 3), rngs)

        def __call__(self, tokens):
            x = self.embed(tokens)
            return self.embed.attend(x + self.attn(x).reshape(x.shape))

    model = Model(nnx.Rngs(0))
    assert not find_sites(model, ".")[0].path.startswith("attn")
    layers.register_einsum(Einsum, "w", "equation")
    assert [(s.path, s.rows, s.columns) for s in find_sites(model)] == [("attn/w", D, 6)]
    assert_equal_to_the_reference(model, random_batch([5, 3, 4], 5))


@pytest.mark.parametrize("remat", [False, True])
def test_a_users_embedding_class_can_be_made_known(random_batch, remat):
    """Guards: a table's gradient without the factor that its class gives the rows; tied tables."""

    class Embedder(nnx.Module):
        def __init__(self, rngs):
            self.table = nnx.Param(rngs.normal((V, D)))

        def encode(self, tokens):
            return jnp.tanh(self.table[...][tokens]) * jnp.sqrt(D)

        def decode(self, x):
            return x @ self.table[...].T

    class Model(nnx.Module):
        def __init__(self, rngs):
            self.embedder = Embedder(rngs)
            self.mlp = nnx.Linear(D, D, rngs=rngs)

        def __call__(self, tokens):
            def encode(embedder, tokens):
                return embedder.encode(tokens)

            x = (nnx.remat(encode) if remat else encode)(self.embedder, tokens)
            return self.embedder.decode(x + jnp.tanh(self.mlp(x)))

    model, batch = Model(nnx.Rngs(0)), random_batch([5, 3, 4], 5)
    assert [s.path for s in find_sites(model, ".")] == ["mlp/kernel"]
    layers.register_embedding(Embedder, "table", "encode", "decode")
    assert [s.path for s in find_sites(model, ".")] == ["embedder/table", "mlp/kernel"]
    assert_equal_to_the_reference(model, batch)
    assert_equal_to_the_reference(model, batch, untapped="reference")


def test_a_loss_of_the_users_own(decoder, random_batch):
    """A model that is called in another way: the loss calls it."""
    model, batch = decoder(), random_batch([5, 3], 5)

    def loss(model, batch):
        log_p = jax.nn.log_softmax(model(batch["tokens"]))
        picked = jnp.take_along_axis(log_p, batch["targets"][..., None], axis=-1)[..., 0]
        return -jnp.sum(picked * batch["weights"], axis=-1)

    projection = Projection(side=4, blocks=2)
    got = make_encoder(model, projection, output=loss)(batch)
    expected = make_encoder(model, projection)(batch)
    np.testing.assert_allclose(got, expected, rtol=0, atol=1e-5 * np.abs(expected).max())
    assert functional.flat_parameters(reference.per_example_gradients(model, batch, loss))
