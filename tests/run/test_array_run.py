"""A whole run by the tasks of an array, each a part: equal bytes, whoever computed what."""

import itertools
import json
import shutil

import numpy as np
import pytest

from tda import results
from tda.data import corpora, pieces
from tda.data.rows import Question
from tda.live import finished_run
from tda.methods import METHODS
from tda.model import sizes
from tda.retrieval.scann import settings
from tda.run import engines, run, stages
from tda.run.workdir import Workdir
from tda.runtime import code_version, groups, progress
from tda.runtime.array_tasks import EXIT_STATUS, Unfinished
from tda.runtime.directory_lock import HeldError
from tda.runtime.engine import PROCESSES, Processes
from tda.viewer import export, opening
from tests.experiments.test_trace import make_config, without_labels

KEPT = ("stores", "retrieval", "results", "metrics.json", "table.md")


@pytest.fixture(scope="module")
def small_groups(runs_on_one_device):
    """Groups of two shards, so that every work has several."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(run, "_GROUP_SHARDS", 2)
        patch.setattr(groups, "_ROWS_PER_RESULT", 0)
        patch.setattr(corpora, "_PIECE_BYTES", 1)
        shape = dict(width=16, layers=2, heads=2, kv_heads=1, head_width=8, ff_width=24)
        patch.setitem(sizes.SIZES, "nano", shape)
        yield


def run_alone(path, methods, is_labelled=True, **changed):
    """A run by one process: its config and its workdir."""
    config = make_config(path)
    if not is_labelled:
        config = without_labels(config, path)
    # Rounded to int8, all shards would be one group.
    config.methods, config.store.shard_bytes, config.store.dtype = methods, 512, "float32"
    config.model.size, config.train.epochs = "nano", 2.0
    config.eval.update(changed)
    stages.trace(config, Workdir(path / "alone"))
    return config, path / "alone"


@pytest.fixture(scope="module")
def alone(tmp_path_factory, small_groups):
    """A short run."""
    path = tmp_path_factory.mktemp("short")
    return run_alone(path, "trackstar", tail_patch_queries=0, samples=0)


@pytest.fixture(scope="module")
def full(tmp_path_factory, small_groups):
    """A run with every kind of stage."""
    return run_alone(tmp_path_factory.mktemp("full"), "trackstar,less,hidden_last,bm25")


@pytest.fixture(scope="module")
def plain(tmp_path_factory, small_groups):
    """A short run on a corpus without labels, with the same texts and queries."""
    path = tmp_path_factory.mktemp("plain")
    return run_alone(path, "trackstar", False, tail_patch_queries=1, samples=0)


def choose(config, workdir, part):
    """The engine of a task that does not wait for the others."""
    return engines.choose_engine(config, workdir, engines.EngineFlags(part, patience=0.0))


def trace(config, path, part):
    """Runs one task, or with "none" the preparation; returns what it said when it ended early."""
    workdir = Workdir(path)
    try:
        stages.trace(config, workdir, choose(config, workdir, part))
    except Unfinished as rest:
        return rest
    return None


def run_array(config, path, count):
    """Runs the tasks of an array one after the other until one ends the run; returns the rounds."""
    for turn in range(1, 20):
        if not all([trace(config, path, f"{i}/{count}") for i in range(count)]):
            return turn
    raise AssertionError("the array does not end")


def contents(path):
    """The bytes of all files that a run keeps, but for when and by whom they were written."""
    files = [p for name in KEPT for p in [path / name, *(path / name).rglob("*")] if p.is_file()]
    return {str(p.relative_to(path)): p.read_bytes() for p in files}


def trained(alone, path):
    """A workdir in which the model is trained and nothing more is done."""
    shutil.copytree(alone[1], path, ignore=lambda _, names: {*KEPT, "groups"} & {*names})
    for file in path.glob("*.jsonl"):
        file.unlink()
    return path


def test_groups_stay_until_no_program_reads_them(plain, tmp_path, monkeypatch):
    """Workers of Ray start their stages again, and pass through works that are finished."""
    config, evaluate = plain[0], stages.evaluate.evaluate
    kept = []

    class WithReaders(Processes):
        has_readers = True

        def close(self):
            kept.append((path / "groups").exists())

    def look(run, rankings):
        kept.append((path / "groups").exists())
        return evaluate(run, rankings)

    monkeypatch.setattr(stages.evaluate, "evaluate", look)
    for engine, expected in ((WithReaders(), [True, True]), (PROCESSES, [False])):
        path = trained(plain, tmp_path / str(len(expected)))
        stages.trace(config, Workdir(path), engine)
        assert kept == expected and not (path / "groups").exists()
        kept.clear()
        assert contents(path) == contents(plain[1])


def check_array(alone, path, count):
    assert run_array(alone[0], trained(alone, path), count) > 1
    assert contents(path) == contents(alone[1])
    assert not (path / "groups").exists()


def test_an_array_writes_what_one_process_writes(alone, tmp_path):
    check_array(alone, tmp_path / "array", 2)


@pytest.mark.slow
@pytest.mark.parametrize("count", [1, 4])
def test_an_array_does_every_stage(full, tmp_path, count):
    if count > 1:
        check_array(full, tmp_path / "array", count)
    else:
        assert run_array(full[0], trained(full, tmp_path / "array"), 1) == 1
        assert contents(tmp_path / "array") == contents(full[1])


def test_a_corpus_without_labels_ranks_as_one_with_labels(alone, plain):
    (record, *_), (expected, *_) = (
        list(results.read(path / "results" / "trackstar.jsonl")) for _, path in (plain, alone)
    )
    for key in ("example_id", "proponents", "proponent_ids", "proponent_scores", "target_nats"):
        assert record[key] == expected[key]
    assert len(record["proponents"]) == 10 and "proponent_correct" not in record
    metrics = json.loads((plain[1] / "metrics.json").read_text())["trackstar"]
    assert np.isfinite(metrics["tail_patch"]) and metrics["has_labels"] is False
    assert not [k for k in metrics if k.startswith(("mrr", "recall", "by_content", "by_freq"))]
    table = (plain[1] / "table.md").read_text()
    assert "| method | tail-patch |" in table and "has no labels" in table and "–" not in table


def test_a_corpus_without_labels_is_asked_without_its_files(plain, tmp_path):
    config, path = plain
    shutil.copytree(path, tmp_path / "w")
    moved = json.loads((path / "config.json").read_text())
    moved["data"] |= {"corpus": "/nowhere"}
    (tmp_path / "w" / "config.json").write_text(json.dumps(moved))
    live = finished_run.LiveRun(tmp_path / "w")
    assert live.describe(progress.silent)["passages"] == 12
    query, methods = list(results.read(path / "results" / "trackstar.jsonl"))[1], ("length",)
    question = query["inputs_plaintext"], query["targets_plaintext"]
    chosen = {n: METHODS[n] for n in ("trackstar", *methods)}
    asked = live.records(Question("", *question), chosen, 10, progress.silent)
    assert asked["trackstar"]["proponent_ids"] == query["proponent_ids"]
    assert "proponent_correct" not in asked["trackstar"]
    longest = np.argsort(-live.run.corpus.lengths, kind="stable")[:10]
    assert asked["length"]["proponents"] == [live.run.corpus.text_of(i) for i in longest]


def test_a_corpus_without_labels_is_shown(plain, tmp_path):
    collection = opening.collect(str(plain[1]), [], None, str(tmp_path))
    (shown,) = collection.index()["run"]["methods"]
    assert shown.keys() == {"name", "title", "tail_patch"}
    assert export.export(collection, tmp_path / "out") > 1
    assert {"correct", "frequency", "bucket"}.isdisjoint(collection.index()["files"][0]["fields"])


def test_a_corpus_without_labels_is_searched_through_an_index(plain, tmp_path, monkeypatch):
    pytest.importorskip("scann", reason="ScaNN is not installed: pip install 'tda-jax[scann]'")
    config, path = plain[0].copy_and_resolve_references(), tmp_path / "w"
    shutil.copytree(plain[1], path)
    monkeypatch.setattr(settings, "_EXACT_NUMBERS", 0)
    config.search.index = "scann"
    one_part = dict(part_rows=12, dims_per_block=2, reorder=12, reorder_dtype="float32")
    config.search.scann.update(one_part, training_rows=16)
    stages.trace(config, Workdir(path))
    assert "through a ScaNN index, recall@10" in (path / "table.md").read_text()
    files = [p / "results" / "trackstar.jsonl" for p in (path, plain[1])]
    for record, exact in zip(*map(results.read, files), strict=True):
        assert record["proponent_ids"] == exact["proponent_ids"]
        assert record.keys() == exact.keys() and "first_correct_rank" not in record


@pytest.mark.slow
def test_an_array_tokenises_and_does_the_rest(plain, tmp_path, monkeypatch):
    config, path = plain
    array = tmp_path / "array"
    # A task needs the tokenizer alone, and the parts of two files are of two tasks.
    (array / "model").mkdir(parents=True)
    (array / "stages").mkdir()
    for name in ("model/tokenizer.json", "stages/tokenizer.json"):
        shutil.copy(path / name, array / name)
    made, make = [], pieces._make_part

    def counted(job, piece, number, batches):
        made.append(piece)
        return make(job, piece, number, batches)

    monkeypatch.setattr(pieces, "_make_part", counted)
    assert "groups is missing, those of task 1" in str(trace(config, array, "0/2"))
    assert made == [0]
    with pytest.raises(ValueError, match="the corpus is tokenised; .*--groups=none"):
        trace(config, array, "1/2")
    assert made == [0, 1]
    assert "all is prepared for encode queries" in str(trace(config, array, "none"))
    run_array(config, array, 2)
    assert made == [0, 1]
    tokens = "tokens/parts/000000-00000.safetensors"
    assert (array / tokens).exists() and contents(array) == contents(path)


def test_an_array_is_prepared_by_one_call_that_trains(alone, tmp_path):
    config = alone[0]
    with pytest.raises(ValueError, match="not trained yet.*--groups=none"):
        trace(config, tmp_path, "0/2")
    prepared = trace(config, tmp_path, "none")
    assert "all is prepared for encode queries" in str(prepared) and prepared.status == 0
    rest = trace(config, tmp_path, "1/2")
    assert "missing, those of task 0" in str(rest) and rest.status == EXIT_STATUS


@pytest.mark.slow
@pytest.mark.parametrize("stage", ["R", "search", "tail"])
def test_a_task_is_killed_and_arrays_change_their_size(full, tmp_path, monkeypatch, stage):
    config, path = full[0], trained(full, tmp_path / "array")
    write, killed = groups._write, []

    def kill(folder, number, result):
        if folder.name.startswith(stage) and not killed:
            killed.append(folder.name)
            raise KeyboardInterrupt
        write(folder, number, result)

    monkeypatch.setattr(groups, "_write", kill)
    for count in [4, 2, *[3] * 20]:
        ends = []
        for i in range(count):
            try:
                ends.append(trace(config, path, f"{i}/{count}"))
            except KeyboardInterrupt:
                ends.append("killed")
        if not all(ends):
            break
    assert killed and contents(path) == contents(full[1])


@pytest.mark.slow
def test_a_damaged_result_costs_one_group(alone, tmp_path, monkeypatch):
    config, path = alone[0], trained(alone, tmp_path / "array")
    tasks = itertools.cycle(["0/2", "1/2"])
    while not (results := [*path.glob("groups/R-*/*.npz")]):
        assert trace(config, path, next(tasks))
    damaged, *intact = sorted(results)
    content = bytearray(damaged.read_bytes())
    content[50] ^= 4
    damaged.write_bytes(content)
    written, write = [], groups._write

    def record(folder, number, result):
        written.append((folder.name.partition("-")[0], number))
        write(folder, number, result)

    monkeypatch.setattr(groups, "_write", record)
    run_array(config, path, 2)
    numbers = [n for name, n in written if name == "R"]
    assert len(numbers) == len(set(numbers)) > 1 and int(damaged.name[:6]) in numbers
    assert not {int(p.name[:6]) for p in intact} & {*numbers}
    assert contents(path) == contents(alone[1])


def test_another_array_and_a_job_alone_are_refused_meanwhile(alone, tmp_path, monkeypatch):
    config, path = alone[0], trained(alone, tmp_path / "array")
    other = config.copy_and_resolve_references()
    other.eval.top_k = 3
    task = choose(config, Workdir(path), "0/2")
    with Workdir(path).hold(task.party):
        for changed, part in ((other, "0/2"), (config, "0/3"), (config, None), (config, "none")):
            with pytest.raises(HeldError, match="in use by the tasks of an array, whose first was"):
                trace(changed, path, part)
        assert trace(config, path, "1/2") is not None
        monkeypatch.setattr(code_version, "describe", lambda: {"tda": "another checkout"})
        with pytest.raises(HeldError, match="in use by the tasks of an array"):
            trace(config, path, "1/2")


@pytest.mark.parametrize("part", ["2/2", "-1/2", "1", "1/0", "a/b", ""])
def test_a_part_that_is_none_is_refused(tmp_path, part):
    with pytest.raises(ValueError, match="must be I/N"):
        choose(make_config(tmp_path), Workdir(tmp_path), part)
