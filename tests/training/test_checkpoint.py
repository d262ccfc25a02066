"""Checkpoints: what is restored, which leaves are never read, and which errors are raised."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from tda.model import functional
from tda.runtime import sharding
from tda.training import checkpoint
from tda.training.checkpoint import CheckpointError


def parameters(width=4, layers=2):
    rng = np.random.default_rng(0)
    return {
        "embedding": {"embedding": jnp.asarray(rng.normal(size=(6, width)), jnp.float32)},
        "layers": {
            i: {"kernel": jnp.asarray(rng.normal(size=(width, 3)), jnp.float32)}
            for i in range(layers)
        },
    }


def state_of(params):
    tx = optax.chain(optax.clip_by_global_norm(1.0), optax.adam(1e-2))
    gradient = jax.tree.map(lambda x: x * 2, params)
    _, opt_state = tx.update(gradient, tx.init(params), params)
    return {"params": params, "opt_state": opt_state, "step": jnp.int32(3)}


def abstract(tree):
    return jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype), tree)


def assert_same(got, expected):
    assert jax.tree.structure(got) == jax.tree.structure(expected)
    for a, b in zip(jax.tree.leaves(got), jax.tree.leaves(expected), strict=True):
        assert a.dtype == b.dtype
        np.testing.assert_array_equal(a, b)


@pytest.fixture(scope="module")
def saved(tmp_path_factory):
    """A state with twelve layers, and the directory where it is saved as step 3."""
    root = tmp_path_factory.mktemp("saved")
    state = state_of(parameters(layers=12))
    checkpoint.save(root, 3, state, {"optimizer": {"b2": 0.99}, "seed": 5})
    return state, root


def test_the_whole_state_comes_back(saved):
    """Guards: moments or weights in another order (layer 10 before layer 2)."""
    state, root = saved
    assert_same(checkpoint.restore(root, abstract(state)), state)


def test_parameters_come_back_alone(saved):
    """Guards: adapter weights loaded at random."""
    state, root = saved
    assert_same(checkpoint.restore_parameters(root, abstract(state["params"])), state["params"])


def test_parameters_come_back_split_over_a_mesh(saved):
    state, root = saved
    mesh = sharding.make_mesh(data=4, fsdp=2)
    like = functional.abstract(
        state["params"],
        {
            name: ("embed",) + (None,) * (x.ndim - 1)
            for name, x in functional.flat_parameters(state["params"]).items()
        },
        mesh,
    )
    got = checkpoint.restore_parameters(root, like)
    assert_same(got, state["params"])
    kernel = got["layers"][0]["kernel"]
    assert kernel.sharding.shard_shape(kernel.shape) == (2, 3)


def test_the_description_comes_back(saved):
    _, root = saved
    assert checkpoint.describe(root) == {"optimizer": {"b2": 0.99}, "seed": 5}
    assert checkpoint.describe(root, 3) == checkpoint.describe(root)


def test_a_checkpoint_without_optimizer_state(tmp_path):
    params = parameters()
    checkpoint.save(tmp_path, 1, {"params": params}, {})
    assert_same(checkpoint.restore_parameters(tmp_path, abstract(params)), params)
    assert not checkpoint.has_optimizer(tmp_path)


def test_missing_checkpoints_are_named(saved, tmp_path):
    _, root = saved
    with pytest.raises(CheckpointError, match="no checkpoint 4 under .*; available steps: 3"):
        checkpoint.describe(root, 4)
    for call in (
        lambda: checkpoint.describe(tmp_path / "absent"),
        lambda: checkpoint.restore_parameters(tmp_path / "absent", {}),
    ):
        with pytest.raises(CheckpointError, match="no checkpoint .*available steps: none"):
            call()


@pytest.mark.parametrize("restore", ["state", "parameters"])
def test_another_models_parameters_are_refused_by_name(saved, restore):
    """Guards: weights of another model, or missing ones, loaded in silence."""
    state, root = saved
    fewer = abstract(state_of(parameters(layers=11)))
    wider = abstract(state_of(parameters(width=5, layers=12)))
    for other, message in (
        (fewer, r"layers/11/kernel: \(4, 3\) → absent"),
        (wider, r"embedding/embedding: \(6, 4\) → \(6, 5\)"),
        (wider, r"and 5 more"),
    ):
        with pytest.raises(CheckpointError, match=message):
            if restore == "state":
                checkpoint.restore(root, other)
            else:
                checkpoint.restore_parameters(root, other["params"])


def test_old_checkpoints_are_removed_and_the_last_is_found(tmp_path):
    root = tmp_path / "run"
    assert checkpoint.latest_step(root) is None
    for step in (2, 9, 10, 11):
        checkpoint.save(root, step, {"params": {"w": jnp.full(2, step)}}, {}, keep=2)
    assert sorted(p.name for p in root.iterdir()) == ["10", "11"]
    # 10 after 9: steps are numbers, not text.
    assert checkpoint.latest_step(root) == 11
    like = {"w": jax.ShapeDtypeStruct((2,), jnp.int32)}
    assert checkpoint.restore_parameters(root, like)["w"].tolist() == [11, 11]
    assert checkpoint.restore_parameters(root, like, step=10)["w"].tolist() == [10, 10]
    checkpoint.save(root, 12, {"params": {"w": jnp.full(2, 12)}}, {}, keep=0)
    assert sorted(p.name for p in root.iterdir()) == ["10", "11", "12"]


def test_what_a_kill_leaves_half_written_is_not_a_checkpoint(tmp_path):
    checkpoint.save(tmp_path, 4, {"params": {"w": jnp.ones(2)}}, {})
    (tmp_path / "8.orbax-checkpoint-tmp-123").mkdir()
    assert checkpoint.latest_step(tmp_path) == 4
    # Nor does it block the next attempt to save that step.
    checkpoint.save(tmp_path, 8, {"params": {"w": jnp.zeros(2)}}, {})
    assert checkpoint.latest_step(tmp_path) == 8


def test_an_empty_directory_is_not_a_checkpoint(tmp_path):
    checkpoint.save(tmp_path, 4, {"params": {"w": jnp.ones(2)}}, {})
    (tmp_path / "8").mkdir()
    assert checkpoint.latest_step(tmp_path) == 4


def test_a_relative_path_is_taken_from_the_working_directory(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    checkpoint.save("runs/a", 1, {"params": {"w": jnp.arange(3.0)}}, {"x": 1})
    assert checkpoint.latest_step("runs/a") == 1 and checkpoint.describe("runs/a") == {"x": 1}
    back = checkpoint.restore_parameters("runs/a", {"w": jax.ShapeDtypeStruct((3,), jnp.float32)})
    np.testing.assert_array_equal(back["w"], np.arange(3.0))
