"""Results records: the release's fields, and what is refused."""

import json

import pytest

from tda import results


def one(**changes):
    made = results.record(
        "f1", "trex", "The capital of France is", "Paris",
        [("p1", "Paris…", 0.5)], [("p9", "x", -0.1)],
        fact_id="f1", proponent_correct=[True],
    )  # fmt: skip
    return made | changes


def test_round_trip(tmp_path):
    results.write(tmp_path / "r.jsonl", [one(), one(example_id="é\u2028")])
    back = list(results.read(tmp_path / "r.jsonl"))
    assert back == [one(), one(example_id="é\u2028")]
    assert back[0]["proponents"] == ["Paris…"] and back[0]["opponent_scores"] == [-0.1]
    assert not (tmp_path / "r.jsonl.part").exists()


def test_refusals_name_file_line_and_field(tmp_path):
    path = tmp_path / "r.jsonl"
    broken = one()
    del broken["opponents"]
    path.write_text(json.dumps(one()) + "\n" + json.dumps(broken) + "\n")
    with pytest.raises(
        results.ResultsError, match=r"r.jsonl, line 2: field 'opponents' is missing"
    ):
        list(results.read(path))
    path.write_text(json.dumps(one(proponent_ids=[])) + "\n")
    with pytest.raises(results.ResultsError, match="line 1: proponents.*differ in number"):
        list(results.read(path))
    path.write_text("{\n")
    with pytest.raises(results.ResultsError, match="line 1: not JSON"):
        list(results.read(path))
    path.write_text("[]\n")
    with pytest.raises(results.ResultsError, match="must be an object, not list"):
        list(results.read(path))
