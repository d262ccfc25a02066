"""Metrics reach TensorBoard and wandb once each, whatever is killed and resumed."""

import json
import pathlib
import sys
import types

import pytest

from tda.reports import plots
from tda.runtime import metrics, progress


def read_scalars(folder):
    """(step, tag, value) of the event files of a folder, in their order."""
    return [
        (event.step, value.tag, pytest.approx(value.simple_value, rel=1e-6))
        for event in metrics.TensorBoard.read_events(folder)
        for value in event.summary.value
    ]


def test_a_resumed_run_doubles_no_step(tmp_path):
    for steps in ([0, 10, 20], [10, 20, 30]):
        with metrics.writing("tensorboard", tmp_path, {}):
            for step in steps:
                metrics.log("train", step, {"loss": step / 4})
    scalars = read_scalars(tmp_path / "tensorboard" / "train")
    assert scalars == [(s, "train/loss", s / 4) for s in (0, 10, 20, 30)]
    metrics.log("train", 40, {"loss": 1.0})  # no writer is open
    assert len(read_scalars(tmp_path / "tensorboard" / "train")) == 4


def test_values_are_in_the_file_at_once_and_a_torn_event_is_passed_over(tmp_path):
    folder = tmp_path / "tensorboard" / "train"
    with metrics.writing("tensorboard", tmp_path, {}):
        metrics.log("train", 0, {"loss": 1.0})
        metrics.log("train", 10, {"loss": 2.0})
        assert len(read_scalars(folder)) == 2  # as a kill would leave it
    (file,) = folder.iterdir()
    file.write_bytes(file.read_bytes()[:-3])
    with metrics.writing("tensorboard", tmp_path, {}):
        metrics.log("train", 10, {"loss": 2.0})
    assert read_scalars(folder) == [(0, "train/loss", 1.0), (10, "train/loss", 2.0)]


def test_the_figures_of_a_later_table_replace_the_earlier(tmp_path):
    for figure in (0.25, 0.5):
        with metrics.writing("tensorboard", tmp_path, {}):
            metrics.log_figures(7, {"mrr/bm25": figure})
    assert read_scalars(tmp_path / "tensorboard" / "table") == [(7, "table/mrr/bm25", 0.5)]


def test_a_plot_that_is_drawn_is_shown_in_the_place_of_the_last(tmp_path, monkeypatch):
    fake = FakeWandb()
    monkeypatch.setitem(sys.modules, "wandb", fake)
    for y in (1.0, 2.0):
        with metrics.writing("tensorboard,wandb", tmp_path, {}):
            line = plots.Line("a", [0.0, 1.0], [0.0, y])
            png, _ = plots.draw(tmp_path / "costs", [plots.Panel("MRR", [line])], "cost")
    (event,) = metrics.TensorBoard.read_events(tmp_path / "tensorboard" / "plots" / "costs")
    (value,) = event.summary.value
    content = pathlib.Path(png).read_bytes()
    assert value.tag == "plots/costs" and value.image.encoded_image_string == content
    height, width, _ = pytest.importorskip("matplotlib.image").imread(png).shape
    assert (value.image.width, value.image.height) == (width, height)
    assert fake.logged == [{"plots/costs": str(tmp_path / "costs.png")}] * 2


def test_a_progress_bar_logs_its_rate(tmp_path):
    with metrics.writing("tensorboard", tmp_path, {}):
        with progress.bar(40, "encode corpus", "token", done=10) as bar:
            bar.update(30)
    scalars = read_scalars(tmp_path / "tensorboard" / "progress" / "encode_corpus")
    tag = "progress/encode_corpus"
    assert [s[:2] for s in scalars] == [(40, f"{tag}/tokens_per_second"), (40, f"{tag}/share")]
    assert scalars[1][2] == 1.0


class FakeWandb(types.SimpleNamespace):
    """What tda calls of wandb, with what it was called with."""

    def __init__(self):
        super().__init__(inits=[], logged=[], axes=set(), summary={}, finished=0)

    def Image(self, path):
        return path

    def init(self, **arguments):
        self.inits.append(arguments)
        return self

    def define_metric(self, name, step_metric):
        self.axes.add((name, step_metric))

    def log(self, values):
        self.logged.append(values)

    def finish(self):
        self.finished += 1


def test_wandb_goes_on_in_the_same_run(tmp_path, monkeypatch):
    fake = FakeWandb()
    monkeypatch.setitem(sys.modules, "wandb", fake)
    for steps in ([0, 10], [10, 20]):
        with metrics.writing("wandb", tmp_path / "w", {"seed": 3}):
            for step in steps:
                metrics.log("train", step, {"loss": step / 4})
            metrics.log_figures(20, {"mrr/bm25": 0.5})
    assert [x["train/step"] for x in fake.logged] == [0, 10, 20]
    assert fake.logged[1] == {"train/step": 10, "train/loss": 2.5}
    first, second = fake.inits
    assert first == second and first["resume"] == "allow" and first["config"] == {"seed": 3}
    assert first["id"] == json.loads((tmp_path / "w" / "wandb.json").read_text())["id"]
    assert fake.axes == {("train/*", "train/step")} and fake.finished == 2
    assert fake.summary == {"table/step": 20, "table/mrr/bm25": 0.5}


@pytest.mark.slow
def test_wandb_itself_takes_them_offline(tmp_path, monkeypatch):
    pytest.importorskip("wandb")
    monkeypatch.setenv("WANDB_MODE", "offline")
    with metrics.writing("wandb", tmp_path, {"seed": 3}):
        metrics.log("train", 0, {"loss": 1.0})
        metrics.log_figures(0, {"mrr/bm25": 0.5})
    (file,) = tmp_path.glob("wandb/offline-run-*/*.wandb")
    assert b"train/loss" in file.read_bytes() and b"mrr/bm25" in file.read_bytes()


@pytest.mark.parametrize("name, extra", [("tensorboardX", "tensorboard"), ("wandb", "wandb")])
def test_a_library_that_is_not_there_is_named_with_its_extra(name, extra, monkeypatch):
    monkeypatch.setitem(sys.modules, name, None)
    with pytest.raises(ValueError, match=rf"pip install 'tda-jax\[{extra}\]'"):
        metrics.check(extra)


@pytest.mark.parametrize("names", ["mlflow", "tensorboard,mlflow", "tensorboard,tensorboard"])
def test_other_names_are_refused(names):
    with pytest.raises(ValueError, match="metrics.writers='"):
        metrics.check(names)
    assert metrics.check(" tensorboard ") == ["tensorboard"] and metrics.check("") == []


def test_only_process_0_writes(tmp_path, monkeypatch):
    monkeypatch.setattr(metrics.processes, "is_first", lambda: False)
    with metrics.writing("tensorboard", tmp_path, {}):
        metrics.log("train", 0, {"loss": 1.0})
    assert not list(tmp_path.iterdir())
