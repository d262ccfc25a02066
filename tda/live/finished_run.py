"""Answers live questions from a finished run's model, stores and retrievers.

A live question is a run with one query. The same code searches for it, so a query of the run gets
the passages and scores that the run gave it.
"""

import functools
import math
import pathlib

import jax
import numpy as np
from flax import nnx

from tda import results
from tda.data.joining import join
from tda.data.rows import Query, Question
from tda.live.heat import Heat
from tda.live.speaker import Speaker, may_begin_word
from tda.methods import METHODS, Method
from tda.methods import parse as parse_methods
from tda.retrieval.ranked import Ranked
from tda.run import remembered
from tda.run.registry import retriever_of
from tda.run.remembered import LiveError
from tda.run.retrievers import Queries, Retriever
from tda.runtime.progress import Progress

# Passages shown on either side of one, in its document: about a screen of text.
_NEIGHBOURS = 3

__all__ = ["LiveError", "LiveRun", "open_workdir"]


def open_workdir(path) -> "LiveRun | None":
    """Opens a finished run for questions; returns None if the workdir holds no model."""
    path = pathlib.Path(path)
    return LiveRun(path) if (path / "model" / "config.json").exists() else None


class LiveRun:
    """Answers a viewer's questions (`tda.viewer.server.Live`); the first question opens the run.

    Retrievers are made once, so that encoders stay compiled and R^(−1/2), indices and vectors in
    memory.

    Args:
        path: the workdir.
    """

    def __init__(self, path: pathlib.Path):
        self._path = path
        self._retrievers: dict[str, Retriever] = {}

    @property
    def heat_methods(self) -> tuple[str, ...]:
        """Names of the methods, plugins' included, whose scores `heat` can split."""
        return tuple(n for n, m in METHODS.items() if m.shares_scan and m.curvature == "none")

    @functools.cached_property
    def run(self):
        """The run (`tda.run.run.Run`)."""
        return remembered.open_run(self._path)

    @functools.cached_property
    def speaker(self) -> Speaker:
        """The run's model, to complete prompts and score targets."""
        config, corpus = self.run.config, self.run.corpus
        return Speaker(
            self.run.trained.model, corpus.tokenizer, config.model.context, config.data.joiner
        )

    @functools.cached_property
    def _heat(self) -> Heat:
        return Heat(self.run, self.speaker, self._retriever(METHODS["grad_dot"]).encodings)

    def _open(self, progress: Progress) -> None:
        if "run" not in vars(self):
            progress("opening the model and its store", 0, 0)
        self.run.corpus.on_progress = progress

    def _retriever(self, method: Method) -> Retriever:
        factory = retriever_of(method)
        if method.searched_by not in self._retrievers:
            self._retrievers[method.searched_by] = factory(self.run)
        return self._retrievers[method.searched_by]

    def lacks(self, method: Method) -> str | None:
        """Returns why a method cannot be asked here, or None if it can."""
        try:
            return self._retriever(method).lacks(method)
        except ValueError as error:  # a plugin's method without a retriever
            return str(error)

    def _takes_contrasts(self, method: Method) -> bool:
        return self.lacks(method) is None and self._retriever(method).takes_contrasts

    def describe(self, progress: Progress) -> dict:
        """Returns all methods, the run's own first, why some are unavailable, and sizes."""
        self._open(progress)
        names = [name.strip() for name in self.run.config.methods.split(",")]
        usual = [name for name in names if name in METHODS]
        model = self.run.trained.model
        return {
            "methods": [
                {
                    "name": name,
                    "title": METHODS[name].title,
                    "usual": name in usual,
                    "lacks": self.lacks(METHODS[name]),
                    "contrasts": self._takes_contrasts(METHODS[name]),
                }
                for name in dict.fromkeys([*usual, *METHODS])
            ],
            "passages": self.run.corpus.rows,
            "parameters": sum(x.size for x in jax.tree.leaves(nnx.state(model, nnx.Param))),
        }

    def complete(self, progress: Progress, prompt: str, tokens: int) -> dict:
        """Returns the model's own completion of a prompt, and the prompt's tokens.

        "continues" says whether it begins with the rest of the prompt's last word.
        """
        self._open(progress)
        steps = self.speaker.complete(prompt, tokens, on_progress=progress)
        ended = bool(steps) and steps[-1]["token"] == "<eos>"
        answers = self.speaker.answers(prompt)
        ids = self.speaker.ids_of(prompt)
        steps = steps[:-1] if ended else steps
        continues = not may_begin_word(prompt, "".join(step["token"] for step in steps))
        return {
            "prompt": ids,
            "steps": steps,
            "ended": ended,
            "continues": continues,
            "answers": answers,
        }

    def trace(self, progress: Progress, query: Question, methods: list[str], k: int) -> dict:
        """Returns the passages of a question by method, as results records."""
        self._open(progress)
        chosen = parse_methods(",".join(methods))
        likelihood = self.speaker.likelihood(query)
        records = self.records(query, chosen, k, progress)
        other = self.speaker.likelihood(_contrast(query)) if query.contrast else None
        return {
            "probability": math.exp(-likelihood["nats"]),
            "rank": likelihood["rank"],
            "contrast_probability": None if other is None else math.exp(-other["nats"]),
            "methods": [
                {"name": n, "title": m.title, "record": records[n]} for n, m in chosen.items()
            ],
        }

    def records(
        self, query: Question, methods: dict[str, Method], k: int, progress: Progress
    ) -> dict[str, dict]:
        """Returns the passages of a question by method, as results records.

        Args:
            query: the question.
            methods: the methods by name.
            k: the number of proponents, and of opponents.
            progress: called as the search advances; an exception that it raises stops the search.

        Raises:
            ValueError: the question does not fit the context, or a method is not available here.
        """
        for name, method in methods.items():
            if why := self.lacks(method):
                raise ValueError(f"{name}: {why}")
            if query.contrast and not self._takes_contrasts(method):
                raise ValueError(
                    f"{name}: it ranks for one target, not for the difference of two; leave the "
                    "method out, or the other target"
                )
        queries = self._queries(query)
        groups: dict[str, dict[str, Method]] = {}
        for name, method in methods.items():
            groups.setdefault(method.searched_by, {})[name] = method
        records = {}
        for group in groups.values():
            retriever = self._retriever(next(iter(group.values())))
            for name, result in retriever.search(queries, group, k, progress).items():
                records[name] = self._record(query, queries, result.ranked)
        return records

    def _queries(self, query: Question) -> Queries:
        if query.contrast:
            return self._contrasted(query)
        table, known = self.speaker.table(query), self.run.corpus.known
        number = known.number(query.prompt, query.target)
        if number is not None:
            # Generated as other tokens, or with other white space, it is another question.
            run_query = Query(query.id, known.prompts[number], known.targets[number])
            run_table = self.speaker.table(run_query)
            is_same = np.array_equal(run_table.tokens, table.tokens)
            if not (is_same and np.array_equal(run_table.scored, table.scored)):
                number = None
        # Texts of known tokens may lack the space between them; the run's joiner is not in them.
        joiner = self.speaker.joiner if query.tokens is None else None
        text = join(query.prompt, query.target, joiner)
        return Queries(table, [text], [number], {})

    def _contrasted(self, query: Question) -> Queries:
        other = _contrast(query)
        text = join(query.prompt, query.target, self.speaker.joiner)
        tables = self.speaker.table(query), self.speaker.table(other)
        return Queries(tables[0], [f"{text} rather than {other.target}"], [None], {}, tables[1])

    def _record(self, query: Query, queries: Queries, ranked: Ranked) -> dict:
        corpus, (number,) = self.run.corpus, queries.numbers

        def passages(rows_K, scores_K):
            exist = rows_K >= 0
            read = corpus.read_passages(rows_K[exist])
            pairs = zip(read, scores_K[exist].tolist(), strict=True)
            return [(p.id, p.text or "", score) for p, score in pairs]

        more = {}
        if number is not None:
            correct = corpus.known.correct[number]
            more["fact_id"] = corpus.known.ids[number]
            # A fact without labelled passages stays unmarked, as in the run's tables.
            if len(correct):
                rows_K = ranked.proponents[0]
                more["proponent_correct"] = np.isin(rows_K[rows_K >= 0], correct).tolist()
        return results.record(
            f"live: {queries.texts[0]}",
            "live",
            query.prompt,
            query.target,
            passages(ranked.proponents[0], ranked.proponent_scores[0]),
            passages(ranked.opponents[0], ranked.opponent_scores[0]),
            **more,
        )

    def context(self, progress: Progress, passage: str) -> dict:
        """Returns the text around a passage in its document.

        Returns:
            {"before", "after"}: the texts of up to `_NEIGHBOURS` passages on either side, in the
            document's order; {"earlier", "later"}: how many more the document has.

        Raises:
            ValueError: the passage is unknown, or the workdir keeps no texts.
        """
        self._open(progress)
        store = self.run.corpus.store
        if store is None:
            raise LiveError("the workdir has no store, which would hold the documents' texts")
        try:
            row = store.row_of(passage)
        except KeyError as error:
            raise ValueError(f"the store has no passage {passage!r}") from error
        rows = store.rows_of_document(store.passages([row])[0].document)
        at = rows.index(row)
        first, stop = max(0, at - _NEIGHBOURS), at + 1 + _NEIGHBOURS
        texts = [p.text or "" for p in store.passages(rows[first:stop])]
        return {
            "before": texts[: at - first],
            "after": texts[at - first + 1 :],
            "earlier": first,
            "later": max(0, len(rows) - stop),
        }

    def heat(self, progress: Progress, query: Question, method: str, passage: str) -> dict:
        """Returns how much each position of a passage adds to its score; see `Heat.split`.

        Raises:
            ValueError: the passage is unknown, or the method's scores cannot be split.
        """
        self._open(progress)
        (chosen,) = parse_methods(method).values()
        if method not in self.heat_methods:
            raise ValueError(
                f"{chosen.title}: its scores are not inner products with one plain gradient per "
                "passage and cannot be split by position; choose one of "
                f"{', '.join(self.heat_methods)}"
            )
        if why := self.lacks(chosen):
            raise ValueError(why)
        return self._heat.split(self._queries(query), chosen, passage, progress)


def _contrast(query: Question) -> Query:
    """Returns a question's prompt with its other target."""
    return Query("contrast", query.prompt, query.contrast)
