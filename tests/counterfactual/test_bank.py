"""The bank: retrainings without some units, kept one by one."""

import jax
import numpy as np
import optax
import pytest

from tda.counterfactual.bank import Retraining, draw_subsets, weights_without
from tda.counterfactual.training import batch_nats, sum_by_unit, units_of_tokens
from tda.runtime import preemption
from tda.runtime.array_tasks import ArrayTask, Unfinished
from tda.runtime.groups import Groups
from tda.training import loop
from tests.conftest import make_decoder
from tests.counterfactual.world import LAYOUT, PASSAGES, make_optimizer, make_queries, make_training


def make_retraining(**changes):
    training = make_training()
    unit_C, _ = units_of_tokens(training.table, range(PASSAGES))
    fields = dict(training=training, queries=make_queries(), unit_C=unit_C, identity={"a": 1})
    return Retraining(**(fields | changes))


REMOVED = draw_subsets(PASSAGES, 0.2, 3, seed=0)


@pytest.mark.slow
def test_with_all_weights_one_it_is_the_training_of_fit(tmp_path):
    training = make_training()
    settings = loop.TrainingSettings(training.steps, LAYOUT, seed=0)
    fitted = loop.fit(
        make_decoder(), make_optimizer(training.steps), training.table, settings, tmp_path / "c"
    )
    losses = [make_queries()(state["params"]) for state in (training.run(), fitted)]
    np.testing.assert_allclose(*losses, rtol=2e-5)


def test_with_all_weights_one_its_steps_are_those_of_training():
    training = make_training()
    step = jax.jit(lambda s, b: loop.train_step(training.model_fn.merge, training.tx, s, b)[0])
    state = training.start()
    for batch in training.batches:
        state = step(state, batch.arrays)
    for ours, theirs in zip(*map(jax.tree.leaves, (training.run(), state)), strict=True):
        np.testing.assert_allclose(ours, theirs, atol=2e-5)


def test_a_dropped_passage_leaves_denominator_and_order_as_they_are():
    """Guards: a mean over the tokens that are left, which raises all other passages' weights."""
    training = make_training()
    weights = weights_without(np.eye(PASSAGES, dtype=bool)[3:4], make_retraining().unit_C)[0]
    for batch in training.batches:
        spread, scored = batch.spread(weights), batch.arrays["weights"] > 0
        targets = training.table.tokens[batch.places_BxT]
        np.testing.assert_array_equal(targets[scored], batch.arrays["targets"][scored])
        dropped = [i for i, row in enumerate(batch.rows) if row == 3]
        assert not spread[dropped][scored[dropped]].any()
        others = np.setdiff1d(np.arange(len(spread)), dropped)
        assert spread[others][scored[others]].all()
    arrays, logits = training.batches[0].arrays, np.zeros((8, 8, 50), np.float32)
    logits[..., :4] = np.arange(4)
    full, half = (float(batch_nats(logits, arrays, np.full((8, 8), w))) for w in (1.0, 0.5))
    assert half == pytest.approx(full / 2)
    # Without any token of a batch its loss is 0, and the step is that of a zero gradient.
    state = training.run(np.zeros_like(weights), stop=1)
    assert not any(np.asarray(m).any() for m in jax.tree.leaves(optax.tree.get(state, "mu")))


def test_several_at_once_are_those_of_one_at_a_time():
    alone = make_retraining().bank(REMOVED, "one")
    together = make_retraining(together=4).bank(REMOVED, "four")
    size = np.abs(alone.changes_MxQ).max()
    assert size > 1e-3
    np.testing.assert_allclose(together.changes_MxQ, alone.changes_MxQ, atol=1e-3 * size)


def test_a_killed_bank_continues_with_what_is_missing(tmp_path, monkeypatch):
    retraining = make_retraining(groups=Groups(tmp_path))
    # Asked at each step and after each training: the notice comes within the third training.
    asked = 2 * (make_training().steps + 1) + 3
    noticed = iter([False] * asked + [True])
    monkeypatch.setattr(preemption, "is_noticed", lambda: next(noticed, False))
    with pytest.raises(preemption.Preempted):
        retraining.bank(REMOVED, "killed")
    files = {f: f.stat().st_mtime_ns for f in tmp_path.rglob("*.npz")}
    assert len(files) == 2
    bank = retraining.bank(REMOVED, "continued")
    assert all(f.stat().st_mtime_ns == t for f, t in files.items())
    expected = make_retraining().bank(REMOVED, "whole")
    np.testing.assert_array_equal(bank.losses_MxQ, expected.losses_MxQ)
    # Another training, other units, other sets: none of them takes these files.
    for changed in (
        make_retraining(groups=Groups(tmp_path), identity={"a": 2}),
        make_retraining(groups=Groups(tmp_path), unit_C=retraining.unit_C // 2),
    ):
        before = len(list(tmp_path.rglob("*.npz")))
        changed.bank(REMOVED, "another")
        assert len(list(tmp_path.rglob("*.npz"))) == before + 4


def test_a_longer_list_of_draws_computes_only_what_it_has_more(tmp_path):
    retraining = make_retraining(groups=Groups(tmp_path))
    few = retraining.bank(REMOVED[:2], "few", {"seed": 0})
    files = {f: f.stat().st_mtime_ns for f in tmp_path.rglob("*.npz")}
    more = retraining.bank(REMOVED, "more", {"seed": 0})
    assert all(f.stat().st_mtime_ns == t for f, t in files.items())
    assert len(list(tmp_path.rglob("*.npz"))) == len(files) + 1
    np.testing.assert_array_equal(more.losses_MxQ[:2], few.losses_MxQ)
    with pytest.raises(ValueError, match="without other units than are drawn now"):
        retraining.bank(~REMOVED, "others", {"seed": 0})


def test_tasks_of_an_array_divide_the_retrainings(tmp_path):
    tasks = [
        make_retraining(groups=Groups(tmp_path / "r", engine=ArrayTask(i, 2, tmp_path, "", 0.0)))
        for i in range(2)
    ]
    with pytest.raises(Unfinished, match="2 of its groups are missing, those of task 1"):
        tasks[0].bank(REMOVED, "a part", {"seed": 0})
    files = {f: f.stat().st_mtime_ns for f in tmp_path.rglob("*.npz")}
    bank = tasks[1].bank(REMOVED, "the rest", {"seed": 0})
    assert len(files) == 2 and all(f.stat().st_mtime_ns == t for f, t in files.items())
    expected = make_retraining().bank(REMOVED, "whole")
    np.testing.assert_array_equal(bank.losses_MxQ, expected.losses_MxQ)
    np.testing.assert_array_equal(bank.base_Q, expected.base_Q)


def test_draws_are_seeded_each_for_itself():
    more = draw_subsets(PASSAGES, 0.2, 5, seed=0)
    assert (more[:3] == REMOVED).all() and (more.sum(axis=1) == 5).all()
    assert (draw_subsets(PASSAGES, 0.2, 3, seed=1) != REMOVED).any()
    for fraction in (0.0, 1.0, 0.99):
        with pytest.raises(ValueError, match="give a share above 0 and below 1"):
            draw_subsets(PASSAGES, fraction, 1, seed=0)


def test_units_are_passages_or_any_key_of_them():
    table = make_training().table
    unit_C, names = units_of_tokens(table, [None if i < 2 else i % 3 for i in range(PASSAGES)])
    assert names == [2, 0, 1]
    assert (unit_C[: table.starts[2]] == -1).all() and unit_C[table.starts[2]] == 0
    # Passages of no unit are never dropped.
    assert weights_without(np.ones((1, 3), bool), unit_C)[0].nonzero()[0].max() < table.starts[2]
    sums = sum_by_unit(np.ones((1, len(unit_C))), unit_C, 3)[0]
    assert sums.sum() == len(unit_C) - table.starts[2] and sums[0] == (unit_C == 0).sum()


def test_refusals():
    training = make_training()
    half = {"x": training.even_weights.astype(np.float16)}
    with pytest.raises(ValueError, match="the parameters are float16; .* need float32"):
        type(training)(training.model_fn, half, training.tx, training.table, [1])
    with pytest.raises(ValueError, match="there is none"):
        type(training)(training.model_fn, training.params, training.tx, training.table, [])
