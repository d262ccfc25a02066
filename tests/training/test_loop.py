"""Training: it learns, and a killed run ends where an uninterrupted one does."""

import dataclasses
import json
import os
import pathlib
import signal
import subprocess
import sys

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from tda.data.batches import BatchLayout
from tda.data.tokens import TokenTable
from tda.model import functional
from tda.runtime import preemption, sharding
from tda.training import checkpoint, loop
from tda.training.checkpoint import CheckpointError
from tda.training.loop import TrainingSettings
from tda.training.optimizer import make_optimizer, schedule
from tests.data import test_batches
from tests.training.test_checkpoint import assert_same

ROOT = pathlib.Path(__file__).parents[2]
STEPS = 24
LAYOUT = BatchLayout((4, 8), tokens_per_batch=32, pad=0)


def table_of(count=14, seed=0):
    rng = np.random.default_rng(seed)
    return test_batches.table_of([rng.integers(1, 50, rng.integers(3, 9)) for _ in range(count)])


def optimizer():
    return make_optimizer("adamw", schedule("cosine", 2e-2, STEPS, 4, 0.1), weight_decay=1e-3)


def one_device():
    return sharding.make_mesh(devices=jax.devices()[:1])


def fit(model, directory, log_path=None, mesh=None, description=None, **changes):
    layout = dataclasses.replace(LAYOUT, mesh=mesh or one_device())
    settings = TrainingSettings(STEPS, layout, seed=3, save_every=7)
    return loop.fit(
        model,
        optimizer(),
        table_of(),
        dataclasses.replace(settings, **changes),
        directory,
        description=description,
        log_path=log_path,
    )


def steps_in(log_path):
    lines = pathlib.Path(log_path).read_text(encoding="utf-8").splitlines()
    return [json.loads(line)["step"] for line in lines]


@pytest.fixture(scope="module")
def uninterrupted(decoder, tmp_path_factory):
    directory = tmp_path_factory.mktemp("uninterrupted")
    state = fit(decoder(), directory / "run", directory / "log.jsonl")
    return jax.tree.map(np.asarray, state), directory


def test_the_loss_goes_down(uninterrupted):
    """Guards: the score's sign, a step uphill."""
    state, directory = uninterrupted
    records = [
        json.loads(line)
        for line in (directory / "log.jsonl").read_text(encoding="utf-8").splitlines()
    ]
    assert [r["step"] for r in records] == [0, 10, 20, 23]
    assert abs(records[0]["loss"] - np.log(50)) < 0.5 * np.log(50)
    assert records[-1]["loss"] < 0.75 * records[0]["loss"]
    assert int(state["step"]) == STEPS


def test_a_small_corpus_is_memorised(decoder, tmp_path):
    tx = optax.adam(2e-2)
    state = loop.fit(
        decoder(),
        tx,
        table_of(6),
        TrainingSettings(120, BatchLayout((8,), 48, pad=0, mesh=one_device()), save_every=1000),
        tmp_path,
    )
    fn, _ = functional.split(decoder())
    table = table_of(6)
    right = 0
    for i in range(6):
        ids = table.tokens[table.starts[i] : table.starts[i + 1]]
        logits = fn.apply(state["params"], ids[None, :-1])[0]
        # The first token alone cannot tell which sequence it starts.
        right += int(np.sum(np.asarray(logits.argmax(-1))[1:] == ids[2:]))
    assert right >= 0.9 * (len(table.tokens) - 12)


def test_the_loss_is_the_mean_over_scored_tokens(decoder, random_batch):
    """Guards: normalised by the wrong count (the batch or its padding instead of its tokens)."""
    fn, params = functional.split(decoder())
    batch = random_batch([6, 2, 4, 0], 6)
    got = float(loop.batch_loss(fn.merge, params, batch))
    nats = []
    for i, n in enumerate([6, 2, 4]):
        logits = np.asarray(fn.apply(params, batch["tokens"][i : i + 1]))[0, :n]
        log_p = logits - np.log(np.exp(logits).sum(-1, keepdims=True))
        nats += [-log_p[t, batch["targets"][i, t]] for t in range(n)]
    assert len(nats) == 12
    np.testing.assert_allclose(got, np.mean(nats), rtol=1e-5)
    # Only the ratios of weights matter: guards a divisor that is never below 1.
    for size in (1e-3, 7.0):
        scaled = batch | {"weights": size * batch["weights"]}
        np.testing.assert_allclose(loop.batch_loss(fn.merge, params, scaled), got, rtol=1e-5)
    nothing = batch | {"weights": np.zeros_like(batch["weights"])}
    assert float(loop.batch_loss(fn.merge, params, nothing)) == 0.0


def test_a_step_is_the_optimizers_and_carries_its_state(decoder, random_batch):
    """Guards: the score's sign; an optimizer's state that is lost from step to step."""
    fn, params = functional.split(decoder())
    tx = optax.sgd(0.1, momentum=0.5)
    batch = random_batch([6, 3], 6)
    step = jax.jit(lambda state: loop.train_step(fn.merge, tx, state, batch))
    gradient = jax.jit(jax.grad(lambda p: loop.batch_loss(fn.merge, p, batch)))
    state = {"params": params, "opt_state": tx.init(params), "step": jnp.int32(0)}
    first, loss = step(state)
    second, _ = step(first)
    assert int(second["step"]) == 2
    np.testing.assert_allclose(loss, loop.batch_loss(fn.merge, params, batch), rtol=1e-5)
    g1, g2 = gradient(params), gradient(first["params"])
    expected = jax.tree.map(lambda p, a, b: p - 0.1 * (a + b + 0.5 * a), params, g1, g2)
    for got, expected_leaf in zip(
        jax.tree.leaves(second["params"]), jax.tree.leaves(expected), strict=True
    ):
        np.testing.assert_allclose(got, expected_leaf, rtol=1e-4, atol=1e-6)


KILLED_RUN = """
import os, signal, sys
import tests.conftest as shared
from tda.runtime import sharding
from tests.training import test_loop

put_batch, steps = sharding.put_batch, []

def killing_put_batch(*args):
    steps.append(1)
    if len(steps) == 20:  # some steps after the checkpoint of step 14
        os.kill(os.getpid(), signal.SIGKILL)
    return put_batch(*args)

sharding.put_batch = killing_put_batch
test_loop.fit(shared.make_decoder(), sys.argv[1], sys.argv[2])
"""


def test_a_killed_run_ends_where_an_uninterrupted_one_does(
    decoder, uninterrupted, tmp_path, monkeypatch
):
    """Guards: a killed run that starts from nothing; a resume with its meaning inverted."""
    directory, log_path = tmp_path / "run", tmp_path / "log.jsonl"
    environment = os.environ | {"PYTHONPATH": str(ROOT)}
    done = subprocess.run(
        [sys.executable, "-c", KILLED_RUN, str(directory), str(log_path)],
        cwd=ROOT,
        env=environment,
        capture_output=True,
        text=True,
    )
    assert done.returncode == -signal.SIGKILL, done.stderr
    assert checkpoint.latest_step(directory) == 14
    # The checkpoint lies in the middle of an epoch, so the resumed run must skip batches.
    assert 14 % len(loop.epoch_batches(table_of(), 0, LAYOUT, seed=3)) != 0
    # The log may be ahead of the checkpoint, and end in half a line.
    with open(log_path, "a", encoding="utf-8") as log:
        log.write('{"step": 20, "epoch": 4, "loss": 1.0, "tokens": 9}\n{"step": 2')

    put_batch, steps = sharding.put_batch, []

    def counting_put_batch(*args):
        steps.append(1)
        return put_batch(*args)

    monkeypatch.setattr(sharding, "put_batch", counting_put_batch)
    resumed = fit(decoder(), directory, log_path)
    expected, uninterrupted_directory = uninterrupted
    assert_same(resumed, expected)
    assert len(steps) == STEPS - 14
    assert steps_in(log_path) == [0, 10, 20, 23]
    assert log_path.read_text() == (uninterrupted_directory / "log.jsonl").read_text()


def test_a_notice_ends_training_within_a_step_and_it_resumes_exactly(
    decoder, uninterrupted, tmp_path, monkeypatch
):
    """Guards: SIGTERM swallowed until the job is killed, and all since the last save is lost."""
    monkeypatch.setattr(preemption, "_watch", preemption._Watch())
    directory, log_path = tmp_path / "run", tmp_path / "log.jsonl"
    put_batch, steps = sharding.put_batch, []

    def put(*args):
        steps.append(1)
        if len(steps) in (10, 12):
            preemption._watch.noticed.set()
        return put_batch(*args)

    monkeypatch.setattr(sharding, "put_batch", put)
    for step in (10, 12):
        with pytest.raises(preemption.Preempted, match=f"the training at step {step} of 24"):
            fit(decoder(), directory, log_path)
        preemption._watch.noticed.clear()
        # The checkpoint of a schedule stays beside the one that stands in.
        assert checkpoint.steps(directory) == [7, step] and len(steps) == step
    expected, uninterrupted_directory = uninterrupted
    assert_same(fit(decoder(), directory, log_path), expected)
    assert len(steps) == STEPS and checkpoint.steps(directory) == [21, 24]
    assert log_path.read_text() == (uninterrupted_directory / "log.jsonl").read_text()


def test_a_finished_run_is_left_as_it_is(decoder, uninterrupted):
    expected, directory = uninterrupted
    before = (directory / "log.jsonl").read_text()
    assert_same(fit(decoder(), directory / "run", directory / "log.jsonl"), expected)
    assert (directory / "log.jsonl").read_text() == before


def test_checkpoints_are_kept_with_their_description(decoder, uninterrupted, tmp_path):
    _, directory = uninterrupted
    assert sorted(p.name for p in (directory / "run").iterdir()) == ["21", "24"]
    fit(decoder(), tmp_path, steps=2, save_every=1, keep=1, description={"model": {"size": "x"}})
    assert [p.name for p in tmp_path.iterdir()] == ["2"]
    assert checkpoint.describe(tmp_path)["model"] == {"size": "x"}


def test_the_model_that_is_handed_in_stays_usable(decoder, uninterrupted):
    """The compiled step donates its state, which must not be the caller's arrays."""
    model = decoder()
    _, params = functional.split(model)
    assert all(bool(jnp.isfinite(x).all()) for x in jax.tree.leaves(params))


def test_every_epoch_passes_each_row_once_in_another_order():
    table = table_of()
    plans = [loop.epoch_batches(table, epoch, LAYOUT, seed=3).plan for epoch in (0, 1, 0)]
    for plan in plans:
        assert sorted(plan.order.tolist()) == list(range(len(table)))
    assert plans[0].order.tolist() == plans[2].order.tolist()
    assert plans[0].order.tolist() != plans[1].order.tolist()
    assert len(plans[0]) == len(plans[1])


def test_seeds_of_several_numbers_differ():
    seeds = {loop.hash_seed(a, b) for a in range(20) for b in range(20)}
    assert len(seeds) == 400 and all(0 <= s < 2**63 for s in seeds)
    assert loop.hash_seed(1, 2) != loop.hash_seed(2, 1)


def test_an_empty_corpus_is_refused(decoder, tmp_path):
    nothing = TokenTable([], [], np.zeros(0, np.int32), np.zeros(1, np.int64), np.zeros(0, bool))
    with pytest.raises(ValueError, match="the training corpus has no passages"):
        loop.fit(
            decoder(),
            optimizer(),
            nothing,
            TrainingSettings(1, BatchLayout((8,), tokens_per_batch=32, pad=0)),
            tmp_path / "run",
        )
    assert not (tmp_path / "run").exists()


def test_a_checkpoint_of_another_size_is_refused(decoder, uninterrupted):
    _, directory = uninterrupted
    with pytest.raises(CheckpointError, match=r"up/kernel: \(2, 16, 24\) → \(2, 16, 32\)"):
        fit(decoder(ff_width=32), directory / "run")


def test_a_loss_that_is_not_finite_is_not_saved(decoder, tmp_path):
    tx = optax.sgd(1e30)
    with pytest.raises(FloatingPointError, match="lower the learning rate"):
        loop.fit(
            decoder(),
            tx,
            table_of(),
            TrainingSettings(8, BatchLayout((8,), 32, pad=0, mesh=one_device())),
            tmp_path / "run",
        )
    assert checkpoint.latest_step(tmp_path / "run") is None


def test_training_on_eight_devices_resumes_on_one(decoder, uninterrupted, tmp_path):
    """Guards: batches, and with them steps, that depend on the devices of today."""
    # Batches of four rows, which are filled up for eight devices.
    assert {*loop.epoch_batches(table_of(), 0, LAYOUT, seed=3).plan.sizes} == {4}
    mesh = sharding.make_mesh(data=4, fsdp=2)
    state = fit(decoder(), tmp_path, steps=7, mesh=mesh)
    up = state["params"]["layers"]["mlp"]["up"]["kernel"]
    assert up.sharding.shard_shape(up.shape) == (2, 8, 24)
    resumed = fit(decoder(), tmp_path)
    for a, b in zip(jax.tree.leaves(resumed), jax.tree.leaves(uninterrupted[0]), strict=True):
        # Sums over a batch are added in another order, and Adam divides by small numbers.
        np.testing.assert_allclose(a, b, rtol=0, atol=2e-5 * max(1.0, np.abs(b).max()))


def test_training_does_not_resume_with_other_batches(decoder, tmp_path):
    """Guards: a resumed run whose step means another place in the data."""
    fit(decoder(), tmp_path, steps=1, save_every=1)
    with pytest.raises(checkpoint.CheckpointError, match="other batches:\n  seed: 3 → 4\n"):
        fit(decoder(), tmp_path, steps=2, seed=4)
