"""Validation: every kind of bad record gets an error that names place, field and remedy."""

import dataclasses
import json

import pytest

from tda.data.jsonl import RecordError
from tda.facts.records import fact_from_dict, sentence_from_dict

WHERE = "corpus.jsonl.gz, line 17"
URIS = {"entity0_uri": "u:FR", "predicate_uri": "u:P36", "entity1_uri": "u:Paris"}
SENTENCE = {
    "sentence_id": "s1",
    "text": "Paris is the capital of France.",
    "abstract_uri": "u:page",
    "sent_idx_in_abst": 0,
    "fact_triples": [{"fact_id": "f1", "subject_initial": False, "entity0": "France", **URIS}],
}
FACT = {
    "fact_id": "f1",
    "entity0": "France",
    "relation": "capital",
    "entity1": "Paris",
    **URIS,
    "entity0_alias": ["French Republic"],
    "trex_sentences": ["s1"],
    "prompt0": "The capital of France is",
    "prompt2": "France has its capital in",
    "is_repetition": False,
    "c4_frequency": 7,
}


def test_sentence_keeps_every_field():
    sentence = sentence_from_dict(SENTENCE | {"unknown": 1}, WHERE)
    assert sentence.sentence_id == "s1"
    assert sentence.text == SENTENCE["text"]
    assert sentence.abstract_uri == "u:page"
    assert sentence.sent_idx_in_abst == 0
    (triple,) = sentence.fact_triples
    assert triple.fact_id == "f1"
    assert triple.entity0 == "France"
    assert triple.entity1 is None
    assert triple.subject_initial is False
    assert triple.uris == ("u:FR", "u:P36", "u:Paris")


def test_absent_null_and_empty_optional_fields_are_none():
    for fields in ({}, {"abstract_uri": None, "fact_triples": None}, {"abstract_uri": ""}):
        sentence = sentence_from_dict({"sentence_id": "s", "text": "t", **fields}, WHERE)
        assert sentence.abstract_uri is None
        assert sentence.sent_idx_in_abst is None
        assert sentence.fact_triples == ()


@pytest.mark.parametrize("triple", [list(URIS.values()), dict(URIS)])
def test_triples_without_fact_id_are_read_in_both_shapes(triple):
    sentence = sentence_from_dict(SENTENCE | {"fact_triples": [triple]}, WHERE)
    assert sentence.fact_triples[0].fact_id is None
    assert sentence.fact_triples[0].uris == ("u:FR", "u:P36", "u:Paris")


@pytest.mark.parametrize(
    ("change", "field", "expected"),
    [
        ({"sentence_id": None}, "sentence_id", "non-empty string"),
        ({"sentence_id": " "}, "sentence_id", "non-empty string"),
        ({"sentence_id": 5}, "sentence_id", "5"),
        ({"text": None}, "text", "non-empty string"),
        ({"text": ["a"]}, "text", "['a']"),
        ({"text": ""}, "text", "non-empty string"),
        ({"text": " \n"}, "text", "non-empty string"),
        ({"abstract_uri": 3}, "abstract_uri", "a string or null"),
        ({"sent_idx_in_abst": "0"}, "sent_idx_in_abst", "whole number"),
        ({"sent_idx_in_abst": -1}, "sent_idx_in_abst", "whole number"),
        ({"sent_idx_in_abst": True}, "sent_idx_in_abst", "whole number"),
        ({"fact_triples": "x"}, "fact_triples", "a list of triples"),
        ({"fact_triples": [URIS, 4]}, "fact_triples', item 1", "4"),
        ({"fact_triples": [["a", "b"]]}, "fact_triples', item 0", "three non-empty strings"),
        ({"fact_triples": [{"entity0": "f"}]}, "entity0_uri", "missing"),
        ({"fact_triples": [URIS | {"subject_initial": 1}]}, "subject_initial", "true, false"),
        ({"fact_triples": [URIS | {"fact_id": 9}]}, "fact_id", "9"),
    ],
)
def test_bad_sentences_are_named(change, field, expected):
    with pytest.raises(RecordError) as error:
        sentence_from_dict(SENTENCE | change, WHERE)
    assert WHERE in str(error.value)
    assert field in str(error.value)
    assert expected in str(error.value)


@pytest.mark.parametrize("field", ["sentence_id", "text"])
def test_missing_sentence_fields_are_named(field):
    with pytest.raises(RecordError, match=f"line 17: field '{field}' is missing"):
        sentence_from_dict({k: v for k, v in SENTENCE.items() if k != field}, WHERE)


@pytest.mark.parametrize("value", [None, 3, "text", [SENTENCE]])
def test_a_value_other_than_an_object_is_refused(value):
    with pytest.raises(RecordError, match="line 17: .*a sentence must be a JSON object"):
        sentence_from_dict(value, WHERE)
    with pytest.raises(RecordError, match="line 17: .*a fact must be a JSON object"):
        fact_from_dict(value, WHERE)


def test_fact_keeps_every_field():
    fact = fact_from_dict(FACT, WHERE)
    assert dataclasses.asdict(fact) == {
        **FACT,
        "entity0_alias": ("French Republic",),
        "entity1_alias": (),
        "trex_sentences": ("s1",),
        "prompt1": None,
        "n_objects_same_subject": None,
        "kilt_id": None,
        "other_choices": (),
    }


def test_a_prompt_that_a_fact_lacks_is_refused():
    fact = fact_from_dict(FACT, WHERE)
    assert fact.prompt(0) == "The capital of France is"
    assert fact.prompt(2) == "France has its capital in"
    with pytest.raises(RecordError, match="'f1' has no 'prompt1'"):
        fact.prompt(1)
    for i in (3, -1):
        with pytest.raises(RecordError, match="choose 0, 1 or 2"):
            fact.prompt(i)


@pytest.mark.parametrize("field", ["fact_id", "entity0", "relation", "entity1", "prompt0"])
def test_missing_fact_fields_are_named(field):
    with pytest.raises(RecordError, match=f"line 17: field '{field}' is missing"):
        fact_from_dict({k: v for k, v in FACT.items() if k != field}, WHERE)


@pytest.mark.parametrize(
    ("change", "field"),
    [
        ({"entity1": ""}, "entity1"),
        ({"prompt0": 1}, "prompt0"),
        ({"prompt1": []}, "prompt1"),
        ({"trex_sentences": "s1"}, "trex_sentences"),
        ({"entity1_alias": ["a", 2]}, "entity1_alias"),
        ({"is_repetition": "no"}, "is_repetition"),
        ({"c4_frequency": 1.5}, "c4_frequency"),
        ({"n_objects_same_subject": "one"}, "n_objects_same_subject"),
        ({"kilt_id": 12}, "kilt_id"),
    ],
)
def test_bad_facts_are_named(change, field):
    with pytest.raises(RecordError, match=f"line 17: field '{field}' is .*; it must be"):
        fact_from_dict(FACT | change, WHERE)


HALF = "\ud83d"


@pytest.mark.parametrize(
    ("from_dict", "record", "change", "field"),
    [
        (sentence_from_dict, SENTENCE, {"text": f"Paris {HALF}"}, "text"),
        (sentence_from_dict, SENTENCE, {"sentence_id": HALF}, "sentence_id"),
        (sentence_from_dict, SENTENCE, {"abstract_uri": HALF}, "abstract_uri"),
        (sentence_from_dict, SENTENCE, {"fact_triples": [["a", HALF, "b"]]}, "fact_triples"),
        (sentence_from_dict, SENTENCE, {"fact_triples": [URIS | {"fact_id": HALF}]}, "fact_id"),
        (fact_from_dict, FACT, {"prompt0": f"{HALF} is"}, "prompt0"),
        (fact_from_dict, FACT, {"entity1": HALF}, "entity1"),
        (fact_from_dict, FACT, {"prompt1": HALF}, "prompt1"),
        (fact_from_dict, FACT, {"entity1_alias": ["a", HALF]}, "entity1_alias"),
    ],
)
def test_half_a_character_is_named(from_dict, record, change, field):
    """Guards: a tokenizer's "TextEncodeInput must be …", which names no record."""
    with pytest.raises(RecordError) as error:
        from_dict(record | change, WHERE)
    message = str(error.value)
    assert WHERE in message and f"'{field}'" in message and "replace it" in message
    assert r"half a character, \ud83d" in message
    message.encode()


def test_characters_beyond_the_first_plane_are_whole():
    smile = json.loads(r'"\ud83d\ude00"')
    assert sentence_from_dict(SENTENCE | {"text": smile}, WHERE).text == "\U0001f600"


def test_a_triple_with_an_id_needs_no_uris():
    (triple,) = sentence_from_dict(SENTENCE | {"fact_triples": [{"fact_id": "f"}]}, "").fact_triples
    assert triple.fact_id == "f" and triple.uris == ("", "", "")
