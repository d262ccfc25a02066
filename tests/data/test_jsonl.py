"""Reading JSON lines: formats, order, and what is wrong with a file."""

import gzip
import json

import pytest

from tda.data import jsonl
from tda.facts.records import RecordError


def line(i, text="Some text."):
    return json.dumps({"sentence_id": f"s{i}", "text": text}) + "\n"


def fact_line(i):
    fact = {"fact_id": f"f{i}", "entity0": "a", "relation": "r", "entity1": "b", "prompt0": "p"}
    return json.dumps(fact) + "\n"


def ids(sentences):
    return [sentence.sentence_id for sentence in sentences]


@pytest.mark.parametrize("name", ["a.jsonl", "a.jsonl.gz", "a.jsonl-00003-of-00020"])
def test_plain_and_gzip_whatever_the_suffix(tmp_path, name):
    path = tmp_path / name
    content = (line(1, "Köln ✓") + "\n" + line(2)).encode()
    path.write_bytes(gzip.compress(content) if name.endswith("gz") else content)
    sentences = jsonl.read_sentences(path)
    assert ids(sentences) == ["s1", "s2"]
    assert sentences[0].text == "Köln ✓"
    hidden = tmp_path / "downloaded"
    hidden.write_bytes(gzip.compress(content))
    assert jsonl.read_sentences(str(hidden)) == sentences


def test_shards_by_list_and_by_glob(tmp_path):
    for i in (2, 0, 1):
        (tmp_path / f"x.jsonl-{i:05d}-of-00003").write_text(line(i))
    shards = sorted(tmp_path.iterdir())
    assert ids(jsonl.read_sentences(tmp_path / "x.jsonl-*")) == ["s0", "s1", "s2"]
    assert ids(jsonl.read_sentences(shards[::-1])) == ["s2", "s1", "s0"]


def test_streaming_reads_no_further_than_asked(tmp_path):
    path = tmp_path / "a.jsonl"
    path.write_text(line(1) + "not json\n")
    stream = jsonl.iter_sentences(path)
    assert next(stream).sentence_id == "s1"
    with pytest.raises(RecordError, match="a.jsonl, line 2: not JSON"):
        next(stream)


def test_facts(tmp_path):
    path = tmp_path / "facts.jsonl"
    path.write_text(fact_line(1) + fact_line(2))
    assert [fact.fact_id for fact in jsonl.read_facts(path)] == ["f1", "f2"]
    path.write_text(fact_line(1) + fact_line(1))
    with pytest.raises(RecordError, match="line 2: field 'fact_id' is 'f1', as in .*line 1"):
        jsonl.read_facts(path)


def test_validation_names_the_line_of_the_file_not_of_the_records(tmp_path):
    path = tmp_path / "a.jsonl"
    path.write_text(line(1) + "\n\n" + line(2, " "))
    with pytest.raises(RecordError, match="a.jsonl, line 4: field 'text' is blank"):
        jsonl.read_sentences(path)


def test_missing_files(tmp_path):
    for path in (tmp_path / "absent.jsonl", tmp_path / "*.jsonl", [tmp_path / "absent.jsonl"]):
        with pytest.raises(FileNotFoundError, match="no such file"):
            jsonl.read_sentences(path)
    with pytest.raises(FileNotFoundError, match="empty list"):
        jsonl.read_sentences([])


@pytest.mark.parametrize("content", ["", "\n \n"])
def test_empty_file(tmp_path, content):
    (tmp_path / "a.jsonl").write_text(content)
    with pytest.raises(RecordError, match="a.jsonl: no records"):
        jsonl.read_sentences(tmp_path / "a.jsonl")


def test_duplicate_ids_across_shards_name_both_lines(tmp_path):
    (tmp_path / "a.jsonl").write_text(line(1) + line(2))
    (tmp_path / "b.jsonl").write_text(line(3) + line(2))
    with pytest.raises(RecordError, match="b.jsonl, line 2: .*'s2', as in a.jsonl, line 2"):
        jsonl.read_sentences(tmp_path / "?.jsonl")


def test_bad_utf8(tmp_path):
    (tmp_path / "a.jsonl").write_bytes(line(1).encode() + line(2).encode().replace(b"S", b"\xff"))
    with pytest.raises(RecordError, match="a.jsonl, line 2: not UTF-8"):
        jsonl.read_sentences(tmp_path / "a.jsonl")


def test_truncated_and_damaged_gzip(tmp_path):
    path = tmp_path / "a.jsonl.gz"
    whole = gzip.compress("".join(line(i) for i in range(500)).encode())
    path.write_bytes(whole[: len(whole) // 2])
    with pytest.raises(RecordError, match="a.jsonl.gz, after line .*truncated"):
        jsonl.read_sentences(path)
    path.write_bytes(whole[:40] + bytes(byte ^ 255 for byte in whole[40:60]) + whole[60:])
    with pytest.raises(RecordError, match="damaged"):
        jsonl.read_sentences(path)
