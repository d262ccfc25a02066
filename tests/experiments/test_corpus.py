"""What a run's model is trained on, beside the passages that are searched."""

import pytest

from experiments import corpus
from experiments.workdir import Workdir
from tests.experiments.test_trace import make_config


def load(tmp_path, **changes):
    config = make_config(tmp_path)
    config.data.n_sentences, config.data.n_queries = 6, 1
    config.update_from_flattened_dict({f"data.{k}": v for k, v in changes.items()})
    return corpus.load(config, Workdir(tmp_path / "w"))


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


@pytest.mark.parametrize("key", ["train_on", "statements_of", "pool"])
def test_an_unknown_choice_is_named(tmp_path, key):
    with pytest.raises(ValueError, match=f"unknown data.{key}='some'"):
        load(tmp_path, **{key: "some"})
