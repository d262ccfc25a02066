"""What cannot be read is named by file and record."""

import json

import pytest

from tda.data import corpora
from tda.data.corpora import CorpusError


def documents(path, content, **options):
    path.write_bytes(content if isinstance(content, bytes) else content.encode())
    return list(corpora.Corpus(path, **options))


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("a.csv", "", "a.csv: no records"),
        ("a.csv", "id,text\n", "a.csv: no records"),
        ("a.json", "[]", "a.json: no records"),
        ("a.jsonl", "\n\n", "a.jsonl: no records"),
        ("a.jsonl", '{"text": "x", "n": ' + "9" * 5000 + "}", r"a.jsonl, line 1: not JSON \(Exc"),
        ("a.jsonl", '{"n": ' + "[" * 10**5 + "]" * 10**5 + "}", "line 1: not JSON .*recursion"),
        ("a.json", '[{"n": ' + "9" * 5000 + "}]", "a.json: begins as a JSON array, but is none"),
        ("a.jsonl", '{"input_ids": [[1, 2], [3]]}', "line 1: 'input_ids' is not a list of whole"),
        ("a.jsonl", '{"input_ids": null}', "line 1: 'input_ids' are not a list of whole"),
        ("a.jsonl", '{"input_ids": [1], "labels": [[1], [1, 2]]}', "line 1: 'labels' is not a li"),
    ],
)
def test_files_that_hold_nothing_or_what_python_refuses(tmp_path, name, content, message):
    with pytest.raises(ValueError, match=message):
        documents(tmp_path / name, content)


def test_null_masks_of_token_ids_are_none(tmp_path):
    row = {"input_ids": [1, 2], "attention_mask": None, "labels": None}
    (document,) = documents(tmp_path / "a.jsonl", json.dumps(row))
    assert (document.tokens, document.scored) == ((1, 2), None)


@pytest.mark.parametrize("indent", [None, 1])
def test_records_of_an_array_are_skipped_whole(tmp_path, indent):
    """Guards: a bad line taken out of a record of several lines, or the array's only line."""
    rows = [{"text": "Oslo", "by": "BAD"}, {"text": "Rome", "by": "me"}, {"text": "BAD", "by": ""}]
    content = json.dumps(rows, indent=indent).encode().replace(b"BAD", b"\xff")
    with pytest.warns(UserWarning, match="2 records are not UTF-8"):
        found = documents(tmp_path / "a.json", content, undecodable="skip")
    assert [d.text for d in found] == ["Rome"]
    with pytest.raises(ValueError, match="not UTF-8"):
        documents(tmp_path / "a.json", content)


def test_damage_within_a_file_of_columns_is_told_with_its_name(tmp_path):
    pytest.importorskip("pyarrow")
    import pyarrow.parquet

    table = pyarrow.table({"text": [f"passage {i * 7919 % 10007}" for i in range(20_000)]})
    file = tmp_path / "a.parquet"
    pyarrow.parquet.write_table(table, file)
    content = file.read_bytes()
    with pytest.raises(CorpusError, match="a.parquet is not a Parquet file, or is damaged .*fetch"):
        documents(file, content[:3000] + b"\x55" * 800 + content[3800:])
    stream = tmp_path / "dataset" / "data-00000-of-00001.arrow"
    stream.parent.mkdir()
    with pyarrow.ipc.new_stream(stream, table.schema) as out:
        out.write_table(table)
    state = {"_data_files": [{"filename": stream.name}]}
    (stream.parent / "state.json").write_text(json.dumps(state))
    assert len(list(corpora.Corpus(stream.parent))) == 20_000
    stream.write_bytes(stream.read_bytes()[:200_000])
    with pytest.raises(CorpusError, match="arrow is not a stream of Arrow, or is damaged"):
        list(corpora.Corpus(stream.parent))
    stream.unlink()
    with pytest.raises(CorpusError, match="00001.arrow: no such file"):
        list(corpora.Corpus(stream.parent))
