"""Reading JSON lines: formats, order, and what is wrong with a file."""

import gzip
import json

import pytest

from tda.data import jsonl
from tda.data.jsonl import RecordError


def line(i, text="Some text."):
    return json.dumps({"id": f"s{i}", "text": text}) + "\n"


def values(path):
    return [value for _, value in jsonl.iter_records(path)]


def ids(path):
    return [value["id"] for value in values(path)]


@pytest.mark.parametrize("name", ["a.jsonl", "a.jsonl.gz", "a.jsonl-00003-of-00020"])
def test_plain_and_gzip_whatever_the_suffix(tmp_path, name):
    path = tmp_path / name
    content = (line(1, "Köln ✓") + "\n" + line(2)).encode()
    path.write_bytes(gzip.compress(content) if name.endswith("gz") else content)
    records = values(path)
    assert ids(path) == ["s1", "s2"]
    assert records[0]["text"] == "Köln ✓"
    hidden = tmp_path / "downloaded"
    hidden.write_bytes(gzip.compress(content))
    assert values(str(hidden)) == records


def test_shards_by_list_and_by_glob(tmp_path):
    for i in (2, 0, 1):
        (tmp_path / f"x.jsonl-{i:05d}-of-00003").write_text(line(i))
    shards = sorted(tmp_path.iterdir())
    assert ids(tmp_path / "x.jsonl-*") == ["s0", "s1", "s2"]
    assert ids(shards[::-1]) == ["s2", "s1", "s0"]


def test_missing_files(tmp_path):
    for path in (tmp_path / "absent.jsonl", tmp_path / "*.jsonl", [tmp_path / "absent.jsonl"]):
        with pytest.raises(FileNotFoundError, match="no such file"):
            values(path)
    with pytest.raises(FileNotFoundError, match="empty list"):
        values([])


@pytest.mark.parametrize("content", ["", "\n \n"])
def test_empty_file(tmp_path, content):
    (tmp_path / "a.jsonl").write_text(content)
    with pytest.raises(RecordError, match="a.jsonl: no records"):
        values(tmp_path / "a.jsonl")


def test_bad_utf8(tmp_path):
    (tmp_path / "a.jsonl").write_bytes(line(1).encode() + line(2).encode().replace(b"S", b"\xff"))
    with pytest.raises(RecordError, match="a.jsonl, line 2: not UTF-8"):
        values(tmp_path / "a.jsonl")


def test_truncated_and_damaged_gzip(tmp_path):
    path = tmp_path / "a.jsonl.gz"
    whole = gzip.compress("".join(line(i) for i in range(500)).encode())
    path.write_bytes(whole[: len(whole) // 2])
    with pytest.raises(RecordError, match="a.jsonl.gz, after line .*truncated"):
        values(path)
    path.write_bytes(whole[:40] + bytes(byte ^ 255 for byte in whole[40:60]) + whole[60:])
    with pytest.raises(RecordError, match="damaged"):
        values(path)
