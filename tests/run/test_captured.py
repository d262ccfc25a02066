"""The gradients of a training's own steps: kept through kills, and ranked by as their sum says."""

import dataclasses
import json
import shutil
import types

import jax
import numpy as np
import pytest

from tda import store as stores
from tda.encoding import captured
from tda.encoding.captured import Recorder, TrainingRows
from tda.gradients import reference
from tda.gradients.capture import Capture
from tda.gradients.projection import Projection
from tda.methods import GradientKind, parse
from tda.run import capturing, defaults, encode, retrieve, stages
from tda.run import train as training
from tda.run.captured import Captured
from tda.run.retrievers import queries_of_run
from tda.run.workdir import Workdir, WorkdirError
from tda.training import loop
from tda.training.loop import TrainingSettings
from tda.training.optimizer import schedule
from tests.experiments.test_trace import make_config
from tests.training.test_loop import LAYOUT, one_device, optimizer, table_of

PROJECTION = Projection(side=2, blocks=1)
STEPS = 11


def fit(decoder, directory, store_path):
    """Trains for some steps over several epochs, and keeps what the examples add to them."""
    model, table = decoder(), table_of()
    layout = dataclasses.replace(LAYOUT, mesh=one_device())
    rows = TrainingRows.of(table, layout, STEPS, seed=3)
    capture = Capture(model, PROJECTION, tell=False)
    store = stores.create(
        store_path,
        rows.names(table.ids),
        dict.fromkeys(capture.layout.blocks, 4),
        {"training": "a test's"},
        shard_bytes=5 * 4 * capture.layout.width,
    )
    settings = TrainingSettings(STEPS, layout, seed=3, save_every=4)
    recorder = Recorder(capture, store, rows, directory / "captured")
    loop.fit(model, optimizer(), table, settings, directory / "model", recorder=recorder)
    return store, rows


def test_a_killed_training_keeps_the_same_rows(decoder, tmp_path, monkeypatch):
    expected, rows = fit(decoder, tmp_path / "whole", str(tmp_path / "a"))
    assert not expected.missing() and len(expected.shards()) > 5
    calls, record = [], Recorder.record

    def killed(self, step, parts):
        calls.append(step)
        # In the middle of two checkpoints, and once more behind the next one.
        if (step, len(calls)) in ((2, 3), (6, 10)):
            raise KeyboardInterrupt
        record(self, step, parts)

    monkeypatch.setattr(Recorder, "record", killed)
    for _ in range(2):
        with pytest.raises(KeyboardInterrupt):
            fit(decoder, tmp_path / "killed", str(tmp_path / "b"))
    store, _ = fit(decoder, tmp_path / "killed", str(tmp_path / "b"))
    assert calls == [0, 1, 2, 0, 1, 2, 3, 4, 5, 6, 4, 5, 6, 7, 8, 9, 10]
    every = np.arange(expected.rows)
    np.testing.assert_array_equal(store.read(every), expected.read(every))
    # Several epochs give a sequence several rows, each under a name of its own.
    assert len(rows.sequences) == expected.rows > 14 == len(set(rows.sequences))
    assert {p.id for p in store.passages(every)} >= {"0", "0 (time 2)"}
    # Of what was kept beside the store, only the last checkpoint's is left.
    assert [p.name for p in (tmp_path / "killed" / "captured").iterdir()] == ["rows-before-11.npz"]


def test_the_store_tells_each_steps_rows_and_learning_rate(decoder, tmp_path):
    store, rows = fit(decoder, tmp_path / "w", str(tmp_path / "a"))
    with pytest.raises(stores.StoreError, match="a has no training.json of its training"):
        captured.read_rates(str(tmp_path / "a"))
    rates = np.linspace(1e-3, 1e-4, STEPS)
    captured.keep_steps(str(tmp_path / "a"), rows, rates)
    np.testing.assert_array_equal(captured.read_rates(str(tmp_path / "a")), rates.astype("f4"))
    first_rows = json.loads((tmp_path / "a" / "training.json").read_text())["first_rows"]
    assert len(first_rows) == STEPS + 1 and first_rows[-1] == store.rows
    # It is no part of the store, which opens and resumes as before.
    again, _ = fit(decoder, tmp_path / "w", str(tmp_path / "a"))
    assert not again.missing()


def test_a_checkpoint_without_captured_rows_is_refused(decoder, tmp_path):
    fit(decoder, tmp_path / "w", str(tmp_path / "a"))
    (tmp_path / "w" / "captured" / "rows-before-11.npz").unlink()
    table = table_of()
    rows = TrainingRows.of(table, dataclasses.replace(LAYOUT, mesh=one_device()), STEPS, seed=3)
    capture = Capture(decoder(), PROJECTION, tell=False)
    store = stores.open_store(str(tmp_path / "a"))
    recorder = Recorder(capture, store, rows, tmp_path / "w" / "captured")
    recorder.resume(STEPS)  # nothing is missing behind the last step
    with pytest.raises(stores.StoreError, match="step 3 was written without its"):
        recorder.resume(3)


def test_a_run_captures_by_a_config_whose_blocks_its_pooling_does_not_use(decoder, tmp_path):
    """In Python such a number is a mistake; a config file may set more than its run needs."""
    table = table_of()
    rows = TrainingRows.of(table, dataclasses.replace(LAYOUT, mesh=one_device()), STEPS, seed=3)
    for blocks in (2, 8):
        config = defaults.get_config()
        config.projection.update(side=2, pooling="matrix", blocks=blocks)
        corpus, workdir = types.SimpleNamespace(training=table), Workdir(tmp_path)
        capturing.make_recorder(config, corpus, workdir, decoder(), {"training": "a"}, rows)
    # Both have the same store, with a block for each matrix.
    (path,) = (tmp_path / "stores").iterdir()
    assert len(stores.open_store(str(path)).manifest["block_widths"]) > 8
    with pytest.raises(ValueError, match="blocks=2 has no effect with pooling='matrix'"):
        Capture(decoder(), Projection(side=2, blocks=2, pooling="matrix"))


@pytest.fixture(scope="module")
def ranked(tmp_path_factory, one_device):
    """A run that captured its training, with the rankings by it."""
    path = tmp_path_factory.mktemp("captured")
    config = make_config(path)
    config.methods = "captured,captured_plain"
    # Scores are held against sums of float32 numbers.
    config.store.dtype = "float32"
    config.train.capture = True
    config.train.keep = 0
    config.train.save_every = 1
    config.train.epochs = 2.0
    config.projection.blocks = 1
    config.several.checkpoints = 100
    config.eval.top_k = 12
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(training, "make_mesh", lambda config: one_device)
        run = stages.prepare(config, Workdir(path / "w"))
        yield run, retrieve.retrieve(run)[0]


@pytest.mark.slow
def test_a_run_ends_with_the_checkpoints_of_the_queries(ranked):
    """Mistake: a note that the last lines of a run cannot print, after all of its work."""
    run, rankings = ranked
    notes = retrieve.retrieve(run)[1]
    assert {retrieve.describe(notes[name]) for name in rankings} == {"checkpoints 1, 2, 3, 4"}


def rate_of(run):
    """The learning rate by step."""
    t = training.options(run.config)
    return schedule(t["schedule"], t["learning_rate"], run.total_steps, t["warmup"], t["final"])


@pytest.mark.slow
def test_scores_are_the_sum_over_the_steps(ranked):
    run, rankings = ranked
    table, seed = run.corpus.training, run.config.seed
    layout = training.total_steps(run.config, run.corpus)[1]
    rate = rate_of(run)
    expected = np.zeros((2, 4, run.corpus.rows))
    projection = run.projection(GradientKind())
    per_epoch = len(loop.epoch_batches(table, 0, layout, seed))
    for step in range(1, run.total_steps):
        # Before step 1 there is no checkpoint: the first step is left to the test of the encoder.
        epoch, number = divmod(step, per_epoch)
        batch = loop.epoch_batches(table, epoch, layout, seed)[number]
        model = run.at_step(step).trained.model
        parts = reference.encode(model, jax.tree.map(np.asarray, batch.arrays()), projection)
        parts = np.asarray(parts)[: len(batch.rows)] / batch.weights.sum() * float(rate(step))
        for i, kind in enumerate((GradientKind(corrected=True), GradientKind())):
            queries = encode.encode_queries(run.at_step(step), kind)
            np.add.at(expected[i].T, batch.rows, parts @ queries.T)
    for i, name in enumerate(("captured", "captured_plain")):
        found = rankings[name]
        scores = np.zeros((4, run.corpus.rows))
        np.put_along_axis(scores, found.proponents, found.proponent_scores, axis=1)
        first = _first_step(run, i, layout)
        np.testing.assert_allclose(
            scores, expected[i] + first, atol=2e-4 * np.abs(expected[i]).max()
        )


def _first_step(run, which, layout):
    """What the first step adds, from its stored rows and the first checkpoint's queries."""
    store = stores.open_store(capturing.path_of(run.config, run.workdir, run.trained.fingerprint))
    batch = loop.epoch_batches(run.corpus.training, 0, layout, run.config.seed)[0]
    queries = encode.encode_queries(run.at_step(1), GradientKind(corrected=which == 0))
    out = np.zeros((run.corpus.rows, len(queries)))
    out[batch.rows] = store.read(np.arange(len(batch.rows))) @ queries.T * float(rate_of(run)(0))
    return out.T


@pytest.mark.slow
def test_methods_share_a_scan_without_what_was_withdrawn(ranked, monkeypatch):
    run, rankings = ranked
    scans, scan = [], stores.GradientStore.scan

    def watched(store, *arguments):
        scans.append(store.rows)
        return scan(store, *arguments)

    monkeypatch.setattr(stores.GradientStore, "scan", watched)
    before = rankings["captured"].proponents[0]
    monkeypatch.setattr(Captured, "withdrawn", before[:1])
    methods = parse("captured,captured_plain")
    found = Captured(run).search(queries_of_run(run), methods, run.corpus.rows)
    assert len(scans) == 1 and list(found) == list(methods)
    assert found["captured"].ranked.proponents[0].tolist() == [*before[1:], -1]


def capturing_config(path, **projection):
    config = make_config(path)
    config.train.capture, config.methods = True, "captured_plain"
    config.projection.update(projection)
    return config


@pytest.mark.slow
def test_a_training_keeps_the_gradients_of_one_projection(tmp_path, monkeypatch):
    """Mistake: one store with rows of two projections, from a training that was resumed."""
    workdir = Workdir(tmp_path / "w")
    with monkeypatch.context() as patch:
        patch.setattr(loop.preemption, "is_due", lambda steps: steps == 6)
        with pytest.raises(loop.preemption.Preempted):
            stages.prepare(capturing_config(tmp_path, seed=0), workdir)
    with pytest.raises(WorkdirError, match="its capture differs in\n  projection.seed: 0 → 1\n"):
        stages.prepare(capturing_config(tmp_path, seed=1), workdir)
    run = stages.prepare(capturing_config(tmp_path, seed=0), workdir)
    retrieve.retrieve(run)
    # A finished training serves other projections too, except for what it captured.
    run = stages.prepare(capturing_config(tmp_path, seed=1), workdir)
    with pytest.raises(stores.StoreError, match="other settings:\n  projection.seed: 0 → 1\nuse"):
        retrieve.retrieve(run)


def test_a_training_does_not_resume_with_another_store(decoder, tmp_path):
    fit(decoder, tmp_path / "w", str(tmp_path / "a"))
    shutil.rmtree(tmp_path / "a")
    with pytest.raises(stores.StoreError, match="a lacks rows of the steps before 11, from"):
        fit(decoder, tmp_path / "w", str(tmp_path / "a"))


@pytest.mark.parametrize("is_first_stage", [False, True])
def test_methods_of_the_training_need_its_gradients(tmp_path, is_first_stage):
    config = make_config(tmp_path)
    config.methods = "rerank_cos" if is_first_stage else "captured"
    config.rerank.candidates = "captured"
    config.rerank.passages = 20 if is_first_stage else 0
    with pytest.raises(ValueError, match="give train.capture=True, in a new workdir"):
        stages.trace(config, Workdir(tmp_path / "w"))
