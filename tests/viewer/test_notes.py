"""Notes by hand: kept, changed, counted, read again."""

import json

import pytest

from tda import results
from tda.viewer.notes import Notes, NotesError
from tda.viewer.results_file import ResultsFile
from tests.viewer.big_file import records


def test_notes_survive_a_restart_and_the_last_counts(tmp_path):
    path = tmp_path / "notes.jsonl"
    notes = Notes(path)
    notes.add("q1", "p1", "states", "", "bm25")
    notes.add("q1", "p2", "unrelated", "odd\u2028 <b>", "bm25")
    notes.add("q1", "p1", "part", "", "trackstar")
    notes.add("q2", "p1", "states", "", "bm25")
    notes.add("q2", "p1", None, "", "bm25")
    assert len(path.read_text().splitlines()) == 5
    for some in (notes, Notes(path)):
        found = {(n["example_id"], n["passage_id"]): n for n in some.all()}
        assert set(found) == {("q1", "p1"), ("q1", "p2")}
        assert found["q1", "p1"]["type"] == "part"
        assert found["q1", "p2"]["comment"] == "odd\u2028 <b>"


def test_a_line_that_a_kill_tore_is_cut_off(tmp_path):
    path = tmp_path / "notes.jsonl"
    Notes(path).add("q1", "p1", "states", "", "a")
    whole = path.read_bytes()
    path.write_bytes(whole + whole[:-7])
    notes = Notes(path)
    assert len(notes.all()) == 1 and path.read_bytes() == whole
    notes.add("q1", "p2", "part", "", "a")
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
    notes.add("q00001", first, "states", "", "a")
    notes.add("q00001", second, "name", "", "a")
    notes.add("q00001", "else", "name", "", "b")
    notes.add("q99999", first, "states", "", "a")
    counts = notes.counts(files)
    assert counts["a"]["states"] == 1 and counts["a"]["name"] == 1
    assert counts["b"]["states"] == 1 and counts["b"]["name"] == 1
    assert sum(counts["a"].values()) == sum(counts["b"].values()) == 2


def test_refusals_name_file_line_and_field(tmp_path):
    path = tmp_path / "notes.jsonl"
    notes = Notes(path)
    with pytest.raises(NotesError, match="unknown type 'x'; there are states, part"):
        notes.add("q", "p", "x", "", "a")
    with pytest.raises(NotesError, match="ids of a query and a passage"):
        notes.add("", "p", "states", "", "a")
    with pytest.raises(NotesError, match="at most 4000"):
        notes.add("q", "p", "states", "x" * 5000, "a")
    assert not path.exists()
    path.write_text("{}\n")
    with pytest.raises(NotesError, match=r"notes.jsonl, line 1: 'example_id' must be"):
        Notes(path)
    path.write_text(json.dumps([]) + "\n")
    with pytest.raises(NotesError, match="line 1: a note must be an object"):
        Notes(path)
    with pytest.raises(NotesError, match="cannot write"):
        Notes(tmp_path / "absent" / "n").add("q", "p", "states", "", "a")
