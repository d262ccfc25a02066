"""1/√V against what the optimizers themselves divide by."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from tda import checkpoint
from tda.gradients import second_moments, sites
from tda.gradients.second_moments import (
    SecondMomentError,
    adafactor_scale,
    adam_scale,
    factored_scale,
)
from tda.model import functional
from tda.optimizer import make_optimizer

SHAPES = [
    (32, 64),
    (64, 32),
    (48, 48),
    (3, 40, 50),
    (3, 50, 40),
    (3, 40, 40),
    (64, 33, 40),
    (64, 40, 33),
    (48, 48, 48),
    (4, 5),
    (3, 8, 40),
]


def random(shape, seed):
    # Rows and columns of very different size, so that a transposed scale stands out.
    rng = np.random.default_rng(seed)
    x = rng.normal(size=shape)
    x *= np.exp(rng.normal(size=(*shape[:-1], 1)))
    x *= np.exp(0.5 * rng.normal(size=(*shape[:-2], 1, shape[-1])))
    return x.astype(np.float32)


@pytest.mark.parametrize(("eps", "eps_root"), [(1e-8, 0.0), (0.3, 0.0), (1e-8, 0.3), (0.2, 0.1)])
@pytest.mark.parametrize("steps", [1, 4])
def test_adam_scale_is_adams_own_denominator(eps, eps_root, steps):
    """Guards: epsilon inside the root where it belongs outside; no bias correction."""
    # Without momentum, Adam's update is −lr g · scale.
    tx = optax.adam(0.5, b1=0.0, b2=0.9, eps=eps, eps_root=eps_root)
    params = jnp.zeros((6, 4))
    state = tx.init(params)
    for step in range(steps):
        g = random((6, 4), step)
        update, state = tx.update(jnp.asarray(g), state, params)
    scale = adam_scale(state[0].nu, state[0].count, 0.9, eps, eps_root)
    assert scale.left is None and scale.right is None
    np.testing.assert_allclose(-0.5 * g * scale.dense(), update, rtol=1e-5)


def test_adam_scale_with_momentum():
    """The same denominator divides the bias-corrected mean of gradients."""
    tx = optax.adam(0.5, b1=0.9, b2=0.99, eps=0.1)
    state = tx.init(jnp.zeros((6, 4)))
    for step in range(3):
        update, state = tx.update(jnp.asarray(random((6, 4), step)), state)
    mean = state[0].mu / (1 - 0.9**3)
    scale = adam_scale(state[0].nu, state[0].count, 0.99, 0.1)
    np.testing.assert_allclose(-0.5 * mean * scale.dense(), update, rtol=1e-4)


def test_adam_scale_of_half_precision_moments_is_float32():
    """Guards: half precision before projection."""
    scale = adam_scale(jnp.ones((2, 3), jnp.bfloat16), jnp.int32(1), 0.99, 1e-8)
    assert scale.full.dtype == jnp.float32


@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_adafactor_scale_is_what_optax_multiplies_by(shape):
    """Guards: row and column statistics transposed for square matrices."""
    tx = optax.scale_by_factored_rms(min_dim_size_to_factor=32)
    params = {"w": jnp.zeros(shape)}
    state = tx.init(params)
    for step in range(2):
        g = {"w": jnp.asarray(random(shape, step))}
        update, state = tx.update(g, state, params)
    scale = adafactor_scale(state.v_row["w"], state.v_col["w"], state.v["w"], shape)
    np.testing.assert_allclose(g["w"] * scale.dense(), update["w"], rtol=1e-4)
    # Where the two last axes are factored, nothing of the matrix's size is made.
    factored = sorted(shape)[-2] >= 32
    two_last = len(shape) == 2 or shape[0] <= min(shape[1:])
    assert (scale.full is None) == (factored and two_last)


def test_adafactor_scale_refuses_what_does_not_fit():
    one = jnp.ones(1)
    with pytest.raises(SecondMomentError, match="do not fit"):
        adafactor_scale(jnp.ones(32), jnp.ones(64), one, (40, 64))
    with pytest.raises(SecondMomentError, match="v has shape"):
        adafactor_scale(one, one, one, (7,))


@pytest.mark.parametrize("shape", [(5, 9), (9, 5), (6, 6), (3, 5, 7), (4, 6, 6)], ids=str)
def test_factored_scale_is_exact_for_rank_one(shape):
    """Guards: transposed for square matrices; a factor of the mean left out."""
    rng = np.random.default_rng(0)
    rows = rng.uniform(0.1, 4, (*shape[:-1], 1))
    columns = rng.uniform(1, 9, (*shape[:-2], 1, shape[-1]))
    full = jnp.asarray(1 / np.sqrt(rows * columns), jnp.float32)
    scale = factored_scale(full)
    assert scale.full is None
    assert scale.left.shape == shape[:-1] and scale.right.shape == shape[:-2] + shape[-1:]
    np.testing.assert_allclose(scale.dense(), full, rtol=1e-5)


def test_factored_scale_keeps_the_means_of_rows_and_columns():
    V = np.exp(np.random.default_rng(0).normal(size=(3, 6, 6)))
    approximate = 1 / np.square(factored_scale(jnp.asarray(1 / np.sqrt(V), jnp.float32)).dense())
    for axis in (-1, -2):
        np.testing.assert_allclose(approximate.mean(axis), V.mean(axis), rtol=1e-4)


CONSTANTS = {"b2": 0.9, "eps": 0.05, "eps_root": 0.02}


def train(model, tx, steps=3):
    """The state after a few updates by gradients that differ from parameter to parameter."""
    _, params = functional.split(model)
    opt_state = tx.init(params)
    update = jax.jit(tx.update)
    for step in range(steps):
        flat, tree = jax.tree.flatten(params)
        g = jax.tree.unflatten(
            tree, [random(x.shape, 100 * step + i) if x.ndim > 1 else x for i, x in enumerate(flat)]
        )
        _, opt_state = update(g, opt_state, params)
    return {"params": params, "opt_state": opt_state, "step": jnp.int32(steps)}


@pytest.fixture(scope="module")
def adam_runs(decoder, tmp_path_factory):
    """For a scanned and an unrolled model: the model, its state and where it is saved."""
    tx = optax.chain(
        optax.clip_by_global_norm(1e9), optax.adam(1e-2, b2=0.9, eps=0.05, eps_root=0.02)
    )
    runs = {}
    for scan in (True, False):
        model = decoder(layers=3, scan=scan, tied=False)
        state = train(model, tx)
        root = tmp_path_factory.mktemp(f"adam{scan}")
        checkpoint.save(root, 3, state, {"optimizer": CONSTANTS})
        runs[scan] = (model, state, root)
    return runs


@pytest.fixture(scope="module")
def adafactor_run(decoder, tmp_path_factory):
    model = decoder(layers=3, width=32, ff_width=40, head_width=16)
    state = train(model, make_optimizer("adafactor", 1e-2, clip=1e9))
    root = tmp_path_factory.mktemp("adafactor")
    checkpoint.save(root, 3, state, {})
    return model, state, root


@pytest.mark.parametrize("scan", [True, False])
def test_adams_moments_are_read_by_path(adam_runs, scan):
    """Guards: moments mapped to the wrong modules; a correction silently dropped."""
    model, state, root = adam_runs[scan]
    chosen = sites.find(model, ".")
    got = second_moments.read(root, chosen, "adam")
    assert got.keys() == {s.path for s in chosen}
    nu = functional.flat_parameters(optax.tree.get(state["opt_state"], "nu"))
    for path, scale in got.items():
        expected = 1 / (np.sqrt(np.asarray(nu[path]) / (1 - 0.9**3) + 0.02) + 0.05)
        np.testing.assert_allclose(scale.full, expected, rtol=1e-5)
        assert scale.full.dtype == jnp.float32
    assert len({np.asarray(s.full).tobytes() for s in got.values()}) == len(got)


@pytest.mark.parametrize("scan", [True, False])
def test_factored_moments_are_made_from_adams(adam_runs, scan):
    model, state, root = adam_runs[scan]
    chosen = sites.find(model)
    got = second_moments.read(root, chosen, "factored")
    nu = functional.flat_parameters(optax.tree.get(state["opt_state"], "nu"))
    for path, scale in got.items():
        assert scale.full is None
        V = np.square(np.sqrt(np.asarray(nu[path]) / (1 - 0.9**3) + 0.02) + 0.05)
        rows, columns = V.mean(-1, keepdims=True), V.mean(-2, keepdims=True)
        expected = 1 / np.sqrt(rows * columns / rows.mean(-2, keepdims=True))
        np.testing.assert_allclose(scale.dense(), expected, rtol=1e-4)


def test_adafactors_moments_are_read_by_path(adafactor_run):
    model, state, root = adafactor_run
    chosen = sites.find(model, ".")
    got = second_moments.read(root, chosen, "factored")
    held = {
        kind: functional.flat_parameters(optax.tree.get(state["opt_state"], kind))
        for kind in ("v_row", "v_col", "v")
    }
    for site in chosen:
        shape = (site.rows, site.columns)
        shape = shape if site.stack is None else (site.stack, *shape)
        leaves = [held[kind][site.path] for kind in ("v_row", "v_col", "v")]
        np.testing.assert_array_equal(
            got[site.path].dense(), adafactor_scale(*leaves, shape).dense()
        )
    # Both kinds are there: wide enough to factor, and not.
    assert got["layers/mlp/up/kernel"].full is None
    assert got["layers/attention/key/kernel"].full is not None


def test_adafactor_has_no_exact_moments(adafactor_run):
    model, _, root = adafactor_run
    with pytest.raises(SecondMomentError, match="Adafactor.*use correction='factored'"):
        second_moments.read(root, sites.find(model), "adam")


def test_unknown_corrections_are_refused(adam_runs):
    """Guards: a correction silently dropped."""
    model, _, root = adam_runs[True]
    for name in ("none", "adma"):
        with pytest.raises(SecondMomentError, match=f"unknown correction '{name}'"):
            second_moments.read(root, sites.find(model), name)


def test_a_checkpoint_without_optimizer_state_is_refused(adam_runs, tmp_path):
    model, state, _ = adam_runs[True]
    checkpoint.save(tmp_path, 1, {"params": state["params"]}, {"optimizer": CONSTANTS})
    with pytest.raises(checkpoint.CheckpointError, match="no optimizer state"):
        second_moments.read(tmp_path, sites.find(model), "adam")


def test_an_optimizer_without_second_moments_is_refused(adam_runs, tmp_path):
    model, state, _ = adam_runs[True]
    momentum = optax.sgd(0.1, momentum=0.9).init(state["params"])
    checkpoint.save(tmp_path, 1, {"params": state["params"], "opt_state": momentum}, {})
    with pytest.raises(SecondMomentError, match="no second moments"):
        second_moments.read(tmp_path, sites.find(model), "factored")


def test_moments_of_another_model_are_refused(adam_runs, decoder):
    _, _, root = adam_runs[True]
    with pytest.raises(SecondMomentError, match=r"shape \(3, 16, 24\), the matrix \(3, 16, 32\)"):
        second_moments.read(root, sites.find(decoder(layers=3, ff_width=32), "up"), "adam")
    with pytest.raises(SecondMomentError, match="none for layers/0/.*it has nothing|has none for"):
        second_moments.read(root, sites.find(decoder(layers=3, scan=False)), "adam")


def test_a_description_without_adams_constants_is_refused(adam_runs, tmp_path):
    model, state, _ = adam_runs[True]
    checkpoint.save(tmp_path, 1, state, {"optimizer": {"eps": 1e-8}})
    with pytest.raises(SecondMomentError, match="lacks optimizer.b2"):
        second_moments.read(tmp_path, sites.find(model), "adam")


def test_the_step_that_is_asked_for_is_read(adam_runs, tmp_path):
    model, state, _ = adam_runs[True]
    tx = optax.chain(optax.clip_by_global_norm(1e9), optax.adam(1e-2))
    other = train(model, tx, steps=1)
    checkpoint.save(tmp_path, 1, other, {"optimizer": CONSTANTS})
    checkpoint.save(tmp_path, 3, state, {"optimizer": CONSTANTS})
    chosen = sites.find(model, "down")
    first, last, default = (
        second_moments.read(tmp_path, chosen, "adam", step)["layers/mlp/down/kernel"].full
        for step in (1, 3, None)
    )
    np.testing.assert_array_equal(last, default)
    assert np.abs(np.asarray(first) - np.asarray(last)).max() > 1e-2
