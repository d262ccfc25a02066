"""Live questions are answered as the run answered its own, and their heat is that of the score."""

import json
import os
import shutil
import types

import numpy as np
import pytest

from tda import results
from tda.data.rows import Question
from tda.live import finished_run, heat
from tda.methods import METHODS
from tda.run import remembered, stages
from tda.run.workdir import Workdir
from tda.store import Passage
from tda.viewer.collection import Collection
from tda.viewer.jobs import Cancelled
from tda.viewer.notes import Notes
from tests.experiments.test_trace import make_config
from tests.live.test_live_methods import check, of_batch, silent
from tests.viewer.browser import Page, serving

pytestmark = pytest.mark.slow  # the quick ones: tests/live/test_retrievers.py
NAMES = ("trackstar", "exp4", "grad_cos", "grad_dot", "bm25")


@pytest.fixture(scope="module")
def workdir(tmp_path_factory):
    """A finished run of a few sentences."""
    folder = tmp_path_factory.mktemp("live")
    config = make_config(folder)
    config.methods = ",".join(NAMES)
    config.eval.tail_patch_queries = 0
    config.hessian.damping = 0.02
    config.store.dtype = "float32"
    stages.trace(config, Workdir(folder / "w"))
    return folder / "w"


@pytest.fixture(scope="module")
def run(workdir):
    return finished_run.open_workdir(workdir)


def question_of(record, tokens=None):
    return Question("question", record["inputs_plaintext"], record["targets_plaintext"], tokens)


@pytest.mark.parametrize("number", [0, 3])
def test_a_querys_live_passages_are_those_of_the_run(workdir, run, number):
    found = run.trace(silent, question_of(of_batch(workdir, "bm25", number)), list(NAMES), 10)
    assert [m["name"] for m in found["methods"]] == list(NAMES)
    for method in found["methods"]:
        results.check(method["record"], method["name"])
    check(found, workdir, number, tolerance=1e-4)


def test_a_generated_span_is_traced_by_its_own_tokens(workdir, run):
    """Mistakes: the span encoded again; another tokenisation given the run's own gradient."""
    asked = of_batch(workdir, "grad_cos", 0)
    table = run.speaker.table(question_of(asked))
    prompt, target = (tuple(table.tokens[m].tolist()) for m in (~table.scored, table.scored))
    as_encoded = question_of(asked, (prompt, target))
    record = run.trace(silent, as_encoded, ["grad_cos"], 10)["methods"][0]["record"]
    assert record["proponent_ids"] == asked["proponent_ids"] and "proponent_correct" in record
    letters = run.speaker.tokenizer.encode_spans([asked["targets_plaintext"][:1]])[0][0]
    as_letters = question_of(asked, (prompt, (*target, *letters)))
    other = run.trace(silent, as_letters, ["grad_cos"], 10)["methods"][0]["record"]
    assert "proponent_correct" not in other
    assert other["proponent_scores"] != pytest.approx(record["proponent_scores"], rel=1e-3)
    heat = run.heat(silent, as_letters, "grad_cos", other["proponent_ids"][0])
    assert heat["score"] == pytest.approx(other["proponent_scores"][0], rel=1e-3)


def test_a_passages_document_is_around_it(run, monkeypatch):
    """Documents of seven passages and of one."""
    texts = {"d": [f"d{i}" for i in range(7)], "e": ["e"]}
    passages = [Passage(f"{d}#{i}", d, t) for d, ts in texts.items() for i, t in enumerate(ts)]
    store = types.SimpleNamespace(
        row_of=lambda name: {p.id: i for i, p in enumerate(passages)}[name],
        rows_of_document=lambda name: [i for i, p in enumerate(passages) if p.document == name],
        passages=lambda rows: [passages[r] for r in rows],
    )
    monkeypatch.setattr(run.run.corpus, "store", store)
    found = run.context(silent, "d#4")
    assert found == {"before": ["d1", "d2", "d3"], "after": ["d5", "d6"], "earlier": 1, "later": 0}
    assert run.context(silent, "e#0") == {"before": [], "after": [], "earlier": 0, "later": 0}
    with pytest.raises(ValueError, match="no passage 'zz'"):
        run.context(silent, "zz")


def test_the_settings_of_r_are_the_runs(workdir, run):
    """Guards: defaults taken in the place of the run's own config."""
    asked = of_batch(workdir, "trackstar", 0)
    kept = json.loads((workdir / remembered.CONFIG).read_text())
    assert kept["hessian"]["damping"] == 0.02
    assert kept["model"]["dtype"] == "float32"  # not "auto": another machine may open the run
    live = finished_run.LiveRun(workdir)
    live.run.config.hessian.damping = 1e-3
    chosen = {"trackstar": METHODS["trackstar"]}
    question = question_of(asked)
    differing = live.records(question, chosen, 10, silent)["trackstar"]["proponent_scores"]
    assert np.abs(np.subtract(differing, asked["proponent_scores"])).max() > 1e-3


def test_what_the_model_thinks_of_a_target_is_what_the_run_measured(workdir, run):
    for number in range(4):
        asked = of_batch(workdir, "bm25", number)
        question = question_of(asked)
        found = run.speaker.likelihood(question)
        assert found["nats"] == pytest.approx(asked["target_nats"], rel=1e-4)
        assert found["rank"] == asked["target_rank"]


def test_r_is_kept_and_read_again(workdir, run):
    asked = of_batch(workdir, "trackstar", 1)
    question = question_of(asked)
    run.trace(silent, question, ["trackstar"], 10)
    kept = sorted((workdir / "live").glob("inverse-root-*.npz"))
    assert kept and not list((workdir / "live").glob("*.part"))
    again, told = finished_run.open_workdir(workdir), []
    found = again.trace(lambda *t: told.append(t[0]), question, ["trackstar"], 10)
    assert "reading R" in told and "R of the passages" not in told
    again = found["methods"][0]["record"]["proponent_scores"]
    np.testing.assert_allclose(again, asked["proponent_scores"], rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("name", ["trackstar", "exp4", "grad_dot"])
def test_heat_sums_to_the_score(workdir, run, name):
    for number in range(2):
        asked = of_batch(workdir, name, number)
        for i in (0, 7):
            question = question_of(asked)
            found = run.heat(silent, question, name, asked["proponent_ids"][i])
            scale = max(map(abs, asked["proponent_scores"]))
            assert found["score"] == pytest.approx(
                asked["proponent_scores"][i], rel=1e-3, abs=1e-4 * scale
            )
            assert found["faithful"]
            assert found["sum"] == pytest.approx(found["score"], rel=1e-3, abs=1e-3 * scale)
            text = "".join(t["text"] for t in found["tokens"] if not t["special"])
            assert asked["proponents"][i] == text


def test_a_run_that_is_older_than_a_key_has_its_default(workdir, tmp_path):
    shutil.copytree(workdir, tmp_path / "w")
    file = tmp_path / "w" / "config.json"
    config = json.loads(file.read_text())
    del config["store"]["rank"], config["rerank"]
    file.write_text(json.dumps(config))
    older = finished_run.open_workdir(tmp_path / "w")
    assert older.run.config.store.rank == 0 and older.run.config.rerank.passages == 100
    asked = older.trace(silent, Question("", "The capital of France is", "Paris"), ["grad_cos"], 3)
    assert len(asked["methods"][0]["record"]["proponent_ids"]) == 3


def test_a_question_of_two_targets_is_their_difference(run):
    """Guards: the wrong sign, a contrast that is dropped, and R or a norm before the difference."""
    prompt, many = "The capital of France is", run.run.corpus.rows
    methods = ["grad_dot", "exp1"]

    def scores(target, contrast=""):
        question = Question("", prompt, target, contrast=contrast)
        traced = run.trace(silent, question, methods, many)
        return traced, [
            dict(zip(m["record"]["proponent_ids"], m["record"]["proponent_scores"], strict=True))
            for m in traced["methods"]
        ]

    (told, both), (_, paris), (rome, other) = (
        scores(*targets) for targets in (("Paris", "Rome"), ("Paris",), ("Rome",))
    )
    for found, one, two in zip(both, paris, other, strict=True):
        expected = {i: one[i] - two[i] for i in one}
        assert found == pytest.approx(expected, rel=1e-3, abs=1e-5 * max(map(abs, one.values())))
    assert told["contrast_probability"] == pytest.approx(rome["probability"])
    question = Question("", prompt, "Paris", contrast="Rome")
    heat = run.heat(silent, question, "grad_dot", next(iter(both[0])))
    assert heat["faithful"] and heat["score"] == pytest.approx(
        next(iter(both[0].values())), rel=1e-3
    )
    with pytest.raises(ValueError, match="bm25: it ranks for one target"):
        run.trace(silent, question, ["bm25"], 3)
    with pytest.raises(ValueError, match="both targets have the same gradient"):
        run.trace(silent, Question("", prompt, "Paris", contrast="Paris"), ["grad_dot"], 3)
    described = {m["name"]: m["contrasts"] for m in run.describe(silent)["methods"]}
    assert described["grad_dot"] and not described["bm25"] and not described["hidden_last"]


@pytest.mark.parametrize(("dtype", "rank"), [("float32", 0), ("int8", 0), ("2bit", 0), ("int8", 3)])
def test_heat_tells_where_a_passage_is_read_otherwise(
    workdir, run, tmp_path, monkeypatch, dtype, rank
):
    """And not where the store alone has rounded it."""
    shutil.copytree(workdir, tmp_path / "w")
    config = run.run.config.copy_and_resolve_references()
    config.methods, config.store.dtype, config.store.rank = "grad_dot", dtype, rank
    if rank:
        config.projection.pooling, config.projection.side = "matrix", 8
    stages.trace(config, Workdir(tmp_path / "w"))
    run = finished_run.open_workdir(tmp_path / "w")
    record = of_batch(tmp_path / "w", "grad_dot", 0)
    asked = question_of(record)
    found = [run.heat(silent, asked, "grad_dot", i) for i in record["proponent_ids"]]
    assert all(f["faithful"] for f in found)
    assert any(f["sum"] != pytest.approx(f["score"], rel=1e-3) for f in found) == (
        dtype != "float32"
    )
    other = np.asarray([1, 9, 9, 9, 9]), list("abcde")
    monkeypatch.setattr(heat, "tokens_of", lambda store, row, speaker: other)
    assert not run.heat(silent, asked, "grad_dot", record["proponent_ids"][0])["faithful"]


def test_a_completion_ends_where_the_model_ends_the_passage(run):
    for prompt in ("The capital of France is", "The capital of France is Paris."):
        found = run.complete(silent, prompt, 4)
        assert "<eos>" not in [s["token"] for s in found["steps"]]
        assert found["ended"] == (len(found["steps"]) < 4)
        assert not found["continues"]


def test_a_completion_says_whether_it_continues_the_prompts_last_word(run, monkeypatch):
    steps = [{"id": 1, "token": token, "probability": 0.5, "others": []} for token in ("ey", " is")]
    monkeypatch.setattr(run.speaker, "complete", lambda *told, **options: steps)
    for prompt, continues in (("It lies in Turk", True), ("It says “", False)):
        assert run.complete(silent, prompt, 4)["continues"] == continues


def test_what_can_be_asked_is_described(run):
    told = run.describe(silent)
    by_name = {m["name"]: m for m in told["methods"]}
    assert set(by_name) == set(METHODS) and told["passages"] == 12
    assert all(by_name[n]["lacks"] is None and by_name[n]["usual"] for n in NAMES)
    assert not by_name["exp5"]["usual"]
    assert [m["name"] for m in told["methods"][: len(NAMES)]] == list(NAMES)


def test_refusals(workdir, run, tmp_path):
    with pytest.raises(ValueError, match="unknown method 'bert'"):
        run.trace(silent, Question("", "a", "b"), ["bert"], 3)
    with pytest.raises(ValueError, match="the context has 32"):
        run.trace(silent, Question("", "long " * 60, "b"), ["grad_cos"], 3)
    with pytest.raises(ValueError, match="has no token"):
        run.trace(silent, Question("", "a", " "), ["grad_cos"], 3)
    with pytest.raises(ValueError, match="no passage 'zz'"):
        run.heat(silent, Question("", "a", "b"), "grad_cos", "zz")
    with pytest.raises(ValueError, match="BM25: its scores are not inner products"):
        run.heat(silent, Question("", "a", "b"), "bm25", "s00")
    with pytest.raises(ValueError, match="the context 32"):
        run.complete(silent, "long " * 60, 3)
    assert finished_run.open_workdir(tmp_path) is None


def test_a_search_ends_when_it_is_not_wanted(run):
    def progress(what, done, total):
        if what == "searching passages":
            raise Cancelled

    with pytest.raises(Cancelled):
        run.trace(progress, Question("", "The capital of France is", "Paris"), ["grad_cos"], 3)


def test_stores_that_are_not_this_models_are_not_asked(workdir, tmp_path):
    os.symlink(workdir / "model", tmp_path / "model")
    os.symlink(workdir / "stages", tmp_path / "stages")
    for name in (remembered.CONFIG, remembered.FILE):
        os.symlink(workdir / name, tmp_path / name)
    (tmp_path / "stores").mkdir()
    told = {m["name"]: m for m in finished_run.open_workdir(tmp_path).describe(silent)["methods"]}
    assert all("no store of gradients" in told[n]["lacks"] for n in ("exp4", "trackstar"))
    for store in (workdir / "stores").glob("corpus-none-*"):
        os.symlink(store, tmp_path / "stores" / store.name)
    told = {m["name"]: m for m in finished_run.open_workdir(tmp_path).describe(silent)["methods"]}
    assert told["exp4"]["lacks"] is None and told["bm25"]["lacks"] is None
    assert "no store of gradients with optimizer correction" in told["trackstar"]["lacks"]
    assert "R_eval" in told["trackstar_raw"]["lacks"]


def test_of_several_stores_the_runs_own_is_asked(workdir, run, tmp_path_factory):
    """Guards: a store that an earlier run in the same workdir made by other settings."""
    folder = tmp_path_factory.mktemp("twice")
    config = make_config(folder)
    config.methods, config.eval.tail_patch_queries = "grad_cos", 0
    for name in ("model", "stages"):
        os.symlink(workdir / name, folder / name)
    for seed in (0, 1, 0):
        config.projection.seed = seed
        stages.trace(config, Workdir(folder))
        asked = of_batch(folder, "grad_cos", 0)
        question = question_of(asked)
        found = finished_run.open_workdir(folder).trace(silent, question, ["grad_cos"], 10)
        assert found["methods"][0]["record"]["proponent_ids"] == asked["proponent_ids"]


def test_a_live_trace_in_the_browser(browser, workdir, run, tmp_path):
    """From the page to the store and back: the run's own answer, and its heat."""
    asked = of_batch(workdir, "trackstar", 2)
    collection = Collection(workdir, Notes(tmp_path / "notes.jsonl"))
    for name in ("trackstar", "bm25"):
        collection.add(workdir / "results" / f"{name}.jsonl")
    with serving(collection, run) as address:
        page = Page(browser)
        page.open(f"{address}#view=trace")
        page.page.wait_for_selector(".methods input")
        page.page.fill("#prompt", asked["inputs_plaintext"])
        page.page.click("text=Let the model go on")
        page.page.wait_for_selector(".completed button")
        page.page.fill("#target", asked["targets_plaintext"])
        page.page.locator(".main-action").click()
        page.page.wait_for_selector(".results .column", timeout=120_000)
        for name in NAMES:
            shown = page.texts(f".results [data-method={name}] .card p.text")
            expected = of_batch(workdir, name, 2)["proponents"]
            assert shown == expected, name
            correct = of_batch(workdir, name, 2)["proponent_correct"]
            assert page.page.locator(f"[data-method={name}] .tag.yes").count() == sum(correct) > 0
        page.page.click("#trackstar-proponents-1 >> text=heat")
        page.page.wait_for_selector("#trackstar-proponents-1 .token", timeout=120_000)
        tokens = page.texts("#trackstar-proponents-1 .token")
        assert "".join(tokens[1:]) == asked["proponents"][0]
        page.context.close()
        page.fine()
