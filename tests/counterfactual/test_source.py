"""SOURCE, against a training that is simulated step by step."""

import dataclasses
import math

import jax.numpy as jnp
import numpy as np

from tda.counterfactual import source
from tda.gradients.kronecker import Curvature
from tda.gradients.sites import Site

SITE = Site((), "kernel", 2, 3)


def test_it_is_the_displacement_of_a_simulated_training():
    """θ' = −D (H θ + g) in two segments, by small steps in float64: τ = −g_qᵀ θ at the end."""
    rng = np.random.default_rng(0)
    query, segments, steps = rng.normal(size=6), [], 20_000
    moved, total = np.zeros((2, 6)), np.zeros(6)
    gradients = rng.normal(size=(2, 6))
    for i, rates in enumerate((1.5, 0.7)):
        left, right = (np.linalg.qr(rng.normal(size=(n, n)))[0] for n in (2, 3))
        values, D = rng.random((2, 3)) * 2, rng.random(6) + 0.3
        values[0, 0] = 0.0
        scaled = np.kron(left, right) @ np.diag(values.ravel()) @ np.kron(left, right).T
        H = scaled / np.sqrt(np.outer(D, D))
        for _ in range(steps):
            # What the passage's gradient of this segment does, and what is left of the first's.
            moved = moved - rates / steps * (moved @ H) * D
            moved[i] -= rates / steps * D * gradients[i]
        scales = {"kernel": jnp.asarray(D.reshape(2, 3), jnp.float32)}
        curvature = {"kernel": Curvature(*(x.astype(np.float32) for x in (left, right, values)))}
        segments.append(source.Segment(rates, scales, curvature))
    total = -moved @ query
    queries = {"kernel": jnp.asarray(query.reshape(1, 2, 3), jnp.float32)}
    sides = [np.ravel(x["kernel"]) for x in source.pull_back([SITE], segments, queries)]
    np.testing.assert_allclose([sides[1] @ gradients[0], sides[0] @ gradients[1]], total, rtol=1e-3)
    # Without curvature it is the sum of the steps' products.
    flat = [
        dataclasses.replace(s, curvature={"kernel": dataclasses.replace(c, values=0 * c.values)})
        for s in segments
        for c in s.curvature.values()
    ]
    (last, first) = (np.ravel(x["kernel"]) for x in source.pull_back([SITE], flat, queries))
    np.testing.assert_allclose(first, 1.5 * np.ravel(flat[0].scales["kernel"]) * query, rtol=1e-4)
    np.testing.assert_allclose(last, 0.7 * np.ravel(flat[1].scales["kernel"]) * query, rtol=1e-4)


def test_segments_hold_every_step_and_a_kept_state():
    """Guards: a short training, the learning rates of whose first steps were left out."""
    for steps in range(1, 80):
        stride = math.isqrt(steps)
        saved = [*range(stride, steps, stride), steps]
        spans = source.divide(saved, 3)
        assert [t for a, b in spans for t in range(a, b)] == list(range(steps))
        assert all(any(a < s <= b for s in saved) for a, b in spans) and len(spans) <= 3
    assert source.divide([6, 12, 18, 24, 30, 36, 42, 48], 3) == [(0, 16), (16, 32), (32, 48)]
    assert source.divide([2, 4], 3) == [(0, 3), (3, 4)]
