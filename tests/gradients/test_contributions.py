"""The parts of a score that the positions of a passage carry."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from tda import hessian
from tda.gradients import kronecker, reference
from tda.gradients.contributions import direction_of, make_contributions
from tda.gradients.encoder import make_encoder
from tda.gradients.projection import Projection
from tda.gradients.sites import find_sites
from tda.retrieval import scorer
from tests.gradients.test_encoder import scales_of

P = Projection(side=4, blocks=2)


@pytest.mark.parametrize("scan", [True, False])
@pytest.mark.parametrize(
    "correction", ["none", pytest.param("factored", marks=pytest.mark.slow), "adam"]
)
@pytest.mark.parametrize("include", [None, "."])
def test_parts_sum_to_the_inner_product(decoder, random_batch, scan, correction, include):
    model, batch = decoder(scan=scan), random_batch([6, 3, 5], 6)
    scales = scales_of(model, correction, ".")
    encoded = np.asarray(make_encoder(model, P, scales, include=include)(batch))
    direction = np.random.default_rng(0).normal(size=encoded.shape[1]).astype(np.float32)
    parts = make_contributions(model, P, scales, include=include)(batch, direction)
    assert parts.shape == batch["tokens"].shape and np.abs(parts[1, :3]).min() > 0
    np.testing.assert_allclose(
        np.asarray(parts, np.float64).sum(1),
        encoded.astype(np.float64) @ direction,
        atol=1e-5 * np.linalg.norm(encoded, axis=1).max() * np.linalg.norm(direction),
    )
    assert not np.asarray(parts)[1, 3:].any()  # padding carries nothing


def test_parts_sum_to_the_score(decoder, random_batch):
    """The score that a method ranks by, whitened and of unit norm."""
    model, batch = decoder(), random_batch([6, 4], 6)
    encoder = make_encoder(model, P)
    passages, query = np.asarray(encoder(batch)), np.asarray(encoder(random_batch([5], 5, seed=1)))
    rng = np.random.default_rng(0)
    roots = [np.cov(rng.normal(size=(16, 40))).astype(np.float32) for _ in encoder.layout.slices]
    widths = tuple(s.stop - s.start for s in encoder.layout.slices)
    pairs = [np.cov(rng.normal(size=(4, 40))) for _ in range(2 * len(roots))]
    products = hessian.inverse_root(pairs, shapes=[(4, 4)] * len(roots))
    for roots_, unit in ((roots, True), (roots, False), (None, True), (products, True)):
        whitened = [np.asarray(scorer.encode(x, roots_, unit, widths)) for x in (query, passages)]
        score = whitened[0] @ whitened[1].T
        contributions = make_contributions(model, P)
        for i in range(2):
            direction = direction_of(query[0], passages[i], roots_, encoder.layout.slices, unit)
            parts = contributions(batch, direction.astype(np.float32))
            np.testing.assert_allclose(float(parts[i].sum()), score[0, i], rtol=2e-4, atol=1e-6)


def test_a_positions_part_is_the_gradient_through_that_position(decoder, random_batch):
    """Guards: parts that sum right but stand at the wrong positions."""
    model, batch = decoder(layers=1, scan=False), random_batch([6], 6)
    p = Projection(side=4, blocks=1)
    include = "mlp/up"
    direction = np.random.default_rng(0).normal(size=16).astype(np.float32)
    parts = np.asarray(make_contributions(model, p, include=include)(batch, direction))[0]

    def value(mask_T):
        """The inner product with the gradient of a weight that is used at some positions only."""
        up = model.layers[0].mlp.up

        class Masked(type(up)):
            def __call__(self, x):
                W, fixed = self.kernel[...], jax.lax.stop_gradient(self.kernel[...])
                return x @ fixed + mask_T[None, :, None] * (x @ (W - fixed))

        object.__setattr__(up, "__class__", Masked)
        try:
            return float(
                np.asarray(reference.encode(model, batch, p, include=include))[0] @ direction
            )
        finally:
            object.__setattr__(up, "__class__", Masked.__mro__[1])

    for t in range(6):
        mask = np.eye(6, dtype=np.float32)[t]
        np.testing.assert_allclose(
            value(mask), parts[t], rtol=1e-3, atol=1e-5 * np.abs(parts).max()
        )


class Heads(nnx.Module):
    """A layer whose inputs have an axis of heads, as many as positions."""

    def __init__(self, axis):
        self.axis = axis
        self.embed = nnx.Embed(50, 3, rngs=nnx.Rngs(0))
        self.mixed = nnx.Linear(3, 3, rngs=nnx.Rngs(1))
        self.lm_head = nnx.Linear(3, 50, rngs=nnx.Rngs(2))

    def __call__(self, tokens):
        x = self.embed(tokens)
        heads = jnp.stack([x, jnp.sin(x), x**2, -x], self.axis)
        return self.lm_head(jnp.tanh(self.mixed(heads)).sum(self.axis))


def test_positions_are_told_from_heads_by_what_depends_on_the_sequence(random_batch):
    """Guards: a head's part shown as a position's, where the positions are not in front."""
    batch, p = random_batch([4, 4], 4), Projection(side=3, pooling="matrix")
    direction = np.random.default_rng(0).normal(size=9).astype(np.float32)
    split = make_contributions(Heads(1), p, include="mixed")
    with pytest.raises(ValueError, match="mixed/kernel: its layer .*second axis is not the seq"):
        split(batch, direction)
    with pytest.raises(ValueError, match="mixed/kernel: its layer .*second axis is not the seq"):
        model = Heads(1)
        kronecker.covariances(model, find_sites(model, "mixed"), [batch], "data")
    parts = np.asarray(make_contributions(Heads(2), p, include="mixed")(batch, direction))
    encoded = np.asarray(make_encoder(Heads(2), p, include="mixed")(batch))
    np.testing.assert_allclose(parts.sum(1), encoded @ direction, rtol=1e-4)


def test_a_sequence_as_long_as_the_models_positions_is_split(decoder, random_batch):
    """Guards: a model refused because no longer sequence fits it."""
    model, batch = decoder(max_positions=7), random_batch([7], 7)
    parts = make_contributions(model, P)(batch, np.ones(2 * 2 * 16, np.float32))
    assert np.isfinite(parts).all() and np.abs(parts).min() > 0
