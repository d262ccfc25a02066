"""Examples whose loss depends on the others of their batch, on chance, or on their place."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from tda.gradients import per_example
from tda.gradients.encoder import make_encoder
from tda.gradients.projection import Projection
from tda.gradients.sites import find_sites

D, P = 4, Projection(side=2, pooling="matrix")


class Model(nnx.Module):
    """Two layers with whatever `between` does between them."""

    def __init__(self, rngs, dtype=jnp.float32):
        self.first = nnx.Linear(D, D, dtype=dtype, rngs=rngs)
        self.second = nnx.Linear(D, 3, dtype=dtype, rngs=rngs)
        self.drop = nnx.Dropout(0.5, rngs=rngs)
        self.norm = nnx.BatchNorm(D, rngs=rngs)

    def between(self, x):
        return jnp.tanh(x)

    def __call__(self, x):
        return self.second(self.between(self.first(x)))


class Centred(Model):
    def between(self, x):
        return x - x.mean(0)


class Mixed(Model):
    """Each example is mixed with another, which cannot be seen if all are the same."""

    def between(self, x):
        return (x + x[::-1]) / 2


class Statistics(nnx.Module):
    """A user's own norm over the batch."""

    def __call__(self, x):
        return x / jnp.std(x, axis=0)


class OwnNorm(Model):
    """Its layers take turns, one of which looks at the batch."""

    def __init__(self, rngs, **kwargs):
        super().__init__(rngs, **kwargs)
        self.statistics = Statistics()

    def between(self, x):
        return jnp.tanh(self.statistics(jnp.tanh(x)))


class Cumulative(Model):
    """An example depends on those before it, which stay where they are if it does."""

    def between(self, x):
        return jnp.cumsum(x, axis=0)


class Sorted(Model):
    """Each loss is right; inside, each example has another's place."""

    def __call__(self, x):
        order = jnp.argsort(x[:, 0])
        return super().__call__(x[order])[jnp.argsort(order)]


class SortedByLength(Model):
    """Examples of one length, the count of numbers other than 0, stay in their places."""

    def __call__(self, x):
        order = jnp.argsort(jnp.sum(x != 0, axis=1), stable=True)
        return super().__call__(x[order])[jnp.argsort(order)]


class Reversed(Model):
    def __call__(self, x):
        return super().__call__(x[::-1])[::-1]


class ByPlace(Model):
    """Dropout with a key of its own."""

    def between(self, x):
        return jnp.where(jax.random.bernoulli(jax.random.key(0), 0.5, x.shape), x, 0)


def squares(model, batch):
    return jnp.sum(model(batch["x"]) ** 2, axis=-1) * batch["weight"]


def centred(model, batch):
    """Adds up to 0, as does its gradient."""
    loss_B = squares(model, batch)
    return loss_B - loss_B.mean()


def make_batch(count=5, seed=0, padding=0):
    x = np.random.default_rng(seed).normal(size=(count, D)).astype(np.float32)
    weight = np.ones(count, np.float32)
    weight[count - padding :] = 0
    return {"x": x, "weight": weight}


def evaluated(kind, **kwargs):
    model = kind(nnx.Rngs(0), **kwargs)
    model.eval()
    return model


def first_of(model, batches, loss=squares, **scope):
    return next(per_example(model, loss, batches, P, **scope))


@pytest.mark.parametrize("untapped", ["leave", "reference"])
@pytest.mark.parametrize("kind", [Centred, Cumulative])
def test_a_loss_that_depends_on_batch_mates_is_refused(kind, untapped):
    with pytest.raises(ValueError, match=r"the loss of an example changes by \d+% with the batch"):
        first_of(evaluated(kind), [make_batch()], include="kernel|first/bias", untapped=untapped)


def test_the_module_that_looks_at_the_batch_is_named():
    with pytest.raises(ValueError, match=r"that it is in, in statistics \(Statistics\); it must"):
        first_of(evaluated(OwnNorm), [make_batch()])
    with pytest.raises(ValueError, match=r"that it is in, in the model \(Centred\); it must"):
        first_of(evaluated(Centred), [make_batch()])
    with pytest.raises(ValueError, match="that it is in; it must"):
        first_of(evaluated(Model), [make_batch()], centred)


def test_a_loss_centred_over_the_batch_is_refused():
    """Guards: gradients of 0 for every example."""
    with pytest.raises(ValueError, match="the loss of an example changes"):
        first_of(evaluated(Model), [make_batch()], centred)


def test_a_loss_that_counts_only_among_the_largest_is_refused():
    """Guards: hard examples alone, which are the same in every batch that has them."""

    def hardest(model, batch):
        loss_B = squares(model, batch)
        return jnp.where(loss_B >= jnp.sort(loss_B)[-2], loss_B, 0)

    sizes = np.array([9.0, 0.2, 8.0, 0.1], np.float32)[:, None]
    batch = make_batch(4) | {"x": sizes * np.ones(D, np.float32)}
    with pytest.raises(ValueError, match=r"the loss of an example changes by \d+% with the batch"):
        first_of(evaluated(Model), [batch], hardest)


@pytest.mark.parametrize("kind", [Sorted, Reversed, ByPlace])
def test_another_order_inside_the_model_or_chance_is_refused(kind):
    """Guards: each example with another's gradient; dropout by the example's place."""
    with pytest.raises(ValueError, match="the gradient of an example changes"):
        first_of(evaluated(kind), [make_batch()])
    scope = dict(include=".", untapped="reference", exclude="norm")
    assert np.isfinite(first_of(evaluated(kind), [make_batch()], **scope)).all()


def test_a_later_batch_is_checked_where_the_first_tells_nothing():
    same = {name: np.repeat(x[:1], 5, axis=0) for name, x in make_batch().items()}
    encodings = per_example(evaluated(Mixed), squares, [make_batch(1), same, make_batch()], P)
    with pytest.raises(ValueError, match="the loss of an example changes"):
        for _ in encodings:
            pass


def test_an_order_that_later_batches_have_is_refused():
    """Guards: examples sorted by length, behind a first batch of one length."""
    ragged = make_batch(4)
    ragged["x"] *= np.arange(D) < np.array([4, 2, 3, 1])[:, None]
    encodings = per_example(evaluated(SortedByLength), squares, [make_batch(4), ragged], P)
    with pytest.raises(ValueError, match="the gradient of an example changes"):
        list(encodings)
    assert len(list(per_example(evaluated(Model), squares, [make_batch(4), ragged] * 2, P))) == 4


@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16])
@pytest.mark.parametrize(
    "batch", [make_batch(), make_batch(2), make_batch(64), make_batch(6, 1, 4)]
)
def test_examples_on_their_own_pass(batch, dtype):
    """Guards: rounding, padding and vanishing gradients that look like a dependence."""
    model = evaluated(Model, dtype=dtype)
    encode = make_encoder(model, P, output=squares)
    encode(batch)
    batch["x"] *= np.logspace(-6, 0, len(batch["x"]))[:, None]
    make_encoder(model, P, output=squares)(batch)


@pytest.mark.parametrize(
    ("change", "named"),
    [
        (dict(deterministic=False), r"drop \(Dropout\): in training mode"),
        (dict(use_running_average=False), r"norm \(BatchNorm\): in training mode"),
    ],
)
def test_a_model_in_training_mode_is_refused(change, named):
    model = evaluated(Model)
    assert find_sites(model)
    model.set_attributes(**change)
    with pytest.raises(ValueError, match=named):
        first_of(model, [make_batch()])
    model.drop.rate = 0.0
    if "deterministic" in change:
        assert find_sites(model)


def test_attention_with_dropout_is_refused():
    model = nnx.MultiHeadAttention(2, 4, dropout_rate=0.1, deterministic=False, rngs=nnx.Rngs(0))
    with pytest.raises(ValueError, match=r"the model \(MultiHeadAttention\): in training mode"):
        find_sites(model)


def test_a_known_model_is_not_checked(decoder):
    """Guards: an encoding that costs more than it did."""
    assert make_encoder(decoder(), Projection(side=2, blocks=1)).first_batch is None
