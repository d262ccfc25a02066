"""A grid from end to end: what points share, commands, failures, parallel points."""

import contextlib
import dataclasses
import json
import pathlib
import re
import shlex
import signal
import subprocess
import sys
import threading
import time

import numpy as np
import pytest
from absl import flags
from absl.testing import flagsaver

from experiments import sweep
from tda.encoding import table as encoding
from tda.run import defaults, measures, retrieve, stages
from tda.run.workdir import Workdir
from tda.sweep import digests, grid, points, report
from tda.training import loop
from tests.experiments.test_trace import make_config
from tests.run import test_counterfactual
from tests.sweep.test_grid import write


def test_a_sweep_may_not_be_named_as_what_all_share(tmp_path, capsys):
    flags.FLAGS.mark_as_parsed()
    for name in ("points", "runs", "point"):
        path = write(tmp_path / f"{name}.py", '{"axes": {"seed": [1, 2]}}')
        with flagsaver.flagsaver(sweep=path, list=True):
            if name == "point":
                sweep.main(defaults.get_config(), tmp_path)
                assert len(capsys.readouterr().out.splitlines()) == 2
            else:
                with pytest.raises(ValueError, match=f"{name}.py: .*rename it"):
                    sweep.main(defaults.get_config(), tmp_path)


@pytest.fixture(scope="module")
def swept(tmp_path_factory, runs_on_one_device):
    """A small grid that was run in this process: its sweep, its directory, what it computed."""
    path = tmp_path_factory.mktemp("sweep")
    config = make_config(path)
    config.eval.samples, config.eval.resamples = 0, 100
    body = """{
        "fixed": {"methods": "trackstar,grad_cos"},
        "axes": {"hessian.weight": (-1.0, 0.5), "projection.side": (2, 4)},
    }"""
    found = grid.load(write(path / "s.py", body), config)
    count = {}
    with pytest.MonkeyPatch.context() as patch:
        for module, name in ((loop, "fit"), (encoding, "fill_stores"), (measures, "TailPatch")):
            patch.setattr(module, name, counted(module, name, count))
        for point in found.points:
            points.run_point(point, path / "w")
    return found, path / "w", count


def counted(module, name, count):
    real = getattr(module, name)

    def call(*args, **kwargs):
        if name == "fill_stores" and not any(store.missing() for store in args[0]):
            return real(*args, **kwargs)
        count[name] = count.get(name, 0) + 1
        return real(*args, **kwargs)

    return call


def test_points_share_what_their_keys_leave_alone(swept):
    found, path, count = swept
    # One training; of two sides the corpus, raw and corrected at once, and the queries for each.
    # Retrieved pairs that an earlier point measured are not measured again.
    assert count["fit"] == 1 and count["fill_stores"] == 2 * (1 + 2)
    assert len(list((path / "runs").iterdir())) == 1
    (kept,) = path.glob("runs/*/tail_patch-*.jsonl")
    keys = [json.loads(line)["key"] for line in kept.read_text().splitlines()]
    assert len(keys) == len(set(keys))
    assert all(points.is_finished(p, path) for p in found.points)


@pytest.mark.slow
def test_a_point_is_what_a_trace_of_its_config_is(swept, tmp_path):
    found, path, _ = swept
    point = found.points[-1]
    metrics = stages.trace(point.config, Workdir(tmp_path / "alone"))[0]
    there = json.loads((path / "points" / point.name / "metrics.json").read_text())
    assert there == metrics
    for name in ("trackstar", "grad_cos"):
        result = f"results/{name}.jsonl"
        own = path / "points" / point.name / result
        assert own.read_bytes() == (tmp_path / "alone" / result).read_bytes()


def test_points_held_against_retraining_share_the_retrainings(tmp_path, runs_on_one_device):
    config = test_counterfactual.make_config(
        tmp_path,
        **{
            "methods": "grad_dot,bm25",
            "counterfactual.methods": "dot_whole",
            "counterfactual.orders": 1,
            "counterfactual.own_top": 0,
            "counterfactual.subsets": 3,
            "eval.tail_patch_queries": 0,
            "eval.samples": 0,
        },
    )
    path = write(tmp_path / "s.py", '{"axes": {"projection.side": (2, 4)}}')
    found = grid.load(path, config, is_board=True)
    written = []
    for point in found.points:
        points.run_point(point, tmp_path / "w")
        (bank,) = (tmp_path / "w" / "runs").glob("*/counterfactual")
        shared = [*bank.glob("retrainings/**/*.npz"), *bank.glob("scores/dot_whole-*")]
        written.append({f: f.stat().st_mtime_ns for f in shared})
    assert written[0] == written[1] and len(written[0]) > 1
    finished = points.read(found.points, tmp_path / "w")
    for point, metrics, _ in finished:
        out = tmp_path / "w" / "points" / point.name
        board = json.loads((out / "board.json").read_text())["methods"]
        assert [*metrics] == ["dot_whole", "grad_dot", "bm25"] and (out / "board.md").exists()
        for name, m in metrics.items():
            lds = board[name]["lds"]["0.3"]["same order"]
            assert m["lds_0.3"] == lds["mean"] and m["mrr"] == board[name]["mrr"]["mean"]
            assert m["intervals"]["lds_0.3"] == [lds["low"], lds["high"]]
            assert (out / "results" / f"{name}.jsonl").exists()
            for other, d in m["differences"].items():
                difference = m["lds_0.3"] - metrics[other]["lds_0.3"]
                assert d["lds_0.3"]["difference"] == pytest.approx(difference)
    # Of another side the projected scores are others, and the rest is the same.
    (_, a, _), (_, b, _) = finished
    assert a["grad_dot"]["lds_0.3"] != b["grad_dot"]["lds_0.3"]
    assert all(a[n]["lds_0.3"] == b[n]["lds_0.3"] for n in ("dot_whole", "bm25"))
    # What a board cannot have is refused before anything runs.
    config.counterfactual.subsets = 1
    (point,) = grid.load(write(tmp_path / "s.py", '{"axes": {"seed": (0,)}}'), config, True).points
    with pytest.raises(ValueError, match="point board,seed=0-.*counterfactual.subsets=1"):
        points.check(point)


def test_finished_points_are_gathered_and_not_run_again(swept, monkeypatch, capsys):
    found, path, _ = swept
    monkeypatch.setattr(retrieve, "retrieve", None)
    for point in found.points:
        points.run_point(point, path)
    monkeypatch.setattr(points, "_start", None)
    assert points.run_all(found.points, path, 2, None) == {}
    table = report.rows(points.read(found.points, path))
    lambdas = {
        (r["projection.side"], r["lambda"])
        for r in table
        if r["method"] == "trackstar" and r["hessian.weight"] == 0.5
    }
    assert lambdas == {(2, 0.5), (4, 0.5)}
    assert {r["dimensions"] for r in table} == {4 * 2**2, 4 * 4**2}
    assert np.isfinite([r["value"] for r in table]).all()
    # Another config is another point's result, even under the same name.
    changed = grid._with_values(found.points[0].config, {"eval.top_k": 3}, "s.py")
    assert not points.is_finished(grid.Point(found.points[0].name, {}, changed), path)


@contextlib.contextmanager
def with_bytes(path, contents):
    """A file with other contents for a while; None: it is gone."""
    path = pathlib.Path(path)
    before = path.read_bytes()
    try:
        path.unlink() if contents is None else path.write_bytes(contents)
        yield
    finally:
        path.write_bytes(before)


@contextlib.contextmanager
def with_stamp(path, point, change):
    """A point whose stamp says something else for a while."""
    stamp = path / "points" / point.name / "point.json"
    told = json.loads(stamp.read_text())
    change(told)
    with with_bytes(stamp, json.dumps(told).encode()):
        yield


class Ended:
    """A point's process that has ended well."""

    returncode = 0

    def poll(self):
        return 0

    def terminate(self):
        pass


@pytest.mark.parametrize("key", ["sentences", "facts"])
def test_points_of_files_that_changed_are_run_anew(swept, monkeypatch, capsys, key):
    """Mistakes: a table of points of the old file beside points of the new one."""
    found, path, _ = swept
    file = pathlib.Path(found.points[0].config.data[key])
    started = []
    monkeypatch.setattr(points, "_start", lambda point, *_: started.append(point.name) or Ended())
    with with_bytes(file, file.read_bytes().replace(b"Oslo", b"Bergen")):
        assert not any(points.is_finished(p, path) for p in found.points)
        points.run_all(found.points, path, 1, None)
        told = capsys.readouterr().out
    assert started == [p.name for p in found.points]
    change = f"\n  data.{key}: the contents have changed\n"
    assert all(f"{name} runs again; since it was run:{change}" in told for name in started)
    # Written anew with the same contents it is the same file.
    assert all(points.is_finished(p, path) for p in found.points)


def test_a_point_of_another_config_is_run_anew_and_the_change_is_told(swept, monkeypatch, capsys):
    found, path, _ = swept
    last = found.points[-1]
    monkeypatch.setattr(points, "_start", lambda *_: Ended())
    with with_stamp(path, last, lambda stamp: stamp["made_from"]["config"]["eval"].update(seed=7)):
        points.run_all([last], path, 1, None)
    assert f"{last.name} runs again; since it was run:\n  eval.seed: 7 → 0\n" in (
        capsys.readouterr().out
    )


def test_a_stamp_holds_the_constants_that_a_config_leaves_to_the_optimizer(swept):
    """So that stamps stay valid, whether the constants are set to their usual values or unset."""
    found, path, _ = swept
    point = found.points[0]
    stamp = json.loads((path / "points" / point.name / "point.json").read_text())
    assert point.config.train.b2 is None and stamp["made_from"]["config"]["train"]["b2"] == 0.99
    config = grid._with_values(point.config, {"train.b2": 0.99}, "s.py")
    other = dataclasses.replace(point, config=config)
    assert points.is_finished(other, path) and other.training == point.training


def test_points_without_their_files_are_gathered_if_they_agree(swept):
    found, path, _ = swept
    data = found.points[0].config.data
    digest = ("made_of", "files", "data.facts")
    with with_bytes(data.sentences, None), with_bytes(data.facts, None):
        assert all(points.is_finished(p, path) for p in found.points)
        points.check_alike(found.points, path)
        last = found.points[-1]
        for keys in (digest, ("made_of", "corpus", "queries"), ("made_of", "training")):

            def change(told, keys=keys):
                for key in keys[:-1]:
                    told = told[key]
                told[keys[-1]] = "another"

            with with_stamp(path, last, change):
                assert points.is_finished(last, path)
                names = f"points {found.points[0].name} and {last.name} "
                with pytest.raises(ValueError, match=re.escape(names) + ".*point.json"):
                    points.check_alike(found.points, path)


def test_a_table_has_no_points_of_both(swept, monkeypatch, capsys):
    found, path, _ = swept
    first, last = found.points[0], found.points[-1]
    monkeypatch.setattr(points, "_start", lambda *_: Ended())
    flags.FLAGS.mark_as_parsed()

    def main():
        with flagsaver.flagsaver(
            sweep=str(path.parent / "s.py"), list=False, point=None, plots=False
        ):
            sweep.main(first.config, path)

    main()
    assert "4 of 4 points" in capsys.readouterr().out
    # What changed while the points ran is told, and none of them is gathered.
    data = pathlib.Path(first.config.data.facts)
    with with_bytes(data, data.read_bytes() + b"\n"):
        with pytest.raises(ValueError, match="4 points failed.*\n.*has changed since"):
            main()
        assert "of 4 points" not in capsys.readouterr().out
    with with_stamp(path, last, lambda told: told["made_of"].update(training="another")):
        with pytest.raises(ValueError, match="different contents of the training"):
            main()
    assert "of 4 points" not in capsys.readouterr().out


def test_what_was_measured_stays_where_a_changed_file_is_refused(swept):
    """The training of the old text is there: neither is it thrown away, nor are its figures."""
    found, path, _ = swept
    point = found.points[0]
    sentences = pathlib.Path(point.config.data.sentences)
    changed = sentences.read_bytes().replace(b"all day", b"all night")
    with with_bytes(sentences, changed), pytest.raises(ValueError, match="holds another run"):
        points.run_point(point, path)
    assert points.is_finished(point, path)


def test_what_a_changed_file_would_make_is_not_marked_as_made(swept, tmp_path, monkeypatch):
    """Guards: two points at once in the stores of the new file, which none has made."""
    found, _, _ = swept
    facts = tmp_path / "facts.jsonl"
    facts.write_bytes(pathlib.Path(found.points[0].config.data.facts).read_bytes())
    config = grid._with_values(found.points[0].config, {"data.facts": str(facts)}, "s.py")
    (point,) = grid.load(write(tmp_path / "s.py", '{"axes": {"seed": [0]}}'), config).points
    old = digests.digests(point.config)

    real = points.train.train
    monkeypatch.setattr(points.train, "train", lambda *a: (real(*a), facts.write_bytes(b""))[0])
    monkeypatch.setattr(points.retrieve, "retrieve", lambda *a: ({}, {}))
    monkeypatch.setattr(points.evaluate, "evaluate", lambda *a: {})
    points.run_point(point, tmp_path)
    assert digests.digests(point.config) != old
    markers = sorted(f.name for f in (tmp_path / "runs" / point.training).glob("*-*.*s"))
    assert markers == [points._marker(point, "stores", old)]


def test_points_of_one_training_remove_no_results_of_each_others_groups(swept, monkeypatch):
    """Guards: a point that ended while another wrote a group's result, whose folder was gone."""
    found, path, _ = swept
    folders = []

    def rank(run):
        folders.append(run.groups.directory)
        folders[-1].mkdir()
        raise RuntimeError("killed")

    monkeypatch.setattr(points.retrieve, "retrieve", rank)
    for point in found.points[:2]:
        with with_bytes(path / "points" / point.name / "point.json", None):
            with pytest.raises(RuntimeError, match="killed"):
                points.run_point(point, path)
    assert found.points[0].training == found.points[1].training
    first, second = folders
    assert first != second and first.parent == second.parent
    for folder in folders:
        folder.rmdir()


def test_what_is_wrong_with_a_point_is_told_before_any_is_run(swept, tmp_path, monkeypatch):
    found, path, _ = swept
    config = found.points[0].config
    flags.FLAGS.mark_as_parsed()
    monkeypatch.setattr(points, "_start", None)
    for axis, told in (
        ('"eval.top_k": (5, 0)', "point top_k=0-.*eval.top_k=0 must be 1 or more"),
        ('"search.index": ("none", "scan")', "point index=scan-.*unknown search.index='scan'"),
        ('"train.final": (0.0,)', "point final=0.0-.*ends at 0"),
    ):
        body = f'{{"axes": {{{axis}}}}}'
        with flagsaver.flagsaver(sweep=write(tmp_path / "k.py", body), list=False, point=None):
            with pytest.raises(ValueError, match=told):
                sweep.main(config, tmp_path / "w")
    # A point alone tells it too, before it reads anything.
    wrong = grid._with_values(config, {"train.final": 0.0, "data.sentences": "/nowhere"}, "s.py")
    with pytest.raises(ValueError, match="ends at 0; give eval.tail_patch_learning_rate"):
        points.run_point(grid.Point("p", {}, wrong), tmp_path / "w")


def test_commands_are_for_one_point_each(monkeypatch, tmp_path):
    path = write(tmp_path / "s.py", '{"axes": {"hessian.weight": [0.5]}}')
    given = ["sweep.py", "--config=c.py", f"--sweep={path}", "--workdir=a b", "--config.seed=3"]
    monkeypatch.setattr(sys, "argv", [*given, "--parallel", "4", "--list", "--noplots"])
    (point,) = grid.load(path, defaults.get_config()).points
    told = shlex.join(sweep.command(point))
    assert told.endswith(f"--sweep={path} '--workdir=a b' --config.seed=3 --point={point.name}")
    assert told.startswith(f"{sys.executable} -m experiments.sweep --config=c.py")


def test_why_a_point_failed(tmp_path):
    log = tmp_path / "log.txt"
    log.write_text("train: 3%\nerror: no such file\n(traceback in error.txt)\n")
    assert points._failure(log, 1) == f"error: no such file ({log})"
    assert points._failure(log, -9) == f"killed by signal 9 ({log})"
    log.write_text("")
    assert points._failure(log, 3) == f"exit status 3 ({log})"


def test_only_points_take_an_accelerator(monkeypatch):
    taken = []
    monkeypatch.setattr(sweep.jax.config, "update", lambda *change: taken.append(change))
    sweep._leave_devices_to_points(["--config=c.py", "--point=a"])
    sweep._leave_devices_to_points(["--point", "a"])
    assert not taken
    sweep._leave_devices_to_points(["--config=c.py", "--workdir=point"])
    assert taken == [("jax_platforms", "cpu")]


def test_what_is_shared_is_made_by_one_and_waited_for_by_the_rest(tmp_path, capsys):
    marker, lock, seen = tmp_path / "m.training", tmp_path / "lock", []
    inside, go = threading.Event(), threading.Event()

    def make(name, wait):
        with points._once(marker, lock):
            seen.append((name, marker.exists()))
            if wait:
                inside.set()
                assert go.wait(60)

    first = threading.Thread(target=make, args=("first", True), daemon=True)
    first.start()
    assert inside.wait(60)
    rest = [threading.Thread(target=make, args=(i, False), daemon=True) for i in range(2)]
    for thread in rest:
        thread.start()
        thread.join(0.2)
    assert seen == [("first", False)] and "waiting for it" in capsys.readouterr().out
    go.set()
    for thread in (first, *rest):
        thread.join(60)
    assert sorted(seen[1:]) == [(0, True), (1, True)]
    # Where the one that makes it fails, the next makes it.
    marker.unlink()
    with pytest.raises(ZeroDivisionError), points._once(marker, lock):
        raise ZeroDivisionError
    assert not marker.exists()
    make("next", False)
    assert seen[-1] == ("next", False) and marker.exists()


def test_the_next_point_waits_for_nothing_if_it_can(tmp_path):
    def point(name, **changes):
        config = defaults.get_config()
        for key, value in changes.items():
            config[key.split("_")[0]][key.split("_")[1]] = value
        return grid.Point(name, {}, config)

    a, b = point("a", hessian_weight=0.1), point("b", hessian_weight=0.2)
    c, d = point("c", projection_side=4), point("d", model_size="mini")
    # While a trains, only d has something of its own to do.
    assert points._next([b, c, d], [a], tmp_path).name == "d"
    run = tmp_path / "runs" / a.training
    run.mkdir(parents=True)
    files = digests.digests(a.config)
    (run / points._marker(a, "training", files)).touch()
    assert points._next([b, c, d], [a], tmp_path).name == "c"
    (run / points._marker(a, "stores", files)).touch()
    assert points._next([b, c, d], [a], tmp_path).name == "b"
    assert points._next([b], [], tmp_path).name == "b"


@pytest.mark.slow
def test_killed_and_in_parallel_it_ends_in_the_same_table(tmp_path):
    config = make_config(tmp_path)
    path = write(
        tmp_path / "s.py",
        """{
        "fixed": {"methods": "trackstar,bm25", "tokenizer.vocab_size": 300, "model.context": 32,
                  "train.epochs": 4.0, "train.tokens_per_batch": 256, "train.warmup": 2,
                  "projection.blocks": 2, "eval.tail_patch_queries": 2, "eval.resamples": 100,
                  "data.pool": "all"},
        "axes": {"hessian.weight": (-1.0, 0.5), "projection.side": (2, 4)},
        "plots": [{"name": "p", "x": "lambda", "y": ("mrr",), "lines": ["projection.side"]}],
    }""",
    )

    def start(workdir, *more):
        return subprocess.Popen(
            [
                sys.executable, "-m", "experiments.sweep", "--config=configs/world_facts.py",
                f"--sweep={path}", f"--workdir={workdir}",
                f"--config.data.sentences={config.data.sentences}",
                f"--config.data.facts={config.data.facts}", *more,
            ],
            stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True,
        )  # fmt: skip

    whole = start(tmp_path / "whole")
    assert whole.wait() == 0, whole.stdout.read()
    killed = tmp_path / "killed"
    for enough in (1, 2):
        run = start(killed, "--parallel=2")
        while len(list(killed.glob("points/*/point.json"))) < enough and run.poll() is None:
            time.sleep(0.1)
        run.send_signal(signal.SIGKILL)
        run.wait()
    listed = start(killed, "--list")
    commands = listed.communicate()[0].splitlines()
    assert len(commands) == 4
    jobs = [subprocess.Popen(c, shell=True, stdout=subprocess.DEVNULL) for c in commands]
    assert [j.wait() for j in jobs] == [0] * 4
    last = start(killed, "--parallel=2")
    told = last.communicate()[0]
    assert last.returncode == 0 and "4 of 4 points" in told, told
    for name in ("s/sweep.csv", "s/p.png"):
        assert (killed / name).read_bytes() == (tmp_path / "whole" / name).read_bytes(), name
    # A missing file is told before any point starts, what is wrong inside one by every point.
    missing = start(tmp_path / "missing", "--config.data.facts=/nowhere.jsonl")
    told = missing.communicate()[0]
    assert missing.returncode == 1 and "error: point" in told and "/nowhere.jsonl" in told
    (tmp_path / "bad.jsonl").write_text("no JSON\n")
    failing = start(tmp_path / "failing", f"--config.data.facts={tmp_path / 'bad.jsonl'}")
    told = failing.communicate()[0]
    assert failing.returncode == 1 and "4 points failed" in told and "bad.jsonl" in told
