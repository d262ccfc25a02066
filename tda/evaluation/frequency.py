"""How often a corpus states a fact: passages that name both of its entities, found as strings.

As in Chang et al. (2024): an entity is named by its name or by any alias (`tda.facts.names` says
what a match is).
"""

from collections import defaultdict
from collections.abc import Iterable, Sequence

import numpy as np

from tda.facts.names import Names
from tda.facts.records import Fact


def entity(name: str, aliases: Iterable[str]) -> tuple[str, ...]:
    """Returns all names of an entity, which identify it: a user's corpus may have no URIs."""
    return tuple(sorted({name, *aliases}))


def counts(facts: Sequence[Fact], texts: Iterable[str], advance=lambda n: None) -> np.ndarray:
    """Counts the texts that name both entities of each fact: int64 [facts].

    Args:
        facts: the facts.
        texts: the passages; each counts at most once.
        advance: called with the number of texts done since the last call.
    """
    entities: dict[tuple[str, ...], int] = {}

    def number(name: str, aliases: Iterable[str]) -> int:
        return entities.setdefault(entity(name, aliases), len(entities))

    facts_of: dict[int, list[tuple[int, int]]] = defaultdict(list)
    for i, fact in enumerate(facts):
        subject = number(fact.entity0, fact.entity0_alias)
        facts_of[subject].append((i, number(fact.entity1, fact.entity1_alias)))
    names = Names(list(entities))
    out = np.zeros(len(facts), np.int64)
    for text in texts:
        named = names(text)
        for subject in named & facts_of.keys():
            for i, target in facts_of[subject]:
                out[i] += target in named
        advance(1)
    return out


def buckets(frequencies, edges: Sequence[int]) -> tuple[np.ndarray, list[str]]:
    """Returns each frequency's bucket, int64, and the buckets' names, such as "0" and "1 to 9".

    Args:
        frequencies: int [facts].
        edges: the least frequency of every bucket except the first, in rising order.

    Raises:
        ValueError: `edges` is empty, not rising, or begins below 1.
    """
    edges = list(edges)
    if not edges or edges[0] < 1 or any(b <= a for a, b in zip(edges, edges[1:], strict=False)):
        raise ValueError(f"edges={edges} must be rising whole numbers from 1 up")
    names = []
    for low, high in zip([0, *edges], edges, strict=False):
        names.append(str(low) if high == low + 1 else f"{low} to {high - 1}")
    names.append(f"{edges[-1]} and more")
    return np.searchsorted(edges, np.asarray(frequencies), side="right"), names
