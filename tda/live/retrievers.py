"""Retrievers that are asked without a gradient: by words, by vectors, by labels, and controls.

A passage that was withdrawn from the store is found by none of them.
"""

import hashlib
from collections.abc import Callable
from typing import Protocol

import numpy as np

from tda.live.encoded import Encoded
from tda.live.questions import Question
from tda.methods import GradientKind, Method
from tda.retrieval import annotated, bm25, by_score, exact
from tda.retrieval.ranked import Ranked
from tda.retrieval.scorer import Scorer
from tda.retrieval.sources import InMemory
from tda.run.remembered import Known
from tda.runtime.progress import Progress
from tda.store import GradientStore, Passage

_TEXTS = 8192


class Passages(Protocol):
    """A corpus's passages, by row."""

    @property
    def rows(self) -> int:
        """C, the number of passages."""

    @property
    def withdrawn(self) -> np.ndarray:
        """The rows that are never retrieved, int64."""

    def read_passages(self, rows) -> list[Passage]:
        """Id, document and text of some rows."""


class StoredPassages:
    """The passages whose gradients a store has."""

    def __init__(self, store: GradientStore):
        self._store, self.rows, self.withdrawn = store, store.rows, store.withdrawn
        self.read_passages = store.passages


class Retriever(Protocol):
    """Answers questions by methods of one kind."""

    def lacks(self, method: Method) -> str | None:
        """Why a method cannot be asked; None where it can."""

    def search(self, method: Method, question: Question, k: int, on_progress: Progress) -> Ranked:
        """The k passages of one question; rows of −1 are none."""


class Words:
    """BM25; its index is made for the first question."""

    def __init__(self, passages: Passages):
        self._passages, self._index = passages, None

    def lacks(self, method: Method) -> str | None:
        """Nothing."""
        return None

    def search(self, method: Method, question: Question, k: int, on_progress: Progress) -> Ranked:
        """See `Retriever`."""
        if self._index is None:
            texts, rows = [], self._passages.rows
            for first in range(0, rows, _TEXTS):
                on_progress("reading passages", first, rows)
                some = range(first, min(rows, first + _TEXTS))
                texts += [p.text or "" for p in self._passages.read_passages(some)]
            on_progress("indexing words", 0, 0)
            self._index = bm25.Index(texts)
        on_progress("BM25", 0, 0)
        gone = self._passages.withdrawn
        found = self._index.search([question.text], k + len(gone))
        # Left out of the answer, not of the index: others' scores are the run's all the same.
        kept = ~np.isin(found.proponents[0], gone)
        return _ranked(found.proponents[0][kept][:k], found.proponent_scores[0][kept][:k])


class Vectors:
    """Likeness of vectors of texts: hidden states, or a sentence encoder's.

    Args:
        passages: says which are withdrawn.
        of_passages: gives a method's vectors of the corpus, float32 [C, D]; called once each.
        of_question: gives that of a question, float32 [1, D].
        why: why a method cannot be asked, or None.
    """

    def __init__(
        self,
        passages: Passages,
        of_passages: Callable[[Method, Progress], np.ndarray],
        of_question: Callable[[Method, Question], np.ndarray],
        why: Callable[[Method], str | None] = lambda method: None,
    ):
        self._passages, self._of_passages = passages, of_passages
        self._of_question, self.lacks = of_question, why
        self._held: dict[str, InMemory] = {}

    def search(self, method: Method, question: Question, k: int, on_progress: Progress) -> Ranked:
        """See `Retriever`."""
        if method.layer not in self._held:
            vectors_CxD = np.array(self._of_passages(method, on_progress))
            vectors_CxD[self._passages.withdrawn] = np.inf
            self._held[method.layer] = InMemory(vectors_CxD, [slice(0, vectors_CxD.shape[1])])
        on_progress("comparing vectors", 0, 0)
        scorers = {"": Scorer(None, method.unit_norm)}
        asked_1xD, source = self._of_question(method, question), self._held[method.layer]
        # What is least like a text says nothing.
        return exact.search(asked_1xD, source, scorers, k, opponents=False)[""]


class Labels:
    """The passages that are annotated with the fact; a question of one's own has none."""

    def __init__(self, known: Known, seed: int):
        self._known, self._seed = known, seed

    def lacks(self, method: Method) -> str | None:
        """Why not: the run's queries and labels are not known."""
        return None if self._known.ids else _no_queries(method)

    def search(self, method: Method, question: Question, k: int, on_progress: Progress) -> Ranked:
        """See `Retriever`."""
        if question.number is None:
            return _ranked(np.zeros(0, np.int64), np.zeros(0, np.float32))
        q = question.number
        return annotated.ranked([self._known.ids[q]], [self._known.correct[q]], k, self._seed)


class Control:
    """A method whose scores look at no query.

    Args:
        passages: says which are withdrawn.
        scores: gives a method's scores of a question, [C].
        why: why a method cannot be asked, or None.
    """

    def __init__(
        self,
        passages: Passages,
        scores: Callable[[Method, Question, Progress], np.ndarray],
        why: Callable[[Method], str | None] = lambda method: None,
    ):
        self._passages, self._scores, self.lacks = passages, scores, why

    def search(self, method: Method, question: Question, k: int, on_progress: Progress) -> Ranked:
        """See `Retriever`."""
        scores_C = np.array(self._scores(method, question, on_progress))
        scores_C[self._passages.withdrawn] = -np.inf
        left = self._passages.rows - len(self._passages.withdrawn)
        return by_score.rank([scores_C], 1, min(k, left))


def random_scores(passages: Passages, seed: int) -> Callable:
    """Scores for `Control`: the run's of its queries; of other questions a function of the text."""

    def scores(method: Method, question: Question, on_progress: Progress) -> np.ndarray:
        if question.number is not None:
            return by_score.random_scores(passages.rows, seed, question.number)
        digest = hashlib.sha256(question.text.encode()).digest()
        words = np.frombuffer(digest, np.uint32).tolist()
        return by_score.random_scores(passages.rows, seed, *words)

    return scores


def gradient_norms(encoded: dict[GradientKind, Encoded]) -> Control | None:
    """The control by norms of uncorrected gradients; None where there are none."""
    e, held = encoded.get(GradientKind()), []
    if e is None:
        return None

    def scores(method: Method, question: Question, on_progress: Progress) -> np.ndarray:
        if not held:
            on_progress("norms of gradients", 0, 0)
            held.append(by_score.norms(e.store, exact.step_rows(e.store.form.width)))
        return held[0]

    return Control(StoredPassages(e.store), scores)


def _ranked(rows_K: np.ndarray, scores_K: np.ndarray) -> Ranked:
    none = np.zeros((1, 0))
    return Ranked(rows_K[None], scores_K[None], none.astype(np.int64), none.astype(np.float32), {})


def _no_queries(method: Method) -> str:
    return (
        f"{method.title}: the run kept no list of its queries; run experiments.trace with this "
        "workdir once more, which computes nothing anew"
    )
