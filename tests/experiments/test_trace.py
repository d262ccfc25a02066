"""`experiments.trace` from end to end on a corpus of a few sentences, and on bad input."""

import collections
import copy
import dataclasses
import importlib.util
import json
import os
import shutil
import signal
import subprocess
import sys
import time
import types

import numpy as np
import pytest

from configs import world_facts
from tda import results
from tda import store as stores
from tda.data import tokens
from tda.data.jsonl import RecordError
from tda.data.rows import Question
from tda.encoding import table
from tda.evaluation.likelihood import Likelihood
from tda.live import finished_run
from tda.methods import METHODS, GradientKind
from tda.reports import tables
from tda.retrieval import annotated, bm25, exact
from tda.retrieval.ranked import Ranked
from tda.run import corpus, defaults, evaluate, measures, moments, questions, stages, train
from tda.run import encode as encoding_stage
from tda.run.workdir import Workdir, WorkdirError
from tda.runtime import metrics, progress
from tda.runtime.directories import DirectoryError
from tda.training import checkpoint, loop
from tda.viewer.notes import TYPES
from tda.viewer.release import release

CAPITALS = {"France": "Paris", "Norway": "Oslo", "Italy": "Rome", "Spain": "Madrid"}

CORRECTED = GradientKind(corrected=True)


def records():
    """Sentences that state four facts twice, and some that state none."""
    sentences, facts = [], []
    for i, (country, capital) in enumerate(CAPITALS.items()):
        uris = dict(entity0_uri=f"c:{i}", predicate_uri="P36", entity1_uri=f"t:{i}")
        triple = dict(fact_id=f"f{i}", entity0=country, entity1=capital, **uris)
        for text in (f"The capital of {country} is {capital}.", f"{capital} governs {country}."):
            name = f"s{len(sentences):02}"
            sentences.append({"sentence_id": name, "text": text, "fact_triples": [triple]})
        sentences.append({"sentence_id": f"d{i}", "text": f"It rains in {country} all day long."})
        facts.append(
            {
                "fact_id": f"f{i}",
                "entity0": country,
                "relation": "capital",
                "entity1": capital,
                **uris,
                "prompt0": f"The capital of {country} is",
                "trex_sentences": [sentences[-3]["sentence_id"], sentences[-2]["sentence_id"]],
            }
        )
    return sentences, facts


def write(path, items):
    path.write_text("".join(json.dumps(i) + "\n" for i in items))
    return str(path)


def make_config(tmp_path, sentences=None, facts=None):
    good_sentences, good_facts = records()
    c = defaults.get_config()
    c.data.sentences = write(
        tmp_path / "s.jsonl", good_sentences if sentences is None else sentences
    )
    c.data.facts = write(tmp_path / "f.jsonl", good_facts if facts is None else facts)
    c.tokenizer.vocab_size = 300
    c.model.context = 32
    c.train.epochs = 6.0
    c.train.tokens_per_batch = 256
    c.train.warmup = 2
    c.train.save_every = 2
    c.projection.side = 4
    c.projection.blocks = 2
    c.eval.tail_patch_queries = 2
    c.mesh.data = -1
    return c


def without_labels(config, path):
    """A copy of a config whose corpus is the texts in two files, asked by prompts and targets."""
    sentences, facts = records()
    config = copy.deepcopy(config)
    (path / "documents").mkdir(parents=True)
    for name, part in (("a.jsonl", sentences[:5]), ("b.jsonl", sentences[5:])):
        documents = [{"id": s["sentence_id"], "text": s["text"]} for s in part]
        write(path / "documents" / name, documents)
    queries = [{"id": f["fact_id"], "prompt": f["prompt0"], "target": f["entity1"]} for f in facts]
    config.data.sentences = config.data.facts = ""
    config.data.corpus = str(path / "documents")
    config.data.queries = write(path / "q.jsonl", queries)
    return config


@pytest.fixture(scope="module")
def finished(tmp_path_factory):
    """A finished run: its config, its workdir and its metrics."""
    path = tmp_path_factory.mktemp("trace")
    config = make_config(path)
    config.judge.name, config.metrics.writers = "lexical", "tensorboard"
    return config, path / "w", stages.trace(config, Workdir(path / "w"))[0]


def test_writes_what_it_promises(finished):
    _, path, metrics = finished
    assert list(metrics) == ["trackstar", "grad_cos", "grad_dot", "bm25"]
    assert json.loads((path / "metrics.json").read_text()) == metrics
    for name, m in metrics.items():
        assert 0 < m["mrr"] <= 1 and 0 <= m["recall_at_10"] <= 1 and m["n_queries"] == 4
        assert np.isfinite(m["tail_patch"])
        found = list(results.read(path / "results" / f"{name}.jsonl"))
        assert [r["example_id"] for r in found] == ["f0", "f1", "f2", "f3"]
        assert len(found[0]["proponents"]) == 10
        texts = {s["text"] for s in records()[0]}
        assert all(p in texts for r in found for p in r["proponents"])
        scores = found[0]["proponent_scores"]
        assert scores == sorted(scores, reverse=True)
    assert metrics["bm25"]["mrr"] == 1.0
    assert "TrackStar" in (path / "table.md").read_text()


def test_metrics_are_in_event_files_too(finished):
    config, path, table = finished
    scalars: dict = collections.defaultdict(dict)
    for folder in (path / "tensorboard").rglob("*"):
        for event in metrics.TensorBoard.read_events(folder):
            for value in event.summary.value:
                scalars[value.tag][event.step] = value.simple_value
    losses = {r["step"]: r["loss"] for r in map(json.loads, open(path / "train.jsonl"))}
    assert losses and scalars["train/loss"] == pytest.approx(losses)
    rate = train.learning_rates(config, max(losses) + 1)
    assert scalars["train/learning_rate"] == pytest.approx({s: float(rate(s)) for s in losses})
    assert all(x > 0 for x in scalars["train/tokens_per_second"].values())
    assert any(t.startswith("progress/encode_") and "tokens_per_second" in t for t in scalars)
    for name, m in table.items():
        for figure in ("mrr", "recall_at_10", "tail_patch"):
            tag, (low, high) = f"table/{figure}/{name}", m["intervals"][figure]
            values = [next(iter(scalars[f"{tag}{end}"].values())) for end in ("", "/low", "/high")]
            assert values == pytest.approx([m[figure], low, high])


@pytest.mark.slow
def test_a_corpus_without_labels_is_traced_as_one_with_labels(finished, tmp_path):
    labelled, expected, _ = finished
    config = without_labels(labelled, tmp_path)
    config.methods, config.eval.samples, config.judge.name = "trackstar,bm25", 0, ""
    path = tmp_path / "w"
    metrics, _ = stages.trace(config, Workdir(path))
    judged = ("proponent_correct", "has_trex_sentence", "c4_frequency", "c4_frequency_bucket")
    judged += ("first_correct_rank", "first_strict_rank", "relation", "8b_generations")
    judged += ("proponent_ais_scores", "proponent_ais_best_windows", "target_prior_nats")
    judged += ("proponent_kinds",)
    for name in ("trackstar", "bm25"):
        records, others = (results.read(w / "results" / f"{name}.jsonl") for w in (path, expected))
        for record, other in zip(records, others, strict=True):
            assert record == {
                k: v for k, v in other.items() if k not in (*judged, "8b_confidence")
            } | {"relation": "", "query_set": "q"}
        assert not [key for key in metrics[name] if key.startswith(("mrr", "recall"))]
        assert np.isfinite(metrics[name]["tail_patch"]) and "by_content" not in metrics[name]
    table = (path / "table.md").read_text()
    assert "has no labels" in table and "MRR |" not in table and "–" not in table
    # Nothing but the workdir and the queries is needed to ask it.
    shutil.rmtree(config.data.corpus)
    live, name = finished_run.LiveRun(path), "trackstar"
    assert live.describe(progress.silent)["passages"] == 12
    chosen = {n: METHODS[n] for n in ("trackstar", "length")}
    asked = live.records(
        Question("", "The capital of Norway is", "Oslo"), chosen, 10, progress.silent
    )
    record = list(results.read(path / "results" / f"{name}.jsonl"))[1]
    assert asked[name]["proponent_ids"] == record["proponent_ids"]
    assert "proponent_correct" not in asked[name]


@pytest.mark.slow
def test_limits_hold_in_every_stage(tmp_path):
    """Mistakes: the option to limit rows ignored by one stage."""
    config = make_config(tmp_path)
    config.methods = "trackstar,grad_cos,bm25"
    config.data.n_sentences, config.data.n_queries, config.eval.queries = 7, 3, 2
    metrics = stages.trace(config, Workdir(tmp_path / "w"))[0]
    data = corpus.load(config, Workdir(tmp_path / "w"))
    kept = set(data.passages.ids)
    assert len(kept) == len(data.passages) == 7 and len(data.queries) == 3
    for kind, rows in (("corpus", 7), ("queries", 3)):
        for path in (tmp_path / "w" / "stores").glob(f"{kind}-*"):
            assert stores.open_store(path).rows == rows
    for name, m in metrics.items():
        assert m["n_queries"] == 2 and m["n_tail_patch_queries"] == 2
        found = list(results.read(tmp_path / "w" / "results" / f"{name}.jsonl"))
        assert len(found) == 2
        for r in found:
            assert set(r["proponent_ids"]) == kept and len(r["proponent_ids"]) == 7


def test_marks_and_ranks_are_those_of_the_labels(finished):
    _, path, metrics = finished
    stating = {f["fact_id"]: f["trex_sentences"] for f in records()[1]}
    for name in metrics:
        for r in results.read(path / "results" / f"{name}.jsonl"):
            marks = [p in stating[r["example_id"]] for p in r["proponent_ids"]]
            assert r["proponent_correct"] == marks
            # Of the 12 passages ten are proponents.
            assert r["first_correct_rank"] == marks.index(True) + 1 if any(marks) else 11


def test_a_judge_reads_the_proponents(finished):
    config, path, metrics = finished
    for name, m in metrics.items():
        found = list(results.read(path / "results" / f"{name}.jsonl"))
        names = [(f["entity0"], f["entity1"]) for f in records()[1]]
        for record, both in zip(found, names, strict=True):
            # Of sentences so short each is one window, and states a fact if it names both.
            states = [all(n in text for n in both) for text in record["proponents"]]
            assert [s > 0.5 for s in record["proponent_ais_scores"]] == states
            assert record["proponent_ais_best_windows"] == record["proponents"]
        marks = np.array([r["proponent_ais_scores"] for r in found]) > 0.5
        first = [1 / (1 + np.argmax(row)) if row.any() else 0 for row in marks]
        assert m["ais_mrr"] == pytest.approx(np.mean(first))
        assert m["ais_recall_at_10"] == np.mean(marks.any(1))
        assert m["ais_precision_at_10"] == pytest.approx(np.mean(marks)) and m["judge"]
        # The same proponents by type: the judge's share of statements, and all ranks together.
        kinds = [kind for record in found for kind in record["proponent_kinds"]]
        shares = {title: kinds.count(key) / len(kinds) for key, title in TYPES.items()}
        assert shares["states the fact"] == pytest.approx(m["ais_precision_at_10"])
        for title, by_kind in m["by_kind"].items():
            assert by_kind["share"] == pytest.approx(shares[title])
            assert np.mean(by_kind["by_rank"]) == pytest.approx(shares[title])
    assert metrics["bm25"]["ais_mrr"] == 1
    assert metrics["bm25"]["differences"]["trackstar"]["ais_mrr"]["low"] is not None
    told = (path / "table.md").read_text()
    assert "## What the proponents say, by judge and rule\n" in told
    if importlib.util.find_spec("matplotlib"):
        assert (path / "kinds.png").stat().st_size and (path / "kinds_by_rank.svg").exists()
    assert "| AIS-MRR |" in told and "the judge lexical, which reads it in windows of 3" in told


def test_a_finished_run_is_released(finished, tmp_path):
    config, path, metrics = finished
    release(str(path), str(tmp_path))
    names = {p.name.removesuffix(".jsonl.gz") for p in (tmp_path / "results").iterdir()}
    assert names == set(metrics)
    card = (tmp_path / "README.md").read_text()
    assert "adam, learning rate" in card and "epochs: 6" in card and "`proponent_kinds`" in card
    assert config.data.sentences not in (tmp_path / "config.json").read_text()


def test_metrics_of_queries_groups_and_methods(finished):
    config, path, metrics = finished
    means = {}
    for name, m in metrics.items():
        found = list(results.read(path / "results" / f"{name}.jsonl"))
        ranks = np.array([r["first_correct_rank"] for r in found])
        assert m["mrr"] == pytest.approx(np.mean(1 / ranks))
        assert m["mrr_at_10"] == pytest.approx(np.mean(np.where(ranks <= 10, 1 / ranks, 0)))
        assert m["counts"]["mrr"] == 4 and m["counts"]["tail_patch"] == 2
        low, high = m["intervals"]["mrr"]
        assert low <= m["mrr"] <= high
        patched = [r["proponent_tail_patch"] for r in found if "proponent_tail_patch" in r]
        assert len(patched) == 2
        for k in (1, 3, 5, 10):
            by_hand = np.mean([p[:k] for p in patched])
            assert m[f"tail_patch_at_{k}"] == pytest.approx(by_hand, rel=1e-9)
        assert m["tail_patch"] == m["tail_patch_at_10"] != m["tail_patch_log"]
        for key in ("tail_patch", "tail_patch_log"):
            assert m[f"{key}_control"] != 0
            assert m[f"{key}_net"] == pytest.approx(m[key] - m[f"{key}_control"])
        assert m["by_relation"]["capital"]["mrr"] == pytest.approx(m["mrr"])
        assert [r["c4_frequency"] for r in found] == [2, 2, 2, 2]
        assert list(m["by_frequency"]) == ["1 to 9"] == [found[0]["c4_frequency_bucket"]]
        stated = [r["is_8b_correct"] for r in found]
        assert m["n_stated"] == sum(stated) == sum(r["target_rank"] == 1 for r in found)
        assert sum(g["n_queries"] for g in m["by_stated"].values()) == 4
        means[name] = m["mrr"]
        said = m["by_content"]
        states = np.mean([np.mean(r["proponent_correct"]) for r in found])
        assert said["states the fact"]["share"] == pytest.approx(states)
        assert sum(kind["share"] for kind in said.values()) == pytest.approx(1)
        of_steps = sum(
            kind["tail_patch"] * kind["n_tail_patches"]
            for kind in said.values()
            if kind["n_tail_patches"]
        )
        assert of_steps == pytest.approx(np.sum(patched), abs=1e-12)
    for name, other in ((a, b) for a in means for b in means if a != b):
        difference = metrics[name]["differences"][other]["mrr"]["difference"]
        assert difference == pytest.approx(means[name] - means[other], abs=1e-12)
    told = (path / "table.md").read_text()
    for title in ("95% intervals", "Difference to TrackStar", "by depth", "MRR by relation"):
        assert f"## {title}" in told or f"{title}\n" in told


def test_a_targets_prior_is_its_mean_after_other_subjects(finished):
    config, path, metrics = finished
    run = stages.prepare(config, Workdir(path))
    facts = run.corpus.queries
    pairs = [(a, b) for a in range(4) for b in range(4) if a != b]
    swapped = tokens.tokenise_queries(
        [(f"{a} {b}", facts[b].prompt0, facts[a].entity1) for a, b in pairs],
        run.corpus.tokenizer, config.model.context,
    )  # fmt: skip
    nats = Likelihood(run.trained.model, run.unsharded_layout)(swapped).nats
    found = list(results.read(path / "results" / "bm25.jsonl"))
    for a, record in enumerate(found):
        by_hand = np.mean([x for x, pair in zip(nats, pairs, strict=True) if pair[0] == a])
        assert record["target_prior_nats"] == pytest.approx(by_hand, rel=1e-4)
    beyond = [r["target_prior_nats"] - r["target_nats"] for r in found]
    names = [
        ("knows" if x >= 1 else "guesses") if r["is_8b_correct"] else "does not state"
        for x, r in zip(beyond, found, strict=True)
    ]
    groups = metrics["bm25"]["by_prior"]
    assert {n: g["n_queries"] for n, g in groups.items()} == dict(collections.Counter(names))
    said = metrics["bm25"]["by_content"]["states the fact"]["by_prior"]
    for group in groups:
        of_group = [r for r, name in zip(found, names, strict=True) if name == group]
        by_hand = np.mean([np.mean(r["proponent_correct"]) for r in of_group])
        assert said[group] == pytest.approx(by_hand)
    without = config.copy_and_resolve_references()
    without.eval.prior_prompts = 0
    assert measures.priors(dataclasses.replace(run, config=without), [0]) == {}


def test_known_facts_are_shown_first(finished, monkeypatch):
    """Guards: examples of facts that the model guesses or does not state, where it knows others."""
    config, path, _ = finished
    run = stages.prepare(config, Workdir(path))
    prompts = [f.prompt0 for f in run.corpus.queries]
    for known in ([0, 1, 3], [1, 2, 3]):
        knowledge = np.array([0 if q in known else 1 + q % 2 for q in range(4)])
        monkeypatch.setattr(measures, "knowledge", lambda run, queries, k=knowledge: k[queries])
        text = stages.examples(run, {})
        assert [p for p in prompts if f"{p} →" in text] == [prompts[q] for q in known]


def test_a_model_with_choices_is_asked_which_it_prefers(finished, tmp_path, capsys):
    config, path, _ = finished
    run = stages.prepare(config, Workdir(path))
    facts = run.corpus.queries
    others = {0: facts[1:3], 2: facts[3:]}
    chosen_from = [
        dataclasses.replace(f, other_choices=tuple(o.entity1 for o in others.get(q, ())))
        for q, f in enumerate(facts)
    ]
    swapped = tokens.tokenise_queries(
        [(f"{q} {o.fact_id}", facts[q].prompt0, o.entity1) for q in others for o in others[q]],
        run.corpus.tokenizer, config.model.context,
    )  # fmt: skip
    a, b, c = Likelihood(run.trained.model, run.unsharded_layout)(swapped).nats
    config = config.copy_and_resolve_references()
    config.eval.update(samples=0, tail_patch_queries=0)
    config.judge.name = ""
    corpus = dataclasses.replace(run.corpus, queries=chosen_from)
    run = dataclasses.replace(run, config=config, corpus=corpus)
    first = Ranked.of_proponents(np.zeros((4, 1), int), np.zeros((4, 1)), {"all": np.ones(4)})
    m = evaluate.evaluate(run, {"bm25": first}, tmp_path)["bm25"]
    records = list(results.read(tmp_path / "results" / "bm25.jsonl"))
    nats = [r["target_nats"] for r in records]
    for q, expected in enumerate(([a, b], None, [c], None)):
        assert records[q].get("other_choice_nats") == (
            expected if expected is None else pytest.approx(expected, rel=1e-4)
        )
    preferred = [nats[0] < min(a, b), nats[2] < c]
    assert m["n_with_choices"] == 2 and m["chosen"] == np.mean(preferred)
    told = f"prefers the right one for {np.mean(preferred):.1%} of 2 queries"
    assert told in capsys.readouterr().out and told in tables.run_table({"bm25": m})
    known = evaluate.Known(
        np.array([1.0, 2.0, 3.0]), np.ones(3), {}, np.zeros(3, int), {0: [0.5, 2.0], 2: [4.0, 5.0]},
        None, np.zeros(0), [], {}, {},
    )  # fmt: skip
    assert known.chosen == 0.5
    # A choice that does not fit is told before anything is trained.
    facts[3] = dataclasses.replace(facts[3], other_choices=("very " * 40,))
    with pytest.raises(ValueError, match=f"query '{facts[3].fact_id}' needs .* positions"):
        questions.tokenise(facts, config, corpus.tokenizer)


def test_the_model_is_asked_for_answers(finished):
    config, path, metrics = finished
    found = list(results.read(path / "results" / "bm25.jsonl"))
    for r in found:
        assert len(r["8b_generations"]) == 20 and len(set(r["8b_generations"])) > 1
        states = [g.startswith(r["groundtruth"]) for g in r["8b_generations"]]
        assert r["8b_confidence"] == pytest.approx(np.mean(states), abs=0.1)
    confidence = np.mean([r["8b_confidence"] for r in found])
    assert metrics["bm25"]["confidence"] == pytest.approx(confidence)


def test_the_tail_patch_step_is_what_it_says(finished):
    config, path, metrics = finished
    (stamp,) = [json.loads((path / "stages" / "train.json").read_text())]
    rule = metrics["bm25"]["tail_patch_rule"]
    steps = stamp["made_from"]["steps"]
    assert rule["optimizer_state"] == "restored" and rule["checkpoint_step"] == steps
    # The schedule ends at a tenth of its peak.
    assert rule["learning_rate"] == pytest.approx(0.1 * config.train.learning_rate)
    (kept,) = path.glob("tail_patch-*.jsonl")
    pairs = [json.loads(line)["key"] for line in kept.read_text().splitlines()]
    assert len(pairs) == len(set(pairs))  # each once, whichever methods found it
    # All 12 passages and the control, for two queries at most.
    assert len(pairs) <= 2 * 13


@pytest.fixture(scope="module")
def loaded(finished):
    """The finished run's stages, to measure more of it."""
    config, path, _ = finished
    return stages.prepare(config, Workdir(path))


def changed(run, config):
    return dataclasses.replace(run, config=config)


@pytest.mark.slow
def test_other_steps_are_other_scores_and_kept_apart(finished, loaded):
    config, path, metrics = finished
    pairs = [(0, 0), (0, measures.CONTROL)]
    usual = measures.tail_patches(loaded, pairs)
    other = config.copy_and_resolve_references()
    # The rate that the rule gives, spelled out, is the same step, and nothing is computed.
    other.eval.tail_patch_learning_rate = metrics["bm25"]["tail_patch_rule"]["learning_rate"]
    assert measures.tail_patches(changed(loaded, other), pairs) == usual
    other.eval.tail_patch_learning_rate *= 10
    faster = measures.tail_patches(changed(loaded, other), pairs)
    effect = {p: x[1] - x[0] for p, x in usual.items()}
    assert abs(faster[0, 0][1] - faster[0, 0][0]) > 3 * abs(effect[0, 0])
    other.eval.tail_patch_state = "fresh"
    fresh = measures.tail_patches(changed(loaded, other), pairs)
    # Without momentum a step with a zero gradient is none; with it, it is one.
    before, after = fresh[0, measures.CONTROL]
    assert after == pytest.approx(before, abs=2e-6) and abs(effect[0, measures.CONTROL]) > 1e-4
    assert fresh[0, 0][0] == pytest.approx(usual[0, 0][0]) and fresh[0, 0] != faster[0, 0]
    assert len(list(path.glob("tail_patch-*.jsonl"))) == 3


def test_a_step_that_diverges_is_told_and_not_kept(finished, loaded, monkeypatch):
    config, path, _ = finished
    other = config.copy_and_resolve_references()
    other.eval.tail_patch_learning_rate = 1e30

    def diverge(*args, on_done, **kwargs):
        on_done(np.array([1]), np.array([[-1.0, np.nan]]))

    monkeypatch.setattr(measures, "TailPatch", lambda *_: diverge)
    with pytest.raises(FloatingPointError, match="passage 's00' .* query 'f0'.*lower .*1e\\+30"):
        measures.tail_patches(changed(loaded, other), [(0, 0), (0, 1)])
    rule = measures.step_rule(changed(loaded, other))
    rule = measures.fingerprint(loaded.checkpoint | {"rule": rule})
    assert not (path / f"tail_patch-{rule}.jsonl").exists()


def test_a_step_of_no_length_is_refused(finished, loaded):
    """Mistakes: tail-patch 0 of every method, where the schedule has come to its end."""
    config = finished[0].copy_and_resolve_references()
    config.train.final = 0.0
    with pytest.raises(ValueError, match="ends at 0; give eval.tail_patch_learning_rate"):
        measures.step_rule(changed(loaded, config))
    config.eval.tail_patch_learning_rate = 1e-4
    assert measures.step_rule(changed(loaded, config))["learning_rate"] == 1e-4


def test_an_evaluation_that_is_broken_off_leaves_no_metrics(
    finished, loaded, tmp_path, monkeypatch
):
    """Else a viewer would take what it wrote over for the earlier one's."""
    config, path, metrics = finished
    data = loaded.corpus
    ranked = {n: annotated.ranked(data.prompts.ids, data.correct["all"]) for n in ("a", "b")}
    arguments = loaded, ranked, tmp_path / "own"
    evaluate.evaluate(*arguments)
    assert (tmp_path / "own" / "metrics.json").exists()
    write = evaluate.results.write

    def torn(file, records):
        if file.stem == "b":
            raise OSError("No space left")
        write(file, records)

    monkeypatch.setattr(evaluate.results, "write", torn)
    with pytest.raises(OSError):
        evaluate.evaluate(*arguments)
    assert not (tmp_path / "own" / "metrics.json").exists()


def test_annotated_sentences_are_measured_without_ranks(finished, loaded, tmp_path):
    config, path, metrics = finished
    data = loaded.corpus
    found = annotated.ranked(data.prompts.ids, data.correct["all"])
    own = evaluate.evaluate(loaded, {"annotated": found}, tmp_path / "own")["annotated"]
    records = list(results.read(tmp_path / "own" / "results" / "annotated.jsonl"))
    assert all(len(r["proponents"]) == 2 and all(r["proponent_correct"]) for r in records)
    patched = [r["proponent_tail_patch"] for r in records if "proponent_tail_patch" in r]
    assert own["tail_patch"] == pytest.approx(np.mean(patched)) and own["mrr"] is None
    assert json.loads((path / "metrics.json").read_text()) == metrics  # the run's own are left


def test_a_checkpoint_within_the_training_is_traced(finished, loaded, tmp_path):
    config, path, _ = finished
    last = loaded.trained.step
    early = config.copy_and_resolve_references()
    early.train.traced = 0.5
    with pytest.raises(ValueError, match="train.traced=0.5 asks for.*keep=0"):
        train.train(early, loaded.corpus, Workdir(path))
    early.train.traced = 0.0
    with pytest.raises(ValueError, match="above 0"):
        stages.check(early)
    early.train.keep, early.train.traced = 0, 0.5
    workdir = Workdir(tmp_path / "w")
    data = corpus.load(early, workdir)
    trained = train.train(early, data, workdir)
    assert abs(trained.step - last / 2) <= 1
    early.train.traced = 1.0
    whole = train.train(early, data, workdir)
    assert whole.step == last and whole.fingerprint == trained.fingerprint
    kernel = [np.asarray(t.model.final_norm.scale[...]) for t in (trained, whole, loaded.trained)]
    assert not np.array_equal(kernel[0], kernel[1])
    np.testing.assert_array_equal(kernel[1], kernel[2])


def test_a_second_run_computes_nothing_again(finished, monkeypatch):
    config, path, metrics = finished

    def fail(*args, **kwargs):
        raise AssertionError("computed again")

    for module, name in (
        (loop, "fit"),
        (table, "encode_kinds"),
        (exact.ExactSearch, "rank"),
        (bm25.Index, "search"),
        (measures, "TailPatch"),
        (measures, "Sampler"),
        (measures, "Likelihood"),
    ):
        monkeypatch.setattr(module, name, fail)
    assert stages.trace(config, Workdir(path))[0] == metrics


def test_another_projection_goes_beside_the_old_one(finished, monkeypatch):
    config, path, _ = finished
    config = config.copy_and_resolve_references()
    config.projection.seed = 1
    config.methods = "grad_cos"
    monkeypatch.setattr(loop, "fit", None)
    before = set(os.listdir(path / "stores"))
    stages.trace(config, Workdir(path))
    assert before < set(os.listdir(path / "stores"))


def test_another_model_size_in_the_same_workdir_is_refused(finished):
    config, path, _ = finished
    config = config.copy_and_resolve_references()
    config.model.size = "small"
    with pytest.raises(WorkdirError, match="train differs in\n  model.size: tiny → small\nuse"):
        stages.trace(config, Workdir(path))


def test_a_checkpoint_without_optimizer_state_is_refused(finished, tmp_path, monkeypatch):
    config, path, _ = finished
    config = config.copy_and_resolve_references()
    run = stages.prepare(config, Workdir(path))
    trained = run.trained
    _, params = train.functional.split(trained.model)
    checkpoint.save(tmp_path / "bare", trained.step, {"params": params}, {})
    bare = dataclasses.replace(
        run,
        workdir=Workdir(tmp_path / "w"),
        trained=dataclasses.replace(trained, root=str(tmp_path / "bare"), fingerprint={}),
    )
    config.gradients.second_moments = "optimizer"
    with pytest.raises(checkpoint.CheckpointError, match="has no optimizer state"):
        encoding_stage.encode(bare, CORRECTED)
    assert not (tmp_path / "w" / "stores").exists()
    # Unless asked for, they are estimated, and the store says so.
    config.gradients.second_moments = "auto"
    config.gradients.estimate_batches = 2
    store, queries = encoding_stage.encode(bare, CORRECTED)
    made = store.manifest["fingerprint"]["second_moments"]
    assert made["estimated from batches"] == 2
    exact, _ = encoding_stage.encode(run, CORRECTED)
    assert exact.manifest["fingerprint"]["second_moments"] == "optimizer"
    assert not np.allclose(store.read([0]), exact.read([0])) and np.isfinite(queries).all()
    # And not again for stores that are there.
    monkeypatch.setattr(moments.estimate, "estimate", None)
    again, _ = encoding_stage.encode(bare, CORRECTED)
    np.testing.assert_array_equal(again.read([0]), store.read([0]))


@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        (lambda s, f: ([*s[:3], {"sentence_id": "x"}], f), RecordError, "s.jsonl, line 4.*'text'"),
        (lambda s, f: ([s[0], s[0] | {"text": " "}], f), RecordError, "s.jsonl, line 2.*text"),
        (lambda s, f: ([], f), ValueError, "s.jsonl.*no records"),
        (lambda s, f: (s[1:], f), RecordError, "f0.*s00"),
        (lambda s, f: (s, [f[0] | {"entity1": " "}]), ValueError, "entity1|target"),
        (
            lambda s, f: (s, [f[0] | {"prompt0": "on and on " * 40}]),
            ValueError,
            "'f0' needs .* positions, the context has 32",
        ),
    ],
    ids=[
        "broken line",
        "empty text",
        "empty corpus",
        "absent sentence",
        "no target",
        "long prompt",
    ],
)
def test_bad_input_is_told_and_nothing_is_trained(tmp_path, change, error, message):
    config = make_config(tmp_path, *change(*records()))
    with pytest.raises(error, match=message):
        stages.trace(config, Workdir(tmp_path / "w"))
    assert not (tmp_path / "w" / "model" / "checkpoints").exists()
    assert not (tmp_path / "w" / "results").exists()


def test_a_torn_line_is_named(tmp_path):
    config = make_config(tmp_path)
    with open(config.data.sentences, "a") as out:
        out.write('{"sentence_id": "t", "te')
    with pytest.raises(ValueError, match="s.jsonl, line 13"):
        stages.trace(config, Workdir(tmp_path / "w"))


def test_an_unknown_method_is_told_before_anything_is_read(tmp_path):
    config = make_config(tmp_path)
    config.methods = "trackstar,exp9"
    config.data.sentences = "/nowhere"
    with pytest.raises(ValueError, match="unknown method 'exp9'"):
        stages.trace(config, Workdir(tmp_path / "w"))


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({}, "/nowhere: no such file"),
        ({"eval.top_k": 0}, "eval.top_k=0 must be 1 or more"),
        ({"model.size": "huge"}, "unknown model size 'huge'; there are micro, tiny, mini"),
        ({"gradients.correction": "adams"}, "unknown correction 'adams'; use"),
        ({"eval.frequency_edges": "1,x"}, "eval.frequency_edges='1,x' must be rising whole"),
        ({"eval.frequency_edges": "10,1"}, "eval.frequency_edges='10,1' must be rising whole"),
        ({"curvature.damping": 0.0}, "curvature.damping=0.0 must be above 0"),
        ({"eval.tail_patch_state": "warm"}, "tail_patch_state='warm'; use restored or fresh"),
        ({"train.final": 0.0}, "ends at 0; give eval.tail_patch_learning_rate"),
        (
            {"train.final": 0.0, "train.schedule": "linear"},
            "ends at 0; give eval.tail_patch_learning_rate",
        ),
    ],
)
def test_what_the_config_alone_tells_is_told_before_anything_is_read(tmp_path, changes, message):
    config = make_config(tmp_path)
    config.update_from_flattened_dict({"data.sentences": "/nowhere"} | changes)
    with pytest.raises((ValueError, FileNotFoundError), match=message):
        stages.trace(config, Workdir(tmp_path / "w"))


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"hessian.component": 17}, "R_eval of 4 queries has no direction at component 17"),
        ({"hessian.evaluation": "leave_one_out", "data.n_queries": 1}, "there is one query"),
        ({"hessian.evaluation": "disjoint", "hessian.component": 9}, "R_eval of 2 queries has no"),
        ({"gradients.include": "nothing"}, "nothing"),
        ({"projection.blocks": 9}, "blocks=9 exceeds the model's 4 layers"),
        ({"train.warmup": 99}, "train.warmup=99 is longer than the training of 12 steps"),
        ({"train.traced": 0.5}, "train.traced=0.5 asks for.*kept are of steps 12; .*keep=0"),
    ],
)
def test_what_the_corpus_tells_is_told_before_training(tmp_path, monkeypatch, changes, message):
    """Mistakes: checks after hours of work that could stand before it."""
    config = make_config(tmp_path)
    config.methods = "trackstar"
    config.update_from_flattened_dict(changes)
    monkeypatch.setattr(loop, "fit", None)
    with pytest.raises(ValueError, match=message):
        stages.trace(config, Workdir(tmp_path / "w"))
    assert not (tmp_path / "w" / "stages" / "train.json").exists()


def test_a_context_beyond_the_table_of_positions_is_refused(monkeypatch):
    config = defaults.get_config()
    config.model.pretrained = "gpt2"
    arguments = {"vocab_size": 9, "max_positions": 64}
    model = types.SimpleNamespace(arguments=arguments)
    monkeypatch.setattr(train.pretrained, "inspect", lambda name: model)
    with pytest.raises(
        ValueError, match="model.context=128 is more than the 64 positions that gpt2"
    ):
        train.model_arguments(config)
    config.model.context = 64
    assert train.model_arguments(config)["max_positions"] == 64


@pytest.mark.parametrize(
    "changes",
    [
        {"eval.tail_patch_queries": 0},
        {"eval.tail_patch_learning_rate": 1e-3},
        {"train.schedule": "constant"},
        {"train.traced": 0.5},
    ],
)
def test_a_schedule_may_end_at_nothing_where_no_step_is_taken_there(tmp_path, changes):
    config = make_config(tmp_path)
    config.update_from_flattened_dict({"train.final": 0.0} | changes)
    measures.check(config)


@pytest.mark.parametrize(
    ("optimizer", "changes", "message"),
    [
        ("adam", {"weight_decay": 0.1}, "weight_decay=0.1 .*optimizer=adam: .*adamw"),
        ("adafactor", {"weight_decay": 0.1}, "weight_decay=0.1 .*optimizer=adafactor: .*adamw"),
        ("adafactor", {"b1": 0.8, "eps": 1e-6}, "b1=0.8, train.eps=1e-06 .*optimizer=adafactor"),
        # The default value of another optimizer, too.
        ("adafactor", {"b1": 0.9}, "b1=0.9 .*optimizer=adafactor"),
    ],
)
def test_options_that_the_optimizer_has_not_are_refused(
    tmp_path, monkeypatch, optimizer, changes, message
):
    """Mistakes: a weight decay that is accepted and has no effect."""
    config = make_config(tmp_path)
    config.train.optimizer = optimizer
    config.train.update(changes)
    monkeypatch.setattr(loop, "fit", None)
    with pytest.raises(ValueError, match=f"train.{message}"):
        stages.trace(config, Workdir(tmp_path / "w"))
    assert not (tmp_path / "w" / "stages" / "train.json").exists()


def test_options_are_refused_of_no_training_that_is_done(finished, loaded, monkeypatch):
    """A run that was finished before they were refused can still be traced."""
    config, path, _ = finished
    monkeypatch.setattr(train, "check", None)
    assert train.train(config, loaded.corpus, Workdir(path)).step == loaded.trained.step


def test_what_an_optimizer_has_is_accepted():
    for optimizer, changes in (
        ("adamw", {"weight_decay": 0.1, "b1": 0.8}),
        ("adam", {"b1": 0.8, "b2": 0.9, "eps": 1e-6}),
        ("adafactor", {}),
    ):
        config = defaults.get_config()
        config.train.optimizer = optimizer
        config.train.update(changes)
        train.check(config)


def test_an_unwritable_workdir_is_told(tmp_path):
    (tmp_path / "file").write_text("")
    for place in ("file", "file/w"):
        with pytest.raises(DirectoryError, match="--workdir=.* is a file; give a directory"):
            Workdir(tmp_path / place)


def command(config_key_values, workdir):
    return [
        sys.executable,
        "-m",
        "experiments.trace",
        "--config=configs/world_facts.py",
        f"--workdir={workdir}",
        *(f"--config.{k}={v}" for k, v in config_key_values.items()),
    ]


def test_a_mistyped_key_is_told_with_a_suggestion(tmp_path):
    for key, wanted in (
        ("train.epoch", "did you mean train.epochs"),
        ("learning_rate", "did you mean"),
        ("qqqq", "its keys are\n"),
    ):
        done = subprocess.run(command({key: 1}, tmp_path), capture_output=True, text=True)
        assert done.returncode != 0
        assert f"error: the config has no key {key!r}" in done.stderr and wanted in done.stderr
        assert "Traceback" not in done.stderr


def test_keys_of_a_config_are_listed_with_their_sections():
    keys = defaults.flat(defaults.get_config())
    assert {"methods", "data.sentences", "eval.queries"} <= set(keys)


def changed_keys(config):
    """The keys of a config that are not the demo's, for a command with `world_facts.py`."""
    demo = defaults.flat(world_facts.get_config())
    return {key: value for key, value in defaults.flat(config).items() if value != demo[key]}


@pytest.mark.slow
def test_killed_again_and_again_it_ends_in_the_same_files(tmp_path):
    """Whatever stage the kill falls into: training, encoding, search, tail-patch."""
    config = make_config(tmp_path)
    changed = changed_keys(config)
    one_device = os.environ | {"XLA_FLAGS": ""}

    def start(workdir):
        return subprocess.Popen(
            command(changed, workdir),
            stdout=subprocess.DEVNULL,
            stderr=subprocess.DEVNULL,
            env=one_device,
        )

    killed = tmp_path / "killed"
    kills = 0
    for stage in ("train.json", "stores", "retrieval", "tail_patch-", None):
        run = start(killed)
        while run.poll() is None and stage:
            # os.walk passes over what vanishes while it looks.
            there = [n for _, dirs, files in os.walk(killed) for n in dirs + files]
            if any(name.startswith(stage) for name in there):
                run.send_signal(signal.SIGKILL)
            time.sleep(0.02)
        kills += run.wait() == -signal.SIGKILL
    assert run.returncode == 0 and kills >= 3
    assert start(tmp_path / "whole").wait() == 0
    for name in ("metrics.json", "table.md", "results/trackstar.jsonl", "results/grad_dot.jsonl"):
        assert (killed / name).read_bytes() == (tmp_path / "whole" / name).read_bytes(), name
    for shard in (tmp_path / "whole" / "stores").rglob("*"):
        if shard.is_file():
            other = killed / shard.relative_to(tmp_path / "whole")
            assert other.read_bytes() == shard.read_bytes(), shard
