"""What a passage says about a query, without labels: the types of the viewer's notes, by rule.

The types follow the paper's analysis (Chang et al. 2024, section 6). A judge decides whether a
passage states the fact; names and words decide the rest, as in `tda.evaluation.lexical`.
"""

import functools
import re

from tda.evaluation.judge import Claim
from tda.evaluation.lexical import names_in, relation_of, share, unqualified, words_of
from tda.viewer.notes import TYPES

# The closest type first; a passage is of the first one that fits.
KINDS, TITLES = tuple(TYPES), tuple(TYPES.values())
# A name is present in part with at least this share of its words; a relation, with more.
_PRESENT = 0.5
# Words in a row that two texts of the same form share.
_IN_A_ROW = 3


def kind_of(text: str, claim: Claim, is_stated: bool) -> str:
    """Returns the type of a passage for a query, a key of `TYPES`.

    - `states`: the judge says so.
    - `part`: it names subject or target, and has half of the words of the other's name, the last
      among them: of people, a first name in common says nothing.
    - `prior`: it has most of the prompt's words other than the subject: the relation, of others.
    - `entity`: it names subject or target.
    - `name`: it has half of the words of one of their names.
    - `form`: it shares three words or signs in a row with the prompt; numbers count as equal.
    - `unrelated`: none of these.

    Args:
        text: the passage.
        claim: the query, its target, and the names of its subject if known.
        is_stated: whether the passage entails the claim according to the judge.
    """
    if is_stated:
        return "states"
    query, words = _read(claim), set(words_of(text))
    named = [bool(entity(text)) for entity in query.entities]
    in_part = [[n for n in names if share(n, words) >= _PRESENT] for names in query.names]
    subject, target = (
        is_named or any(name[-1] in words for name in partial)
        for is_named, partial in zip(named, in_part, strict=True)
    )
    fits = {
        "part": any(named) and subject and target,
        "prior": bool(query.relation) and share(query.relation, words) > _PRESENT,
        "entity": any(named),
        "name": any(in_part),
        "form": not query.form.isdisjoint(_form(text)),
    }
    return next((kind for kind, is_fitting in fits.items() if is_fitting), "unrelated")


class _Query:
    """A claim, parsed once for all passages."""

    def __init__(self, claim: Claim):
        both = unqualified(claim.subject), unqualified(claim.target)
        self.entities = [names_in(names) for names in both]
        self.names = [[w for w in map(words_of, names) if w] for names in both]
        self.relation = relation_of(claim)
        self.form = _form(claim.prompt)


_read = functools.lru_cache(4096)(_Query)


def _form(text: str) -> set[tuple[str, ...]]:
    """Returns the runs of words and signs of a text, with every number as 0."""
    signs = re.findall(r"\w+|[^\w\s]", re.sub(r"\d+", "0", text.casefold()))
    return set(zip(*(signs[i:] for i in range(_IN_A_ROW)), strict=False))
