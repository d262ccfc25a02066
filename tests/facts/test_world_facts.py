"""The embedded corpus: exact labels, a long tail, good queries."""

import re
from collections import Counter, defaultdict

import pytest

from tda.facts import features
from tda.facts.features import load_tfds
from tda.facts.labels import clean_pool, relevant_passages
from tda.facts.world_facts import builder
from tda.facts.world_facts.corpus import generate
from tda.facts.world_facts.templates import PROMPTS, RELATION_NAMES, STATEMENTS
from tda.runtime.fingerprint import fingerprint_texts


@pytest.fixture(scope="module")
def world():
    return generate(seed=0)


@pytest.fixture(scope="module")
def queries(world):
    sentences, facts = world
    return clean_pool(facts, sentences)


def test_size_and_unique_ids_and_texts(world):
    sentences, facts = world
    assert len(sentences) == 20_000
    assert [s.sentence_id for s in sentences] == [f"wf-{i:06d}" for i in range(20_000)]
    assert len({s.text for s in sentences}) == 20_000
    assert len({fact.fact_id for fact in facts}) == len(facts)
    assert len({fact.relation for fact in facts}) >= 8


def test_the_corpus_is_a_function_of_its_seed(world):
    generate.__globals__["countries"].cache_clear()
    assert generate(seed=0) == world
    assert generate(seed=1)[0] != world[0]
    assert [f.fact_id for f in generate(seed=1)[1]] == [f.fact_id for f in world[1]]


def test_the_corpus_of_the_demo_is_always_the_same(world):
    """Guards: figures that change with a table of cities, or with the order of random choices."""
    assert fingerprint_texts(sentence.text for sentence in world[0]) == "d2c7aab0b1460f12"


def test_a_sentence_is_labelled_with_exactly_the_facts_whose_names_meet_in_it(world):
    sentences, facts = world
    by_names = defaultdict(set)
    for fact in facts:
        # "Singapore" alone is both names of its capital fact, and says nothing of it.
        if fact.entity0 != fact.entity1:
            by_names[fact.entity0, fact.entity1].add(fact.fact_id)
    # Longest first: "Papua New Guinea" does not mention Guinea.
    names = sorted({name for pair in by_names for name in pair}, key=len, reverse=True)
    pattern = re.compile(rf"(?<!\w)(?:{'|'.join(map(re.escape, names))})(?!\w)")
    self_named = {fact.fact_id for fact in facts if fact.entity0 == fact.entity1}
    for sentence in sentences:
        named = set(pattern.findall(sentence.text))
        stated = {i for a in named for b in named for i in by_names.get((a, b), ())}
        labelled = {triple.fact_id for triple in sentence.fact_triples}
        assert stated == labelled - self_named, sentence
        for triple in sentence.fact_triples:
            assert triple.entity0 in sentence.text and triple.entity1 in sentence.text
            assert triple.subject_initial is True


def test_facts_and_triples_agree(world):
    sentences, facts = world
    by_id = {fact.fact_id: fact for fact in facts}
    for sentence in sentences:
        for triple in sentence.fact_triples:
            assert by_id[triple.fact_id].uris == triple.uris
            assert sentence.sentence_id in by_id[triple.fact_id].trex_sentences
    from_triples = sum(len(sentence.fact_triples) for sentence in sentences)
    assert from_triples == sum(len(fact.trex_sentences) for fact in facts)


def test_queries_are_many_and_of_every_relation(queries):
    assert 600 <= len(queries) <= 1200
    assert {query.relation for query in queries} == set(RELATION_NAMES.values())


def test_queries_have_one_answer_that_the_prompt_does_not_hold(queries):
    assert len({(q.entity0_uri, q.predicate_uri) for q in queries}) == len(queries)
    for query in queries:
        for i in range(3):
            prompt = query.prompt(i)
            assert query.entity1.casefold() not in prompt.casefold()
            assert query.entity0 in prompt
            assert prompt[0].isupper() and prompt == prompt.strip()
            assert "  " not in prompt and "the the" not in prompt


def test_every_prompt_begins_a_statement_of_its_relation(world):
    for relation, statements in STATEMENTS.items():
        assert len(set(statements)) >= 6
        for prompt in PROMPTS[relation]:
            assert any(s.startswith(prompt) and s.endswith("{o}") for s in statements), prompt
        assert any(s.index("{o}") < s.index("{s}") for s in statements) or relation == "border"


def test_frequent_facts_are_stated_in_the_words_of_a_prompt(world, queries):
    text_of = {sentence.sentence_id: sentence.text for sentence in world[0]}
    often = [query for query in queries if len(query.trex_sentences) >= 20]
    assert len(often) > 30
    for query in often:
        statements = tuple(f"{query.prompt(i)} {query.entity1}" for i in range(3))
        texts = [text_of[i] for i in query.trex_sentences]
        assert any(text.startswith(statements) for text in texts), query


def test_copied_targets_are_marked(world):
    facts = {fact.fact_id: fact for fact in world[1]}
    for fact_id in ("capital:MX", "capital:SG", "continent:ZA", "border:NE:NG", "capital:TN"):
        assert facts[fact_id].is_repetition, fact_id
    for fact_id in ("capital:FR", "continent:FR", "border:PT:ES", "language:BR"):
        assert not facts[fact_id].is_repetition, fact_id
    assert facts["border:PT:ES"].n_objects_same_subject == 1
    assert facts["border:FR:ES"].n_objects_same_subject > 1


def test_some_facts_are_those_of_an_atlas(world):
    facts = {fact.fact_id: fact for fact in world[1]}
    for fact_id, prompt, target in (
        ("capital:FR", "The capital of France is", "Paris"),
        ("currency:JP", "The currency of Japan is the", "yen"),
        ("calling_code:GB", "The calling code of the United Kingdom is", "+44"),
        ("domain:DE", "The internet domain of Germany is", ".de"),
        ("language:BR", "The language of government in Brazil is", "Portuguese"),
        ("continent:EG", "Egypt is a country in", "Africa"),
        ("border:CA:US", "Canada shares a land border with the", "United States"),
    ):
        assert facts[fact_id].prompt(0) == prompt
        assert facts[fact_id].entity1 == target
    assert "capital:AQ" not in facts
    cities = {fact.entity0: fact.entity1 for fact in facts.values() if fact.relation == "country"}
    assert cities["Istanbul"] == "Turkey"
    # Two countries have one.
    assert not {"Hyderabad", "Valencia", "Birmingham"} & cities.keys()


def test_frequencies_have_a_long_tail(world, queries):
    labels = relevant_passages(world[0], queries)
    counts = sorted((len(ids) for ids in labels.values()), reverse=True)
    assert counts[-1] >= 1
    assert 40 <= counts[0] <= 60
    assert counts[len(counts) // 2] <= 5
    # A tenth of the facts has a large part of all statements.
    assert sum(counts[: len(counts) // 10]) > 0.35 * sum(counts)
    histogram = Counter(counts)
    assert histogram[1] > 50 and sum(histogram[n] for n in range(20, 61)) > 30


def test_distractors_speak_of_the_same_names(world):
    plain = [sentence.text for sentence in world[0] if not sentence.fact_triples]
    assert 8_000 <= len(plain) <= 12_000
    for name in ("Nairobi", "Kenya", "the yen", ".fr", "+33", "easily confused"):
        assert any(name in text for text in plain), name


def test_sentences_are_short_and_well_formed(world):
    lengths = Counter(len(sentence.text.split()) for sentence in world[0])
    assert max(lengths) <= 26
    assert sum(n for length, n in lengths.items() if length >= 8) > 0.9 * 20_000
    for sentence in world[0]:
        text = sentence.text
        assert text.endswith(".") and text[0] == text[0].upper()
        assert not re.search(r"\{|\}|  |\bthe [Tt]he\b|\.\.|,,", text), text


def test_the_builder_serves_the_generated_records(world, tmp_path, monkeypatch, capsys):
    records = world[0][:500], world[1][:100]  # all of them take 15 s
    monkeypatch.setattr(builder, "generate", lambda: records)
    monkeypatch.setattr(features, "_CHUNK", 150)
    assert load_tfds("world_facts", tmp_path) == records
    # TFDS by itself says that it downloads what is generated here.
    assert capsys.readouterr().out == f"preparing world_facts in {tmp_path}\n"
    assert load_tfds("world_facts", tmp_path) == records
    assert not capsys.readouterr().out
