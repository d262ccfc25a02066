"""What is asked, and what a run knows of the queries that it asked itself."""

import dataclasses
import functools
from collections.abc import Sequence

import numpy as np

from tda.data.tokens import TokenTable


@dataclasses.dataclass(frozen=True)
class Question:
    """A live question.

    Attributes:
        prompt, target: its text.
        table: it as a table of one sequence.
        number: of the run's query that it is, from 0; None where it is none of them.
    """

    prompt: str
    target: str
    table: TokenTable
    number: int | None = None

    @property
    def text(self) -> str:
        """Prompt and target, as retrievers of texts are asked."""
        return f"{self.prompt} {self.target}"


@dataclasses.dataclass(frozen=True)
class Known:
    """A run's own queries, and the passages that are correct for them.

    Attributes:
        ids: of the queries, in the run's order.
        prompts, targets: their text.
        correct: the correct passage rows of each, int64.
    """

    ids: Sequence[str] = ()
    prompts: Sequence[str] = ()
    targets: Sequence[str] = ()
    correct: Sequence[np.ndarray] = ()

    def number(self, prompt: str, target: str) -> int | None:
        """Which of the queries a question is, the first of those alike; None where it is none."""
        return self._numbers.get(_key(prompt, target))

    @functools.cached_property
    def _numbers(self) -> dict[tuple[str, str], int]:
        keys = [_key(*pair) for pair in zip(self.prompts, self.targets, strict=True)]
        return {key: q for q, key in reversed(list(enumerate(keys)))}


def _key(prompt: str, target: str) -> tuple[str, str]:
    # White space between them makes no other question: they are joined by one space.
    return prompt.rstrip(), target.strip()
