"""Retrievers by name, which rank a run's passages for queries.

A method names its retriever (`Method.searched_by`). A run makes each retriever once: the batch
stage (`tda.run.retrieve`) searches with all of the run's queries, a live session with one query.
"""

import contextlib
import dataclasses
import functools
from collections.abc import Iterable, Sequence
from typing import Any

import numpy as np

from tda.data.tokens import TokenTable
from tda.methods import Method
from tda.retrieval import bm25, dense, exact
from tda.retrieval.ranked import Ranked
from tda.retrieval.scorer import Scorer
from tda.retrieval.sources import InMemory, Source
from tda.run import vectors
from tda.run.run import Run
from tda.run.withdrawals import withdrawn_passages
from tda.runtime import progress
from tda.runtime.fingerprint import fingerprint, plain
from tda.runtime.groups import ONE_GROUP
from tda.runtime.progress import Progress, silent

# Passages whose texts are read together.
_TEXTS = 8192


@dataclasses.dataclass(frozen=True)
class Queries:
    """Queries that are searched together."""

    table: TokenTable  # prompts and targets as tokens
    texts: Sequence[str]  # prompt and target of each
    numbers: Sequence[int | None]  # row among the run's queries; None for another question
    correct: dict[str, list[np.ndarray]]  # by labels to rank, the correct rows of each query
    contrast: TokenTable | None = None  # sequences whose gradients are subtracted from the queries'

    def __len__(self) -> int:
        return len(self.texts)


def queries_of_run(run: Run) -> Queries:
    """Returns all queries of a run."""
    prompts = run.corpus.prompts
    return Queries(prompts, run.query_texts, range(len(prompts)), run.corpus.correct)


@dataclasses.dataclass(frozen=True)
class Result:
    """A method's ranking, with notes on how it was made (λ and the like)."""

    ranked: Ranked
    note: dict = dataclasses.field(default_factory=dict)


class Retriever:
    """Ranks passages for queries by all methods that name it.

    A subclass implements `search`; the rest has defaults.

    Attributes:
        shares_search: whether all processes of a run call `search`, which shares the work; else
            process 0 alone does.
        searches_together: whether all methods of a run that name it are searched at once.
        takes_contrasts: whether it can rank by the difference of two targets' gradients.
        same_for_every_k: whether the first passages are the same however many are asked for.
        zero_is_no_match: whether a passage without a score above 0 does not match the query at all
            and only fills the ranking up.

    Args:
        run: the run whose passages are ranked. If `run.live`, the retriever is held open and
            answers one question after the other from the run's files.
    """

    shares_search = False
    searches_together = False
    takes_contrasts = False
    same_for_every_k = False
    zero_is_no_match = False

    def __init__(self, run: Run):
        self.run = run

    def search(
        self,
        queries: Queries,
        methods: dict[str, Method],
        k: int,
        on_progress: Progress | None = None,
    ) -> dict[str, Result]:
        """Ranks passages for each query.

        Args:
            queries: the queries.
            methods: the methods by name.
            k: number of proponents, and of opponents, of each query.
            on_progress: called with the progress; None shows progress bars.

        Returns:
            The results by method name. Where processes share the search, only process 0 gets any.
        """
        raise NotImplementedError

    def lacks(self, method: Method) -> str | None:
        """Returns why a method cannot answer live questions, or None if it can."""
        return None

    def prepare(self, methods: dict[str, Method], later: Iterable[Method] = ()) -> None:
        """Encodes what a search needs; called by all processes, before process 0 searches.

        Args:
            methods: the methods of the next search.
            later: the methods of later searches, whose gradients may share a pass over the corpus.
        """

    def release(self, methods: dict[str, Method]) -> None:
        """Frees what only the last search needed."""

    def provenance(self, method: Method) -> list:
        """Returns what a ranking depends on besides method, corpus and k, as JSON values."""
        return []

    def ranking_name(self, method: Method) -> str:
        """Returns the file name of a method's ranking: a hash of all that it depends on."""
        fields = dataclasses.asdict(method)
        fields.pop("title")  # methods that differ in nothing else share a ranking
        fields.pop("candidates")  # their rankings are in `provenance`
        run = self.run
        common: list = [fields, run.corpus.fingerprint, run.config.eval.top_k]
        if len(self.withdrawn):
            common.append({"withdrawn": self.withdrawn.tolist()})
        return f"{method.retriever}-{fingerprint(plain(common + self.provenance(method)))}"

    @functools.cached_property
    def withdrawn(self) -> np.ndarray:
        """Rows that are never retrieved, int64.

        In a run all processes read them together: first for `ranking_name`, before any search.
        """
        run = self.run
        return run.corpus.withdrawn if run.live else withdrawn_passages(run)


def scan(
    run: Run,
    source: Source,
    identity: Any,
    on_progress: Progress | None,
    queries_QxE: np.ndarray,
    scorers: dict[str, Scorer],
    k: int,
    correct: dict[str, list[np.ndarray]],
    opponents: bool = True,
) -> dict[str, Ranked]:
    """Ranks all rows of a source by every scorer, in one scan; see `exact.ExactSearch.rank`.

    Args:
        run: the run.
        source: the rows.
        identity: JSON values that identify the rows: a killed search then loses at most one group
            of rows, and processes share the groups. None searches in this process alone.
        on_progress: called with the progress; None shows a progress bar.
        queries_QxE, scorers, k, correct, opponents: as in `exact.ExactSearch.rank`.
    """
    with contextlib.ExitStack() as stack:
        if on_progress is not None:
            on_rows = progress.counted(on_progress, "searching passages", source.rows)
        else:
            title = f"search ({', '.join(scorers)})"
            on_rows = stack.enter_context(progress.bar(source.rows, title, "passage")).update
        groups = ONE_GROUP if identity is None else run.groups
        search = exact.ExactSearch(source, run.search_mesh, on_rows, groups, identity)
        return search.rank(queries_QxE, scorers, k, correct, opponents=opponents)


def tell(on_progress: Progress | None, description: str) -> None:
    """Reports work of unknown length."""
    if on_progress is not None:
        on_progress(description, 0, 0)


class Words(Retriever):
    """BM25; its index is built at the first search."""

    same_for_every_k = True
    zero_is_no_match = True  # a passage that shares no word with the query
    _index: bm25.Index | None = None

    def search(self, queries, methods, k, on_progress=None):
        """See `Retriever`."""
        if self._index is None:
            # In chunks, so that a live question can show its progress.
            texts, rows = [], self.run.corpus.rows
            for first in range(0, rows, _TEXTS):
                if on_progress is not None:
                    on_progress("reading passages", first, rows)
                chunk = range(first, min(rows, first + _TEXTS))
                texts += [p.text or "" for p in self.run.corpus.read_passages(chunk)]
            tell(on_progress, "indexing words")
            self._index = bm25.Index(texts)
        tell(on_progress, "BM25")
        withdrawn = self.withdrawn
        k = min(k, self.run.corpus.rows - len(withdrawn))
        # Left out of the ranking, not of the index: other passages keep their scores.
        ranked = self._index.search(queries.texts, k, queries.correct, withdrawn)
        return dict.fromkeys(methods, Result(ranked))


class _Vectors(Retriever):
    """Similarity of text vectors, which a subclass computes; the corpus's are cached by layer."""

    _description = "vectors"

    def __init__(self, run: Run):
        super().__init__(run)
        self._sources: dict[str, InMemory] = {}

    def _vectors(self, name: str, layer: str, on_rows=vectors.ignore_rows) -> np.ndarray:
        """Returns the stored vectors of the "corpus" or of the "queries", float32 [N, D]."""
        raise NotImplementedError

    def _encode(self, queries: Queries, layer: str) -> np.ndarray:
        """Returns the vectors of a question, float32 [Q, D]."""
        raise NotImplementedError

    def prepare(self, methods, later=()):
        """Computes the vectors of passages and queries."""
        for method in methods.values():
            for name in ("queries", "corpus"):
                self._vectors(name, method.layer)

    def _source(self, layer: str, on_progress: Progress | None) -> InMemory:
        if layer not in self._sources:
            tell(on_progress, f"reading {self._description}")
            total = self.run.corpus.rows

            def on_rows(done: int) -> None:
                if on_progress is not None:
                    on_progress(f"{self._description} of the passages", done, total)

            vectors_CxD = np.array(self._vectors("corpus", layer, on_rows))
            # The search skips rows that are not finite.
            vectors_CxD[self.withdrawn] = np.inf
            self._sources[layer] = InMemory(vectors_CxD, [slice(0, vectors_CxD.shape[1])])
        return self._sources[layer]

    def search(self, queries, methods, k, on_progress=None):
        """See `Retriever`."""
        results = {}
        for name, method in methods.items():
            source = self._source(method.layer, on_progress)
            if self.run.live:
                queries_QxD = self._encode(queries, method.layer)
            else:
                queries_QxD = self._vectors("queries", method.layer)
            tell(on_progress, "comparing vectors")
            # No opponents: the least similar texts are unrelated, not opposed.
            quiet = silent if self.run.live else None
            scorers, correct = {name: Scorer(None, method.unit_norm)}, queries.correct
            ranked = scan(
                self.run, source, None, quiet, queries_QxD, scorers, k, correct, opponents=False
            )
            results[name] = Result(ranked[name])
        return results

    def release(self, methods):
        """Frees the vectors."""
        self._sources.clear()


class Dense(_Vectors):
    """Vectors of a sentence encoder."""

    _description = "sentence vectors"
    _encoder: dense.SentenceEncoder | None = None

    def lacks(self, method):
        """Returns why the sentence encoder cannot be used, or None if it can."""
        if not self.run.config.dense.model:
            return "the run's config names no sentence encoder (dense.model)"
        try:
            dense.check_installed()
        except dense.DenseError as error:
            return str(error)
        return None

    def provenance(self, method):
        """Returns the identity of the encoder."""
        return [dense.identity(self.run.config.dense.model)]

    def _make_encoder(self) -> dense.SentenceEncoder:
        if self._encoder is None:
            self._encoder = dense.SentenceEncoder(self.run.config.dense.model)
        return self._encoder

    def _vectors(self, name, layer, on_rows=vectors.ignore_rows):
        return vectors.sentence_vectors(self.run, self._make_encoder, name, on_rows)

    def _encode(self, queries, layer):
        return self._make_encoder().encode(list(queries.texts))


class Hidden(_Vectors):
    """Mean hidden states of the traced model."""

    _description = "hidden states"

    def __init__(self, run: Run):
        super().__init__(run)
        self._poolers: dict = {}

    def provenance(self, method):
        """Returns the identity of the checkpoint."""
        return [fingerprint(self.run.trained.fingerprint), self.run.trained.step]

    def _pooler(self, layer: str):
        if layer not in self._poolers:
            self._poolers[layer] = vectors.make_pooler(self.run, layer)
        return self._poolers[layer]

    def _vectors(self, name, layer, on_rows=vectors.ignore_rows):
        return vectors.hidden_states(self.run, self._pooler(layer), layer, name, on_rows)

    def _encode(self, queries, layer):
        layout = self.run.corpus.layout(1)
        return self._pooler(layer).rows(queries.table, np.arange(len(queries)), layout)
