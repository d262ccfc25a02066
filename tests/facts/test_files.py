"""Reading passages and facts from JSON lines: order, streaming, and the checks of every record."""

import json

import pytest

from tda.data.jsonl import RecordError
from tda.facts import files


def line(i, text="Some text."):
    return json.dumps({"sentence_id": f"s{i}", "text": text}) + "\n"


def fact_line(i):
    fact = {"fact_id": f"f{i}", "entity0": "a", "relation": "r", "entity1": "b", "prompt0": "p"}
    return json.dumps(fact) + "\n"


def test_streaming_reads_no_further_than_its_consumer(tmp_path):
    path = tmp_path / "a.jsonl"
    path.write_text(line(1) + "not json\n")
    stream = files.iter_sentences(path)
    assert next(stream).sentence_id == "s1"
    with pytest.raises(RecordError, match="a.jsonl, line 2: not JSON"):
        next(stream)


def test_facts_are_read_in_order_and_have_one_id_each(tmp_path):
    path = tmp_path / "facts.jsonl"
    path.write_text(fact_line(1) + fact_line(2))
    assert [fact.fact_id for fact in files.iter_facts(path)] == ["f1", "f2"]
    path.write_text(fact_line(1) + fact_line(1))
    with pytest.raises(RecordError, match="line 2: field 'fact_id' is 'f1', as in .*line 1"):
        list(files.iter_facts(path))


def test_validation_names_the_line_of_the_file_not_of_the_records(tmp_path):
    path = tmp_path / "a.jsonl"
    path.write_text(line(1) + "\n\n" + line(2, " "))
    with pytest.raises(RecordError, match="a.jsonl, line 4: field 'text' is ' '; it must be"):
        list(files.iter_sentences(path))


def test_duplicate_ids_across_shards_name_both_lines(tmp_path):
    (tmp_path / "a.jsonl").write_text(line(1) + line(2))
    (tmp_path / "b.jsonl").write_text(line(3) + line(2))
    with pytest.raises(RecordError, match="b.jsonl, line 2: .*'s2', as in a.jsonl, line 2"):
        list(files.iter_sentences(tmp_path / "?.jsonl"))
