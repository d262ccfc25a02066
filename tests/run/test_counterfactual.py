"""The bank and the board of a run, from a config to a table."""

import contextlib
import json
import os
import pathlib
import shutil
import signal
import subprocess
import sys
import time
import types

import numpy as np
import pytest
import scipy.stats

from configs import counterfactual_trex, counterfactual_world
from tda import results
from tda.counterfactual import figures
from tda.counterfactual.bank import Bank
from tda.facts.records import Sentence, Triple
from tda.methods import METHODS as ALL_METHODS
from tda.reports import board as board_report
from tda.retrieval.ranked import Ranked
from tda.run import bank_rankings, bank_scores, board, checkpoints, counterfactual, defaults, stages
from tda.run import corpus as corpus_stage
from tda.run.workdir import Workdir
from tda.runtime import array_tasks, preemption, progress, sharding
from tests.experiments import test_trace
from tests.run import test_many_processes
from tests.runtime.test_processes import free_port

METHODS = "exp3,grad_dot,tracin,trak,bm25,rerank_ekfac,random"


def make_config(path, **changes):
    c = test_trace.make_config(path)
    c.data.n_sentences = 10
    c.data.train_on = "rest"
    c.model.size = "micro"
    c.train.epochs = 1.0
    c.train.warmup = 0
    c.methods = METHODS
    c.projection.pooling = "matrix"
    c.rerank.passages = 0
    c.counterfactual.tokens_per_batch = 64
    c.counterfactual.warmup = 1
    c.counterfactual.subsets = 6
    c.counterfactual.orders = 2
    c.counterfactual.fractions = "0.3"
    c.counterfactual.fisher = 8
    c.counterfactual.own_top = 2
    c.counterfactual.resamples = 50
    c.update_from_flattened_dict(changes)
    return c


@pytest.mark.slow
def test_a_killed_board_continues_and_holds_every_method_against_the_bank(tmp_path, monkeypatch):
    """The metagradient is what retraining is predicted by; controls are near nothing."""
    config, workdir = make_config(tmp_path), Workdir(tmp_path / "w")
    retrainings = tmp_path / "w" / "counterfactual" / "retrainings"
    monkeypatch.setattr(preemption, "is_noticed", lambda: len(list(retrainings.rglob("*"))) > 4)
    with pytest.raises(preemption.Preempted):
        board.measure(config, workdir)
    monkeypatch.undo()
    done = {f: f.stat().st_mtime_ns for f in retrainings.rglob("*.npz")}
    record = board.measure(make_config(tmp_path), workdir)
    assert done and all(f.stat().st_mtime_ns == t for f, t in done.items())
    lds = {n: m["lds"]["0.3"]["same order"]["mean"] for n, m in record["methods"].items()}
    assert set(lds) == {*bank_scores.own_methods(config), *METHODS.split(",")}
    assert lds["metagradient"] > 0.8
    assert record["methods"]["metagradient"]["own_top"]["mean"] > 0
    assert all(m["cost"] > 0 for m in record["methods"].values())
    assert (tmp_path / "w" / "costs.png").exists()
    assert -1 <= record["ceilings"]["0.3"]["agreement"] <= 1 and record["metasmoothness"] > 0.5
    text = (tmp_path / "w" / "board.md").read_text()
    assert "metagradient (exact)" in text and "BM25" in text
    assert "| QLD | tail-patch | MRR | cost |" in text and "(Spearman): QLD" in text
    # Beside LDS stand the metrics that a trace has, of the same scores and model.
    metrics = json.loads((tmp_path / "w" / "counterfactual" / "metrics.json").read_text())
    for name, m in record["methods"].items():
        for metric in ("mrr", "tail_patch"):
            assert m[metric]["mean"] == metrics[name][metric]
            assert [m[metric]["low"], m[metric]["high"]] == metrics[name]["intervals"][metric]
    pairs = [(lds[n], m["mrr"]["mean"]) for n, m in record["methods"].items()]
    rho = scipy.stats.spearmanr(*zip(*pairs, strict=True)).statistic
    assert abs(record["agreements"]["0.3"]["mrr"] - rho) < 1e-9
    assert json.loads((tmp_path / "w" / "board.json").read_text())["units"] == 10
    with np.load(tmp_path / "w" / "counterfactual" / "bank.npz") as bank:
        assert bank["0.3/1/losses"].shape == (6, 4)
        changes = bank["0.3/0/losses"].astype(np.float64) - bank["0.3/0/base"]
    with np.load(tmp_path / "w" / "board.npz") as arrays:
        np.testing.assert_array_equal(arrays["0.3/same order"], changes)
        by_query = figures.spearman(arrays["0.3/bm25"], changes)
        np.testing.assert_array_equal(arrays["0.3/same order/bm25"], by_query)
        assert by_query.mean() == lds["bm25"]
        sums = arrays["0.3/metagradient"]
        # Whole gradients once, and once as products of their factors.
        whole, factors = arrays["0.3/ekfac_whole"], arrays["0.3/rerank_ekfac"]
        np.testing.assert_allclose(factors, whole, rtol=0, atol=1e-5 * np.abs(whole).max())
    # A method's passages are those of the highest scores: together they are what it predicts.
    items = list(results.read(tmp_path / "w" / "counterfactual" / "results" / "metagradient.jsonl"))
    assert [i["example_id"] for i in items] == [t["id"] for t in record["texts"]]
    with np.load(tmp_path / "w" / "counterfactual" / "bank.npz") as bank:
        removed = bank["0.3/0/removed"]
    names = json.loads((tmp_path / "w" / "counterfactual" / "bank.json").read_text())["unit names"]
    for q, item in enumerate(items):
        scores = dict(zip(item["proponent_ids"], item["proponent_scores"], strict=True))
        assert len(scores) == 10 and item["proponent_scores"] == sorted(scores.values())[::-1]
        ordered = [scores[i] for i in names]
        np.testing.assert_allclose(removed @ ordered, sums[:, q], rtol=1e-5, atol=1e-7)
    # Scores stay: a new method is held against the bank without any training.
    config = make_config(tmp_path, methods="bm25", **{"counterfactual.methods": "dot_whole"})
    again = board.measure(config, workdir)["methods"]
    assert again["dot_whole"]["lds"]["0.3"]["same order"]["mean"] == lds["dot_whole"]
    assert again["dot_whole"]["cost"] == record["methods"]["dot_whole"]["cost"]


def test_a_bank_is_asked_by_sentences_that_it_leaves_out(tmp_path):
    config = make_config(tmp_path, **{"data.n_sentences": 8})
    facts = corpus_stage.load(config, Workdir(tmp_path / "w"))
    corpus = counterfactual.ask_held_out(facts, 2, seed=3)
    assert len(corpus.queries) == len(corpus.prompts) == 2 and not corpus.has_labels
    assert corpus.fingerprint["queries"] != facts.fingerprint["queries"]
    assert corpus.passages is facts.passages
    assert not {*corpus.query_ids} & {*facts.passages.ids}
    table = facts.training
    for q, fact in enumerate(corpus.queries):
        row = list(table.ids).index(fact.fact_id)
        for asked, text in zip(corpus.prompts.sequence(q), table.sequence(row), strict=True):
            np.testing.assert_array_equal(asked, text)
        assert fact.entity1 == facts.text_of(row, table) and fact.prompt(0) == ""
    others = counterfactual.ask_held_out(facts, 2, seed=4)
    assert others.query_ids != corpus.query_ids
    with pytest.raises(ValueError, match="held_out=99: only 4 passages are outside"):
        counterfactual.ask_held_out(facts, 99, seed=3)


@pytest.mark.slow
def test_a_unit_can_be_a_token(tmp_path):
    """Derivatives by token predict retrainings without them; a passage's score is shared evenly."""
    names = "metagradient,adjoint_none,dot_whole,cosine_whole"
    settings = {"counterfactual.methods": names, "counterfactual.unit": "token"}
    settings |= {"counterfactual.orders": 1, "counterfactual.subsets": 20}
    config = make_config(tmp_path, methods="bm25", **settings)
    record = board.measure(config, Workdir(tmp_path / "w"))
    methods = record["methods"]
    lds = {n: m["lds"]["0.3"]["same order"]["mean"] for n, m in methods.items()}
    assert lds["metagradient"] > 0.8
    assert [n for n, m in methods.items() if "shared" in m["title"]] == ["cosine_whole", "bm25"]
    manifest = json.loads((tmp_path / "w" / "counterfactual" / "bank.json").read_text())
    passages = {n.rpartition(":")[0] for n in manifest["unit names"]}
    assert len(passages) == 10 < record["units"] == len(manifest["unit names"])
    scores = {
        p.name.split("-")[0]: np.load(p)["scores"]
        for p in (tmp_path / "w" / "counterfactual" / "scores").glob("*.npz")
    }
    places = [n.rpartition(":")[0] for n in manifest["unit names"]]
    for name, of_units in scores.items():
        values = [len({*of_units[0][np.array(places) == p].tolist()}) for p in passages]
        assert (max(values) == 1) == (name in ("cosine_whole", "bm25"))


@pytest.mark.slow
def test_held_out_sentences_have_a_board(tmp_path):
    """The metagradient predicts their losses too; without labels there is no MRR."""
    settings = {"counterfactual.methods": "metagradient,dot_whole", "counterfactual.held_out": 2}
    config = make_config(tmp_path, methods="grad_dot,bm25", **settings)
    record = board.measure(config, Workdir(tmp_path / "w"))
    assert record["queries"] == 2 and all(t["prompt"] == "" for t in record["texts"])
    assert record["methods"]["metagradient"]["lds"]["0.3"]["same order"]["mean"] > 0.8
    assert all("tail_patch" in m and "mrr" not in m for m in record["methods"].values())


# What does not depend on the clock.
BANK = ("board.npz", "counterfactual/bank.npz", "counterfactual/results/metagradient.jsonl")


def start(config, workdir, *flags):
    """A process of `experiments.counterfactual`."""
    changed = defaults.flat(config)
    before = defaults.flat(defaults.get_config())
    keys = [f"--config.{k}={v}" for k, v in changed.items() if v != before[k]]
    command = [sys.executable, "-m", "experiments.counterfactual", f"--workdir={workdir}"]
    command += ["--config=tda/run/defaults.py", *keys, *flags]
    flags = " ".join(["--xla_force_host_platform_device_count=1", *test_many_processes.FLAGS])
    environment = os.environ | {"JAX_PLATFORMS": "cpu", "XLA_FLAGS": flags}
    return subprocess.Popen(command, env=environment, stderr=subprocess.PIPE, text=True)


@pytest.mark.slow
def test_tasks_joined_processes_and_workers_write_the_same_bank(tmp_path):
    """Whoever retrains, and whoever is killed meanwhile."""
    config = make_config(tmp_path, methods="exp3,bm25")
    config.counterfactual.update(methods="metagradient,dot_whole", orders=1, together=1)
    prepared = start(config, tmp_path / "prepared", "--groups=none")
    assert "all is prepared for retrained" in prepared.communicate()[1] and not prepared.returncode
    # The same model for all: joined processes would train another, in its last bits.
    for name in ("alone", "array", "joined", "ray"):
        shutil.copytree(tmp_path / "prepared", tmp_path / name)
    alone = start(config, tmp_path / "alone")
    assert alone.wait() == 0, alone.stderr.read()
    expected = [(tmp_path / "alone" / name).read_bytes() for name in BANK]

    def check(workdir):
        assert [(workdir / name).read_bytes() for name in BANK] == expected

    array = tmp_path / "array"
    tasks = [start(config, array, f"--groups={i}/2", "--patience=4") for i in range(2)]
    while not list(array.glob("counterfactual/retrainings/*/000001-*.npz")):
        assert tasks[1].poll() is None
        time.sleep(0.02)
    tasks[1].kill()
    texts = [task.communicate()[1] for task in tasks]
    assert [t.returncode for t in tasks] == [array_tasks.EXIT_STATUS, -signal.SIGKILL], texts
    assert "are missing, those of task 1" in texts[0]
    done = {f: f.stat().st_mtime_ns for f in array.rglob("retrainings/*/*.npz")}
    assert 1 < len(done) < 7
    tasks = [start(config, array, f"--groups={i}/2") for i in range(2)]
    texts = [task.communicate()[1] for task in tasks]
    assert not any(t.returncode for t in tasks), texts
    assert all(f.stat().st_mtime_ns == t for f, t in done.items())
    assert not (array / "counterfactual" / "groups").exists()
    check(array)
    # The processes of one run retrain, and one process does the rest.
    address = f"--coordinator=localhost:{free_port()}"
    joined = [
        start(config, tmp_path / "joined", address, "--num_processes=2", f"--process_id={i}")
        for i in range(2)
    ]
    texts = [process.communicate()[1] for process in joined]
    assert not any(p.returncode for p in joined), texts
    assert "the retrainings are finished; one process scores the methods" in texts[0]
    done = {f: f.stat().st_mtime_ns for f in tmp_path.glob("joined/**/retrainings/*/*.npz")}
    assert len(done) == 7
    rest = start(config, tmp_path / "joined")
    assert rest.wait() == 0, rest.stderr.read()
    assert all(f.stat().st_mtime_ns == t for f, t in done.items())
    check(tmp_path / "joined")
    pytest.importorskip("ray")
    flags = "--engine=ray", "--workers=2", "--worker_resources=CPU=0.5"
    driver = start(config, tmp_path / "ray", *flags)
    while not list(tmp_path.glob("ray/**/retrainings/*/*.npz")):
        assert driver.poll() is None
        time.sleep(0.02)
    os.kill(find_worker(driver.pid), signal.SIGKILL)
    assert driver.wait() == 0, driver.stderr.read()
    check(tmp_path / "ray")


def find_worker(driver):
    """Returns a worker of the Ray cluster that a process has started."""
    parents, workers = {}, []
    for process in pathlib.Path("/proc").glob("[0-9]*"):
        with contextlib.suppress(OSError):
            number, text = int(process.name), (process / "stat").read_text()
            parents[number] = int(text.rpartition(")")[2].split()[1])
            if b"ray::Worker" in (process / "cmdline").read_bytes():
                workers.append(number)
    return next(worker for worker in workers if parents.get(parents[worker]) == driver)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"counterfactual.held_out": 4}, "held_out=4 .* use data.train_on=rest"),
        ({"counterfactual.fractions": "0.05,1"}, "fractions=0.05,1: give shares above 0"),
        ({"counterfactual.fractions": "x"}, "fractions=x: give shares above 0"),
        ({"model.dtype": "bfloat16"}, "=bfloat16 would .* need model.dtype=float32"),
        ({"train.optimizer": "adafactor"}, "the bank is trained by adam or adamw"),
        ({"counterfactual.methods": "dots"}, "unknown dots; there are metagradient"),
        ({"counterfactual.subsets": 1}, "subsets=1: LDS is a correlation .*; give two or more"),
        ({"methods": "annotated,bm25"}, "leave it out of methods"),
        ({"search.index": "scann"}, "use search.index=none"),
        ({"data.corpus": "x"}, "give the passages as data.sentences"),
    ],
)
def test_what_a_bank_cannot_have_is_refused_by_key(changes, message):
    config = defaults.get_config()
    config.update_from_flattened_dict(changes)
    with pytest.raises(ValueError, match=message):
        counterfactual.check(config)
        board.check(config)


def test_on_accelerators_a_bank_asks_for_float32(monkeypatch):
    monkeypatch.setattr(sharding, "is_accelerated", lambda: True)
    with pytest.raises(ValueError, match="=auto would compute in bfloat16: .*=float32"):
        counterfactual.check(defaults.get_config())
    for packaged in (counterfactual_world, counterfactual_trex):
        counterfactual.check(packaged.get_config())


def test_a_triple_without_uris_is_of_no_unit():
    """Guards: all passages whose annotation only names its fact, dropped together."""
    triples = [Triple("f1", None, None, "", "", ""), Triple(None, None, None, "s", "r", "o")]
    sentences = [Sentence(f"s{i}", "x", fact_triples=(t,)) for i, t in enumerate(triples)]
    corpus = types.SimpleNamespace(
        sentences=[*sentences, Sentence("s2", "x")],
        passages=types.SimpleNamespace(documents=["s0", "s1", "s2", "s1"]),
    )
    run = types.SimpleNamespace(corpus=corpus)
    assert counterfactual._unit_names(run, "relation") == [None, "r", None, "r"]
    assert counterfactual._unit_names(run, "subject") == [None, "s", None, "s"]


def test_any_field_of_the_sentences_is_a_unit(tmp_path):
    """Guards: a bank whose units are those that the file had before."""

    def write(sources):
        lines = [
            json.dumps({"sentence_id": f"s{i}", "text": f"text {i}", "source": source})
            for i, source in enumerate(sources)
        ]
        (tmp_path / "s.jsonl").write_text("\n".join(lines))

    config = defaults.get_config()
    config.counterfactual.unit = "source"
    with pytest.raises(ValueError, match="unknown counterfactual.unit='source'; use passage,"):
        counterfactual.check(config)
    config.data.sentences = str(tmp_path / "s.jsonl")
    counterfactual.check(config)
    corpus = types.SimpleNamespace(
        passages=types.SimpleNamespace(documents=["s2", "s0", "s1", "s0"]),
        fingerprint={"corpus": "c", "queries": "q"},
    )
    trained = types.SimpleNamespace(fingerprint="t", step=3)
    run = types.SimpleNamespace(config=config, corpus=corpus, trained=trained)
    write(["web", "book", "web"])
    assert counterfactual._unit_names(run, "source") == ["web", "web", "book", "web"]
    before = counterfactual._identity(run, 0)
    assert counterfactual._identity(run, 0) == before
    write(["web", "book", "book"])
    assert counterfactual._identity(run, 0) != before
    (tmp_path / "s.jsonl").write_text('{"sentence_id": "s0", "text": "x"}\n')
    with pytest.raises(ValueError, match="s.jsonl.*source"):
        counterfactual._unit_names(run, "source")


def test_checkpoints_on_the_way_are_some_of_those_kept():
    """Guards: a training of four steps, with one state on the way for two checkpoints."""
    steps_of = checkpoints.steps_before_last
    assert steps_of(range(6, 48, 6), 3) == [18, 36]
    assert steps_of(range(2, 4, 2), 3) == [2]
    assert steps_of(range(1, 1), 3) == [] and steps_of(range(1, 9), 1) == []


@pytest.mark.slow
def test_a_bank_sums_over_the_checkpoints_that_its_config_asks_for(tmp_path):
    """Mistake: other steps, and other figures, where another config had saved some before."""
    keys = {"counterfactual.epochs": 8.0, "counterfactual.subsets": 1, "counterfactual.orders": 1}
    for count in (3, 2):
        config = make_config(tmp_path, **keys, **{"several.checkpoints": count})
        with progress.hidden():
            retrained = counterfactual.retrain(stages.prepare(config, Workdir(tmp_path / "w")))
        steps, stride = retrained.trainings[0].steps, retrained.reverse.stride
        before_last = checkpoints.steps_before_last(range(stride, steps, stride), count)
        assert len(before_last) == count - 1
        assert checkpoints.steps_of(retrained.run, ALL_METHODS["tracin"]) == [*before_last, steps]


def test_the_engine_of_the_run_computes_retrainings(tmp_path, monkeypatch):
    monkeypatch.setattr(counterfactual, "_identity", lambda run, order: {})
    engine, config = array_tasks.Preparation(), defaults.get_config()
    run = type("Run", (), {"config": config, "engine": engine})
    retrained = counterfactual.Retrained(run, [None], None, None, [], {}, tmp_path)
    assert retrained.retraining().groups.engine is engine


@pytest.mark.parametrize(
    ("unit", "units", "names"),
    [
        ("passage", [0, 1, 2], ["a", "b (part 1)", "b (part 2)"]),
        ("document", ["a", "b"], ["a", "b"]),
    ],
)
def test_a_bank_names_its_columns(tmp_path, unit, units, names):
    """So that scores from elsewhere can be held against it."""
    config = defaults.get_config()
    config.counterfactual.unit = unit
    corpus = types.SimpleNamespace(
        passages=types.SimpleNamespace(ids=["a", "b (part 1)", "b (part 2)"]),
        queries=[types.SimpleNamespace(fact_id="f7")],
    )
    run = types.SimpleNamespace(config=config, corpus=corpus)
    bank = Bank(np.zeros((4, len(units)), bool), np.ones((4, 1)), np.ones(1))
    trainings, workdir = [types.SimpleNamespace(steps=5)], Workdir(tmp_path)
    retrained = counterfactual.Retrained(run, trainings, None, None, units, {0.5: [bank]}, workdir)
    counterfactual.write_bank(retrained, {})
    manifest = json.loads((tmp_path / "bank.json").read_text())
    assert manifest["unit names"] == names and manifest["query names"] == ["f7"]


def test_modes_that_disagree_for_one_query_are_refused(monkeypatch):
    """Guards: a batched derivative that is right for the first query and wrong for another."""
    config = defaults.get_config()
    retrained = counterfactual.Retrained(
        type("Run", (), {"config": config}), [None], None, None, [], {}, None
    )
    by_token = np.random.default_rng(0).normal(size=(3, 20)).astype(np.float32)

    class Forward:
        def __init__(self, *arguments):
            pass

        def along(self, direction):
            return -by_token @ direction * factors

    monkeypatch.setattr(counterfactual, "Forward", Forward)
    factors = np.ones(3)
    assert counterfactual.check_modes_agree(retrained, by_token) < 1e-5
    factors = np.array([1, 1, 1.05])
    with pytest.raises(counterfactual.DisagreementError, match="query 2: reverse and forward"):
        counterfactual.check_modes_agree(retrained, by_token)


def test_a_full_ranking_is_turned_back_into_scores():
    rows, scores = np.array([[2, 0, 1]]), np.array([[0.75, 0.5, -1.0]], np.float32)
    ranked = Ranked.of_proponents(rows, scores)
    np.testing.assert_array_equal(bank_rankings.all_scores(ranked, 3), [[0.5, -1.0, 0.75]])
    with pytest.raises(ValueError, match="the ranking has 3 of 4 passages"):
        bank_rankings.all_scores(ranked, 4)
    with pytest.raises(ValueError, match="needs the score of each"):
        bank_rankings.all_scores(Ranked.of_proponents(rows - 1, scores), 3)


def test_the_board_is_sorted_and_has_a_column_for_each_fraction_and_order():
    def lds(x):
        shares = ("0.5", "0.005")
        return {f: {"same order": dict(mean=x, low=x - 0.1, high=x + 0.1)} for f in shares}

    record = {
        "methods": {
            "a": {"title": "A", "cost": None, "lds": lds(0.2)},
            "c": {"title": "C", "cost": None, "lds": lds(float("nan"))},
            "b": {"title": "B", "cost": 2.345, "lds": lds(0.7)},
        },
        "ceilings": {"0.005": {"agreement": 0.5, "one": 0.7, "mean": 0.8, "orders": 2}},
        "banks": {"0.005": {"sd of changes": 0.1234}, "0.5": {"sd of changes": 2.0}},
        "queries": 3, "units": 4, "unit": "document", "steps": 5,
        "seconds of a training": 1.0, "metasmoothness": 0.9,
    }  # fmt: skip
    b = record["methods"]["b"]
    b["tail_patch"] = dict(mean=0.0123, low=0.01, high=0.02)
    record["agreements"] = {"0.005": {"mrr": 0.5, "tail_patch": -0.25}, "0.5": {}}
    b["lds"]["0.005"]["same order, less A's"] = dict(mean=0.5, low=0.4, high=0.6)
    lines = board_report.describe(record).splitlines()
    assert "share of 4 documents" in lines[1] and "mean over 3 queries" in lines[2]
    assert lines[4] == "| method | LDS 0.5%, same order | LDS 50%, same order | tail-patch | cost |"
    ends = "0.700 [0.600, 0.800] | 0.700 [0.600, 0.800] | +1.23% [+1.00%, +2.00%]"
    assert lines[6] == f"| B | {ends} | 2.3 |"
    assert lines[7] == "| A | 0.200 [0.100, 0.300] | 0.200 [0.100, 0.300] |  |  |"
    # A method without a figure is the last, not between the others.
    assert lines[8] == "| C |  |  |  |  |"
    # Of the baseline there is no difference.
    assert lines[12:16] == ["| method | LDS 0.5%, same order, less A's |", "|---|---:|",
                            "| B | 0.500 [0.400, 0.600] |", ""]  # fmt: skip
    assert lines[-4].startswith("Without 0.5% a query's loss changes by 0.123 nats (")
    assert lines[-3].startswith("Without 50% a query's loss changes by 2.000 nats (")
    assert (
        "without 0.5%: agreement 0.500; ceilings 0.700 (one order), 0.800 (mean of 2)" in lines[-2]
    )
    assert lines[-1].endswith(
        "with LDS at 0.5% on the order of the methods (Spearman): MRR 0.50, tail-patch -0.25."
    )
    # On a terminal, in aligned columns that fit it.
    lines = board_report.summarise(record).splitlines()
    assert lines[4] == "method  LDS 0.5%, same order [95%]  50%, same order  cost"
    assert lines[5] == "B             0.700 [0.600, 0.800]            0.700   2.3"
    assert max(map(len, lines)) < 120
