"""Labels, the clean pool and the draw of a subset."""

import dataclasses
import random

import pytest

from tda.data.jsonl import RecordError
from tda.facts import files
from tda.facts.labels import clean_pool, relevant_passages, select
from tda.facts.records import Fact, Sentence, Triple
from tests.facts import trex


def make_fact(name, sentences=(), **fields):
    defaults = dict(
        fact_id=name,
        entity0=f"subject {name}",
        relation="r",
        entity1=f"object {name}",
        entity0_uri=f"u:s-{name}",
        predicate_uri="http://x/direct/P1",
        entity1_uri=f"u:o-{name}",
        entity0_alias=(),
        entity1_alias=(),
        trex_sentences=tuple(sentences),
        prompt0="p",
    )
    return Fact(**defaults | fields)


def make_triple(name, initial=None, with_id=True):
    fact_id = name if with_id else None
    uris = (f"u:s-{name}", "http://x/direct/P1", f"u:o-{name}")
    return Triple(fact_id, None, None, *uris, initial)


def make_sentence(name, *triples):
    return Sentence(name, f"text {name}", fact_triples=triples)


SENTENCES = [
    make_sentence("s3", make_triple("a", True)),
    make_sentence("s1", make_triple("a", False), make_triple("b", None)),
    make_sentence("s2"),
    make_sentence("s0", make_triple("other", True)),
]


def test_both_sources_of_labels_are_united_in_corpus_order():
    facts = [make_fact("a", ["s2", "s1"]), make_fact("b"), make_fact("c")]
    labels = relevant_passages(SENTENCES, facts)
    assert labels == {"a": ("s3", "s1", "s2"), "b": ("s1",), "c": ()}


def test_strict_keeps_only_subject_initial():
    facts = [make_fact("a", ["s2", "s1"]), make_fact("b")]
    assert relevant_passages(SENTENCES, facts, strict=True) == {"a": ("s3",), "b": ()}


def test_strict_labels_are_all_labels_if_no_triple_knows_its_subject_position():
    sentences = [make_sentence("s0", make_triple("a")), make_sentence("s1")]
    facts = [make_fact("a", ["s1"])]
    assert relevant_passages(sentences, facts, strict=True) == {"a": ("s0", "s1")}


def test_triples_without_id_match_by_their_uris():
    sentences = [make_sentence("s0", make_triple("a", with_id=False)), make_sentence("s1")]
    assert relevant_passages(sentences, [make_fact("a"), make_fact("b")]) == {"a": ("s0",), "b": ()}
    swapped = dataclasses.replace(make_fact("a"), entity0_uri="u:o-a", entity1_uri="u:s-a")
    assert relevant_passages(sentences, [swapped]) == {"a": ()}


def test_a_label_that_the_corpus_lacks_is_refused_unless_allowed():
    facts = [make_fact("a", ["s3", "gone"])]
    with pytest.raises(RecordError, match="'a'.*'trex_sentences'.*'gone'"):
        relevant_passages(SENTENCES, facts)
    assert relevant_passages(SENTENCES, facts, may_lack_sentences=True) == {"a": ("s3", "s1")}


def test_clean_pool_takes_each_condition_into_account():
    names = ["good", "repeats", "many", "unstated", "late", "excluded"]
    sentences = [
        make_sentence(f"s-{name}", make_triple(name, name != "late"))
        for name in names
        if name != "unstated"
    ]
    facts = [
        make_fact("good", is_repetition=False, n_objects_same_subject=1),
        make_fact("repeats", is_repetition=True, n_objects_same_subject=1),
        make_fact("many", is_repetition=False, n_objects_same_subject=2),
        make_fact("unstated", is_repetition=False, n_objects_same_subject=1),
        make_fact("late", is_repetition=False, n_objects_same_subject=1),
        make_fact("excluded", predicate_uri="http://x/direct/P11"),
    ]
    pool = clean_pool(facts, sentences)
    assert [fact.fact_id for fact in pool] == ["good", "excluded"]
    pool = clean_pool(facts, sentences, exclude_relations=["P11"])
    assert [fact.fact_id for fact in pool] == ["good"]
    with pytest.raises(ValueError, match="P7"):
        clean_pool(facts, sentences, exclude_relations=["P7"])


def test_clean_pool_derives_absent_fields():
    sentences = [make_sentence(f"s{name}", make_triple(name, True)) for name in "abcdef"]
    facts = [
        make_fact("a", entity0_uri="u:same"),
        make_fact("b", entity0_uri="u:same"),
        make_fact("c", entity0="New York City", entity1="New York"),
        make_fact("d"),
        # The other way round, as in the docstring of `Fact.is_repetition`.
        make_fact("e", entity0="Mexico", entity1="Mexico City"),
        make_fact("f", entity0="euro", entity1="Europe", is_repetition=False),
    ]
    # What a fact says of itself counts, whatever its names are.
    assert [fact.fact_id for fact in clean_pool(facts, sentences)] == ["d", "f"]


def corpus(n=60):
    sentences = [make_sentence(f"s{i}", make_triple(f"f{i // 2}", True)) for i in range(n)]
    return sentences, [make_fact(f"f{i}") for i in range(n // 2)]


def test_select_keeps_every_annotated_passage():
    sentences, facts = corpus()
    chosen, queries = select(sentences, facts, n_sentences=25, n_queries=7, seed=3)
    assert len(chosen) == len(set(chosen)) == 25
    assert len(queries) == 7
    assert chosen == [sentence for sentence in sentences if sentence in chosen]
    assert queries == [fact for fact in facts if fact in queries]
    labels = relevant_passages(sentences, queries)
    assert relevant_passages(chosen, queries) == labels
    assert all(len(ids) == 2 for ids in labels.values())


def test_select_depends_on_seed_and_ids_only():
    sentences, facts = corpus()
    first = select(sentences, facts, 25, 7, seed=3)
    assert select(sentences, facts, 25, 7, seed=3) == first
    assert select(sentences, facts, 25, 7, seed=4) != first
    random.Random(0).shuffle(sentences)
    shuffled = select(sentences, facts[::-1], 25, 7, seed=3)
    assert [set(part) for part in shuffled] == [set(part) for part in first]


def test_select_refuses_numbers_that_do_not_fit():
    sentences, facts = corpus()
    with pytest.raises(ValueError, match="annotated in 14 sentences; raise n_sentences"):
        select(sentences, facts, n_sentences=13, n_queries=7, seed=0)
    with pytest.raises(ValueError, match="there are 30 facts"):
        select(sentences, facts, n_sentences=60, n_queries=31, seed=0)
    with pytest.raises(ValueError, match="the corpus has 60"):
        select(sentences, facts, n_sentences=61, n_queries=1, seed=0)


@trex.needed
def test_clean_pool_of_the_real_data():
    sentences = list(files.iter_sentences(trex.SENTENCES))
    facts = list(files.iter_facts(trex.FACTS))
    labels = relevant_passages(sentences, facts)
    assert sum(map(len, labels.values())) == 98_820
    assert len(clean_pool(facts, sentences)) == 10_333
    worst = ["P527", "P138", "P20", "P937", "P463"]
    assert len(clean_pool(facts, sentences, worst)) == 9_317
