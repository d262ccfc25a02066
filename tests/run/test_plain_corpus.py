"""The corpus of a run without labels: what it takes, what it refuses, and who tokenises it."""

import json

import numpy as np
import pytest

from tda.plan import setting
from tda.run import corpus, plain_corpus, stages
from tda.run.workdir import Workdir
from tests.experiments.test_trace import make_config, records, without_labels, write


@pytest.fixture
def config(tmp_path):
    return without_labels(make_config(tmp_path), tmp_path)


def test_documents_become_the_passages_of_labelled_sentences(config, tmp_path):
    labelled = corpus.load(make_config(tmp_path), Workdir(tmp_path / "a"))
    plain = corpus.load(config, Workdir(tmp_path / "b"))
    assert list(plain.passages.ids) == list(labelled.passages.ids)
    np.testing.assert_array_equal(plain.passages.tokens, labelled.passages.tokens)
    for name in ("tokenizer", "queries"):
        assert plain.fingerprint[name] == labelled.fingerprint[name]
    assert labelled.has_labels and not plain.has_labels
    again = plain_corpus.open_finished(config, Workdir(tmp_path / "b"))
    assert again.fingerprint == plain.fingerprint


def test_fields_are_named_and_facts_are_asked(config, tmp_path):
    documents = [{"url": f"u{i}", "body": "It rains."} for i in range(3)]
    config.data.corpus = write(tmp_path / "d.jsonl", documents)
    config.data.text_field, config.data.id_field = "body", "url"
    config.data.facts, config.data.queries = write(tmp_path / "f.jsonl", records()[1]), ""
    config.data.n_queries = 2
    plain = corpus.load(config, Workdir(tmp_path / "w"))
    assert list(plain.passages.ids) == ["u0", "u1", "u2"]
    assert len(plain.queries) == 2 and {f.relation for f in plain.queries} == {"capital"}


def test_several_files_of_which_each_has_its_fields(config, tmp_path):
    a = write(tmp_path / "a.jsonl", [{"id": 1, "text": "It rains."}, {"id": 2, "text": "Oslo."}])
    b = write(tmp_path / "b.jsonl", [{"id": 1, "uri": "u1", "abstract": "It pours."}])
    config.data.corpus = f"{a},{b}"
    config.data.text_field, config.data.id_field = "abstract,text", "uri,id"
    plain = corpus.load(config, Workdir(tmp_path / "w"))
    assert {i: plain.text_of(r) for r, i in enumerate(plain.passages.ids)} == {
        "1": "It rains.",
        "2": "Oslo.",
        "u1": "It pours.",
    }


def test_facts_are_asked_whose_names_a_passage_has(config, tmp_path, monkeypatch):
    """Guards: queries drawn first, most of which no passage of a sample could answer."""
    facts = records()[1]
    facts[2]["entity0_alias"] = ["Italia"]
    texts = ["Oslo, Norway.", "Paris. It rains in France", "Rome is in Italia.", "Madrid, Norway"]
    config.data.corpus = write(tmp_path / "d.jsonl", [{"text": t} for t in texts])
    config.data.facts, config.data.queries = write(tmp_path / "f.jsonl", facts), ""
    config.data.pool = "named"
    plain = corpus.load(config, Workdir(tmp_path / "w"))
    assert sorted(plain.query_ids) == ["f0", "f1", "f2"] == sorted(plain.prompts.ids)
    monkeypatch.setattr(plain_corpus.frequency, "counts", None)  # the corpus is read once
    assert plain_corpus.open_finished(config, Workdir(tmp_path / "w")).query_ids == plain.query_ids
    config.data.n_queries = 2
    assert len(plain_corpus.open_finished(config, Workdir(tmp_path / "w")).queries) == 2
    monkeypatch.undo()
    config.data.corpus = write(tmp_path / "e.jsonl", [{"text": "Nobody."}])
    with pytest.raises(ValueError, match="no passage names subject and target of any of 4 facts"):
        corpus.load(config, Workdir(tmp_path / "v"))


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"data.sentences": "s.jsonl"}, "data.sentences=s.jsonl does not go with data.corpus"),
        ({"data.n_sentences": 5}, "data.n_sentences=5 does not go with data.corpus"),
        ({"data.pool": "clean"}, "data.pool=clean does not go with .* has no labels"),
        ({"data.train_on": "all"}, "data.train_on=all does not go with"),
        ({"data.also_train_on": "x"}, "data.also_train_on=x does not go with"),
        ({"data.statements": 1}, "data.statements=1 does not go with"),
        ({"data.prompt": 1}, "data.prompt=1 does not go with data.queries=.* holds no facts"),
        ({"data.facts": "f.jsonl"}, "data.queries .* or --config.data.facts, and not both"),
        ({"data.queries": ""}, "data.corpus needs queries"),
        ({"data.corpus": ""}, "data.queries=.* is for data.corpus, which is not set"),
        ({"data.corpus": "/nowhere"}, "/nowhere: no such corpus"),
        ({"data.queries": "/nowhere"}, "/nowhere: no such file"),
        ({"data.pool": "named"}, "data.pool=named does not go with data.queries"),
        ({"data.share": 1.5}, "share=1.5 of the documents; give one above 0, at most 1"),
        ({"methods": "trackstar,annotated"}, "needs labels, which data.corpus"),
    ],
)
def test_what_needs_labels_is_refused_by_name(config, changes, message):
    config.update_from_flattened_dict(changes)
    with pytest.raises((ValueError, FileNotFoundError), match=message):
        stages.check(config)


def test_queries_that_are_none_are_named(config, tmp_path):
    config.data.queries = write(tmp_path / "q.jsonl", [{"prompt": "The capital"}])
    with pytest.raises(ValueError, match="q.jsonl, line 1 has no field 'target'"):
        corpus.load(config, Workdir(tmp_path / "w"))
    assert not (tmp_path / "w" / "tokens").exists()


def test_a_plan_reads_the_tokens_of_the_workdir(config, tmp_path, monkeypatch):
    workdir = tmp_path / "w"
    read = setting.of(config, workdir=str(workdir)).size
    assert not workdir.exists()
    data = corpus.load(config, Workdir(workdir))
    monkeypatch.setattr(corpus, "load", None)
    size = setting.of(config, workdir=str(workdir)).size
    assert size.passages == len(data.passages) == read.passages
    assert size.tokens == data.passages.count_scored() == read.tokens
    assert size.queries == 4 and size.vocab_size == data.tokenizer.vocab_size


def test_another_corpus_in_the_same_workdir_is_refused(config, tmp_path):
    corpus.load(config, Workdir(tmp_path / "w"))
    (tmp_path / "documents" / "c.jsonl").write_text(json.dumps({"text": "More."}) + "\n")
    with pytest.raises(ValueError, match="(?s)holds another run.*or data.corpus"):
        corpus.load(config, Workdir(tmp_path / "w"))
