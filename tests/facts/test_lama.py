"""LAMA's T-REx files are read as they are downloaded."""

import json

import pytest

from tda.data.jsonl import RecordError
from tda.facts import labels, lama

BORN = {"relation": "P19", "template": "[X] was born in [Y] .", "label": "place of birth"}
CAPITAL = {"relation": "P1376", "template": "[X] is the capital of [Y] .", "label": "capital of"}
TWINS = {"relation": "P190", "template": "[X] and [Y] are twin cities .", "label": "twin towns"}


def fact(uuid, relation, subject, target, *evidences):
    fields = ("sub_surface", "obj_surface", "masked_sentence")
    return {
        "uuid": uuid,
        "predicate_id": relation,
        "sub_uri": f"Q-{subject}",
        "sub_label": subject,
        "obj_uri": f"Q-{target}",
        "obj_label": target,
        "evidences": [dict(zip(fields, e, strict=True)) for e in evidences],
    }


def write(folder, records, relations=(BORN, CAPITAL, TWINS)):
    (folder / "TREx").mkdir(exist_ok=True)
    lines = [json.dumps(r) + "\n" for r in relations]
    (folder / "relations.jsonl").write_text("".join(lines), encoding="utf-8")
    for record in records:
        with open(folder / "TREx" / f"{record['predicate_id']}.jsonl", "a") as file:
            file.write(json.dumps(record) + "\n")
    return folder


SHARED = "Bach, born in [MASK], died in Leipzig."
BACH = fact(
    "f1",
    "P19",
    "Johann Sebastian Bach",
    "Eisenach",
    ("Bach", "Eisenach", SHARED),
    ("J. S. Bach", "the town of Eisenach", "In [MASK], J. S. Bach was born; [MASK] was small."),
)


def test_a_fact_and_its_evidence_are_a_query_and_its_passages(tmp_path):
    sentences, (bach,) = lama.read(write(tmp_path, [BACH]))
    assert bach.prompt0 == "Johann Sebastian Bach was born in" and bach.entity1 == "Eisenach"
    assert (bach.fact_id, bach.relation, bach.predicate_uri) == ("f1", "place of birth", "P19")
    assert bach.entity0_alias == ("Bach", "J. S. Bach")
    assert bach.entity1_alias == ("the town of Eisenach",)
    assert [s.text for s in sentences] == [
        "Bach, born in Eisenach, died in Leipzig.",
        "In the town of Eisenach, J. S. Bach was born; the town of Eisenach was small.",
    ]
    assert labels.relevant_passages(sentences, [bach]) == {"f1": bach.trex_sentences}
    # Strict labels: of sentences that begin with the subject alone.
    strict = labels.relevant_passages(sentences, [bach], strict=True)
    assert strict == {"f1": (sentences[0].sentence_id,)}


def test_a_sentence_of_several_facts_stands_once(tmp_path):
    same = ("Bach", "Bach", "[MASK], born in Eisenach, died in Leipzig.")
    other = fact("f2", "P1376", "Bach", "Bach", same, same)
    sentences, facts = lama.read(write(tmp_path, [BACH, other]))
    assert [f.fact_id for f in facts] == ["f2", "f1"]  # P1376 before P19, as sorted files
    assert [len(s.fact_triples) for s in sentences] == [2, 1]
    assert facts[0].trex_sentences == (sentences[0].sentence_id,)


def test_a_template_that_goes_on_after_its_object_asks_nothing(tmp_path):
    twins = fact("f3", "P190", "Bonn", "Oxford", ("Bonn", "Oxford", "Bonn and [MASK] are twins."))
    with pytest.warns(UserWarning, match="templates of P190 do not end in the object"):
        sentences, facts = lama.read(write(tmp_path, [BACH, twins]))
    assert [f.fact_id for f in facts] == ["f1"] and len(sentences) == 2


def test_what_is_no_lama_is_refused_by_name(tmp_path):
    with pytest.raises(FileNotFoundError, match="has no relations.jsonl.*data.zip"):
        lama.read(tmp_path)
    write(tmp_path, [BACH | {"obj_label": None}])
    with pytest.raises(RecordError, match="P19.jsonl, line 1: field 'obj_label' is None"):
        lama.read(tmp_path)
