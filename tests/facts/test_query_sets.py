"""Queries from files of several public forms."""

import json

import pytest

from tda import results
from tda.data.jsonl import RecordError
from tda.facts import query_sets


def read(tmp_path, *records):
    (tmp_path / "q.jsonl").write_text("".join(json.dumps(r) + "\n" for r in records))
    return query_sets.read(tmp_path / "q.jsonl")


@pytest.mark.parametrize(
    ("record", "expected"),
    [
        ({"prompt": "A is", "target": "B"}, ("0", "A is", "B", "", "")),
        ({"id": "c", "prompt": "He fell because", "choices": ["x", "y"], "label": 1,
          "targets": [" he sat.", " he slipped."]},
         ("c", "He fell because", " he slipped.", "", "")),
        ({"id": "g", "question": "How many?", "answer": "18", "solution": "#### 18"},
         ("g", "Q: How many?\n\nA:", "18", "", "")),
        ({"id": "s", "prompt": "It rained.", "original_ending": "It poured.", "endings": ["a"]},
         ("s", "It rained.", "It poured.", "", "")),
        ({"known_id": 7, "subject": "Vinson Massif", "attribute": "Antarctica",
          "prompt": "Vinson Massif is located in the continent of", "relation_id": "P30"},
         ("7", "Vinson Massif is located in the continent of", "Antarctica", "Vinson Massif",
          "P30")),
    ],
)  # fmt: skip
def test_every_form_is_a_prompt_and_a_target(tmp_path, record, expected):
    (fact,) = read(tmp_path, record)
    assert (fact.fact_id, fact.prompt0, fact.entity1, fact.entity0, fact.relation) == expected
    assert fact.other_choices == ((" he sat.",) if "choices" in record else ())


def test_open_questions_of_a_table_have_all_names(tmp_path):
    """PopQA's file: tabs, and lists of names in JSON, quoted as csv quotes them."""
    names = '"[""Oslo"", ""Kristiania""]"'
    path = tmp_path / "popqa.tsv"
    header = "id\tsubj\tprop\tobj\ts_aliases\ts_pop\tquestion\tpossible_answers"
    row = f"42\tNorway\tcapital\tOslo\t[]\t900\tWhat is the capital of Norway?\t{names}"
    path.write_text(f"{header}\n{row}\n")
    (fact,) = query_sets.read(path)
    assert fact.fact_id == "42" and fact.prompt0 == "Q: What is the capital of Norway?\n\nA:"
    assert (fact.entity0, fact.relation, fact.entity1) == ("Norway", "capital", "Oslo")
    assert fact.entity1_alias == ("Oslo", "Kristiania") and fact.entity0_alias == ()
    path.write_text(f"{header}\n{row.replace(names, 'Oslo')}\n")
    with pytest.raises(RecordError, match="line 2: possible_answers='Oslo' is no list in JSON"):
        query_sets.read(path)


def test_a_row_of_a_table_that_does_not_fit_its_header_is_named(tmp_path):
    """Mistake: a tab that is missing, and an answer that becomes the question's."""
    path = tmp_path / "popqa.tsv"
    path.write_text("question\tobj\tpossible_answers\nWho?\t[]\n", encoding="utf-8")
    with pytest.raises(ValueError, match="popqa.tsv, line 2: .*another number of fields"):
        query_sets.read(str(path))


def test_results_are_asked_for_what_the_model_gets_wrong(tmp_path):
    def record(name, answers, **more):
        item = results.record(name, "trex", "Oslo is in", "Norway", [], [], **more)
        return item | ({} if answers is None else {"8b_generations": answers})

    facts = read(
        tmp_path,
        record("right", ["Norway", "Norway"], is_8b_correct=True),
        record("wrong", ["Italy", " Sweden", "Sweden ", ""], is_8b_correct=False),
        record("sometimes right", ["Norway and", "norway.", "Spain"], is_8b_correct=False),
        record("right when sampled", ["Norway and"], is_8b_correct=False),
        record("silent", ["", " "], is_8b_correct=False),
        record("not sampled", None, is_8b_correct=False),
        record("older", None, is_8b_correct=False, temperature_samples=["Finland"]),
    )
    answers = {"wrong": "Sweden", "sometimes right": "Spain", "older": "Finland"}
    assert {f.fact_id: f.entity1 for f in facts} == answers
    assert {f.prompt0 for f in facts} == {"Oslo is in"}


def test_other_records_are_refused(tmp_path):
    with pytest.raises(ValueError, match="q.jsonl, line 2 has no field 'target'"):
        read(tmp_path, {"prompt": "a", "target": "b"}, {"prompt": "a"})
    with pytest.raises(RecordError, match="line 1: label=2 is no place in targets"):
        read(tmp_path, {"prompt": "a", "targets": ["b", "c"], "label": 2})
    with pytest.raises(ValueError, match="the target is 5"):
        read(tmp_path, {"question": "a", "answer": 5})
    silent = results.record("a", "trex", "Oslo is in", "Norway", [], [], is_8b_correct=True)
    same = {"id": "a", "prompt": "b", "target": "c"}
    with pytest.raises(ValueError, match="q.jsonl, line 2 and q.jsonl, line 3 both have the id"):
        read(tmp_path, silent, same, same)


@pytest.mark.parametrize(
    ("record", "message"),
    [
        ({"prompt": "2 + 2 =", "targets": ["4", 5], "label": 0}, r"other_choices=\[5\]"),
        ({"prompt": "a", "targets": ["b", "c"], "label": True}, "label=True is no place"),
        ({"question": None, "answer": "18"}, "the question is None"),
        ({"question": " ", "possible_answers": ["b"], "obj": "b"}, "the question is ' '"),
        ({"question": "a", "possible_answers": ["b", 3], "obj": "b"}, "possible_answers=.*, 3"),
        ({"question": "a", "possible_answers": {"b": 1}, "obj": "b"}, "possible_answers="),
        ({"inputs_plaintext": "a", "8b_generations": [1]}, r"8b_generations=\[1\]"),
    ],
)
def test_a_value_of_another_type_is_refused_by_its_record(tmp_path, record, message):
    """Mistake: a choice that is left out because it is a number, or a question called None."""
    with pytest.raises(RecordError, match=f"q.jsonl, line 1: {message}"):
        read(tmp_path, record)


@pytest.mark.parametrize("field", ["attribute", "original_ending", "answer"])
def test_a_stated_target_counts_beside_fields_of_other_forms(tmp_path, field):
    """Mistake: a column of the user's own that replaces the target."""
    record = {"prompt": "Oslo is in", "target": "Norway", "question": "Where?", field: "country"}
    (fact,) = read(tmp_path, record)
    assert (fact.prompt0, fact.entity1) == ("Oslo is in", "Norway")
