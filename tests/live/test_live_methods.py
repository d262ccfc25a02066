"""Live questions by every kind of method: a run's own queries have the run's own answers."""

import importlib.machinery
import os
import shutil
import sys
import types
import zlib

import numpy as np
import pytest

from tda import results
from tda import store as stores
from tda.data.rows import Question
from tda.live import finished_run
from tda.methods import METHODS
from tda.run import remembered, stages, train
from tda.run.workdir import Workdir
from tests.experiments.test_trace import make_config

pytestmark = pytest.mark.slow  # the quick ones: tests/live
NAMES = (
    "annotated,bm25,dense,exp4,trackstar,trackstar_all,trackstar_leave_one_out,"
    "trackstar_disjoint,trackstar_margin,ekfac,logra_cos,hidden_last,hidden_middle,"
    "random,length,gradient_norm"
).split(",")
OWN = Question("own", "The capital of Norway is", "Paris")


class Words:
    """A sentence encoder: the sum of vectors of a text's words."""

    def __init__(self, model):
        self.model = model

    def get_sentence_embedding_dimension(self):
        return 8

    def encode(self, texts, batch_size, show_progress_bar, convert_to_numpy):
        def one(text):
            words = (np.random.default_rng(zlib.crc32(w.encode())) for w in text.split())
            return sum((rng.normal(size=8) for rng in words), np.zeros(8))

        return np.asarray([one(text) for text in texts], np.float32)


@pytest.fixture(scope="module")
def workdir(tmp_path_factory, one_device):
    """A finished run of all these methods, its second moments estimated and its R shrunk."""
    folder = tmp_path_factory.mktemp("live")
    config = make_config(folder)
    config.methods = ",".join(NAMES)
    config.eval.tail_patch_queries = config.eval.samples = 0
    config.gradients.second_moments, config.gradients.estimate_batches = "estimate", 2
    config.hessian.damping, config.hessian.cutoff = -1.0, 0.5
    config.hessian.evaluation = "leave_one_out"
    config.projection.blocks = 1
    (folder / "encoder").mkdir()
    (folder / "encoder" / "config.json").write_text("{}")
    config.dense.model = str(folder / "encoder")
    library = types.ModuleType("sentence_transformers")
    library.__spec__ = importlib.machinery.ModuleSpec("sentence_transformers", None)
    library.SentenceTransformer = Words
    with pytest.MonkeyPatch.context() as patch:
        patch.setitem(sys.modules, "sentence_transformers", library)
        # On one device: to compile for eight is most of the time.
        patch.setattr(train, "make_mesh", lambda config: one_device)
        stages.trace(config, Workdir(folder / "w"))
        yield folder / "w"


@pytest.fixture(scope="module")
def run(workdir):
    return finished_run.open_workdir(workdir)


def silent(what, done, total):
    pass


def of_batch(workdir, name, number):
    return list(results.read(workdir / "results" / f"{name}.jsonl"))[number]


def asked(workdir, number=0):
    record = of_batch(workdir, "bm25", number)
    return Question("asked", record["inputs_plaintext"], record["targets_plaintext"])


def check(found, workdir, number, tolerance=2e-4):
    """Holds live records against those of the run."""
    for method in found["methods"]:
        name, got = method["name"], method["record"]
        expected = of_batch(workdir, name, number)
        for kind in ("proponent", "opponent"):
            scale = max(map(abs, expected[f"{kind}_scores"]), default=1)
            np.testing.assert_allclose(
                got[f"{kind}_scores"],
                expected[f"{kind}_scores"],
                rtol=tolerance,
                atol=tolerance / 10 * scale,
                err_msg=name,
            )
            assert got[f"{kind}_ids"] == expected[f"{kind}_ids"], name
            assert got[f"{kind}s"] == expected[f"{kind}s"], name
        assert got["proponent_correct"] == expected["proponent_correct"], name
        assert got["fact_id"] == expected["fact_id"]


def linked(workdir, folder, *names):
    """A workdir with some of another's files, as links."""
    folder.mkdir()
    for name in names:
        (folder / name).parent.mkdir(exist_ok=True)
        os.symlink(workdir / name, folder / name)
    return folder


@pytest.mark.parametrize("number", [0, 1])
def test_a_querys_answers_are_those_of_the_run(workdir, run, number):
    found = run.trace(silent, asked(workdir, number), NAMES, 10)
    assert [m["name"] for m in found["methods"]] == NAMES
    assert any(m["record"]["proponent_correct"] for m in found["methods"])
    check(found, workdir, number)


def test_the_halves_are_the_runs(workdir, run):
    """Guards: a query whitened by the half that it is in. Each half has two of the four."""
    for number in range(4):
        check(run.trace(silent, asked(workdir, number), ["trackstar_disjoint"], 10), workdir,
              number)  # fmt: skip


def test_the_cutoff_is_the_configs(workdir, tmp_path):
    """Guards: a cutoff that is not passed on; where R is shrunk, no direction is below it."""
    names = ("model", "stages", "stores", "moments", "corpus.npz", "config.json")
    folder = linked(workdir, tmp_path / "w", *names)
    scores = []
    for cutoff in (0.0, 0.5):
        live = finished_run.LiveRun(folder)
        live.run.config.hessian.update(damping=1e-3, cutoff=cutoff)
        found = live.records(asked(workdir), {"exp4": METHODS["exp4"]}, 10, silent)["exp4"]
        scores.append(found["proponent_scores"])
    assert np.abs(np.subtract(*scores)).max() > 1e-2


def test_another_question_is_scored_with_all_queries(run):
    names = ["trackstar", "trackstar_all", "trackstar_leave_one_out", "trackstar_disjoint"]
    found = run.trace(silent, OWN, [*names, "annotated", "random"], 10)["methods"]
    *records, annotated, random = [m["record"] for m in found]
    assert records[0] == records[1] == records[2] == records[3]
    assert not any("proponent_correct" in m["record"] for m in found)
    assert not annotated["proponents"]
    assert random == run.trace(silent, OWN, ["random"], 10)["methods"][0]["record"]


def test_what_was_not_kept_is_made_once(workdir, tmp_path):
    """Vectors of a run without such methods, and second moments of one that lost its estimate."""
    folder = linked(workdir, tmp_path / "w", "model", "stages", remembered.CONFIG, "corpus.npz")
    names = ["trackstar", "hidden_last", "dense"]
    for store in (workdir / "stores").iterdir():
        if not store.name.startswith(("hidden", "dense")):
            linked(workdir, tmp_path / store.name, f"stores/{store.name}")
            (folder / "stores").mkdir(exist_ok=True)
            os.symlink(store, folder / "stores" / store.name)
    told: list[set] = []
    for _ in range(2):
        told.append(set())
        again = finished_run.open_workdir(folder)
        found = again.trace(lambda *t: told[-1].add(t[0]), asked(workdir), names, 10)
        check(found, workdir, 0)
        # A query of the run has its gradient in a store; another question's is encoded.
        again.trace(lambda *t: told[-1].add(t[0]), OWN, names, 10)
    made = {f"{what} of the passages" for what in ("hidden states", "sentence vectors")}
    made |= {"reading the run's corpus", "estimating second moments"}
    assert made <= told[0] and not made & told[1]


def test_files_that_are_gone_are_told(workdir, tmp_path):
    files = ("model", "stages", "corpus.npz", "config.json")
    folder = linked(workdir, tmp_path / "w", *files)
    (folder / "stores").mkdir()
    live = finished_run.LiveRun(folder)
    live.run.config.data.sentences = str(tmp_path / "gone.jsonl")
    hidden = {"hidden_last": METHODS["hidden_last"]}
    with pytest.raises(finished_run.LiveError, match="needs the files that the run .*gone.jsonl"):
        live.records(asked(workdir), hidden, 10, silent)


def test_heat_of_a_query_whose_part_is_taken_out(workdir, run):
    for name in ("trackstar_leave_one_out", "trackstar_disjoint", "trackstar_margin"):
        record = of_batch(workdir, name, 1)
        for i in (0, 5):
            heat = run.heat(silent, asked(workdir, 1), name, record["proponent_ids"][i])
            scale = max(map(abs, record["proponent_scores"]))
            expected = pytest.approx(record["proponent_scores"][i], rel=2e-3, abs=2e-3 * scale)
            assert heat["score"] == expected and heat["sum"] == expected and heat["faithful"]


def test_what_cannot_be_asked_says_why(workdir, run):
    lacks = {m["name"]: m["lacks"] for m in run.describe(silent)["methods"]}
    assert all(lacks[name] is None for name in NAMES)
    assert lacks["tracin"] is None  # of the one checkpoint that is kept
    assert lacks["trak"].startswith("it sums over the checkpoints")
    assert "of the logit" in lacks["trackstar_logit"]
    with pytest.raises(ValueError, match="not inner products with one plain gradient"):
        run.heat(silent, asked(workdir), "ekfac", "s00")


def test_a_run_without_a_store_is_asked_by_what_needs_none(workdir, tmp_path):
    names = ["bm25", "hidden_last", "length", "random", "annotated"]
    folder = linked(workdir, tmp_path / "w", "model", "stages", "corpus.npz", "config.json")
    live = finished_run.LiveRun(folder)
    live.run.config.store.dtype = "none"
    chosen = {n: METHODS[n] for n in names}
    found = live.records(asked(workdir), chosen, 10, silent)
    check({"methods": [{"name": n, "record": r} for n, r in found.items()]}, workdir, 0)
    assert "no store of gradients" in live.lacks(METHODS["grad_cos"])


def test_withdrawn_passages_are_found_by_nothing(workdir, tmp_path):
    folder = tmp_path / "w"
    shutil.copytree(workdir, folder)
    for path in (folder / "stores").glob("corpus-*"):
        stores.open_store(path).withdraw(["s00"])
    found = finished_run.open_workdir(folder).trace(silent, asked(workdir), NAMES, 12)
    for method in found["methods"]:
        if method["name"] != "annotated":  # labels are not searched
            assert len(method["record"]["proponent_ids"]) == 11, method["name"]
            assert "s00" not in method["record"]["proponent_ids"], method["name"]
