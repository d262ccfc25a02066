"""The result of a trace: queries with their ranked passages, to print, to show and to save."""

import dataclasses
import html
import os
import pathlib
import shutil
import tempfile
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any, overload

from tda import results
from tda.data.documents import is_missing
from tda.data.tokenised import place_of
from tda.evaluation import by_label
from tda.evaluation.statistics import GroupSum, group_sums
from tda.runtime.directories import make_directory
from tda.viewer import opening
from tda.viewer.collection import Collection

# Queries that a notebook shows.
_SHOWN = 20


@dataclasses.dataclass(frozen=True, slots=True)
class RankedPassage:
    """A retrieved passage.

    Attributes:
        id: the passage's id, which leads back to its document and characters
            (`tda.data.tokenised.place_of`).
        score: the cosine of the passage's and the query's encodings, or their product if the method
            has no unit norm.
        text: the passage's text; empty if only arrays were given.
    """

    id: str
    score: float
    text: str


@dataclasses.dataclass(frozen=True, slots=True)
class Answer:
    """A query and its ranked passages.

    Attributes:
        id: the query's id.
        prompt, target: the query's text; empty if only arrays were given.
        proponents: the passages that support the target most, best first.
        opponents: those that speak most against it, worst first.
    """

    id: str
    prompt: str
    target: str
    proponents: tuple[RankedPassage, ...]
    opponents: tuple[RankedPassage, ...]


class TraceResult(Sequence[Answer]):
    """The answers of a trace, one for each query, in order.

    Attributes:
        method: the title of the method that ranked the passages.
        answers: the answers.

    Args:
        read_labels: returns the labels of a field of the corpus by its documents' ids; None if the
            corpus is not of documents with fields.
    """

    def __init__(
        self,
        method: str,
        answers: Sequence[Answer],
        read_labels: Callable[[str], Mapping[str, str]] | None = None,
    ):
        self.method, self.answers = method, tuple(answers)
        self._read_labels = read_labels

    def __len__(self) -> int:
        return len(self.answers)

    @overload
    def __getitem__(self, index: int) -> Answer: ...

    @overload
    def __getitem__(self, index: slice) -> Sequence[Answer]: ...

    def __getitem__(self, index: int | slice) -> Answer | Sequence[Answer]:
        return self.answers[index]

    def records(self) -> Iterator[dict]:
        """Yields the answers in the format of results files (`tda.results`)."""
        for answer in self:
            proponents, opponents = (
                [(p.id, p.text, p.score) for p in passages]
                for passages in (answer.proponents, answer.opponents)
            )
            yield results.record(
                answer.id, "queries", answer.prompt, answer.target, proponents, opponents
            )

    def to_pandas(self) -> Any:
        """Returns a pandas.DataFrame with a row for each ranked passage.

        Its columns: query, prompt, target, list ("proponents" or "opponents"), rank (from 1),
        score, passage (the id) and text.

        Raises:
            ImportError: pandas is not installed.
        """
        try:
            import pandas
        except ImportError as error:
            raise ImportError("a table needs pandas: pip install 'tda-jax[pandas]'") from error
        return pandas.DataFrame.from_records(
            [
                (a.id, a.prompt, a.target, title, rank, p.score, p.id, p.text)
                for a in self
                for title, ranked in _lists(a, opponents=True)
                for rank, p in enumerate(ranked, start=1)
            ],
            columns=["query", "prompt", "target", "list", "rank", "score", "passage", "text"],
        )

    def by(
        self,
        label_of: str | Mapping[str, str] | Callable[[RankedPassage], str],
        resamples: int = 10_000,
        seed: int = 0,
    ) -> list[GroupSum]:
        """Sums the scores of passages by a common label: a source, a topic, a year.

        Single passages are noisy evidence, sums of many less so.

        Args:
            label_of: a field of the corpus's documents, such as "source"; the label of each
                document by its id; or a function from a passage to a label.
            resamples, seed: of the permutation test and of the intervals over queries.

        Returns:
            The groups (`tda.evaluation.statistics.group_sums`), in descending order of how far
            their passages' scores exceed the mean beyond chance.

        Raises:
            ValueError: some passages were not ranked, a document has no label, or the corpus has no
                fields.
        """
        complete = by_label.complete_scores(self.records())
        if complete is None and not any(a.opponents for a in self):
            raise ValueError(
                "sums by label need the scores of all passages, and a second stage (rerank=) ranks "
                "its candidates alone; trace without it, with k= the number of passages"
            )
        if complete is None:
            raise ValueError(
                "sums by label need the scores of all passages, and this trace has only each "
                "query's first and last; trace again with k= the number of passages"
            )
        if isinstance(label_of, str):
            label_of = self._labels(label_of)
        names, table_QxC = complete
        passages = {p.id: p for a in self for p in a.proponents + a.opponents}
        labels = [_label(label_of, passages[name]) for name in names]
        return group_sums(table_QxC, labels, resamples, seed)

    def _labels(self, field: str) -> Mapping[str, str]:
        if self._read_labels is None:
            raise ValueError(
                f"the passages are not a corpus of files, so they have no field {field!r}; give "
                "the labels of documents by their ids"
            )
        return self._read_labels(field)

    def view(
        self,
        port: int = 0,
        labels: Sequence[str] | Mapping[str, Mapping[str, str]] | None = None,
    ) -> None:
        """Shows the answers in the web viewer; prints its address, and serves until interrupted.

        Args:
            port: the port on this machine; 0 takes a free one.
            labels: fields of the corpus's documents, such as ["source"], by which the viewer adds
                up scores as `by` does; or for each key the labels of documents by their ids.
        """
        if labels is not None and not isinstance(labels, Mapping):
            labels = {field: self._labels(field) for field in labels}
        with tempfile.TemporaryDirectory() as folder:
            path = os.path.join(folder, "answers.jsonl")
            self.save(path)
            collection = Collection()
            collection.add(path, "answers", self.method)
            collection.groups = by_label.FiguresByLabel(labels) if labels else None
            opening.serve(collection, None, "127.0.0.1", port, [], allow_urls=False)

    def save(self, path: str | os.PathLike) -> None:
        """Writes the answers to `path` as JSON lines, a record of `tda.results` each.

        Its folder is made if it does not exist.
        """
        make_directory(pathlib.Path(path).parent)
        results.write(path, self.records())

    def show(self, queries: int = 10, passages: int = 5, opponents: bool = False) -> str:
        """Returns the answers as text, a line of the terminal's width for each passage.

        Args:
            queries, passages: the most queries to show, and the most passages of each.
            opponents: whether to show opponents too.
        """
        width = shutil.get_terminal_size((100, 24)).columns
        lines = [self.method] if self.answers else [f"{self.method}: no queries"]
        for answer in self.answers[:queries]:
            lines += ["", _describe_query(answer)]
            for title, ranked in _lists(answer, opponents):
                lines += [f"  {title}"] if opponents else []
                for passage in ranked[:passages]:
                    text = " ".join((passage.text or passage.id).split())
                    line = f"  {passage.score:9.3f}  {text}"
                    lines.append(line if len(line) <= width else line[: width - 1] + "…")
        if len(self) > queries:
            lines += ["", f"… and {len(self) - queries} more queries"]
        return "\n".join(lines)

    def __str__(self) -> str:
        return self.show()

    def __repr__(self) -> str:
        return self.show()

    def _repr_html_(self) -> str:
        """Returns the answers as HTML for notebooks: a table for each query."""
        out = [f"<p><b>{html.escape(self.method)}</b></p>"]
        for answer in self.answers[:_SHOWN]:
            out.append(f"<p>{html.escape(_describe_query(answer))}</p><table>")
            out.append("<tr><th>score</th><th>passage</th><th>id</th></tr>")
            for title, ranked in _lists(answer, bool(answer.opponents)):
                if title == "opponents":
                    out.append("<tr><th colspan='3'>opponents</th></tr>")
                for passage in ranked:
                    cells = f"{passage.score:.3f}", passage.text, passage.id
                    row = "".join(
                        f"<td style='text-align:left'>{html.escape(c)}</td>" for c in cells
                    )
                    out.append(f"<tr>{row}</tr>")
            out.append("</table>")
        if len(self) > _SHOWN:
            out.append(f"<p>… and {len(self) - _SHOWN} more queries</p>")
        return "\n".join(out)


def _describe_query(answer: Answer) -> str:
    if not answer.target:
        return answer.prompt or f"query {answer.id}"
    return f"{answer.prompt} → {answer.target}"


def _label(
    label_of: Mapping[str, str] | Callable[[RankedPassage], str], passage: RankedPassage
) -> str:
    if callable(label_of):
        label = label_of(passage)
    else:
        label = by_label.label_of(label_of, passage.id)
    if is_missing(label):
        document = place_of(passage.id)[0]
        raise ValueError(f"document {document!r} has no label; give one to every document")
    return str(label)


def _lists(answer: Answer, opponents: bool) -> Iterator[tuple[str, tuple[RankedPassage, ...]]]:
    yield "proponents", answer.proponents
    if opponents:
        yield "opponents", answer.opponents
