"""A judge by names and words alone, without any model."""

import functools
import re
from collections.abc import Sequence

import numpy as np

from tda.evaluation.judge import Claim, Judge
from tda.facts.names import Names, normalised

# Words of a prompt that say nothing about its relation.
_FUNCTION_WORDS = frozenset(
    "a an the of in on at by for to from with and or as is are was were be been has have had it "
    "its he she they his her their that this which who what where when how do does did".split()
)
# Forms of a word count as equal by so many first letters: "border", "borders".
_STEM = 5
# The share of a score that the relation's words decide: never whether it is above 0.5.
_RELATION = 0.2


class Lexical(Judge):
    """Looks for names: a premise that names subject and target counts as stating the claim.

    It needs no model and ignores meaning: "X, not Y, was born in Z" entails the claim for both. The
    score is 0 without the target. Otherwise it is the share of the subject's words that the premise
    has (1 for any name in full), of which a fifth depends on the share of the prompt's other words.
    If the subject's names are unknown, all words of the prompt count as the subject's.
    """

    identity = "lexical-2"

    def score(self, pairs):
        """See `Judge`."""
        return np.array([self._score(*pair) for pair in pairs], np.float32)

    def _score(self, premise: str, claim: Claim) -> float:
        target, subject = names_in(claim.target), names_in(unqualified(claim.subject))
        if not target(premise):
            return 0.0
        words, relation = set(words_of(premise)), relation_of(claim)
        names = [words_of(name) for name in unqualified(claim.subject)]
        if not names:
            return share(relation, words)
        is_named = bool(subject(premise))
        # A name of function words or signs alone ("The Who", "!!!") has no share: only all of it.
        named = 1.0 if is_named else max((share(n, words) for n in names if n), default=0.0)
        return named * (1 - _RELATION + _RELATION * share(relation, words))


@functools.lru_cache(4096)
def names_in(names: tuple[str, ...]) -> Names:
    """Returns a finder of an entity's names in a text; empty names are ignored."""
    return Names([names])


def unqualified(names: tuple[str, ...]) -> tuple[str, ...]:
    """Returns names without qualifiers such as "(comedian)", which texts do not have."""
    return tuple(filter(None, (re.sub(r"\s*\([^()]*\)\s*$", "", name) for name in names)))


def words_of(text: str) -> list[str]:
    """Returns the first letters of the words of a text, without function words."""
    words = re.findall(r"\w+", normalised(text).casefold())
    return [word[:_STEM] for word in words if word not in _FUNCTION_WORDS]


@functools.lru_cache(4096)
def relation_of(claim: Claim) -> tuple[str, ...]:
    """Returns a prompt's words (`words_of`) that are in none of its subject's names."""
    about = {word for name in unqualified(claim.subject) for word in words_of(name)}
    return tuple(word for word in words_of(claim.prompt) if word not in about)


def share(words: Sequence[str], present: set[str]) -> float:
    """Returns what share of some words is present; 1 without any words."""
    return sum(word in present for word in words) / len(words) if words else 1.0
