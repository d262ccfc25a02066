"""`experiments.trace` by two real processes, joined on localhost, against one process."""

import json
import os
import pathlib
import re
import shutil
import subprocess
import sys

import jax
import numpy as np
import pytest
from absl import flags
from absl.testing import flagsaver

from experiments import launch
from tda import results
from tda.retrieval import ranked
from tda.training import checkpoint
from tests.experiments.test_trace import changed_keys, make_config, without_labels
from tests.runtime.test_processes import free_port

# Little work for the compiler; and on a busy machine a device may be late for a collective.
FLAGS = [
    "--xla_backend_optimization_level=0",
    "--xla_llvm_disable_expensive_passes=true",
    "--xla_cpu_collective_call_terminate_timeout_seconds=600",
    "--xla_cpu_collective_timeout_seconds=600",
]
RUN = "from experiments.trace import launch, main; launch(main)"


def start(arguments, devices=2, program=RUN, **more):
    """A process of `experiments.trace`, or of another program, with CPU devices of its own."""
    flags = " ".join([f"--xla_force_host_platform_device_count={devices}", *FLAGS])
    env = os.environ | {"JAX_PLATFORMS": "cpu", "XLA_FLAGS": flags} | more
    command = [sys.executable, "-c", program, "--config=configs/world_facts.py", *arguments]
    pipe = subprocess.PIPE
    return subprocess.Popen(command, env=env, stdout=pipe, stderr=pipe, text=True)


def join(*arguments, count=2, **how):
    """Several processes with the same or each with its own arguments: [(rc, stdout, stderr)]."""
    common = [f"--coordinator=localhost:{free_port()}", f"--num_processes={count}"]
    started = [
        start([*common, f"--process_id={i}", *arguments[i % len(arguments)]], **how)
        for i in range(count)
    ]
    try:
        out = [p.communicate(timeout=900) for p in started]
    finally:
        for p in started:
            p.kill()
    return [(p.returncode, *texts) for p, texts in zip(started, out, strict=True)]


def run_alone(arguments, devices=4, **how):
    """One process, by default with as many devices as two have together."""
    process = start(arguments, devices, **how)
    try:
        _, errors = process.communicate(timeout=900)
    finally:
        process.kill()  # else it would outlive a test that has run out of time
    assert process.returncode == 0, errors[-3000:]


def keys(tmp_path, **changed):
    """The command-line keys of the tiny run."""
    set_ = changed_keys(make_config(tmp_path)) | {
        "train.save_every": 4,
        # Several groups of shards. Rounded to int8 they would be one, and make much of a last bit
        # by which two trainings differ.
        "store.shard_bytes": 512,
        "store.dtype": "float32",
        "methods": "trackstar,bm25",
        "eval.tail_patch_queries": 1,
    }
    return [f"--config.{k}={v}" for k, v in (set_ | changed).items()]


def files(path):
    """What stages leave, each with when it was written."""
    kept = ("model/checkpoints", "model/tokenizer.json", "stores", "retrieval", "tail_patch")
    every = [p for p in path.rglob("*") if p.is_file()]
    names = {str(p.relative_to(path)): p.stat().st_mtime_ns for p in every}
    return {n: t for n, t in names.items() if n.startswith(kept)}


@pytest.mark.slow
@pytest.mark.parametrize(
    "changed",
    [
        {"mesh.fsdp": 2},
        {"mesh.fsdp": 4, "gradients.correction": "adam"},
        {"mesh.fsdp": 4, "gradients.second_moments": "estimate", "gradients.estimate_batches": 2},
        # The second stage, with the embedding, which is the head too. Without 1/√V, which magnifies
        # what two trainings differ by in rows of rare tokens.
        {
            "mesh.fsdp": 4,
            "gradients.include": ".",
            "methods": "grad_cos,rerank_cos,rerank_exp4",
            "rerank.candidates": "grad_cos",
            "hessian.damping": 1.0,
        },
    ],
    ids=["model on each", "model over both", "over both, estimated", "over both, reranked"],
)
def test_two_processes_find_what_one_finds(tmp_path, changed):
    arguments = keys(tmp_path, **changed)
    one, two = tmp_path / "one", tmp_path / "two"
    run_alone([*arguments, f"--workdir={one}"])
    for code, _, errors in join([*arguments, f"--workdir={two}"]):
        assert code == 0, errors[:3000] + " … " + errors[-1000:]

    stores = [sorted(p.name for p in (w / "stores").iterdir()) for w in (one, two)]
    assert stores[0] == stores[1] and len(stores[0]) == 2
    shards = [p for p in (two / "stores").rglob("gradients/c.*.0")]
    assert len(shards) > len(stores[0])  # or one process would have had nothing to encode
    a, b = (json.loads((w / "metrics.json").read_text()) for w in (one, two))
    assert a.keys() == b.keys()
    for name in a:
        figures = [{k: x for k, x in m[name].items() if isinstance(x, int | float)} for m in (a, b)]
        assert len(figures[0]) > 10
        assert figures[0] == pytest.approx(figures[1], rel=1e-3, abs=1e-6)
        kept = [list(results.read(w / "results" / f"{name}.jsonl")) for w in (one, two)]
        assert len(kept[0]) == len(kept[1]) == 4
        for x, y in zip(*kept, strict=True):
            scale = np.abs(x["proponent_scores"]).max()
            # Where ranks differ it is by a near tie: the scores at every rank are the same.
            np.testing.assert_allclose(
                y["proponent_scores"], x["proponent_scores"], rtol=0, atol=1e-3 * scale
            )
            assert y["proponent_ids"][:3] == x["proponent_ids"][:3]
    kept = [sorted(p.name for p in (w / "retrieval").glob("*.npz")) for w in (one, two)]
    assert kept[0] == kept[1]
    for name in (n for n in kept[0] if not n.startswith("spectra-")):
        found = [ranked.load(w / "retrieval" / name) for w in (one, two)]
        for label, ranks in found[0].first_ranks.items():
            np.testing.assert_array_equal(ranks, found[1].first_ranks[label])
    losses = [(w / "train.jsonl").read_text().splitlines() for w in (one, two)]
    for x, y in zip(*losses, strict=True):  # each step once, though two processes took it
        assert json.loads(x) == pytest.approx(json.loads(y), rel=1e-4)


@pytest.mark.slow
def test_every_kind_of_retriever_works_with_two_processes(tmp_path):
    methods = "tracin,less,trak,hidden_last,gradient_norm,random,length"
    arguments = keys(tmp_path, methods=methods, **{"train.keep": 0, "eval.tail_patch_queries": 0})
    one, two = tmp_path / "one", tmp_path / "two"
    run_alone([*arguments, f"--workdir={one}"])
    for code, _, errors in join([*arguments, f"--workdir={two}"]):
        assert code == 0, errors[:3000] + " … " + errors[-1000:]
    names = [sorted(p.name for p in (w / "retrieval").glob("*.npz")) for w in (one, two)]
    assert names[0] == names[1] and len(names[0]) == 7
    for name in names[0]:
        x, y = (ranked.load(w / "retrieval" / name).proponent_scores for w in (one, two))
        np.testing.assert_allclose(y, x, rtol=0, atol=1e-3 * np.abs(x).max())


# Small groups, each of which leaves a file that says which process computed it.
GROUPS = f"""
import jax
from tda.run import measures, run
from tda.runtime import groups
run._GROUP_SHARDS, groups._ROWS_PER_RESULT, write = 2, 0, groups._write
measures._PAIRS_PER_GROUP = 8

def log(folder, number, result):
    write(folder, number, result)
    (folder / f"{{number}} by {{jax.process_index()}}").touch()

groups._write = log
run.shutil.rmtree = lambda path, ignore_errors: None
{RUN}
"""


@pytest.mark.slow
@pytest.mark.parametrize("count", [2, 4])
def test_processes_share_R_search_and_tail_patches_to_the_last_bit(tmp_path, count):
    arguments = keys(tmp_path, methods="trackstar,grad_dot,tracin", **{"train.keep": 0})
    one, two = tmp_path / "one", tmp_path / "two"
    run_alone([*arguments, f"--workdir={one}"], program=GROUPS)
    shutil.copytree(one, two)
    for folder in ("retrieval", "results", "groups"):
        shutil.rmtree(two / folder)
    for log in two.glob("tail_patch-*.jsonl"):
        log.unlink()
    for code, _, errors in join([*arguments, f"--workdir={two}"], program=GROUPS, count=count):
        assert code == 0, errors[:3000] + " … " + errors[-1000:]
    folders = sorted(p.name for p in (one / "groups").iterdir() if p.is_dir())
    assert folders == sorted(p.name for p in (two / "groups").iterdir() if p.is_dir())
    assert {name.partition("-")[0] for name in folders} == {"R", "search", "tail"}
    for name in folders:
        shares = [
            {p.name for p in (w / "groups" / name).iterdir() if " by " in p.name}
            for w in (one, two)
        ]
        groups = len(shares[0])
        assert groups > 1 and shares[0] == {f"{i} by 0" for i in range(groups)}
        assert shares[1] == {f"{i} by {i % count}" for i in range(groups)}
    patches = [
        {line for p in w.glob("tail_patch-*.jsonl") for line in p.read_text().splitlines()}
        for w in (one, two)
    ]
    assert len(patches[0]) > 8 and patches[0] == patches[1]
    names = sorted(p.name for p in (one / "retrieval").glob("*.npz"))
    assert len(names) >= 4 and names == sorted(p.name for p in (two / "retrieval").glob("*.npz"))
    for name in names:
        with (
            np.load(one / "retrieval" / name) as expected,
            np.load(two / "retrieval" / name) as shared,
        ):
            np.testing.assert_equal(dict(shared), dict(expected))


@pytest.mark.slow
def test_two_processes_resume_and_then_skip_everything(tmp_path):
    arguments = [*keys(tmp_path), f"--workdir={tmp_path / 'w'}"]
    assert [code for code, _, _ in join([*arguments, "--config.methods=bm25"])] == [0, 0]
    trained = files(tmp_path / "w")
    assert not any("stores" in name for name in trained)
    (first, out, bars), (second, quiet, no_bars) = join(arguments)
    assert first == second == 0
    assert "encode corpus" in bars and not re.search(r"(?m)^train:", bars)  # R_train: is another
    assert "TrackStar" in out
    for told in ("TrackStar", "queries", "files:"):
        assert told not in quiet
    assert "encode" not in no_bars
    done = files(tmp_path / "w")
    # The pairs of tail-patch are appended to; all else stands as it was written first.
    kept = {n: t for n, t in trained.items() if not n.startswith("tail_patch")}
    assert kept.items() <= done.items() and len(done) > len(trained)
    metrics = (tmp_path / "w" / "metrics.json").read_bytes()
    for code, _, errors in join(arguments):
        assert code == 0
        assert not any(bar in errors for bar in ("train:", "encode", "tail-patch:"))
    assert files(tmp_path / "w") == done
    assert (tmp_path / "w" / "metrics.json").read_bytes() == metrics


@pytest.mark.slow
def test_a_run_told_to_end_resumes_with_other_numbers_of_processes(tmp_path):
    """SIGTERM to one of four processes in training, of two, of three while encoding; then one."""
    # Of more shards than a process may encode before it is told to end.
    small = {"store.shard_bytes": 64, "eval.tail_patch_queries": 0}
    arguments = keys(tmp_path, methods="exp3", **small)
    one, many = tmp_path / "one", tmp_path / "many"
    run_alone([*arguments, f"--workdir={one}"], devices=1)
    arguments.append(f"--workdir={many}")
    training = "the training at step"
    for count, stage, saved in ((4, "train", training), (2, "train", training), (3, "encode", "")):
        program = NOTICED.replace("STAGE", stage)
        ended = join(arguments, program=program, count=count, devices=1)
        assert [code for code, _, _ in ended] == [143] * count, [e[-2000:] for _, _, e in ended]
        assert f"ended by SIGTERM. {saved}" in ended[0][2]
        assert "ended by SIGTERM" not in ended[1][2]
    shards = [*(many / "stores").rglob("gradients/c.*.0")]
    assert 0 < len(shards) < len([*(one / "stores").rglob("gradients/c.*.0")])
    run_alone(arguments, devices=1)
    checkpoints = [checkpoint.steps(w / "model" / "checkpoints") for w in (one, many)]
    assert checkpoints[0] == checkpoints[1]
    losses = [(w / "train.jsonl").read_text().splitlines() for w in (one, many)]
    for x, y in zip(*losses, strict=True):
        assert json.loads(x) == pytest.approx(json.loads(y), rel=1e-4)
    (name,) = (p.name for p in (one / "retrieval").glob("*.npz") if "spectra" not in p.name)
    x, y = (ranked.load(w / "retrieval" / name).proponent_scores for w in (one, many))
    np.testing.assert_allclose(y, x, rtol=0, atol=1e-3 * np.abs(x).max())


# A corpus in two pieces, tokenised a document at a time; at its second, a process gets a notice and
# takes its time: process 1 while it reads or tokenises, process 0 while it learns the tokenizer.
EARLY = """
import os, signal, time
import jax
from experiments.trace import launch, main
from tda.data import corpora, pieces
from tda.data.tokenizer import Tokenizer
from tda.facts import files
pieces.BATCH = corpora._PIECE_BYTES = 1
calls = 0
def notice(process):
    global calls
    calls += 1
    if calls == 2 and jax.process_index() == process:
        os.kill(os.getpid(), signal.SIGTERM)
    time.sleep(0.5)
add, train, iter_sentences = pieces.Part.add, Tokenizer.train, files.iter_sentences
if "STAGE" == "tokenise":
    pieces.Part.add = lambda *arguments: (notice(1), add(*arguments))[1]
if "STAGE" == "read":
    files.iter_sentences = lambda path: (s for s in iter_sentences(path) if not notice(1))
if "STAGE" == "learn":
    Tokenizer.train = lambda *arguments: [notice(0) for _ in range(600)]
launch(main)
"""


def plain_keys(tmp_path, **changed):
    """The keys of a run on documents without labels."""
    config = without_labels(make_config(tmp_path), tmp_path)
    data = {k: config.data[k] for k in ("sentences", "facts", "corpus", "queries")}
    return keys(tmp_path, **{f"data.{k}": v for k, v in data.items()}, **changed)


@pytest.mark.slow
@pytest.mark.parametrize("stage", ["read", "learn", "tokenise"])
def test_processes_told_to_end_before_training_end_in_order(tmp_path, stage):
    arguments = keys(tmp_path) if stage == "read" else plain_keys(tmp_path)
    workdir = tmp_path / "w"
    ended = join([*arguments, f"--workdir={workdir}"], program=EARLY.replace("STAGE", stage))
    assert [code for code, _, _ in ended] == [143, 143], [e[-2000:] for _, _, e in ended]
    assert f"ended by SIGTERM. Finished work is kept in {workdir}" in ended[0][2]
    assert not (workdir / "stages" / "train.json").exists()
    assert (workdir / "model" / "tokenizer.json").exists() == (stage == "tokenise")
    assert not (workdir / "tokens" / "corpus.json").exists()


@pytest.mark.slow
def test_two_processes_tokenise_and_trace_as_one(tmp_path):
    """To the last byte, without labels; the model is trained by one."""
    arguments = plain_keys(tmp_path, **{"eval.tail_patch_queries": 0})
    one, two = tmp_path / "one", tmp_path / "two"
    run_alone([*arguments, f"--workdir={one}"], devices=2, program=EARLY)
    kept = ("model", "stages")
    shutil.copytree(one, two, ignore=lambda _, names: {*names} - {*kept} if _ == str(one) else ())
    ended = join([*arguments, f"--workdir={two}"], program=EARLY)
    assert [code for code, _, _ in ended] == [0, 0], [e[-3000:] for _, _, e in ended]
    assert len([*(two / "tokens").rglob("*.safetensors")]) == 2
    for folder in ("tokens", "stores", "retrieval", "results"):
        x, y = (
            {p.relative_to(w): p.read_bytes() for p in (w / folder).rglob("*") if p.is_file()}
            for w in (one, two)
        )
        assert x == y


# Sends process 1 a notice at its third batch of training, or of encoding, and then takes its time.
NOTICED = """
import os, signal, time
import jax
from experiments.trace import launch, main
from tda.encoding import table
from tda.runtime import preemption
calls = 0
def noticed(function):
    def call(*arguments):
        global calls
        calls += 1
        if calls == 3 and jax.process_index() == 1:
            os.kill(os.getpid(), signal.SIGTERM)
        if calls >= 3:
            time.sleep(0.5)
        return function(*arguments)
    return call
if "STAGE" == "encode":
    table.encode_kinds = noticed(table.encode_kinds)
else:
    preemption.is_due = noticed(preemption.is_due)
launch(main)
"""


def test_processes_that_share_no_workdir_are_told(tmp_path):
    arguments = keys(tmp_path)
    (tmp_path / "b").mkdir()
    (tmp_path / "b" / ".writable").write_text("of another run")
    for code, _, errors in join(*([*arguments, f"--workdir={tmp_path / n}"] for n in "ab")):
        assert code == 1
        assert "of process 1 is not that of process 0" in errors


def test_processes_with_other_configs_are_told(tmp_path):
    arguments = [*keys(tmp_path), f"--workdir={tmp_path / 'w'}"]
    for code, _, errors in join(arguments, [*arguments, "--config.seed=1"]):
        assert code == 1 and "Traceback" not in errors
        assert "process 1 has another config than process 0" in errors
    assert not (tmp_path / "w" / "model").exists()


FAILING = """
import jax
from experiments import launch
from tda.runtime import processes
launch._PATIENCE = 5

def main(config, workdir):
    def work():
        raise ValueError("no such colour")
    if config.seed == 0:
        processes.on_first_process("paint", work)
    if jax.process_index() == 1:
        raise ValueError("no such colour")
    processes.wait_for_all("never")

launch.launch(main)
"""


@pytest.mark.parametrize("failing", [0, 1])
def test_a_process_that_fails_alone_ends_the_other(tmp_path, failing):
    arguments = [f"--config.seed={failing}", f"--workdir={tmp_path}"]
    ended = join(arguments, program=FAILING)
    assert all(code != 0 for code, _, _ in ended)
    assert f"error in process {failing}: no such colour" in ended[failing][2]
    if failing == 0:
        assert "error in process 1: process 0 failed to paint" in ended[1][2]
        assert "Traceback" not in ended[0][2] + ended[1][2]


@pytest.fixture
def joined(monkeypatch):
    """What `jax.distributed.initialize` was called with; it is not called in truth."""
    calls = []
    monkeypatch.setattr(jax.distributed, "initialize", lambda **how: calls.append(how))
    for name in ("SLURM_PROCID", "OMPI_COMM_WORLD_RANK"):
        monkeypatch.delenv(name, raising=False)
    flags.FLAGS.mark_as_parsed()
    return calls


def test_flags_say_what_is_joined(joined):
    launch._join()
    assert joined == []  # one process, unless asked
    with flagsaver.flagsaver(distributed=True):
        launch._join()
    assert joined.pop() == {"shutdown_timeout_seconds": 60}
    with flagsaver.flagsaver(coordinator="a:1", num_processes=3, process_id=2):
        launch._join()
    assert (
        joined.pop().items()
        >= {
            "coordinator_address": "a:1",
            "num_processes": 3,
            "process_id": 2,
            "cluster_detection_method": "deactivate",
        }.items()
    )


@pytest.mark.parametrize(
    ("given", "message"),
    [
        (dict(coordinator="a:1"), "--num_processes and --process_id must be given"),
        (dict(num_processes=2, process_id=0), "--coordinator must be given"),
        (dict(coordinator="a:1", num_processes=2, process_id=2), "--process_id=2 must be from 0"),
        (dict(coordinator="a", num_processes=2, process_id=0), "--coordinator=a must be HOST:PORT"),
    ],
)
def test_flags_that_do_not_fit_are_told(joined, given, message):
    with flagsaver.flagsaver(**given), pytest.raises(SystemExit, match=message):
        launch._join()
    assert joined == []


def test_a_task_of_several_that_was_not_told_so_is_refused(joined, monkeypatch):
    monkeypatch.setenv("SLURM_PROCID", "0")
    launch._join()
    monkeypatch.setenv("SLURM_PROCID", "3")
    with pytest.raises(SystemExit, match="SLURM_PROCID=3.*--distributed.*--nodistributed"):
        launch._join()
    with flagsaver.flagsaver(distributed=False):
        launch._join()
    assert joined == []


def test_no_cluster_is_told(monkeypatch, joined):
    def fail(**how):
        raise ValueError("coordinator_address should be defined.")

    monkeypatch.setattr(jax.distributed, "initialize", fail)
    with flagsaver.flagsaver(distributed=True), pytest.raises(SystemExit, match="--coordinator"):
        launch._join()


def test_nothing_computes_before_processes_are_joined():
    check = (
        "import experiments.trace\n"
        "from jax._src import xla_bridge\n"
        "assert not xla_bridge.backends_are_initialized()"
    )
    done = subprocess.run([sys.executable, "-c", check], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-2000:]


def test_the_page_on_pods_names_the_flags():
    page = pathlib.Path(launch.__file__).parents[1].joinpath("docs/pods.md").read_text("utf-8")
    for flag in ("--distributed", "--coordinator", "--num_processes", "--process_id"):
        assert flag in page
