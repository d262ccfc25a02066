"""Losses against the same numbers computed directly in numpy."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from tda import loss
from tda.model import functional
from tda.model.decoder import Decoder
from tda.model.settings import DecoderSettings
from tests.conftest import TINY


@pytest.fixture(scope="module")
def case():
    rng = np.random.default_rng(0)
    logits = rng.normal(size=(3, 4, 7)).astype(np.float32) * 3
    targets = rng.integers(0, 7, (3, 4)).astype(np.int32)
    weights = np.asarray([[1, 1, 1, 1], [0, 1, 1, 0], [1, 0.5, 0, 0]], np.float32)
    p = np.exp(logits.astype(np.float64))
    p /= p.sum(-1, keepdims=True)
    p = np.take_along_axis(p, targets[..., None], -1)[..., 0]
    return logits, targets, weights, p


def test_cross_entropy_is_the_sum_of_nats(case):
    """Guards: `sum` meant `mean`."""
    logits, targets, weights, p = case
    got = loss.cross_entropy(logits, targets, weights)
    np.testing.assert_allclose(got, (-np.log(p) * weights).sum(-1), rtol=1e-5)
    assert got.shape == (3,) and got.dtype == jnp.float32


def test_margin_is_minus_the_log_odds(case):
    """Guards: the sign. A margin is a loss here: a surer target has less of it."""
    logits, targets, weights, p = case
    got = loss.margin(logits, targets, weights)
    np.testing.assert_allclose(got, (-np.log(p / (1 - p)) * weights).sum(-1), rtol=1e-5)


def test_margin_is_finite_where_the_target_is_certain():
    logits = np.zeros((1, 1, 5), np.float32)
    logits[0, 0, 2] = 100.0
    one = np.ones((1, 1), np.float32)
    value, gradient = jax.value_and_grad(lambda x: loss.margin(x, np.asarray([[2]]), one).sum())(
        jnp.asarray(logits)
    )
    np.testing.assert_allclose(value, np.log(4) - 100, rtol=1e-6)
    np.testing.assert_allclose(gradient[0, 0], [0.25, 0.25, -1, 0.25, 0.25], rtol=1e-6)


def test_logit_is_minus_the_targets_logit(case):
    logits, targets, weights, _ = case
    picked = np.take_along_axis(logits, targets[..., None], -1)[..., 0]
    got = loss.logit(logits, targets, weights)
    np.testing.assert_allclose(got, (-picked * weights).sum(-1), rtol=1e-5)


@pytest.mark.parametrize("name", sorted(loss.OUTPUTS))
def test_positions_of_weight_zero_have_no_influence(case, name):
    """Guards: encodings that depend on padding."""
    logits, targets, weights, _ = case
    silent = weights == 0
    other_logits = np.where(silent[..., None], logits[..., ::-1] * 5, logits)
    other_targets = np.where(silent, (targets + 1) % 7, targets)
    f = loss.output(name)
    np.testing.assert_array_equal(
        f(logits, targets, weights), f(other_logits, other_targets, weights)
    )
    gradient = jax.grad(lambda x: f(x, targets, weights).sum())(jnp.asarray(logits))
    assert np.all(np.asarray(gradient)[silent] == 0)
    assert np.all(np.abs(np.asarray(gradient)[~silent]).sum(-1) > 0)


def test_unknown_output_is_refused():
    with pytest.raises(ValueError, match="unknown output function 'nll'; use loss, margin, logit"):
        loss.output("nll")


@pytest.mark.parametrize("tied", [True, False])
@pytest.mark.parametrize("name", sorted(loss.OUTPUTS))
def test_a_total_in_pieces_is_the_total(decoder, random_batch, tied, name):
    """Value and every parameter's gradient, logits at a few positions at a time."""
    model_fn, params = functional.split(decoder(tied=tied))
    batch, output = random_batch([11, 5, 0], 11), loss.output(name)

    def whole(params):
        logits = model_fn.merge(params)(batch["tokens"])
        return jnp.sum(output(logits, batch["targets"], batch["weights"]))

    def pieces(params):
        return loss.total(model_fn.merge(params), batch, output, chunk=3 * 50 * 4)

    expected, got = (jax.jit(jax.value_and_grad(f))(params) for f in (whole, pieces))
    for a, b in zip(jax.tree.leaves(expected), jax.tree.leaves(got), strict=True):
        np.testing.assert_allclose(b, a, rtol=0, atol=2e-6 * np.abs(a).max())


def test_pieces_of_a_gradient_in_half_precision_are_added_in_float32(decoder, random_batch):
    """Guards: a head's gradient that loses digits with every piece."""
    model_fn, params = functional.split(decoder(tied=False, param_dtype="bfloat16"))
    batch = random_batch([64] * 2, 64)

    def head(chunk, params=params):
        def total(p):
            return loss.total(model_fn.merge(p), batch, loss.cross_entropy, chunk=chunk)

        gradient = jax.jit(jax.grad(total))(params)["head"]["kernel"]
        assert gradient.dtype == params["head"]["kernel"].dtype
        return np.asarray(gradient, np.float32)

    exact = head(2**24, jax.tree.map(lambda x: x.astype(jnp.float32), params))
    error, unavoidable = (np.linalg.norm(head(chunk) - exact) for chunk in (2 * 50, 2**24))
    assert error < 1.5 * unavoidable


def test_logits_of_a_batch_are_never_whole(decoder, random_batch):
    """Guards: [B, T, V] in float32 at once."""
    model_fn, params = functional.split(decoder())
    batch = random_batch([64] * 4, 64)

    def shapes(chunk):
        f = jax.grad(lambda p: loss.total(model_fn.merge(p), batch, loss.margin, chunk=chunk))
        return str(jax.make_jaxpr(f)(params))

    assert "f32[4,64,50]" in shapes(2**24)
    assert "f32[4,64,50]" not in shapes(4 * 50 * 16) and "f32[4,16,50]" in shapes(4 * 50 * 16)


@pytest.mark.parametrize("name", sorted(loss.OUTPUTS))
def test_logits_in_half_precision_are_taken_in_float32(case, name):
    """Guards: a sum over the vocabulary that is rounded to bfloat16."""
    logits, targets, weights, _ = case
    rounded = jnp.asarray(logits, jnp.bfloat16)
    got = loss.output(name)(rounded, targets, weights)
    expected = loss.output(name)(rounded.astype(jnp.float32), targets, weights)
    assert got.dtype == jnp.float32
    np.testing.assert_array_equal(got, expected)


class Doubling(Decoder):
    """Calls itself in its own way."""

    def __call__(self, tokens):
        return 2 * super().__call__(tokens)


class Halving(Decoder):
    """Logits that are not each position's own."""

    def logits(self, hidden):
        return super().logits(hidden) / hidden.shape[1]


class Renamed(Decoder):
    """Says again that its head stands alone."""

    has_separate_head = True

    def __call__(self, tokens):
        return self.logits(self.hidden(tokens))


class Layers(nnx.Module):
    """A user's model with layers of these names."""

    def __init__(self, rngs):
        self.hidden = nnx.Linear(5, 5, rngs=rngs)
        self.logits = nnx.Linear(5, 50, rngs=rngs)

    def __call__(self, tokens):
        return self.logits(jnp.tanh(self.hidden(jax.nn.one_hot(tokens, 5))))


@pytest.mark.parametrize("kind", [Doubling, Halving, Renamed, Layers])
def test_a_total_is_of_the_models_own_call(random_batch, kind):
    """Guards: methods of a name taken for what the decoder's do."""
    batch, settings = random_batch([11, 5, 0], 11), DecoderSettings(**TINY)
    model = kind(nnx.Rngs(0)) if kind is Layers else kind(settings, rngs=nnx.Rngs(0))
    expected = loss.cross_entropy(model(batch["tokens"]), batch["targets"], batch["weights"]).sum()
    total = loss.total(model, batch, loss.cross_entropy, chunk=3 * 50 * 4)
    np.testing.assert_allclose(total, expected, rtol=1e-5)
    assert loss.has_separate_head(model) == (kind is Renamed)


def test_an_unchanged_subclass_has_the_decoders_head():
    class Unchanged(Decoder):
        pass

    assert loss.has_separate_head(Unchanged(DecoderSettings(**TINY), rngs=nnx.Rngs(0)))
