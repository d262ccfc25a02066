"""The interface of a judge, which says whether a passage entails a query with its target.

A judge scores pairs of a premise and a claim from 0 to 1. A passage is read in windows of a few
sentences, and has the score of its best window (`tda.evaluation.judges` has the judges by name).
"""

import dataclasses
import re
from collections.abc import Sequence

import numpy as np


@dataclasses.dataclass(frozen=True)
class Claim:
    """A query with its target, which a passage may entail."""

    text: str
    """Prompt and target, the hypothesis."""
    prompt: str
    target: tuple[str, ...]
    """The target's name and aliases."""
    subject: tuple[str, ...] = ()
    """Names of the claim's subject; empty if unknown."""


@dataclasses.dataclass(frozen=True)
class JudgeSettings:
    """The settings that a judge is made with (the section `judge` of a config)."""

    model: str = ""
    """A directory, or a name on the Hugging Face hub."""
    batch: int = 32
    """Pairs that a model scores at a time."""
    tokens: int = 512
    """The most tokens of premise and claim; a longer premise is cut at its end."""


class Judge:
    """Scores how surely premises entail claims.

    Attributes:
        identity: a text that names everything that scores depend on; names the files of scores.
    """

    identity: str

    def score(self, pairs: Sequence[tuple[str, Claim]]) -> np.ndarray:
        """Returns a score from 0 to 1 for each pair of a premise and a claim, float [N]."""
        raise NotImplementedError


# A sentence ends at one of these marks before white space, or at the end of a line.
_END = re.compile(r"[.!?…]+[\"'”’)\]]*(?=\s)|[。！？]+|\n+")
# A full stop after one of these, or after an initial, does not end a sentence.
_ABBREVIATED = re.compile(
    r"(?:^|[\s(])(?:\w|Mr|Mrs|Ms|Dr|Prof|St|Jr|Sr|Mt|No|vs|ca|cf|Rev|Gen|Col|Capt|Lt|Sgt|Hon|Inc|Ltd"
    r"|Co|(?:\w\.)+\w)\.$"
)


def sentences(text: str) -> list[slice]:
    """Returns the span of each sentence of a text, without white space around it.

    By punctuation: a mark that ends a sentence is followed by white space and no lower-case letter,
    and does not follow an initial or a common abbreviation.
    """
    out, start = [], 0
    for match in _END.finditer(text):
        end = match.end()
        follows = text[end:].lstrip()[:1] if "\n" not in match[0] else ""
        if follows.islower() or _ABBREVIATED.search(text[max(start, end - 20) : end]):
            continue
        out.append((start, end))
        start = end
    out.append((start, len(text)))
    return [
        slice(b + len(text[b:e]) - len(text[b:e].lstrip()), b + len(text[b:e].rstrip()))
        for b, e in out
        if text[b:e].strip()
    ]


def windows(text: str, count: int) -> list[slice]:
    """Returns a text's windows of `count` consecutive sentences; the text itself if it has no more.

    With 0 the text is the only window.
    """
    spans = sentences(text) if count else []
    if len(spans) <= count:
        return [slice(0, len(text))]
    last = len(spans) - count
    return [slice(spans[i].start, spans[i + count - 1].stop) for i in range(last + 1)]
