"""Fact frequencies against a search by regular expressions, and the rules of matching."""

import re

import pytest

from tda.evaluation import frequency
from tda.facts import files
from tda.facts.names import normalised
from tda.facts.records import Fact
from tests.facts import trex


def fact(subject, target, subject_alias=(), target_alias=(), name="f"):
    return Fact(
        name, subject, "r", target, f"u:{subject}", "u:r", f"u:{target}", tuple(subject_alias),
        tuple(target_alias), (), "prompt",
    )  # fmt: skip


def count(f, *texts):
    return frequency.counts([f], texts).tolist()[0]


def test_both_entities_must_be_named():
    f = fact("Marie Curie", "Warsaw", ["Maria Skłodowska"], ["Warszawa"])
    assert count(f, "Marie Curie was born in Warsaw.", "Warsaw is large.", "Marie Curie.") == 1
    assert count(f, "MARIA SKŁODOWSKA left Warszawa; marie curie left warsaw.") == 1
    assert count(f, "Marie  Curie\nsaw Warsaw") == 1  # white space is one space
    assert count(f, "Maria Sk\u0142odowska came to (Warsaw)", "x") == 1
    assert count(fact("Zoë", "Café X"), "Zoe\u0308 at Cafe\u0301 X") == 1  # composed alike


def test_only_whole_words_count():
    f = fact("Ann", "Oslo")
    assert count(f, "Anna saw Oslo", "Ann saw Oslofjord", "Hoslo Ann", "Ann2 Oslo") == 0
    assert count(f, "Ann's Oslo", "Oslo-Ann", "“Ann” ×Oslo×") == 3


def test_vowel_signs_belong_to_the_word():
    f = fact("राम", "भारत")
    assert count(f, "रामायण भारत", "राम भारतीय") == 0 and count(f, "राम, भारत।") == 1


def test_short_names_keep_their_case():
    f = fact("Barack Obama", "US")
    assert count(f, "Barack Obama told us", "barack obama left the US") == 1


def test_one_name_may_be_inside_another_or_shared():
    york, new_york = fact("York", "England"), fact("New York", "America")
    assert frequency.counts([york, new_york], ["New York, England, America"]).tolist() == [1, 1]
    twins = [fact("Paris", "France"), fact("Paris", "Texas"), fact("Paris", "Paris")]
    assert frequency.counts(twins, ["Paris in Texas"]).tolist() == [0, 1, 1]


def test_empty_names_are_ignored_and_no_facts_have_no_counts():
    assert count(fact("Ann", "Oslo", [""], [" "]), "Ann was here") == 0
    assert frequency.counts([], ["text"]).shape == (0,)
    assert frequency.counts([fact("Ann", "Oslo")], []).tolist() == [0]


def slow(facts, texts):
    """Every name of every fact by a regular expression in every text."""

    def names(text, all_names):
        for name in map(normalised, all_names):
            flags = 0 if len(name) <= 3 else re.IGNORECASE
            if name and re.search(rf"(?<![^\W_]){re.escape(name)}(?![^\W_])", text, flags):
                return True
        return False

    texts = list(map(normalised, texts))
    return [
        sum(names(t, [f.entity0, *f.entity0_alias]) and names(t, [f.entity1, *f.entity1_alias])
            for t in texts)
        for f in facts
    ]  # fmt: skip


@trex.needed
def test_real_facts_against_regular_expressions():
    texts, facts = [], []
    for _, record in zip(range(400), files.iter_sentences(trex.SENTENCES)):  # noqa: B905
        texts.append(record.text)
    for _, record in zip(range(150), files.iter_facts(trex.FACTS)):  # noqa: B905
        facts.append(record)
    counts = frequency.counts(facts, texts)
    assert counts.tolist() == slow(facts, texts) and counts.sum() > 100


@pytest.mark.slow
@trex.needed
def test_the_whole_of_trex_in_one_pass():
    sentences = list(files.iter_sentences(trex.SENTENCES))
    facts = list(files.iter_facts(trex.FACTS))
    counts = frequency.counts(facts, (s.text for s in sentences))  # Can be read once.
    # The sentences were aligned by names: every fact but one is named by the one that states it.
    assert (counts == 0).sum() <= 1


def test_buckets_begin_at_their_edges():
    edges = [10**i for i in range(5)]
    numbers, names = frequency.buckets([0, 1, 9, 10, 99, 100, 9999, 10_000, 10**9], edges)
    assert names == ["0", "1 to 9", "10 to 99", "100 to 999", "1000 to 9999", "10000 and more"]
    assert numbers.tolist() == [0, 1, 1, 2, 2, 3, 4, 5, 5]
    numbers, names = frequency.buckets([0, 1, 2, 3], edges=[1, 2, 3])
    assert names == ["0", "1", "2", "3 and more"] and numbers.tolist() == [0, 1, 2, 3]
    for wrong in ([], [0, 1], [2, 2]):
        with pytest.raises(ValueError, match="edges="):
            frequency.buckets([1], wrong)
