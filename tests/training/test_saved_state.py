"""Optimizer states in checkpoints of any layout: which leaves are read, onto which devices."""

import os
import subprocess
import sys
import types

import jax
import jax.numpy as jnp
import numpy as np
import optax
import orbax.checkpoint as ocp
import pytest

from tda.runtime import sharding
from tda.training import checkpoint, saved_state
from tda.training.checkpoint import CheckpointError

PARAMS = {"layers": [{"kernel": jnp.arange(6.0) + i} for i in range(12)]}


def state_of(size):
    """Adam's state after a step whose gradients are the parameters, times a size."""
    tx = optax.adam(1e-2, b2=0.75)
    return tx.update(jax.tree.map(lambda x: size * x, PARAMS), tx.init(PARAMS))[1]


def save_steps(root, sizes, options=None, tree="default"):
    """Saves a state for every step, as CheckpointManager does."""
    with ocp.CheckpointManager(root, options=options) as manager:
        for step, size in sizes.items():
            saved = ocp.args.StandardSave({"params": PARAMS, "opt_state": state_of(size)})
            manager.save(step, args=ocp.args.Composite(**{tree: saved}))


def nu_11(saved):
    name = "opt_state/0/nu/layers/11/kernel"
    return float(saved.load([name])[name][0])


def test_leaves_are_read_by_name(tmp_path):
    """Guards: layer 10 before layer 2; reading the whole checkpoint for its second moments."""
    checkpoint.save(tmp_path, 3, {"params": PARAMS, "opt_state": state_of(1.0)}, {"seed": 5})
    saved = saved_state.open_checkpoint(tmp_path)
    assert saved.description == {"seed": 5}
    assert {"params/layers/2/kernel", "opt_state/0/mu/layers/2/kernel"} < set(saved.names)
    loaded = saved.load(["opt_state/0/nu/layers/11/kernel", "opt_state/0/count"])
    assert loaded.keys() == {"opt_state/0/nu/layers/11/kernel", "opt_state/0/count"}
    expected = 0.25 * np.square(PARAMS["layers"][11]["kernel"])
    np.testing.assert_allclose(loaded["opt_state/0/nu/layers/11/kernel"], expected)
    assert int(loaded["opt_state/0/count"]) == 1


@pytest.mark.parametrize(
    "options", [{}, {"step_prefix": "ckpt"}, {"step_format_fixed_length": 8}], ids=str
)
def test_steps_are_found_however_they_are_called(tmp_path, options):
    """Guards: 9 after 10; another step than the one that is asked for."""
    options = ocp.CheckpointManagerOptions(**options)
    save_steps(tmp_path, {9: 1.0, 10: 2.0}, options)
    (tmp_path / "12.orbax-checkpoint-tmp").mkdir()
    (tmp_path / "11").mkdir()
    for step, size in ((None, 2.0), (10, 2.0), (9, 1.0)):
        opened = saved_state.open_checkpoint(tmp_path, step)
        np.testing.assert_allclose(nu_11(opened), 0.25 * (size * 11) ** 2)
    with pytest.raises(CheckpointError, match="no checkpoint 4 under .*; available steps: 9, 10"):
        saved_state.open_checkpoint(tmp_path, 4)
    one = saved_state.open_checkpoint(tmp_path, 9).path
    assert nu_11(saved_state.open_checkpoint(one)) == nu_11(saved_state.open_checkpoint(one, 9))
    with pytest.raises(CheckpointError, match="is one checkpoint; leave step=10 out"):
        saved_state.open_checkpoint(one, 10)


def test_a_step_that_is_there_twice_is_refused(tmp_path):
    save_steps(tmp_path, {9: 1.0})
    save_steps(tmp_path, {9: 2.0}, ocp.CheckpointManagerOptions(step_prefix="ema"))
    with pytest.raises(CheckpointError, match="has step 9 more than once: 9, ema_9; give one's"):
        saved_state.open_checkpoint(tmp_path)


def test_what_is_no_checkpoint_is_refused(tmp_path):
    for path in (tmp_path, tmp_path / "absent"):
        with pytest.raises(CheckpointError, match="no checkpoint .*available steps: none"):
            saved_state.open_checkpoint(path)
    (tmp_path / "optimizer.pkl").touch()
    with pytest.raises(CheckpointError, match="optimizer.pkl is a file; give the directory of an"):
        saved_state.open_checkpoint(tmp_path / "optimizer.pkl")


ONE_DEVICE = """
import sys, jax, numpy as np
from tda.training import saved_state
assert jax.device_count() == 1
saved = saved_state.open_checkpoint(sys.argv[1])
(x,) = saved.load(["opt_state/nu/w"]).values()
print(float(np.asarray(x).sum()))
"""


def test_a_state_of_eight_devices_is_read_on_one(tmp_path):
    """Guards: a checkpoint from more devices than the reading machine has."""
    mesh = sharding.make_mesh()
    split = sharding.named(mesh, ("batch",), (16,))
    nu = jax.device_put(jnp.arange(16.0), split)
    with ocp.CheckpointManager(tmp_path) as manager:
        state = {"params": {"w": jnp.ones(16)}, "opt_state": {"nu": {"w": nu}}}
        manager.save(1, args=ocp.args.StandardSave(state))
    # On as many devices it stays split.
    (x,) = saved_state.open_checkpoint(tmp_path).load(["opt_state/nu/w"]).values()
    assert x.sharding.shard_shape(x.shape) == (2,)
    flags = [f for f in os.environ["XLA_FLAGS"].split() if "device_count" not in f]
    ran = subprocess.run(
        [sys.executable, "-c", ONE_DEVICE, str(tmp_path)],
        env=os.environ | {"XLA_FLAGS": " ".join(flags)},
        capture_output=True,
        text=True,
        check=False,
    )
    assert ran.returncode == 0, ran.stderr[-2000:]
    assert float(ran.stdout) == 120


def test_a_leaf_of_a_device_of_another_process_is_read_in_parts(monkeypatch):
    """Guards: joined processes that cannot open what a single device has saved."""

    def refuse():
        raise ValueError("Device cpu:0 was not found in jax.local_devices().")

    monkeypatch.setattr(jax, "process_count", lambda: 2)
    leaf = types.SimpleNamespace(sharding=types.SimpleNamespace(to_jax_sharding=refuse))
    assert not saved_state._is_everywhere(leaf)
