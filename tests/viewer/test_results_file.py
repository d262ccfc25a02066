"""Results files read at random: the index, malformed lines, rows for the list."""

import gzip
import json

import pytest

from tda import results
from tda.viewer import results_file, summary
from tda.viewer.results_file import ResultsFile
from tests.viewer.big_file import records


def write(path, items):
    with open(path, "w", encoding="utf-8") as out:
        for item in items:
            out.write(item if isinstance(item, str) else json.dumps(item, ensure_ascii=False))
            out.write("\n")
    return path


@pytest.fixture
def items():
    return list(records(25, 4, mean=60))


def test_every_record_is_found_at_its_place(tmp_path, items):
    items[3]["inputs_plaintext"] = "é\u2028\u0085 odd \ud800 line"
    path = tmp_path / "a.jsonl"
    path.write_bytes(b"".join(json.dumps(i).encode() + b"\r\n\n" for i in items))
    file = ResultsFile(path, "a")
    assert len(file) == 25 and file.malformed == 0
    assert [file.record(i) for i in range(25)] == items
    assert file.records(2) == items[20:25]
    assert file.columns["prompt"] == [i["inputs_plaintext"] for i in items]
    with pytest.raises(IndexError):
        file.records(3)
    for body in (file.summaries(0), file.records(0)):
        assert json.loads(results_file.to_json(body)) == body


def test_gzip_is_the_same(tmp_path, items):
    path = tmp_path / "a.jsonl.gz"
    path.write_bytes(gzip.compress("".join(json.dumps(i) + "\n" for i in items).encode()))
    file = ResultsFile(path, "a")
    assert [file.record(i) for i in (24, 0, 7)] == [items[24], items[0], items[7]]
    content = path.read_bytes()
    for damaged in (content[:-20], content[:40] + bytes(30) + content[70:]):
        path.write_bytes(damaged)
        with pytest.raises(results.ResultsError, match="not a complete gzip file"):
            ResultsFile(path, "a")


def test_a_malformed_line_is_shown_and_the_rest_loads(tmp_path, items):
    broken = [
        ("{", "not JSON"),
        ("[1]", "must be an object"),
        (items[0] | {"proponents": "x"}, "'proponents' has type str"),
        (items[0] | {"proponent_scores": [1.0]}, "1 proponent_scores, but 4 proponents"),
        (items[0] | {"proponent_correct": ["yes"] * 4}, "'proponent_correct', item 0"),
        ({k: v for k, v in items[0].items() if k != "targets_plaintext"}, "'targets_plaintext'"),
        (items[0] | {"c4_frequency": "many"}, "'c4_frequency' has type str"),
        ("[" * 100_000, "not JSON"),
        (items[0] | {"proponent_scores": [10**400, 1, 1, 1]}, "'proponent_scores', item 0"),
        (items[0] | {"proponent_scores": [1, 1, 1, -(10**400)]}, "'proponent_scores', item 3"),
        (items[0] | {"c4_frequency": 10**400}, "'c4_frequency' is too large"),
        (items[0] | {"target_nats": -(10**400)}, "'target_nats' is too large"),
    ]
    path = write(tmp_path / "a.jsonl", [items[0], *(line for line, _ in broken), items[1]])
    file = ResultsFile(path, "a")
    assert len(file) == len(broken) + 2 and file.malformed == len(broken)
    for row, (_, why) in enumerate(broken, 1):
        assert why in file.columns["error"][row]
        assert f"a.jsonl, line {row + 1}: " in file.columns["error"][row]
        shown = file.record(row)
        assert why in shown["malformed"] and len(shown["line"]) <= 2000
    last = len(broken) + 1
    assert file.record(0) == items[0] and file.record(last) == items[1]
    assert file.row_of(file.columns["query"][last]) == last
    for body in (file.summaries(0), file.records(0)):
        assert json.loads(results_file.to_json(body)) == body


def test_what_is_no_results_file_is_refused(tmp_path):
    with pytest.raises(results.ResultsError, match="is empty"):
        ResultsFile(write(tmp_path / "a.jsonl", []), "a")
    with pytest.raises(results.ResultsError, match="no line of .* is a record: .*line 1"):
        ResultsFile(write(tmp_path / "a.jsonl", ["PNG", "x"]), "a")


def test_fields_that_a_release_may_lack(tmp_path):
    least = {"inputs_plaintext": "a", "targets_plaintext": "b", "proponents": ["c"]}
    file = ResultsFile(write(tmp_path / "a.jsonl", [least]), "a")
    assert file.malformed == 0 and file.record(0) == least
    assert file.describe()["fields"] == ["prompt", "target", "n"]


def test_numbers_that_json_has_no_word_for(tmp_path, items):
    items[0]["proponent_scores"] = [float("nan"), float("inf"), 1.0, -1.0]
    file = ResultsFile(write(tmp_path / "a.jsonl", items), "a")
    assert file.record(0)["proponent_scores"] == [None, None, 1.0, -1.0]
    assert file.columns["top"][0] is None and file.malformed == 0


def test_the_row_of_a_record():
    item = {
        "inputs_plaintext": "x" * 5000,
        "targets_plaintext": "Paris",
        "proponents": ["a", "b", "c"],
        "proponent_scores": [0.5, 0.2, 0.1],
        "opponents": ["z"],
        "opponent_scores": [-0.3],
        "proponent_correct": [False, True, False],
        "proponent_ais_scores": [0.1, 0.9, 0.2],
        "target_rank": 1,
        "target_nats": 0.6931471805599453,
        "c4_frequency": 999,
    }
    row = summary.summarise(item, "here")
    assert set(row) == set(summary.FIELDS)
    assert len(row["prompt"]) == summary.TEXT_LIMIT + 1
    assert row["correct"] == "010" and row["entailment"] == [0.1, 0.9, 0.2]
    assert row["model_correct"] is True and row["probability"] == pytest.approx(0.5)
    assert row["top"] == 0.5 and row["bottom"] == -0.3 and row["bucket"] == "100 to 999"
    assert summary.summarise(item | {"is_8b_correct": False}, "")["model_correct"] is False
    assert row["beyond"] is None and row["knowledge"] is None


@pytest.mark.parametrize(
    ("beyond", "states", "expected"),
    [(1.0, True, "knows"), (0.875, True, "guesses"), (1.0, False, None)],
)
def test_a_target_is_known_beyond_its_prior(beyond, states, expected):
    item = {"inputs_plaintext": "a", "targets_plaintext": "b", "proponents": []}
    item |= {"is_8b_correct": states, "target_nats": 2.0, "target_prior_nats": 2.0 + beyond}
    row = summary.summarise(item, "here")
    assert row["beyond"] == beyond and row["knowledge"] == expected


def test_older_names_of_fields_are_read(tmp_path, items):
    older = items[0] | {"temperature_samples": ["Oslo"], "model_confidence": 0.25}
    older |= {"fact_frequency": 7, "ground_truth": "Bergen"}
    for field in ("8b_generations", "8b_confidence", "c4_frequency", "groundtruth"):
        older.pop(field, None)
    older.pop("c4_frequency_bucket", None)
    file = ResultsFile(write(tmp_path / "a.jsonl", [older]), "a")
    row = {f: values[0] for f, values in file.columns.items()}
    assert row["prediction"] == "Oslo" and row["confidence"] == 0.25 and row["bucket"] == "1 to 9"
    assert row["truth"] == "Bergen"
    assert file.record(0)["8b_generations"] == ["Oslo"] and "model_confidence" not in file.record(0)


def test_a_query_without_any_correct_passage_is_not_judged():
    """Guards: marks that are all false because nothing is labelled, counted as failures."""
    item = {"inputs_plaintext": "a", "targets_plaintext": "b", "proponents": ["c", "d"]}
    item["proponent_correct"] = [False, False]
    for fields, expected in (
        ({}, "00"),
        ({"has_trex_sentence": None, "first_correct_rank": None}, "00"),
        ({"has_trex_sentence": True, "first_correct_rank": 17}, "00"),
        ({"has_trex_sentence": False}, None),
        ({"first_correct_rank": 0}, None),
        ({"has_trex_sentence": "no", "first_correct_rank": "0"}, "00"),
    ):
        assert summary.summarise(item | fields, "")["correct"] == expected, fields
    scores = {"proponent_ais_scores": [0.9, 0.1], "has_trex_sentence": False}
    assert summary.summarise(item | scores, "")["entailment"] == [0.9, 0.1]
    unlike = item | {"proponent_correct": [False], "has_trex_sentence": False}
    with pytest.raises(results.ResultsError, match="1 proponent_correct, but 2 proponents"):
        summary.summarise(unlike, "")


@pytest.mark.parametrize(
    "frequency, bucket",
    [(0, "0"), (1, "1 to 9"), (9, "1 to 9"), (10, "10 to 99"), (1000, "1,000 to 9,999"),
     (99_999, "10,000 to 99,999"), (100_000, "100,000 or more"), (10**9, "100,000 or more")],
)  # fmt: skip
def test_buckets(frequency, bucket):
    assert summary.bucket_of(frequency) == bucket


def test_overlap_is_by_query_and_id(tmp_path):
    def one(example, ids):
        n = len(ids)
        return {"example_id": example, "inputs_plaintext": "a", "targets_plaintext": "b"} | {
            "proponents": ["t"] * n, "proponent_ids": ids, "proponent_scores": [0.0] * n,
        }  # fmt: skip

    a = [one("q1", ["x", "y", "z"]), one("q2", ["x"]), one("q3", ["x"]), one("q4", [])]
    b = [one("q2", ["y"]), one("q1", ["z", "w", "x"]), one("q4", ["x"])]
    one_file = ResultsFile(write(tmp_path / "a.jsonl", a), "a")
    other = ResultsFile(write(tmp_path / "b.jsonl", b), "b")
    assert results_file.overlap(one_file, other) == [2, 0, None, None]
    assert one_file.ranks_of(0, "z") == 3 and one_file.ranks_of(0, "w") == 0


def test_other_questions_under_the_same_numbers_are_not_joined(tmp_path):
    def item(prompt, target="b"):
        return results.record("0", "queries", prompt, target, [("x", "text", 1.0)], [])

    few_shot = "Q: … A: …\n" * 200
    items = [
        item("France"),
        item("Spain"),
        item("France", "c"),
        item(few_shot),
        item(few_shot + "!"),
    ]
    files = [ResultsFile(write(tmp_path / f"{i}.jsonl", [x]), "f") for i, x in enumerate(items)]
    same = [[results_file.overlap(a, b) == [1] for b in files] for a in files]
    assert same == [[i == j for j in range(5)] for i in range(5)]


def test_a_file_written_anew_is_noticed(tmp_path, items):
    path = tmp_path / "a.jsonl"
    results.write(path, items)
    file = ResultsFile(path, "a")
    assert not file.stale()
    results.write(path, items[:5])
    assert file.stale()
    # What was opened is read on from the old file.
    assert file.record(24) == items[24]
