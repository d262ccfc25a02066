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


def test_fields_of_older_files_have_their_current_names(tmp_path):
    older = dict(
        temperature_samples=["Paris", "Lyon"], model_confidence=0.5, fact_frequency=12,
        frequency_bucket="10 to 99", ground_truth="Paris", trex_id="t1",
    )  # fmt: skip
    item = {k: v for k, v in one().items() if k != "fact_id"} | older
    results.write(tmp_path / "r.jsonl", [item, one(fact_id="f1", trex_id="t1")])
    first, second = results.read(tmp_path / "r.jsonl")
    current = {
        "8b_generations": ["Paris", "Lyon"], "8b_confidence": 0.5, "c4_frequency": 12,
        "c4_frequency_bucket": "10 to 99", "groundtruth": "Paris", "fact_id": "t1",
    }  # fmt: skip
    assert {k: v for k, v in first.items() if k not in one() or k == "fact_id"} == current
    assert second == one()  # of both names the current one


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
