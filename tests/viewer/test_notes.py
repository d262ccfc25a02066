"""Notes by hand: kept, changed, counted, read again."""

import json

import pytest

from tda import results
from tda.viewer.notes import Notes, NotesError, describe_agreement
from tda.viewer.results_file import ResultsFile
from tests.viewer.big_file import note_on, records

Q1, Q2 = (
    {"example_id": name, "inputs_plaintext": f"the capital of {name} is", "targets_plaintext": "x"}
    for name in ("q1", "q2")
)


def test_notes_survive_a_restart_and_the_last_counts(tmp_path):
    path = tmp_path / "notes.jsonl"
    notes = Notes(path)
    notes.add(note_on(Q1, "p1", "states"))
    notes.add(note_on(Q1, "p2", "unrelated", "odd\u2028 <b>"))
    notes.add(note_on(Q1, "p1", "part", "", "trackstar"))
    notes.add(note_on(Q2, "p1", "states"))
    notes.add(note_on(Q2, "p1", None))
    assert len(path.read_text().splitlines()) == 5
    for some in (notes, Notes(path)):
        found = {(n["example_id"], n["passage_id"]): n for n in some.all()}
        assert set(found) == {("q1", "p1"), ("q1", "p2")}
        assert found["q1", "p1"]["type"] == "part"
        assert found["q1", "p2"]["comment"] == "odd\u2028 <b>"


def test_a_line_that_a_kill_tore_is_cut_off(tmp_path):
    path = tmp_path / "notes.jsonl"
    Notes(path).add(note_on(Q1, "p1", "states"))
    whole = path.read_bytes()
    path.write_bytes(whole + whole[:-7])
    notes = Notes(path)
    assert len(notes.all()) == 1 and path.read_bytes() == whole
    notes.add(note_on(Q1, "p2", "part"))
    assert len(Notes(path).all()) == 2


def test_counts_are_by_method_and_a_note_counts_for_each(tmp_path):
    items = list(records(3, 2, mean=40))
    other = [i | {"proponent_ids": [i["proponent_ids"][0], "else"]} for i in items]
    files = []
    for label, some in (("a", items), ("b", other)):
        results.write(tmp_path / label, some)
        files.append(ResultsFile(tmp_path / label, label))
    notes = Notes(tmp_path / "n")
    first, second = items[1]["proponent_ids"]
    notes.add(note_on(items[1], first, "states"))
    notes.add(note_on(items[1], second, "name"))
    notes.add(note_on(items[1], "else", "name"))
    notes.add(note_on(items[1] | {"example_id": "q99999"}, first, "states"))
    counts = notes.counts(files)
    assert counts["a"]["states"] == 1 and counts["a"]["name"] == 1
    assert counts["b"]["states"] == 1 and counts["b"]["name"] == 1
    assert sum(counts["a"].values()) == sum(counts["b"].values()) == 2


def test_agreement_counts_a_noted_passage_once(tmp_path):
    """Notes against the types in results: of those that the rule gives, how many a reader gives."""
    items = list(records(3, 2, mean=40))
    for item in items:
        item["proponent_kinds"] = ["states", "prior"]
    files = []
    for label in ("a", "b"):
        results.write(tmp_path / label, items)
        files.append(ResultsFile(tmp_path / label, label))
    notes = Notes(tmp_path / "n")
    for item, kind in zip(items, ("states", "states", "part"), strict=True):
        notes.add(note_on(item, item["proponent_ids"][0], kind))
    notes.add(note_on(items[0], items[0]["proponent_ids"][1], "prior"))
    notes.add(note_on(items[0], "else", "prior"))
    agreement = notes.agreement(files)
    assert agreement["states"] == (3, 2) and agreement["prior"] == (1, 1)
    assert sum(noted for noted, _ in agreement.values()) == 4
    lines = describe_agreement(agreement).splitlines()
    assert lines[1].split()[-2:] == ["3", "67%"] and lines[-1].split() == ["all", "4", "75%"]
    assert describe_agreement(Notes(tmp_path / "none").agreement(files)).endswith("0      –")


def test_a_note_is_on_a_question_and_not_on_its_number(tmp_path):
    (france,) = records(1, 2, mean=40)
    spain = france | {"inputs_plaintext": "Madrid is the capital of"}
    files = []
    for label, item in (("france", france), ("spain", spain)):
        results.write(tmp_path / label, [item])
        files.append(ResultsFile(tmp_path / label, label))
    notes, passage = Notes(tmp_path / "n"), france["proponent_ids"][0]
    notes.add(note_on(france, passage, "states"))
    counts = notes.counts(files)
    assert (counts["france"]["states"], counts["spain"]["states"]) == (1, 0)
    notes.add(note_on(spain, passage, "unrelated"))
    assert [n["type"] for n in notes.all()] == ["states", "unrelated"]
    assert {n["query"] for n in notes.all()} == {f.columns["query"][0] for f in files}


def test_refusals_name_file_line_and_field(tmp_path):
    path = tmp_path / "notes.jsonl"
    notes = Notes(path)
    with pytest.raises(NotesError, match="unknown type 'x'; there are states, part"):
        notes.add(note_on(Q1, "p", "x"))
    with pytest.raises(NotesError, match="ids of a query and a passage"):
        notes.add(note_on(Q1 | {"example_id": ""}, "p", "states"))
    with pytest.raises(NotesError, match="at most 4000"):
        notes.add(note_on(Q1, "p", "states", "x" * 5000))
    notes_without_target = note_on(Q1, "p", "states")
    del notes_without_target["target"]
    with pytest.raises(NotesError, match="'target' must be a text"):
        notes.add(notes_without_target)
    assert not path.exists()
    path.write_text("{}\n")
    with pytest.raises(NotesError, match=r"notes.jsonl, line 1: 'prompt' must be"):
        Notes(path)
    path.write_text(json.dumps([]) + "\n")
    with pytest.raises(NotesError, match="line 1: a note must be an object"):
        Notes(path)
    with pytest.raises(NotesError, match="cannot write"):
        Notes(tmp_path / "absent" / "n").add(note_on(Q1, "p", "states"))
