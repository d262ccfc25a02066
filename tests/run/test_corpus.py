"""What a run asks, and what its model is trained on beside the passages that are searched."""

import pytest

from tda.run import corpus
from tda.run.run import Run
from tda.run.workdir import Workdir
from tests.experiments.test_trace import make_config, records, write
from tests.facts import test_lama


def make_config_of(tmp_path, sentences=None, facts=None, **changes):
    config = make_config(tmp_path, sentences, facts)
    config.data.n_sentences, config.data.n_queries = 6, 1
    config.update_from_flattened_dict({f"data.{k}": v for k, v in changes.items()})
    return config


def load(tmp_path, sentences=None, facts=None, **changes):
    return corpus.load(
        make_config_of(tmp_path, sentences, facts, **changes), Workdir(tmp_path / "w")
    )


def texts_beside(data):
    """Training texts that are no passages."""
    kept = set(data.passages.ids)
    rows = [i for i, name in enumerate(data.training.ids) if name not in kept]
    return {data.training.ids[i]: data.text_of(i, data.training) for i in rows}


def test_a_model_is_trained_on_its_corpus(tmp_path):
    data = load(tmp_path)
    assert len(data.queries) == 1 and len(data.passages) == 6
    assert data.training is data.passages


def test_on_what_is_left_out_of_the_corpus_too(tmp_path):
    beside = texts_beside(load(tmp_path, train_on="all"))
    assert len(beside) == 6 and not any(name.startswith("statement") for name in beside)


def test_on_what_is_left_out_of_the_corpus_alone(tmp_path):
    data = load(tmp_path, train_on="rest")
    assert len(data.training) == len(texts_beside(data)) == 6
    with pytest.raises(ValueError, match="and there are none; give a smaller data.n_sentences"):
        load(tmp_path, train_on="rest", n_sentences=0)


def test_on_other_documents_that_are_not_traced(tmp_path):
    articles = [{"title": f"a{i}", "text": f"Article {i}. " * 100} for i in range(40)]
    named = {"also_train_on": write(tmp_path / "a.jsonl", articles), "id_field": "title"}

    def read(**changes):
        folder = tmp_path / "-".join(["run", *changes])
        folder.mkdir()
        return load(folder, **named, **changes)

    def articles_of(data):
        return {name.split("#")[0] for name in texts_beside(data)}

    both = read()
    assert articles_of(both) == {f"a{i}" for i in range(40)} and len(both.passages) == 6
    assert any("Article 39. Article 39." in text for text in texts_beside(both).values())
    assert 0 < len(articles_of(read(share=0.5))) < 40
    # All sentences are passages, and "rest" is the articles alone.
    alone = read(train_on="rest", n_sentences=0)
    assert len(alone.training) == len(texts_beside(alone)) and len(articles_of(alone)) == 40
    with pytest.raises(FileNotFoundError, match="/nowhere: no such corpus"):
        corpus.check_files(make_config_of(tmp_path, also_train_on="/nowhere"))


def test_on_statements_of_facts_that_are_not_asked(tmp_path):
    data = load(tmp_path, statements=1)
    asked = data.queries[0]
    beside = texts_beside(data)
    assert len(beside) == 3 and f"statement-{asked.fact_id}-0" not in beside
    assert all(text.startswith("The capital of ") for text in beside.values())


def test_on_statements_of_what_the_corpus_states_alone(tmp_path):
    data = load(tmp_path, statements=1, statements_of="corpus")
    stated = {t.fact_id for s in data.sentences for t in s.fact_triples}
    wanted = {f"statement-{f}-0" for f in stated - {data.queries[0].fact_id}}
    assert texts_beside(data).keys() == wanted
    # The sample leaves some fact out, and keeps another than the query's: else nothing is tested.
    assert 1 < len(stated) < 4


def by_uris(sentences, facts):
    """The same labels without a fact's id: as lists of three URIs."""
    keys = "entity0_uri", "predicate_uri", "entity1_uri"
    listed = [
        s | {"fact_triples": [[t[k] for k in keys] for t in s.get("fact_triples", [])]}
        for s in sentences
    ]
    return listed, [f | {"trex_sentences": []} for f in facts]


def by_sentences(sentences, facts):
    """The same labels in the facts alone."""
    return [s | {"fact_triples": []} for s in sentences], facts


@pytest.mark.parametrize("form", [by_uris, by_sentences])
def test_what_the_corpus_states_is_known_by_labels_of_every_form(tmp_path, form):
    """Mistakes: facts of labels without ids passed over, and the model trained without them."""
    for name in ("ids", "other"):
        (tmp_path / name).mkdir()
    told = dict(statements=1, statements_of="corpus")
    wanted = texts_beside(load(tmp_path / "ids", **told))
    found = texts_beside(load(tmp_path / "other", *form(*records()), **told))
    assert found == wanted and found


def test_a_corpus_that_states_nothing_is_refused(tmp_path):
    sentences, facts = records()
    sentences, facts = [s | {"fact_triples": []} for s in sentences], by_uris([], facts)[1]
    with pytest.raises(ValueError, match="statements_of=corpus: no passage .*statements_of=all"):
        load(tmp_path, sentences, facts, statements=1, statements_of="corpus")
    # Where statements are not asked for, nothing is missing.
    assert load(tmp_path, sentences, facts, statements_of="corpus").training is not None


def test_a_run_without_a_statement_is_told(tmp_path, capsys):
    load(tmp_path, n_queries=4, n_sentences=12, statements=1)
    assert "no fact is stated" in capsys.readouterr().out


def test_queries_and_statements_are_joined_as_the_config_says(tmp_path):
    for name in "ab":
        (tmp_path / name).mkdir()
    plain = load(tmp_path / "a", statements=1)
    joined = load(tmp_path / "b", statements=1, joiner="")
    fact = joined.queries[0]
    ids, scored = joined.tokenizer.encode_query(fact.prompt(0), fact.entity1, "")
    assert joined.prompts.tokens.tolist() == ids.tolist()
    assert joined.prompts.scored.tolist() == scored.tolist()
    assert joined.fingerprint["queries"] != plain.fingerprint["queries"]
    pairs = zip(texts_beside(joined).values(), texts_beside(plain).values(), strict=True)
    assert all(a != b and a.replace(" ", "") == b.replace(" ", "") for a, b in pairs)


def test_the_texts_of_queries_are_joined_as_their_tokens(tmp_path):
    config = make_config(tmp_path)
    config.data.joiner = " → "
    data = corpus.load(config, Workdir(tmp_path / "w"))
    run = Run(config, Workdir(tmp_path / "w"), data, None)
    fact = data.queries[0]
    assert run.query_texts[0] == f"{fact.prompt(0)} → {fact.entity1}"


@pytest.mark.parametrize("pool", ["all", "clean"])
def test_excluded_relations_are_asked_of_no_pool(tmp_path, pool):
    sentences, facts = records()
    facts[0] = facts[0] | {"relation": "seat", "predicate_uri": "x:P9"}
    change = dict(pool=pool, n_queries=0, n_sentences=0)
    assert len(load(tmp_path, sentences, facts, **change).queries) == 4
    for name in ("seat", "x:P9", "P9"):
        data = load(tmp_path, sentences, facts, exclude_relations=f"{name}, ", **change)
        assert [f.fact_id for f in data.queries] == ["f1", "f2", "f3"]
    with pytest.raises(ValueError, match=r"exclude_relations: no fact has relation \['P1'\]"):
        load(tmp_path, sentences, facts, exclude_relations="P1,P9", **change)


@pytest.mark.parametrize("key", ["name", "train_on", "statements_of", "pool"])
def test_an_unknown_choice_is_named(tmp_path, key):
    with pytest.raises(ValueError, match=f"unknown data.{key}='some'"):
        load(tmp_path, **{key: "some"})


def test_lama_s_own_files_are_a_corpus(tmp_path):
    config = make_config(tmp_path)
    config.data.update(sentences="", facts="", name="lama", n_sentences=0, n_queries=0)
    with pytest.raises(ValueError, match="data.name=lama .*--config.data.dir"):
        corpus.check_files(config)
    config.data.dir = str(test_lama.write(tmp_path, [test_lama.BACH]))
    corpus.check_files(config)
    data = corpus.load(config, Workdir(tmp_path / "w"))
    assert [q.entity1 for q in data.queries] == ["Eisenach"] and len(data.passages) == 2
    assert data.correct["all"][0].tolist() == [0, 1] and data.correct["strict"][0].tolist() == [0]
