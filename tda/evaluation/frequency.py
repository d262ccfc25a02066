"""How often a corpus states a fact: passages that name both of its entities, found as strings.

As in Chang et al. (2024): an entity is named by its name or by any alias. A match is a whole word
or words: no letter or digit may touch it. Case does not count, except for names of three characters
or fewer, since "US" is not "us".
"""

import unicodedata
from collections import defaultdict
from collections.abc import Iterable, Sequence

import ahocorasick
import numpy as np

from tda.facts.records import Fact

# Names of at most so many characters are matched with their case.
_SHORT = 3


def normalised(text: str) -> str:
    """Returns a text with composed characters and single spaces, the form that is searched."""
    return " ".join(unicodedata.normalize("NFC", text).split())


class Names:
    """Finds which of some entities a text names.

    Args:
        entities: for each entity, its name and aliases; empty ones are ignored.
    """

    def __init__(self, entities: Sequence[Iterable[str]]):
        cased: dict[str, set[int]] = defaultdict(set)
        folded: dict[str, set[int]] = defaultdict(set)
        for number, names in enumerate(entities):
            for name in map(normalised, names):
                if len(name) > _SHORT:
                    folded[name.casefold()].add(number)
                elif name:
                    cased[name].add(number)
        # Aho and Corasick's automaton finds all names in one pass over a text.
        self._cased, self._folded = _automaton(cased), _automaton(folded)

    def __call__(self, text: str) -> set[int]:
        """Returns the numbers of the entities that `text` names."""
        text = normalised(text)
        entities: set[int] = set()
        for automaton, where in ((self._cased, text), (self._folded, text.casefold())):
            if automaton is None:
                continue
            for end, (length, numbers) in automaton.iter(where):
                start = end + 1 - length
                if not _touched(where, start - 1) and not _touched(where, end + 1):
                    entities |= numbers
        return entities


def _automaton(numbers_of: dict[str, set[int]]):
    if not numbers_of:
        return None
    automaton = ahocorasick.Automaton()
    for name, numbers in numbers_of.items():
        automaton.add_word(name, (len(name), frozenset(numbers)))
    automaton.make_automaton()
    return automaton


def _touched(text: str, at: int) -> bool:
    return 0 <= at < len(text) and text[at].isalnum()


def begins_with(text: str, names: Iterable[str]) -> bool:
    """Whether a text begins with one of the names, as a whole word or words."""
    text = normalised(text)
    for name in map(normalised, names):
        where = text
        if len(name) > _SHORT:
            where, name = text.casefold(), name.casefold()
        if name and where.startswith(name) and not _touched(where, len(name)):
            return True
    return False


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
