"""Names of entities in texts, found as strings.

As in Chang et al. (2024): a match is a whole word or words: no letter or digit may touch it, nor a
mark that belongs to a letter. Case does not count, except for names of three characters or fewer,
since "US" is not "us".
"""

import unicodedata
from collections import defaultdict
from collections.abc import Iterable, Sequence

import ahocorasick

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
    # Vowel signs and other combining marks belong to the letter before them.
    return 0 <= at < len(text) and (
        text[at].isalnum() or unicodedata.category(text[at]).startswith("M")
    )


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
