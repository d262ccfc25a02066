"""What a trace found: queries with their ranked passages, to print, to show and to save."""

import dataclasses
import html
import shutil
from collections.abc import Iterator, Sequence

from tda import results


@dataclasses.dataclass(frozen=True, slots=True)
class Found:
    """A passage that was retrieved.

    Attributes:
        id: of the passage; it leads back to its document and characters
            (`tda.data.tokenised.place_of`).
        score: of the passage for the query: the cosine of their encodings, or their product where
            the method has no unit norm.
        text: what it says; empty where only arrays were given.
    """

    id: str
    score: float
    text: str


@dataclasses.dataclass(frozen=True, slots=True)
class Answer:
    """A query and what was found for it.

    Attributes:
        id: of the query.
        prompt, target: what was asked; empty where only arrays were given.
        proponents: the passages that speak most for the target, best first.
        opponents: those that speak most against it, worst first.
    """

    id: str
    prompt: str
    target: str
    proponents: tuple[Found, ...]
    opponents: tuple[Found, ...]


class Traced(Sequence):
    """The answers of a trace, one for each query, in order.

    Attributes:
        method: what ranked the passages, as tables call it.
        answers: of the queries.
    """

    def __init__(self, method: str, answers: Sequence[Answer]):
        self.method, self.answers = method, tuple(answers)

    def __len__(self) -> int:
        return len(self.answers)

    def __getitem__(self, index):
        return self.answers[index]

    def records(self) -> Iterator[dict]:
        """The answers in the format of results files (`tda.results`)."""
        for answer in self:
            found = (
                [(f.id, f.text, f.score) for f in some]
                for some in (answer.proponents, answer.opponents)
            )
            yield results.record(answer.id, "queries", answer.prompt, answer.target, *found)

    def save(self, path) -> None:
        """Writes the answers to `path` as JSON lines, a record of `tda.results` each."""
        results.write(path, self.records())

    def show(self, queries: int = 10, passages: int = 5, opponents: bool = False) -> str:
        """The answers as text, each passage in a line of the terminal's width.

        Args:
            queries, passages: how many are shown at most.
            opponents: whether opponents are shown too.
        """
        width = shutil.get_terminal_size((100, 24)).columns
        lines = [self.method] if self.answers else [f"{self.method}: no queries"]
        for answer in self.answers[:queries]:
            lines += ["", _asked(answer)]
            for title, found in _lists(answer, opponents):
                lines += [f"  {title}"] if opponents else []
                for f in found[:passages]:
                    said = " ".join((f.text or f.id).split())
                    line = f"  {f.score:9.3f}  {said}"
                    lines.append(line if len(line) <= width else line[: width - 1] + "…")
        if len(self) > queries:
            lines += ["", f"… and {len(self) - queries} more queries"]
        return "\n".join(lines)

    def __str__(self) -> str:
        return self.show()

    def __repr__(self) -> str:
        return self.show()

    def _repr_html_(self) -> str:
        """The answers as notebooks show them: a table for each query."""
        out = [f"<p><b>{html.escape(self.method)}</b></p>"]
        for answer in self.answers[:20]:
            out.append(f"<p>{html.escape(_asked(answer))}</p><table>")
            out.append("<tr><th>score</th><th>passage</th><th>id</th></tr>")
            for title, found in _lists(answer, bool(answer.opponents)):
                if title == "opponents":
                    out.append("<tr><th colspan='3'>opponents</th></tr>")
                for f in found:
                    cells = f"{f.score:.3f}", f.text, f.id
                    row = "".join(
                        f"<td style='text-align:left'>{html.escape(c)}</td>" for c in cells
                    )
                    out.append(f"<tr>{row}</tr>")
            out.append("</table>")
        if len(self) > 20:
            out.append(f"<p>… and {len(self) - 20} more queries</p>")
        return "\n".join(out)


def _asked(answer: Answer) -> str:
    return f"{answer.prompt} → {answer.target}" if answer.target else f"query {answer.id}"


def _lists(answer: Answer, opponents: bool):
    yield "proponents", answer.proponents
    if opponents:
        yield "opponents", answer.opponents
