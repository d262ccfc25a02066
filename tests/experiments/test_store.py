"""`experiments.store`, and runs whose stores were damaged, thinned or left out."""

import json
import os
import pathlib
import shutil
import types

import numpy as np
import pytest
from absl.flags import FLAGS
from absl.testing import flagsaver

from experiments import store as store_main
from tda import store as stores
from tda.retrieval import ranked
from tda.retrieval.scann import settings
from tda.retrieval.scorer import Scorer
from tda.retrieval.sources import InMemory
from tda.run import index, retrieve, stages
from tda.run.workdir import Workdir
from tda.runtime.groups import ONE_GROUP
from tda.store import inspection
from tda.store.location import Location
from tests.experiments.test_trace import make_config
from tests.store.test_remote import gs, s3  # noqa: F401 (fixtures)


@pytest.fixture(scope="module")
def config(tmp_path_factory):
    c = make_config(tmp_path_factory.mktemp("store"))
    c.methods = "trackstar,grad_cos"
    c.eval.tail_patch_queries = 0
    c.store.dtype = "float32"
    c.store.shard_bytes = 512
    return c


@pytest.fixture(scope="module")
def run(config, tmp_path_factory, runs_on_one_device):
    """A finished run: its workdir and metrics."""
    path = tmp_path_factory.mktemp("run")
    return path, stages.trace(config, Workdir(path))[0]


def flat(metrics):
    """The figures of a method that are one number each."""
    return {k: v for k, v in metrics.items() if isinstance(v, int | float)}


def corpora(path):
    return sorted(str(p) for p in (path / "stores").glob("corpus-*"))


@pytest.mark.slow
@pytest.mark.parametrize("place", ["gs", "s3"])
def test_a_run_keeps_its_stores_in_object_storage(request, run, config, tmp_path, place):
    path, metrics = run
    address = request.getfixturevalue(place)
    for name in ("model", "stages"):
        shutil.copytree(path / name, tmp_path / name)
    other = config.copy_and_resolve_references()
    other.store.root = address
    traced = stages.trace(other, Workdir(tmp_path))[0]
    assert {n: flat(m) for n, m in traced.items()} == {n: flat(m) for n, m in metrics.items()}
    assert not (tmp_path / "stores").exists()
    remote = {n.partition("/")[0] for n in Location(address).names()}
    assert remote == {p.name for p in (path / "stores").iterdir()}
    for name in remote:
        assert inspection.verify(f"{address}/{name}") == 0
        stores.remove(f"{address}/{name}")
    assert Location(address).names() == []


def test_info_tells_what_a_store_holds(run, capsys):
    path, _ = run
    for store in corpora(path):
        assert inspection.info(store) == 0
    told = capsys.readouterr().out
    assert "12 of 64 numbers, float32" in told and "6 of 6 shards, 12 rows" in told
    assert "correction  factored" in told and "correction  none" in told
    assert "parameters  " in told and "missing" not in told


def test_the_manifest_says_what_made_the_rows(run):
    path, _ = run
    manifest = json.loads(open(os.path.join(corpora(path)[0], "manifest.json")).read())
    made = manifest["fingerprint"]
    shapes = made["parameters"]
    assert any(p.endswith("query/kernel") and len(s) >= 2 for p, s in shapes.items()), shapes
    assert {"checkpoint", "step", "projection", "correction", "tokenizer"} <= made.keys()
    assert {"seed", "family", "side"} <= made["projection"].keys()
    assert manifest["segments"][0]["corpus"]
    assert stores.open_store(corpora(path)[0]).passages([0])[0].text.endswith("is Paris.")


def test_a_damaged_shard_is_named_and_encoded_again_alone(config, run, capsys):
    path, metrics = run
    store = corpora(path)[0]
    folder = os.path.join(store, "0", "gradients")
    whole = {n: open(os.path.join(folder, n), "rb").read() for n in os.listdir(folder)}
    shard = os.path.join(folder, "c.3.0")
    raw = bytearray(whole["c.3.0"])
    raw[9] ^= 1
    open(shard, "wb").write(raw)
    assert inspection.verify(store, report_only=True) == 1
    assert "shard 3 (rows 6 to 7): " in capsys.readouterr().out and os.path.exists(shard)
    assert inspection.verify(store) == 1
    told = capsys.readouterr().out
    assert "5 of 6 shards are intact" in told and "1 damaged: 3 (removed" in told
    assert not os.path.exists(shard)
    assert inspection.info(store) == 0 and "missing     shards 3" in capsys.readouterr().out
    times = {n: os.stat(os.path.join(folder, n)).st_mtime_ns for n in os.listdir(folder)}
    assert stages.trace(config, Workdir(path))[0] == metrics
    assert {n: open(os.path.join(folder, n), "rb").read() for n in whole} == whole
    for name, when in times.items():
        assert os.stat(os.path.join(folder, name)).st_mtime_ns == when
    assert inspection.verify(store) == 0


@pytest.mark.slow
@pytest.mark.parametrize("rank", [0, 2])
def test_a_store_of_few_bits_is_resumed_to_the_same_bytes_beside_exact_queries(
    config, run, tmp_path, rank
):
    path, _ = run
    other = config.copy_and_resolve_references()
    other.store.dtype, other.store.shard_bytes = "2bit", 96
    if rank:
        other.projection.pooling, other.projection.side = "matrix", 8
        other.store.rank, other.store.shard_bytes = rank, 2048
    other.methods, other.eval.samples = "trackstar", 0
    for name in ("model", "stages"):
        shutil.copytree(path / name, tmp_path / name)
    metrics = stages.trace(other, Workdir(tmp_path))[0]
    store = stores.open_store(corpora(tmp_path)[0])
    (queries,) = (tmp_path / "stores").glob("queries-*")
    assert (store.form.dtype, store.form.rank) == ("2bit", rank)
    assert stores.open_store(queries).form.is_plain
    folder = pathlib.Path(store.path, "0", "gradients")
    whole = {p.name: p.read_bytes() for p in folder.iterdir()}
    assert len(whole) > 2
    for name in ("c.0.0", "c.1.0"):
        (folder / name).unlink()
    assert stages.trace(other, Workdir(tmp_path))[0] == metrics
    assert {p.name: p.read_bytes() for p in folder.iterdir()} == whole


@pytest.mark.slow
def test_without_a_store_the_results_are_the_same(config, run, tmp_path):
    path, metrics = run
    other = config.copy_and_resolve_references()
    other.store.dtype = "none"
    workdir = Workdir(tmp_path)
    os.symlink(path / "model", tmp_path / "model")
    os.symlink(path / "stages", tmp_path / "stages")
    found = stages.trace(other, workdir)[0]
    assert not (tmp_path / "stores").exists()
    for name in metrics:
        assert flat(found[name]) == pytest.approx(flat(metrics[name]), nan_ok=True)
        one, two = (
            [json.loads(x) for x in open(w / "results" / f"{name}.jsonl")] for w in (path, tmp_path)
        )
        for a, b in zip(one, two, strict=True):
            assert a["proponent_ids"] == b["proponent_ids"]
            assert a["opponent_ids"] == b["opponent_ids"]
            np.testing.assert_allclose(a["proponent_scores"], b["proponent_scores"], atol=1e-4)


def test_below_the_size_where_an_index_pays_search_is_exact(config, run, capsys):
    pytest.importorskip("scann", reason="ScaNN is not installed: pip install 'tda-jax[scann]'")
    path, metrics = run
    other = config.copy_and_resolve_references()
    other.search.index = "scann"
    found = stages.trace(other, Workdir(path))[0]
    for name in metrics:
        assert flat(found[name]) == pytest.approx(flat(metrics[name]), nan_ok=True)
    assert "are searched exactly, which is quick enough" in capsys.readouterr().out
    assert not (path / "indices").exists()


@pytest.mark.parametrize("encodings", ["kept in the index", "read from the store"])
def test_through_an_index_the_recall_stands_beside_the_table(
    config, run, capsys, monkeypatch, encodings
):
    pytest.importorskip("scann", reason="ScaNN is not installed: pip install 'tda-jax[scann]'")
    path, metrics = run
    shutil.rmtree(path / "indices", ignore_errors=True)
    other = config.copy_and_resolve_references()
    other.search.index = "scann"
    rows = stores.open_store(corpora(path)[0]).rows
    monkeypatch.setattr(settings, "_EXACT_NUMBERS", 0)
    reorder = rows if encodings == "kept in the index" else 0
    one_part = dict(part_rows=rows, dims_per_block=2, reorder=reorder, reorder_dtype="float32")
    other.search.scann.update(one_part, training_rows=max(16, rows))
    # Every row is scored again by its encoding: what is found is what exact search finds.
    found = stages.trace(other, Workdir(path))[0]
    for name, m in metrics.items():
        assert found[name]["recall_at_10"] == pytest.approx(m["recall_at_10"])
        assert found[name]["mrr"] == pytest.approx(m["mrr"], rel=1e-5)
    table = (path / "table.md").read_text()
    assert table.count("through a ScaNN index, recall@10 against exact search over") == 2
    assert table.count("proponents 1.000, opponents 1.000") == 2
    assert "ScaNN" not in capsys.readouterr().err
    # The index stands beside the exact rankings, which are found again.
    again = stages.trace(config, Workdir(path))[0]
    for name in metrics:
        assert flat(again[name]) == pytest.approx(flat(metrics[name]), nan_ok=True)
    assert "ScaNN" not in (path / "table.md").read_text()
    assert len(list((path / "indices").iterdir())) == 2


def test_a_rank_that_an_index_does_not_know_counts_as_the_last():
    deep = ranked.Ranked(
        np.array([[5, 3, 8], [1, 2, 0], [4, 6, 7]]),
        np.zeros((3, 3), np.float32),
        np.array([[9, 2, 1]] * 3),
        np.zeros((3, 3), np.float32),
        {},
    )
    correct = {"all": [np.array([8, 3]), np.array([9]), np.array([], np.int64)]}
    found = index._cut(deep, 2, correct, 10)
    assert found.first_ranks["all"].tolist() == [2, 10, 0]
    assert found.proponents.tolist() == [[5, 3], [1, 2], [4, 6]]
    assert found.opponents.tolist() == [[9, 2]] * 3


@pytest.mark.parametrize(
    "changes, message",
    [
        ({"search.index": "faiss"}, "unknown search.index='faiss'"),
        ({"search.index": "scann", "store.dtype": "none"}, "needs a store to index"),
        ({"store.rank": 2}, "store.rank=2 stores each matrix.s block .*projection.pooling=matrix"),
        (
            {"store.rank": 8, "projection.pooling": "matrix", "projection.side": 16},
            "rank 8: 8 pairs of vectors",
        ),
        ({"search.index": "scann", "search.depth": 9}, "search.depth=9 is less than eval.top_k=10"),
        ({"search.index": "scann", "search.scann.part_rows": 0}, "search.scann.part_rows is 0"),
        (
            {"search.index": "scann", "search.scann.reorder_dtype": "float16"},
            "search.scann.reorder_dtype is 'float16'; use float32",
        ),
        (
            {"search.index": "scann", "methods": "rrf", "rerank.passages": 101},
            "search.depth=100 is less than rerank.passages=101, .* index of trackstar; raise",
        ),
    ],
)
def test_stores_and_indices_that_cannot_be_are_refused_at_once(config, tmp_path, changes, message):
    other = config.copy_and_resolve_references()
    other.update_from_flattened_dict(changes)
    with pytest.raises(ValueError, match=message):
        stages.trace(other, Workdir(tmp_path))


def test_memory_that_holds_no_index_is_refused_before_training(config, tmp_path, monkeypatch):
    monkeypatch.setattr(settings, "_EXACT_NUMBERS", 0)
    other = config.copy_and_resolve_references()
    other.search.index, other.search.memory_gib = "scann", 1e-4
    with pytest.raises(ValueError, match="search.memory_gib=0.0001: .* too few rows of 64 numbers"):
        stages.prepare(other, Workdir(tmp_path))
    assert not (tmp_path / "train.jsonl").exists()


def test_an_index_without_a_measured_recall_or_a_limit_of_memory(config, tmp_path, monkeypatch):
    """Guards: values that every check lets pass, and that fail once the index is built."""
    pytest.importorskip("scann", reason="ScaNN is not installed: pip install 'tda-jax[scann]'")
    monkeypatch.setattr(settings, "_EXACT_NUMBERS", 0)
    x = np.random.default_rng(0).normal(size=(1000, 16)).astype(np.float32)
    source, other = InMemory(x, [slice(0, 16)]), config.copy_and_resolve_references()
    other.search.update(index="scann", recall_queries=0, memory_gib=np.inf)
    run = types.SimpleNamespace(config=other, workdir=tmp_path, groups=ONE_GROUP)
    scorers = {"a": Scorer(None, True)}
    ranked, notes = index.search(run, source, x[:2], scorers, {}, {"a": "a"}, None, 5)
    assert ranked["a"].proponents[:, 0].tolist() == [0, 1]
    (line,) = index.describe(notes)
    assert "recall was not measured (search.recall_queries=0)" in line


def test_r_of_a_sample_is_another_ranking_of_its_own(config, run):
    path, _ = run
    other = config.copy_and_resolve_references()
    other.hessian.sample = 5
    before = set((path / "retrieval").iterdir())
    stages.trace(other, Workdir(path))
    new = set((path / "retrieval").iterdir()) - before
    assert len([p for p in new if p.suffix == ".npz"]) >= 1


def test_withdrawn_passages_are_no_longer_retrieved(config, run, capsys):
    path, _ = run
    records = [json.loads(x) for x in open(path / "results" / "trackstar.jsonl")]
    gone = records[0]["proponent_ids"][0]
    for store in corpora(path):
        assert inspection.withdraw(store, [gone], []) == 0
    assert "1 rows are withdrawn, 1 in all" in capsys.readouterr().out
    stages.trace(config, Workdir(path))
    for name in ("trackstar", "grad_cos"):
        after = [json.loads(x) for x in open(path / "results" / f"{name}.jsonl")]
        for r in after:
            assert gone not in r["proponent_ids"] + r["opponent_ids"]
            assert len(r["proponent_ids"]) == 10
    for file in (path / "retrieval").glob("gradient-*.npz"):
        ranked.load(file)


def test_methods_without_gradients_leave_out_what_was_withdrawn(config, run, tmp_path):
    """Guards: a list that only gradient methods heed, and rankings on disk from before it."""
    shutil.copytree(run[0], tmp_path / "w")
    other = config.copy_and_resolve_references()
    other.methods, other.eval.top_k = "bm25,hidden_last,length,random,rrf", 11
    other.rerank.passages = 12

    def rank():
        return retrieve.retrieve(stages.prepare(other, Workdir(tmp_path / "w")))[0]

    before = rank()
    gone = before["bm25"].proponents[0, 0]
    for path in corpora(tmp_path / "w"):
        store = stores.open_store(path)
        store.withdraw([store.passages([gone])[0].id])
    after = rank()
    assert gone not in after.pop("rrf").proponents
    for method, ranking in after.items():
        assert (ranking.proponents >= 0).all()
        for rows, rows_before in zip(ranking.proponents, before[method].proponents, strict=True):
            left = rows_before[rows_before != gone]
            assert rows[: len(left)].tolist() == left.tolist(), method


def test_refusals(run, tmp_path, capsys):
    with pytest.raises(stores.StoreError, match="no store at"):
        inspection.info(str(tmp_path))
    with pytest.raises(ValueError, match="--ids"):
        inspection.withdraw(corpora(run[0])[0], [], [])
    FLAGS.mark_as_parsed()
    with pytest.raises(SystemExit, match="usage"):
        store_main.main(["look", "x"])
    with pytest.raises(stores.StoreError, match="no store at"):
        store_main.main(["info", str(tmp_path)])


@pytest.mark.parametrize(
    ("flags", "command"), [({"report_only": True}, "withdraw"), ({"ids": ["a"]}, "verify")]
)
def test_flags_of_another_command_are_refused(tmp_path, flags, command):
    """Guards: passages withdrawn by a command that was only to report."""
    FLAGS.mark_as_parsed()
    refused = pytest.raises(SystemExit, match=f"no effect on {command}; leave")
    with flagsaver.flagsaver(**flags), refused:
        store_main.main([command, str(tmp_path)])
