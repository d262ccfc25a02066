"""Labels of queries, the pool of clean facts, and subsets of a corpus."""

import random
from collections import defaultdict
from collections.abc import Iterable, Sequence

from tda.data.jsonl import RecordError
from tda.facts.records import Fact, Sentence


def relevant_passages(
    sentences: Iterable[Sentence],
    facts: Sequence[Fact],
    strict: bool = False,
    may_lack_sentences: bool = False,
) -> dict[str, tuple[str, ...]]:
    """Returns each fact's id with the passages that are annotated with it, in corpus order.

    The annotations are the sentences' `fact_triples`, matched by fact id, or by the three URIs
    if a triple has no id, united with the facts' `trex_sentences`.

    Args:
        sentences: The corpus.
        facts: The queries; other facts in the sentences are ignored.
        strict: Keep only sentences that begin with the subject, which state the fact far more
            often. If the corpus knows `subject_initial` of no triple, all labels are kept.
        may_lack_sentences: Whether facts may name sentences that the corpus lacks, as in one that
            was cut down on purpose; these are no labels.

    Raises:
        RecordError: A fact names a sentence that the corpus lacks.
    """
    # A triple names its fact by an id, or by the three URIs if it has none.
    by_name: dict[str | tuple[str, str, str], list[str]] = defaultdict(list)
    for fact in facts:
        by_name[fact.fact_id].append(fact.fact_id)
        by_name[fact.uris].append(fact.fact_id)
    position: dict[str, int] = {}
    loose: dict[str, set[str]] = {fact.fact_id: set() for fact in facts}
    initial: dict[str, set[str]] = {fact.fact_id: set() for fact in facts}
    any_known = False
    for i, sentence in enumerate(sentences):
        position[sentence.sentence_id] = i
        for triple in sentence.fact_triples:
            any_known = any_known or triple.subject_initial is not None
            name = triple.uris if triple.fact_id is None else triple.fact_id
            for fact_id in by_name.get(name, ()):
                loose[fact_id].add(sentence.sentence_id)
                if triple.subject_initial:
                    initial[fact_id].add(sentence.sentence_id)
    for fact in facts:
        for sentence_id in fact.trex_sentences:
            if sentence_id in position:
                loose[fact.fact_id].add(sentence_id)
            elif not may_lack_sentences:
                raise RecordError(
                    f"fact {fact.fact_id!r}, field 'trex_sentences': sentence {sentence_id!r} is"
                    " not in the corpus; add the sentence, or remove it from the fact"
                )
    # A fact's own `trex_sentences` do not say where the subject stands, so they are never strict.
    chosen = initial if strict and any_known else loose
    return {
        fact_id: tuple(sorted(ids, key=position.__getitem__)) for fact_id, ids in chosen.items()
    }


def clean_pool(
    facts: Sequence[Fact], sentences: Iterable[Sentence], exclude_relations: Sequence[str] = ()
) -> list[Fact]:
    """Returns the facts whose query has one right answer and a passage that states it, in order.

    A clean fact has no repetition between subject and object, one object for its subject and
    relation, and at least one passage by the strict labels of `relevant_passages`. Fields that a
    fact lacks are derived: `is_repetition` from whether one name holds the other,
    `n_objects_same_subject` from all facts.

    Args:
        facts: All facts of the corpus.
        sentences: The corpus.
        exclude_relations: As for `without_relations`.
    """
    included = without_relations(facts, exclude_relations)
    objects: dict[tuple[str, str], set[str]] = defaultdict(set)
    for fact in facts:
        objects[fact.entity0_uri, fact.predicate_uri].add(fact.entity1_uri)
    stated = relevant_passages(sentences, facts, strict=True, may_lack_sentences=True)

    def is_clean(fact: Fact) -> bool:
        n_objects = fact.n_objects_same_subject
        if n_objects is None:
            n_objects = len(objects[fact.entity0_uri, fact.predicate_uri])
        repeats = fact.is_repetition
        if repeats is None:
            subject, target = fact.entity0.casefold(), fact.entity1.casefold()
            repeats = target in subject or subject in target
        return not repeats and n_objects == 1 and bool(stated[fact.fact_id])

    return [fact for fact in included if is_clean(fact)]


def without_relations(facts: Sequence[Fact], exclude_relations: Sequence[str]) -> list[Fact]:
    """Returns the facts of all other relations.

    Args:
        facts: All facts of the corpus.
        exclude_relations: Relations to leave out, each by its name, its whole `predicate_uri`, or
            the last part of that ("P527").

    Raises:
        ValueError: No fact has one of the excluded relations; it may be misspelt.
    """
    excluded = set(exclude_relations)
    unknown = excluded - {name for fact in facts for name in _relation_names(fact)}
    if unknown:
        raise ValueError(f"exclude_relations: no fact has relation {sorted(unknown)}")
    return [fact for fact in facts if excluded.isdisjoint(_relation_names(fact))]


def select(
    sentences: Sequence[Sentence],
    facts: Sequence[Fact],
    n_sentences: int,
    n_queries: int,
    seed: int,
) -> tuple[list[Sentence], list[Fact]]:
    """Draws queries, and a corpus that holds every passage annotated with any of them.

    The draw depends on the seed and on the ids, never on the order of the arguments, in which the
    drawn sentences and facts are returned.

    Args:
        sentences: The corpus.
        facts: The facts to draw the queries from.
        n_sentences: Size of the drawn corpus: the annotated passages, filled up with others drawn
            uniformly.
        n_queries: Number of facts to draw.
        seed: Seed of both draws.

    Raises:
        ValueError: There are too few facts or sentences, or n_sentences cannot hold the passages
            that the queries are annotated with.
    """
    if not 0 <= n_queries <= len(facts):
        raise ValueError(f"n_queries is {n_queries}, but there are {len(facts)} facts to draw from")
    if not 0 <= n_sentences <= len(sentences):
        raise ValueError(f"n_sentences is {n_sentences}, but the corpus has {len(sentences)}")
    # Each draw has a stream of its own, so that neither depends on how much the other draws.
    drawn = _draw((fact.fact_id for fact in facts), n_queries, f"queries {seed}")
    queries = [fact for fact in facts if fact.fact_id in drawn]
    labels = relevant_passages(sentences, queries, may_lack_sentences=True)
    sentence_ids = {sentence_id for ids in labels.values() for sentence_id in ids}
    if len(sentence_ids) > n_sentences:
        raise ValueError(
            f"n_sentences is {n_sentences}, but the {n_queries} queries drawn are annotated in"
            f" {len(sentence_ids)} sentences; raise n_sentences to that, or lower n_queries"
        )
    unlabelled = (s.sentence_id for s in sentences if s.sentence_id not in sentence_ids)
    sentence_ids |= _draw(unlabelled, n_sentences - len(sentence_ids), f"sentences {seed}")
    return [sentence for sentence in sentences if sentence.sentence_id in sentence_ids], queries


def _draw(ids: Iterable[str], n: int, seed: str) -> set[str]:
    # Sorted first: the same ids in another order must give the same draw.
    return set(random.Random(seed).sample(sorted(ids), n))


def _relation_names(fact: Fact) -> tuple[str, str, str]:
    # "http://www.wikidata.org/prop/direct/P527" and "world:capital" alike.
    last = fact.predicate_uri.replace(":", "/").rsplit("/", 1)[-1]
    return fact.relation, fact.predicate_uri, last
