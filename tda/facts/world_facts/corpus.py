"""Generates the corpus: how often each fact is stated, in which words, among which distractors."""

import math
import random
from collections import defaultdict
from collections.abc import Iterator, Sequence

from tda.facts.records import Fact, Sentence
from tda.facts.world_facts.distractors import distractors
from tda.facts.world_facts.facts import WorldFact, fact_records, world_facts
from tda.facts.world_facts.places import cities, countries
from tda.facts.world_facts.templates import ADDITIONS, PAIRED_STATEMENTS, STATEMENTS, sentence

N_SENTENCES = 20_000

_MAX_STATEMENTS = 50
# The count falls with a fact's rank r of n as 50 (1 + 10 r/n)^-1.6: a few facts have nearly 50
# statements, half of them fewer than 4, the last one.
_TAIL_REACH = 10.0
_TAIL_EXPONENT = 1.6
# Spread of the log-normal noise on popularity, so that no two relations rank alike.
_POPULARITY_NOISE = 1.0
# Of the pairs of a country's facts that have a template, the share that is stated.
_PAIRED_SHARE = 0.5

# A statement: its text, and the facts that it states.
_Statement = tuple[str, tuple[WorldFact, ...]]


def generate(seed: int = 0) -> tuple[list[Sentence], list[Fact]]:
    """Generates the whole corpus; a pure function of the seed.

    Every sentence carries the triples of exactly the facts that it states, each marked
    `subject_initial` since the labels are exact. About half of the sentences state a fact.

    Returns:
        20,000 sentences in order of their ids, and all facts with their prompts and sentences.
    """
    facts = world_facts()
    statements = [*_single_statements(facts, seed), *_paired_statements(facts, seed)]
    rng = random.Random(f"distractors {seed}")
    texts = {text for text, _ in statements}
    for text in distractors(facts, countries(), cities(), rng):
        if len(statements) >= N_SENTENCES:
            break
        if text not in texts:
            texts.add(text)
            statements.append((text, ()))
    random.Random(f"order {seed}").shuffle(statements)

    sentences = []
    sentence_ids = defaultdict(list)
    for i, (text, stated) in enumerate(statements):
        sentence_id = f"wf-{i:06d}"
        triples = tuple(fact.triple() for fact in stated)
        sentences.append(Sentence(sentence_id, text, fact_triples=triples))
        for fact in stated:
            sentence_ids[fact.fact_id].append(sentence_id)
    return sentences, fact_records(facts, sentence_ids)


def n_statements(facts: Sequence[WorldFact], seed: int) -> dict[str, int]:
    """Returns how often to state each fact of one relation: a long tail over noisy popularity.

    The noise depends on the seed and the fact's id alone.
    """

    def noisy_popularity(fact: WorldFact) -> float:
        noise = random.Random(f"popularity {seed} {fact.fact_id}").gauss(0, _POPULARITY_NOISE)
        return math.log1p(fact.popularity) + noise

    ranked = sorted(facts, key=noisy_popularity, reverse=True)
    return {
        fact.fact_id: max(
            1, round(_MAX_STATEMENTS * (1 + _TAIL_REACH * rank / len(ranked)) ** -_TAIL_EXPONENT)
        )
        for rank, fact in enumerate(ranked)
    }


def _single_statements(facts: Sequence[WorldFact], seed: int) -> Iterator[_Statement]:
    """Yields statements of one fact; a border is a fact about either side."""
    by_relation = defaultdict(list)
    by_id = {fact.fact_id: fact for fact in facts}
    for fact in facts:
        # Only one direction of each border, which has two keys: it represents both.
        if fact.keys == tuple(sorted(fact.keys)):
            by_relation[fact.relation].append(fact)
    for relation, members in by_relation.items():
        wordings = [(template, added) for template in STATEMENTS[relation] for added in ADDITIONS]
        counts = n_statements(members, seed)
        for fact in members:
            rng = random.Random(f"wording {seed} {fact.fact_id}")
            back = by_id.get(":".join(("border", *fact.keys[::-1])))
            # Sampled without replacement: no text comes twice.
            for template, added in rng.sample(wordings, counts[fact.fact_id]):
                if back is None:
                    stated = (fact,)
                else:
                    stated = (fact, back) if rng.random() < 0.5 else (back, fact)
                names = {"s": stated[0].subject.phrase, "o": stated[0].object.phrase}
                yield sentence(template, added, **names), stated


def _paired_statements(facts: Sequence[WorldFact], seed: int) -> Iterator[_Statement]:
    of_country = defaultdict(dict)
    for fact in facts:
        if fact.relation not in ("border", "country", "us_state"):
            of_country[fact.keys[0]][fact.relation] = fact
    for subject, known in of_country.items():
        rng = random.Random(f"pairs {seed} {subject}")
        for relations, template in PAIRED_STATEMENTS:
            if rng.random() < _PAIRED_SHARE and all(relation in known for relation in relations):
                stated = tuple(known[relation] for relation in relations)
                names = {fact.relation: fact.object.phrase for fact in stated}
                names["s"] = stated[0].subject.phrase
                text = sentence(template, rng.choice(ADDITIONS), **names)
                yield text, stated
