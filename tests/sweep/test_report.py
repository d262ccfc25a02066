"""Tables and plots of a sweep."""

import csv
import math
import pathlib

import pytest

from configs import world_facts
from tda import methods
from tda.run import defaults
from tda.sweep import grid, report
from tda.sweep.grid import Sweep
from tests.sweep.test_grid import write

SHIPPED = sorted(
    p
    for p in (pathlib.Path(__file__).parents[2] / "configs" / "sweeps").glob("*.py")
    if p.stem != "__init__"
)

KINDS = {"states the fact": {"share": 0.25, "interval": [0.2, 0.3]}}


def make_result(point, seed=0, **more):
    """Metrics of a point as an evaluation writes them, and the description of its run."""
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


def load(tmp_path, body, **how):
    return grid.load(write(tmp_path / "s.py", body), defaults.get_config(), **how)


def shipped(name, config):
    (path,) = [p for p in SHIPPED if p.stem == name]
    return grid.load(str(path), config)


def read(path):
    with open(path, encoding="utf-8") as lines:
        return list(csv.DictReader(lines))


@pytest.fixture
def drawn(monkeypatch):
    """What is drawn: the path, the panels, and the other arguments of each plot."""
    drawn = []
    monkeypatch.setattr(report.plots, "draw", lambda *a, **k: drawn.append((*a, k)) or [])
    return drawn


def test_the_table_is_tidy(tmp_path):
    loaded = load(
        tmp_path,
        '{"fixed": {"methods": "trackstar,bm25"}, "axes": {"hessian.weight": [-1.0, 0.5]}}',
    )
    files = report.write(loaded, [make_result(p) for p in loaded.points], tmp_path, True)
    assert files == [str(tmp_path / "sweep.csv")]
    rows = read(files[0])
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


def test_differences_have_one_row_for_each_pair_and_group(tmp_path):
    loaded = load(
        tmp_path, '{"fixed": {"methods": "trackstar,exp5,bm25"}, "axes": {"hessian.weight": [0.5]}}'
    )
    (point,) = loaded.points
    _, metrics, about = make_result(point)
    d = {"difference": 0.25, "low": 0.1, "high": 0.4, "p": 0.01}
    metrics = {n: dict(m) for n, m in metrics.items()}
    for name, sign in (("trackstar", 1), ("exp5", -1)):
        other = "exp5" if name == "trackstar" else "trackstar"
        text = {other: {"mrr": d | {"difference": sign * 0.25}}}
        metrics[name] |= {"differences": text, "by_stated": {"stated": {"differences": text}}}
    files = report.write(loaded, [(point, metrics, about)], tmp_path, False)
    assert files == [str(tmp_path / "sweep.csv"), str(tmp_path / "differences.csv")]
    rows = read(files[1])
    assert [(r["method"], r["other"], r["group"]) for r in rows] == [
        ("trackstar", "exp5", ""),
        ("trackstar", "exp5", "stated: stated"),
    ]
    assert {(r["hessian.weight"], r["dimensions"], r["metric"]) for r in rows} == {
        ("0.5", "64", "mrr")
    }
    assert (rows[0]["difference"], rows[0]["low"], rows[0]["p"]) == ("0.25", "0.1", "0.01")


def test_seeds_are_summarised(tmp_path):
    loaded = load(
        tmp_path,
        '{"fixed": {"methods": "bm25"}, "axes": {"seed": [0, 1, 2], "projection.side": [2, 4]}}',
    )
    results = [make_result(p, p.values["seed"]) for p in loaded.points]
    files = report.write(loaded, results, tmp_path, True)
    rows = [r for r in read(files[1]) if r["metric"] == "mrr" and not r["group"]]
    assert [r["projection.side"] for r in rows] == ["2", "4"]
    for r in rows:
        figures = [float(r[k]) for k in ("mean", "sd", "least", "most", "seeds")]
        assert figures == pytest.approx([0.6, 0.1, 0.5, 0.7, 3])
    text = pathlib.Path(files[2]).read_text(encoding="utf-8")
    assert "| BM25 | 2 | 0.600 ± 0.100 | 0.700 ± 0.000 |" in text.splitlines()
    assert "over 3 training seeds" in text and "Difference to" not in text


def test_small_tail_patches_are_no_zeros():
    sweep = Sweep(("seed",), [], [])
    row = {"method": "bm25", "group": "", "seeds": 2}
    figures = [
        row | {"metric": "tail_patch", "mean": 2.4e-5, "sd": 3e-6},
        row | {"metric": "tail_patch_log", "mean": 0.0123, "sd": math.nan},
    ]
    text = report.seeds_table(sweep, figures, [])
    assert "| BM25 | +0.0024% ± 0.00030% | +0.0123 |" in text


def test_differences_are_summarised_over_seeds(tmp_path):
    loaded = load(
        tmp_path, '{"fixed": {"methods": "bm25,trackstar,exp5"}, "axes": {"seed": [0, 1, 2]}}'
    )
    results = []
    for p in loaded.points:
        _, metrics, about = make_result(p, p.values["seed"])
        metrics = {name: dict(m) for name, m in metrics.items()}
        seed = p.values["seed"]
        gaps = {"bm25": {"trackstar": 0.1 * seed, "exp5": 0.9}, "trackstar": {"exp5": 0.2 * seed}}
        for a, others in gaps.items():
            text = {b: {"mrr": {"difference": d, "low": 0, "high": 1}} for b, d in others.items()}
            metrics[a]["differences"] = text
        results.append((p, metrics, about))
    files = [pathlib.Path(f) for f in report.write(loaded, results, tmp_path, False)]
    assert [f.name for f in files] == [
        "sweep.csv", "differences.csv", "seeds.csv", "seeds_differences.csv", "seeds.md",
    ]  # fmt: skip
    rows = {(r["method"], r["other"]): r for r in read(files[3])}
    assert len(rows) == 3
    figures = [float(rows["trackstar", "exp5"][k]) for k in ("mean", "sd", "least", "most")]
    assert figures == pytest.approx([0.2, 0.2, 0.0, 0.4])
    text = files[4].read_text(encoding="utf-8").split("Difference to TrackStar")[1].splitlines()
    # The sign flips where TrackStar comes first; a pair without it is left out.
    assert "| BM25 | +0.100 ± 0.100 |" in text
    assert "| Exp 5: optimizer, R_train, norm | -0.200 ± 0.200 |" in text
    assert len([line for line in text if line.startswith("| ")]) == 3


@pytest.mark.parametrize("path", SHIPPED, ids=lambda p: p.stem)
def test_shipped_sweeps(tmp_path, path):
    config = world_facts.get_config()
    loaded = grid.load(str(path), config)
    results = [
        make_result(p, tail_patch_net=0.01, tail_patch_log_net=0.2, tail_patch=0.02, by_kind=KINDS)
        for p in loaded.points
    ]
    files = report.write(loaded, results, tmp_path, True)
    names = {pathlib.Path(f).name for f in files}
    assert {f"{plot['name']}.{s}" for plot in loaded.plots for s in ("png", "svg")} <= names
    assert len(loaded.points) > 1 and loaded.plots
    for p in loaded.points:
        methods.parse(p.config.methods)
    assert f"--sweep=configs/sweeps/{path.name}" in path.read_text()


def test_growth_draws_a_judges_figures_by_size(tmp_path, drawn):
    loaded = shipped("growth", world_facts.get_config())
    assert len(loaded.points) == 12 == len({p.training for p in loaded.points})
    assert {p.config.judge.name for p in loaded.points} == {"lexical"}
    more = dict(ais_mrr=0.3, ais_recall_at_10=0.4, by_kind=KINDS)
    results = [make_result(p, **more) for p in loaded.points]
    report.write(loaded, results, tmp_path, True)
    panels = {path.name: panels for path, panels, *_ in drawn}
    assert [panel.title for panel in panels["growth"]] == ["MRR", "AIS-MRR", "AIS recall@10"]
    # A line for each of three methods and four sizes; BM25 is left out.
    assert [len(panel.lines) for panel in panels["growth"]] == [12, 12, 12]
    assert [len(panel.lines) for panel in panels["growth_by_size"]] == [9, 9]
    (panel,) = panels["growth_kinds"]
    assert len(panel.lines) == 12 and (panel.lines[0].y, panel.lines[0].low) == ((0.25,), (0.2,))


def test_marked_points_and_labels(tmp_path, drawn):
    loaded = shipped("lambda", defaults.get_config())
    results = []
    for p in loaded.points:
        _, metrics, about = make_result(p)
        value = p.values["hessian.weight"]
        about["notes"] = {m: {"lambda": 0.7 if value < 0 else value} for m in metrics}
        results.append((p, metrics, about))
    report.write(loaded, results, tmp_path, True)
    _, panels, x_label, keywords = drawn[0]
    assert x_label == "λ" and keywords["mark_label"] == "the rule's λ"
    assert [p.title for p in panels] == ["MRR", "recall@10"]  # no tail-patch was measured
    line = panels[0].lines[0]
    assert line.label == "TrackStar" and line.marked == 0.7
    assert sorted(line.x) == sorted({0.7, *(p.values["hessian.weight"] for p in loaded.points[1:])})
    assert set(line.low) == {0.4} and set(line.high) == {0.6}
    loaded.plots[0]["omit"] = {"mrr": ("trackstar",)}
    report.write(loaded, results, tmp_path, True)
    _, (without, complete), *_ = drawn[-1]
    assert [x.label for x in complete.lines] == ["TrackStar", *(x.label for x in without.lines)]
    with pytest.raises(ValueError, match="plot 'lambda': no column nowhere"):
        loaded.plots[0]["x"] = "nowhere"
        report.write(loaded, results, tmp_path, True)


def test_methods_side_by_side_have_their_titles(tmp_path, drawn):
    loaded = shipped("seeds", defaults.get_config())
    results = [make_result(p, p.values["seed"]) for p in loaded.points]
    report.write(loaded, results, tmp_path, True)
    lines = drawn[0][1][0].lines
    titles = [methods.METHODS[n].title for n in methods.parse(defaults.get_config().methods)]
    assert [line.x for line in lines] == [[t] for t in titles] == [[line.label] for line in lines]
    (y,), (low,), (high,) = lines[0].y, lines[0].low, lines[0].high
    assert (low, y, high) == pytest.approx((0.5, 0.6, 0.7))  # a standard deviation over seeds


@pytest.mark.parametrize("seeds", [(0,), (0, 1)])
def test_a_plot_does_not_mix_the_points_of_an_axis_that_it_does_not_name(tmp_path, seeds):
    """Mistake: dampings that count as seeds, or of which the last one stands for all."""
    body = f"""{{
        "fixed": {{"methods": "trackstar"}},
        "axes": {{"seed": {seeds}, "projection.side": (4, 8), "hessian.damping": (0.1, 1.0)}},
        "plots": [{{"name": "p", "x": "projection.side", "y": ("mrr",)}}],
    }}"""
    loaded = load(tmp_path, body)
    results = [
        make_result(p, mrr=p.values["hessian.damping"] + p.values["seed"]) for p in loaded.points
    ]
    message = "plot 'p': points that differ in hessian.damping .* projection.side=4; name that"
    with pytest.raises(ValueError, match=message):
        report.write(loaded, results, tmp_path, True)
    assert (tmp_path / "sweep.csv").exists()
    for chosen in ({"lines": ["method", "hessian.damping"]}, {"where": {"hessian.damping": 1.0}}):
        loaded.plots[0] |= chosen
        assert report.write(loaded, results, tmp_path, True)
        del loaded.plots[0][next(iter(chosen))]


def test_a_logarithmic_axis_tells_what_it_leaves_out(tmp_path, drawn, capsys):
    """Guards: points at 0 and -1 that vanish without a word; a list of values that matches none."""
    body = """{
        "fixed": {"methods": "trackstar"},
        "axes": {"hessian.damping": (-1.0, 0.0, 0.1, 1.0, 2.0)},
        "plots": [{"name": "p", "x": "hessian.damping", "y": ("mrr",), "log_x": True,
                   "where": {"hessian.damping": [-1.0, 0.0, 0.1, 1.0]}}],
    }"""
    loaded = load(tmp_path, body)
    report.write(loaded, [make_result(p) for p in loaded.points], tmp_path, True)
    ((_, (panel,), *_),) = drawn
    assert [line.x for line in panel.lines] == [[0.1, 1.0]]
    assert "cannot show hessian.damping=-1.0, 0.0; left out" in capsys.readouterr().out


def test_a_board_leads_with_its_lds(tmp_path, drawn):
    body = """{
        "fixed": {"methods": "grad_dot,trackstar"},
        "axes": {"seed": (0, 1), "projection.side, hessian.structure": (
            (4, "dense"), (8, "dense"), (8, "kronecker"))},
        "plots": [{"name": "p", "x": "projection.side", "y": ("mrr",),
                   "lines": ["method", "hessian.structure"],
                   "where": {"seed": (0, 1), "projection.side": 8}}],
    }"""
    loaded = load(tmp_path, body, is_board=True)
    results = []
    for point in loaded.points:
        _, metrics, about = make_result(point, point.config.seed)
        of_method = next(iter(metrics.values()))
        of_method["lds_0.05"] = 0.25 + 0.5 * point.config.seed
        of_method["differences"] = {
            other: {"lds_0.05": {"difference": difference, "p": None}}
            for other, difference in (("trackstar", 0.5), ("grad_dot", 0.0))
        }
        metrics = {"dot_whole": of_method, "trackstar": of_method, "grad_dot": of_method}
        results.append((point, metrics, about))
    report.write(loaded, results, tmp_path, True)
    text = (tmp_path / "seeds.md").read_text()
    head = "| method | projection.side | hessian.structure | LDS, 5% left out | MRR |"
    assert text.startswith(head)
    assert "| gradient dot product, whole | 4 | dense | 0.500 ± 0.354 |" in text
    (_, differences) = text.split("Difference to TrackStar")
    assert "gradient dot product, whole | 4 | dense | +0.500 ± 0.000 |" in differences
    assert "| gradient dot product | 4 | dense | +0.000 ± 0.000 |" in differences
    ((_, panels, *_),) = drawn
    assert [p.title for p in panels] == ["LDS, 5% left out", "MRR"]
    # R is of one structure or the other; what has no R is one line.
    assert [line.label for line in panels[0].lines] == [
        "gradient dot product, whole",
        "TrackStar, structure dense",
        "gradient dot product",
        "TrackStar, structure kronecker",
    ]
    assert {x for line in panels[0].lines for x in line.x} == {8}
