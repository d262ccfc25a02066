"""Optimizers by name, and schedules."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from tda.training.optimizer import make_optimizer, schedule

PARAMS = {"kernel": jnp.full((3, 2), 0.5)}
GRADIENT = {"kernel": jnp.asarray([[3.0, -4.0], [0.0, 0.0], [0.0, 0.0]])}


def first_update(tx):
    return tx.update(GRADIENT, tx.init(PARAMS), PARAMS)


@pytest.mark.parametrize(
    ("name", "peak_on", "end"),
    [("constant", 0.1, 0.1), ("cosine", 0.1, 0.01), ("linear", 0.1, 0.01)],
)
def test_schedule_warms_up_and_comes_down(name, peak_on, end):
    f = schedule(name, peak=0.1, steps=100, warmup=10, final=0.1)
    np.testing.assert_allclose(f(0), 0.0)
    np.testing.assert_allclose(f(5), 0.05, rtol=1e-5)
    np.testing.assert_allclose(f(10), peak_on, rtol=1e-5)
    np.testing.assert_allclose(f(100), end, rtol=1e-5)
    middle = {"constant": 0.1, "cosine": 0.055, "linear": 0.055}[name]
    np.testing.assert_allclose(f(55), middle, rtol=1e-5)


def test_schedule_errors():
    with pytest.raises(ValueError, match="unknown schedule 'step'"):
        schedule("step", 0.1, 10, 1, 0.1)
    with pytest.raises(ValueError, match="warmup=11 exceeds steps=10"):
        schedule("cosine", 0.1, 10, 11, 0.1)


def test_unknown_optimizer_is_refused():
    with pytest.raises(ValueError, match="unknown optimizer 'sgd'"):
        make_optimizer("sgd", 0.1)


def test_gradients_are_clipped_by_global_norm():
    _, state = first_update(make_optimizer("adam", 0.1, b1=0.0, b2=0.9, clip=1.0))
    nu = optax.tree.get(state, "nu")["kernel"]
    np.testing.assert_allclose(nu[0], 0.1 * np.square([0.6, 0.8]), rtol=1e-5)
    for none in (None, 0):
        _, state = first_update(make_optimizer("adam", 0.1, b1=0.0, b2=0.9, clip=none))
        nu = optax.tree.get(state, "nu")["kernel"]
        np.testing.assert_allclose(nu[0], 0.1 * np.square([3.0, 4.0]), rtol=1e-5)


def test_weight_decay_is_adamws_alone():
    still = {"kernel": jnp.zeros((3, 2))}
    tx = make_optimizer("adamw", 0.1, weight_decay=0.2)
    update, _ = tx.update(still, tx.init(PARAMS), PARAMS)
    np.testing.assert_allclose(update["kernel"], np.full((3, 2), -0.1 * 0.2 * 0.5), atol=1e-9)


@pytest.mark.parametrize(
    ("name", "constants", "message"),
    [
        ("adam", {"weight_decay": 0.2}, "weight_decay=0.2 would have no effect .* eps, eps_root;"),
        ("adafactor", {"weight_decay": 0.2}, "weight_decay=0.2 would have no effect .*: none;"),
        ("adafactor", {"b2": 0.95, "eps": 1e-6}, "b2=0.95, eps=1e-06 would have no effect"),
        ("adamw", {"beta2": 0.95}, "beta2=0.95 would have no effect .*: weight_decay, b1, b2, eps"),
    ],
)
def test_constants_that_an_optimizer_would_ignore_are_refused(name, constants, message):
    """Guards: a weight decay that does not decay."""
    with pytest.raises(ValueError, match=message):
        make_optimizer(name, 0.1, **constants)
    # A default changes nothing, so it may be passed on.
    make_optimizer("adam", 0.1, weight_decay=0.0, b2=0.95)


def test_adams_constants_are_used():
    tx = make_optimizer("adamw", 0.1, b1=0.5, b2=0.75, eps=2.0, clip=None)
    update, state = first_update(tx)
    np.testing.assert_allclose(optax.tree.get(state, "mu")["kernel"][0, 0], 1.5)
    np.testing.assert_allclose(optax.tree.get(state, "nu")["kernel"][0, 0], 0.25 * 9)
    np.testing.assert_allclose(update["kernel"][0], [-0.1 * 3 / 5, 0.1 * 4 / 6], rtol=1e-5)
    tx = make_optimizer("adam", 0.1, b1=0.0, b2=0.0, eps=0.0, eps_root=7.0, clip=None)
    update, _ = first_update(tx)
    np.testing.assert_allclose(update["kernel"][0], [-0.1 * 3 / 4, 0.1 * 4 / 23**0.5], rtol=1e-5)


def test_adafactor_keeps_rows_and_columns():
    params = {"kernel": jnp.ones((32, 40))}
    state = make_optimizer("adafactor", 0.1).init(params)
    row_factors = jax.tree.leaves(optax.tree.get(state, "v_row"))
    assert [x.shape for x in row_factors] == [(32,)]
    assert optax.tree.get(state, "v")["kernel"].shape == (1,)
