"""Sweeps: what a file may say, what points share, the tables, and a grid from end to end."""

import csv
import json
import pathlib
import signal
import subprocess
import sys
import threading
import time

import numpy as np
import pytest
from absl import flags
from absl.testing import flagsaver

from configs import defaults, world_facts
from experiments import attribution, grid, measures, sweep, sweep_report, trace
from experiments.workdir import Workdir
from tda import encoding, methods, train
from tests.experiments.test_trace import make_config

SHIPPED = sorted(
    p
    for p in (pathlib.Path(__file__).parents[2] / "configs" / "sweeps").glob("*.py")
    if p.stem != "__init__"
)


def write(path, body):
    path.write_text(f"def get_sweep():\n    return {body}\n")
    return str(path)


def test_a_grid_is_the_product_of_its_axes(tmp_path):
    path = write(
        tmp_path / "s.py",
        """{
        "fixed": {"methods": "grad_cos", "train.epochs": 2},
        "axes": {"hessian.weight": (0, 0.5), "model.size, train.learning_rate":
                 (("tiny", 1e-3), ("mini", 2e-3))},
    }""",
    )
    found = grid.load(path, defaults.get_config())
    assert found.axes == ("hessian.weight", "model.size", "train.learning_rate")
    assert [tuple(p.values.values()) for p in found.points] == [
        (0, "tiny", 1e-3), (0, "mini", 2e-3), (0.5, "tiny", 1e-3), (0.5, "mini", 2e-3),
    ]  # fmt: skip
    last = found.points[-1].config
    assert (last.hessian.weight, last.model.size, last.train.learning_rate) == (0.5, "mini", 2e-3)
    assert (last.methods, last.train.epochs, last.seed) == ("grad_cos", 2.0, 0)
    assert len({p.name for p in found.points}) == 4
    # A point's name does not hang on the rest of the grid, but on what else its file fixes.
    names = []
    for fixed, weights in (({}, [0.5]), ({}, [0, 0.5]), ({"train.epochs": 2}, [0.5])):
        body = f'{{"axes": {{"hessian.weight": {weights}}}, "fixed": {fixed}}}'
        names.append(grid.load(write(tmp_path / "t.py", body), last).points[-1].name)
    assert names[0].startswith("weight=0.5-") and names[0] == names[1] != names[2]
    # What λ leaves as it is, is shared; another model is not.
    trainings, stores = ([getattr(p, k) for p in found.points] for k in ("training", "stores"))
    assert trainings[0] == trainings[2] != trainings[1] == trainings[3]
    assert stores[0] == stores[2] != stores[1] == stores[3]


@pytest.mark.parametrize(
    "key, trains, encodes",
    [
        ("hessian.damping", False, False),
        ("eval.tail_patch_learning_rate", False, False),
        ("projection.side", False, True),
        ("gradients.correction", False, True),
        ("train.traced", False, True),
        ("train.epochs", True, True),
        ("seed", True, True),
        ("data.n_sentences", True, True),
    ],
)
def test_what_each_key_makes_anew(key, trains, encodes):
    values = {"gradients.correction": "adam"}.get(key, 1 if key != "train.traced" else 0.5)
    config = defaults.get_config()
    other = grid._changed(config, {key: values}, "s.py")
    a, b = grid.Point("a", {}, config), grid.Point("b", {}, other)
    assert (a.training != b.training) == trains and (a.stores != b.stores) == encodes
    # The uncorrected store is the same under every correction: not to be encoded twice at a time.
    apart = encodes and key != "gradients.correction"
    assert (a.encoding != b.encoding) == apart


@pytest.mark.parametrize(
    "body, message",
    [
        ('{"axes": {"hessian.weigh": [1]}}', "no key 'hessian.weigh'; did you mean hessian.weight"),
        ('{"axes": {"hessian.weight": ["x"]}}', "cannot set hessian.weight='x'"),
        ('{"axes": {"hessian.weight": []}}', "axis 'hessian.weight' needs values"),
        ('{"axes": {"seed, hessian.weight": [(1,)]}}', "needs values, each of 2"),
        ('{"axes": {"seed": [1], "seed, train.epochs": [(1, 2)]}}', "a key is on two axes"),
        ('{"axes": {}}', "no axes"),
        ('{"axes": {"seed": [1]}, "plot": []}', "unknown plot"),
    ],
)
def test_what_a_file_may_not_say(tmp_path, body, message):
    with pytest.raises(ValueError, match=rf"s.py: .*{message}"):
        grid.load(write(tmp_path / "s.py", body), defaults.get_config())


def test_other_files_are_refused(tmp_path):
    (tmp_path / "s.py").write_text("x = 1\n")
    with pytest.raises(ValueError, match="no function get_sweep"):
        grid.load(str(tmp_path / "s.py"), defaults.get_config())
    with pytest.raises(FileNotFoundError):
        grid.load(str(tmp_path / "absent.py"), defaults.get_config())


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


def made_up(point, seed=0, **more):
    """Metrics of a point as an evaluation writes them, and what is told of it."""
    m = {
        "mrr": 0.5 + 0.1 * seed, "recall_at_10": 0.7, "tail_patch": None, "n_queries": 9,
        "confidence": 0.1, "intervals": {"mrr": [0.4, 0.6]}, "counts": {"mrr": 9},
        "by_relation": {
            "capital": {"n_queries": 5, "mrr": 0.25, "intervals": {}, "counts": {"mrr": 4}}
        }, **more,
    }  # fmt: skip
    about = {"parameters": 10, "dimensions": 64, "training_tokens": 7, "training_step": 3}
    chosen = methods.parse(point.config.methods)
    notes = {"trackstar": {"lambda": 0.25, "component": 2}} if "trackstar" in chosen else {}
    return point, {name: m for name in chosen}, about | {"notes": notes}


def test_the_table_is_tidy(tmp_path):
    path = write(
        tmp_path / "s.py",
        '{"fixed": {"methods": "trackstar,bm25"}, "axes": {"hessian.weight": [-1.0, 0.5]}}',
    )
    found = grid.load(path, defaults.get_config())
    files = sweep_report.write(found, [made_up(p) for p in found.points], tmp_path, True)
    assert files == [str(tmp_path / "sweep.csv")]
    with open(files[0], encoding="utf-8") as lines:
        rows = list(csv.DictReader(lines))
    # Two points × two methods × (two metrics and one of a group); nothing that has no value.
    assert len(rows) == 12
    first = rows[0]
    assert (first["hessian.weight"], first["method"], first["metric"]) == (
        "-1.0",
        "trackstar",
        "mrr",
    )
    assert (first["value"], first["low"], first["high"]) == ("0.5", "0.4", "0.6")
    assert (first["lambda"], first["dimensions"], first["group"]) == ("0.25", "64", "")
    grouped = [r for r in rows if r["group"]]
    assert {r["group"] for r in grouped} == {"relation: capital"}
    assert {(r["value"], r["n_queries"], r["low"]) for r in grouped} == {("0.25", "4", "")}


def test_differences_are_told_once_for_each_pair_and_group(tmp_path):
    path = write(
        tmp_path / "s.py",
        '{"fixed": {"methods": "trackstar,exp5,bm25"}, "axes": {"hessian.weight": [0.5]}}',
    )
    found = grid.load(path, defaults.get_config())
    (point,) = found.points
    _, metrics, about = made_up(point)
    d = {"difference": 0.25, "low": 0.1, "high": 0.4, "p": 0.01}
    metrics = {n: dict(m) for n, m in metrics.items()}
    for name, sign in (("trackstar", 1), ("exp5", -1)):
        other = "exp5" if name == "trackstar" else "trackstar"
        told = {other: {"mrr": d | {"difference": sign * 0.25}}}
        metrics[name] |= {"differences": told, "by_stated": {"stated": {"differences": told}}}
    files = sweep_report.write(found, [(point, metrics, about)], tmp_path, False)
    assert files == [str(tmp_path / "sweep.csv"), str(tmp_path / "differences.csv")]
    with open(files[1], encoding="utf-8") as lines:
        rows = list(csv.DictReader(lines))
    assert [(r["method"], r["other"], r["group"]) for r in rows] == [
        ("trackstar", "exp5", ""),
        ("trackstar", "exp5", "stated: stated"),
    ]
    assert {(r["hessian.weight"], r["dimensions"], r["metric"]) for r in rows} == {
        ("0.5", "64", "mrr")
    }
    assert (rows[0]["difference"], rows[0]["low"], rows[0]["p"]) == ("0.25", "0.1", "0.01")


def test_seeds_are_told_together(tmp_path):
    path = write(
        tmp_path / "s.py",
        '{"fixed": {"methods": "bm25"}, "axes": {"seed": [0, 1, 2], "projection.side": [2, 4]}}',
    )
    found = grid.load(path, defaults.get_config())
    made = [made_up(p, p.values["seed"]) for p in found.points]
    files = sweep_report.write(found, made, tmp_path, True)
    with open(files[1], encoding="utf-8") as lines:
        rows = [r for r in csv.DictReader(lines) if r["metric"] == "mrr" and not r["group"]]
    assert [r["projection.side"] for r in rows] == ["2", "4"]
    for r in rows:
        figures = [float(r[k]) for k in ("mean", "sd", "least", "most", "seeds")]
        assert figures == pytest.approx([0.6, 0.1, 0.5, 0.7, 3])
    told = pathlib.Path(files[2]).read_text(encoding="utf-8")
    assert "| BM25 | 2 | 0.600 ± 0.100 | 0.700 ± 0.000 |" in told.splitlines()
    assert "over 3 training seeds" in told and "Less that of" not in told


def test_differences_are_told_over_seeds(tmp_path):
    path = write(
        tmp_path / "s.py",
        '{"fixed": {"methods": "bm25,trackstar,exp5"}, "axes": {"seed": [0, 1, 2]}}',
    )
    found = grid.load(path, defaults.get_config())
    made = []
    for p in found.points:
        _, metrics, about = made_up(p, p.values["seed"])
        metrics = {name: dict(m) for name, m in metrics.items()}
        seed = p.values["seed"]
        apart = {"bm25": {"trackstar": 0.1 * seed, "exp5": 0.9}, "trackstar": {"exp5": 0.2 * seed}}
        for a, others in apart.items():
            told = {b: {"mrr": {"difference": d, "low": 0, "high": 1}} for b, d in others.items()}
            metrics[a]["differences"] = told
        made.append((p, metrics, about))
    files = [pathlib.Path(f) for f in sweep_report.write(found, made, tmp_path, False)]
    assert [f.name for f in files] == [
        "sweep.csv", "differences.csv", "seeds.csv", "seeds_differences.csv", "seeds.md",
    ]  # fmt: skip
    with open(files[3], encoding="utf-8") as lines:
        rows = {(r["method"], r["other"]): r for r in csv.DictReader(lines)}
    assert len(rows) == 3
    figures = [float(rows["trackstar", "exp5"][k]) for k in ("mean", "sd", "least", "most")]
    assert figures == pytest.approx([0.2, 0.2, 0.0, 0.4])
    told = files[4].read_text(encoding="utf-8").split("Less that of TrackStar")[1].splitlines()
    # A pair that has TrackStar first is turned; one without it is not told here.
    assert "| BM25 | +0.100 ± 0.100 |" in told
    assert "| Exp 5: optimizer, R_train, norm | -0.200 ± 0.200 |" in told
    assert len([line for line in told if line.startswith("| ")]) == 3


@pytest.mark.parametrize("path", SHIPPED, ids=lambda p: p.stem)
def test_shipped_sweeps(tmp_path, path):
    config = world_facts.get_config()
    found = grid.load(str(path), config)
    made = [made_up(p, tail_patch=0.01, tail_patch_log=0.2) for p in found.points]
    files = sweep_report.write(found, made, tmp_path, True)
    names = {pathlib.Path(f).name for f in files}
    assert {f"{plot['name']}.{s}" for plot in found.plots for s in ("png", "svg")} <= names
    assert len(found.points) > 1 and found.plots
    for p in found.points:
        methods.parse(p.config.methods)
    assert f"--sweep=configs/sweeps/{path.name}" in path.read_text()


def test_marked_points_and_labels(tmp_path, monkeypatch):
    drawn = []
    monkeypatch.setattr(
        sweep_report.plots, "draw", lambda path, panels, *a, **k: drawn.append((panels, a, k)) or []
    )
    (shipped,) = [p for p in SHIPPED if p.stem == "lambda"]
    found = grid.load(str(shipped), defaults.get_config())
    made = []
    for p in found.points:
        _, metrics, about = made_up(p)
        value = p.values["hessian.weight"]
        about["notes"] = {m: {"lambda": 0.7 if value < 0 else value} for m in metrics}
        made.append((p, metrics, about))
    sweep_report.write(found, made, tmp_path, True)
    panels, (x_label,), how = drawn[0]
    assert x_label == "λ" and how["mark_label"] == "the rule's λ"
    assert [p.title for p in panels] == ["MRR", "recall@10"]  # no tail-patch was measured
    line = panels[0].lines[0]
    assert line.label == "TrackStar" and line.marked == 0.7
    assert sorted(line.x) == sorted({0.7, *(p.values["hessian.weight"] for p in found.points[1:])})
    assert set(line.low) == {0.4} and set(line.high) == {0.6}
    with pytest.raises(ValueError, match="plot 'lambda': no column nowhere"):
        found.plots[0]["x"] = "nowhere"
        sweep_report.write(found, made, tmp_path, True)


@pytest.fixture(scope="module")
def swept(tmp_path_factory):
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
        for module, name in ((train, "fit"), (encoding, "fill_together"), (measures, "tail_patch")):
            patch.setattr(module, name, counted(module, name, count))
        for point in found.points:
            sweep.run_point(point, path / "w")
    return found, path / "w", count


def counted(module, name, count):
    real = getattr(module, name)

    def call(*args, **kwargs):
        if name == "fill_together" and not any(store.missing() for store in args[0]):
            return real(*args, **kwargs)
        count[name] = count.get(name, 0) + 1
        return real(*args, **kwargs)

    return call


def test_points_share_what_their_keys_leave_alone(swept):
    found, path, count = swept
    # One training; of two sides the corpus, raw and corrected at once, and the queries for each.
    # Retrieved pairs that an earlier point measured are not measured again.
    assert count["fit"] == 1 and count["fill_together"] == 2 * (1 + 2)
    assert len(list((path / "runs").iterdir())) == 1
    (kept,) = path.glob("runs/*/tail_patch-*.jsonl")
    keys = [json.loads(line)["key"] for line in kept.read_text().splitlines()]
    assert len(keys) == len(set(keys))
    assert all(sweep.is_finished(p, path) for p in found.points)


def test_a_point_is_what_a_trace_of_its_config_is(swept, tmp_path):
    found, path, _ = swept
    point = found.points[-1]
    metrics = trace.run(point.config, Workdir(tmp_path / "alone"))
    there = json.loads((path / "points" / point.name / "metrics.json").read_text())
    assert there == metrics
    for name in ("trackstar", "grad_cos"):
        result = f"results/{name}.jsonl"
        own = path / "points" / point.name / result
        assert own.read_bytes() == (tmp_path / "alone" / result).read_bytes()


def test_finished_points_are_gathered_and_not_run_again(swept, monkeypatch, capsys):
    found, path, _ = swept
    monkeypatch.setattr(attribution, "retrieve", None)
    for point in found.points:
        sweep.run_point(point, path)
    monkeypatch.setattr(sweep, "_start", None)
    assert sweep.run_all(found.points, path, 2) == {}
    table = sweep_report.rows(found, sweep._read(found.points, path))
    lambdas = {
        (r["projection.side"], r["lambda"])
        for r in table
        if r["method"] == "trackstar" and r["hessian.weight"] == 0.5
    }
    assert lambdas == {(2, 0.5), (4, 0.5)}
    assert {r["dimensions"] for r in table} == {4 * 2**2, 4 * 4**2}
    assert np.isfinite([r["value"] for r in table]).all()
    # Another config is another point's result, even under the same name.
    changed = grid._changed(found.points[0].config, {"eval.top_k": 3}, "s.py")
    assert not sweep.is_finished(grid.Point(found.points[0].name, {}, changed), path)


def test_commands_are_for_one_point_each(monkeypatch, tmp_path):
    path = write(tmp_path / "s.py", '{"axes": {"hessian.weight": [0.5]}}')
    given = ["sweep.py", "--config=c.py", f"--sweep={path}", "--workdir=a b", "--config.seed=3"]
    monkeypatch.setattr(sys, "argv", [*given, "--parallel", "4", "--list", "--noplots"])
    (point,) = grid.load(path, defaults.get_config()).points
    told = sweep.command(point)
    assert told.endswith(f"--sweep={path} '--workdir=a b' --config.seed=3 --point={point.name}")
    assert told.startswith(f"{sys.executable} -m experiments.sweep --config=c.py")


def test_why_a_point_failed(tmp_path):
    log = tmp_path / "log.txt"
    log.write_text("train: 3%\nerror: no such file\n(traceback in error.txt)\n")
    assert sweep._why(log, 1) == f"error: no such file ({log})"
    assert sweep._why(log, -9) == f"killed by signal 9 ({log})"
    log.write_text("")
    assert sweep._why(log, 3) == f"exit status 3 ({log})"


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
        with sweep._once(marker, lock):
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
    with pytest.raises(ZeroDivisionError), sweep._once(marker, lock):
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
    assert sweep._next([b, c, d], [a], tmp_path).name == "d"
    run = tmp_path / "runs" / a.training
    run.mkdir(parents=True)
    (run / f"{a.training}.training").touch()
    assert sweep._next([b, c, d], [a], tmp_path).name == "c"
    (run / f"{a.stores}.stores").touch()
    assert sweep._next([b, c, d], [a], tmp_path).name == "b"
    assert sweep._next([b], [], tmp_path).name == "b"


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
    # A point that fails is told, and the others' figures are there.
    failing = start(tmp_path / "failing", "--config.data.facts=/nowhere.jsonl")
    told = failing.communicate()[0]
    assert failing.returncode == 1 and "4 points failed" in told and "/nowhere.jsonl" in told
