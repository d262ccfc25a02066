"""What is asked, and what a run knows of the queries that it asked itself."""

import dataclasses

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
