"""Second moments from a sample of batches, against those of the optimizer."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import nnx

from tda import loss as losses
from tda.gradients.moments.estimate import estimate, squared_gradients
from tda.gradients.moments.optimizer_state import SecondMomentError
from tda.gradients.moments.scales import from_full
from tda.gradients.sites import find_sites
from tda.model import functional
from tda.training import loop


def loss(model, batch):
    return losses.cross_entropy(model(batch["tokens"]), batch["targets"], batch["weights"])


@pytest.fixture(scope="module")
def sample(random_batch):
    """Batches of one shape, with padding and of different numbers of scored tokens."""
    return [random_batch([8, 3], 8, seed=0), random_batch([2, 5], 8, seed=1)]


@pytest.mark.parametrize("scan", [True, False])
def test_the_estimate_is_the_mean_of_adams_own_second_moments(decoder, sample, scan):
    """Guards: per-example squares, sums for means, sites exchanged, layers out of order."""
    model = decoder(scan=scan)
    model_fn, params = functional.split(model)
    tx = optax.adam(0.0, b2=0.75)
    state = {"params": params, "opt_state": tx.init(params), "step": jnp.int32(0)}
    step = jax.jit(lambda state, batch: loop.train_step(model_fn.merge, tx, state, batch)[0])
    # After one step from nothing, the bias-corrected ν is that batch's squared gradient.
    states = [step(state, batch)["opt_state"][0] for batch in sample]
    nus = [functional.flat_parameters(s.nu) for s in states]
    chosen = find_sites(model, ".")
    V = squared_gradients(model, loss, sample, chosen)
    assert V.keys() == {s.path for s in chosen}
    for site in chosen:
        expected = site.matrix(np.mean([nu[site.path] / (1 - 0.75) for nu in nus], axis=0))
        np.testing.assert_allclose(V[site.path], expected, rtol=1e-3, atol=1e-9 * expected.max())


def test_every_correction_is_made_from_the_same_moments(decoder, sample):
    """Guards: a correction silently dropped; the floor or epsilon left out."""
    model = decoder()
    chosen = find_sites(model, "down|^embedding")
    V = squared_gradients(model, loss, sample, chosen)
    found = {
        c: estimate(model, loss, sample, chosen, c, eps=0.01, floor=0.1)
        for c in ("adam", "factored", "low_rank(2)")
    }
    for site in chosen:
        v = np.asarray(V[site.path])
        full = 1 / (np.sqrt(np.maximum(v, 0.1 * v.mean((-1, -2), keepdims=True))) + 0.01)
        np.testing.assert_allclose(found["adam"][site.path].full, full, rtol=1e-5)
        for correction in ("factored", "low_rank(2)"):
            np.testing.assert_allclose(
                found[correction][site.path].dense(),
                from_full(full, correction).dense(),
                rtol=1e-3,
            )


def test_weights_that_no_batch_reaches_have_a_bounded_scale(decoder, sample):
    """Guards: infinite scales, and scales that drown all others, of words not in the sample."""
    model = decoder(tied=False)
    chosen = find_sites(model, "^embedding")
    (V,) = squared_gradients(model, loss, sample, chosen).values()
    untouched = np.asarray(V).max(axis=1) == 0
    assert untouched.any() and not untouched.all()
    (scale,) = estimate(model, loss, sample, chosen, "adam").values()
    bound = 1e3 / np.sqrt(np.asarray(V).mean())
    np.testing.assert_allclose(scale.full[untouched], bound, rtol=1e-3)
    assert scale.full.max() <= 1.001 * bound
    for correction in ("factored", "low_rank(2)"):
        (scale,) = estimate(model, loss, sample, chosen, correction).values()
        assert np.isfinite(scale.dense()).all()


class Bag(nnx.Module):
    """A matrix whose gradient is its input, as a parameter with three axes, and one not in use."""

    def __init__(self, dtype=jnp.float32):
        options = dict(use_bias=False, param_dtype=dtype, dtype=dtype, rngs=nnx.Rngs(0))
        self.used = nnx.LinearGeneral(3, (2, 2), **options)
        self.unused = nnx.Linear(3, 4, **options)


def bag_loss(model, batch):
    y_BxTx2x2 = model.used(batch["tokens"]).astype(jnp.float32)
    return jnp.sum(y_BxTx2x2 * batch["weights"][..., None, None], axis=(1, 2, 3))


def bag_batch(x, length=1):
    x_BxTx3 = jnp.broadcast_to(jnp.asarray(x, jnp.float32), (1, length, 3))
    return {"tokens": x_BxTx3, "weights": jnp.ones((1, length))}


def test_moments_are_summed_in_float32():
    """Guards: a sum that stands still, and squares rounded, in the parameter's bfloat16."""
    model = Bag(jnp.bfloat16)
    x = 1 + 2**-7
    V = squared_gradients(model, bag_loss, [bag_batch(x)] * 300, find_sites(model, "^used"))
    assert V["used/kernel"].dtype == jnp.float32 and V["used/kernel"].shape == (3, 4)
    np.testing.assert_allclose(V["used/kernel"], np.full((3, 4), x * x), rtol=1e-6)


@pytest.mark.parametrize("size", [1e-3, 7.0])
def test_the_size_of_all_weights_does_not_matter(size):
    """Guards: a divisor that is never below 1."""
    model, batch = Bag(), bag_batch(2.0, length=5)
    scaled = batch | {"weights": size * batch["weights"]}
    V = squared_gradients(model, bag_loss, [scaled], find_sites(model, "^used"))
    np.testing.assert_allclose(V["used/kernel"], np.full((3, 4), 4.0), rtol=1e-5)


def test_gradients_of_long_batches_do_not_underflow_in_float16():
    """Guards: a mean over many tokens that float16 rounds to 0."""
    model, batch = Bag(jnp.float16), bag_batch(2.0**-14, length=4096)
    # One token counts; the mean's gradient would be 1.5e-8, below the least number of float16.
    one = batch | {"tokens": batch["tokens"].at[:, 1:].set(0.0)}
    V = squared_gradients(model, bag_loss, [one], find_sites(model, "^used"))
    np.testing.assert_allclose(V["used/kernel"], np.full((3, 4), (2.0**-26) ** 2), rtol=1e-5)


def test_the_loss_is_compiled_once_for_every_shape():
    model, traces = Bag(), []

    def counted(model, batch):
        traces.append(batch["tokens"].shape)
        return bag_loss(model, batch)

    batches = [bag_batch(x, length) for x in (1.0, 2.0, 3.0) for length in (1, 2)]
    squared_gradients(model, counted, batches, find_sites(model, "^used"))
    assert sorted(traces) == [(1, 1, 3), (1, 2, 3)]


def test_a_matrix_that_is_not_in_use_has_the_epsilons_scale():
    model = Bag()
    scales = estimate(model, bag_loss, [bag_batch(1.0)], find_sites(model, "."), "adam", eps=1e-3)
    np.testing.assert_allclose(scales["unused/kernel"].full, np.full((3, 4), 1e3), rtol=1e-6)
    with pytest.raises(SecondMomentError, match="unused/kernel is not finite and above 0"):
        estimate(model, bag_loss, [bag_batch(1.0)], find_sites(model, "."), "adam", eps=0.0)


def test_what_cannot_be_estimated_is_refused():
    model = Bag()
    chosen = find_sites(model, "^used")
    with pytest.raises(SecondMomentError, match="'none' is not made from second moments"):
        estimate(model, bag_loss, [], chosen, "none")
    empty = bag_batch(1.0) | {"weights": jnp.zeros((1, 1))}
    for batches in ([], [empty]):
        with pytest.raises(SecondMomentError, match="at least one batch with a scored token"):
            estimate(model, bag_loss, batches, chosen, "adam")
    for wrong in (np.nan, np.inf):
        for correction in ("adam", "factored", "low_rank(1)"):
            with pytest.raises(SecondMomentError, match="used/kernel is not finite"):
                estimate(model, bag_loss, [bag_batch(wrong)], chosen, correction)


def test_a_batch_without_scored_tokens_does_not_count():
    model = Bag()
    chosen = find_sites(model, "^used")
    empty = bag_batch(1.0) | {"weights": jnp.zeros((1, 1))}
    V = squared_gradients(model, bag_loss, [empty, bag_batch(2.0), empty], chosen)
    np.testing.assert_allclose(V["used/kernel"], np.full((3, 4), 4.0))
