"""Retrievers of a finished run that take no gradients: vectors of texts, labels, controls."""

from collections.abc import Callable

import numpy as np

from tda.data import batches
from tda.live import Question
from tda.live.opened import Opened
from tda.live.retrievers import Control, Labels, Passages, Retriever, Vectors, random_scores
from tda.methods import Method
from tda.retrieval import dense
from tda.run import vectors
from tda.run.remembered import Known, Reread
from tda.run.workdir import Workdir
from tda.runtime.progress import Progress


def others(run: Opened, passages: Passages, text: str | None, reread: Reread) -> dict:
    """The retrievers by name.

    Args:
        run: the run.
        passages: its corpus.
        text: the fingerprint of the corpus, where it is known.
        reread: the corpus, to be read where what is asked was not kept.
    """
    known = run.remembered.known if run.remembered else Known()
    kept = _Kept(run, text, reread)
    sentences = _Sentences(run, kept)
    found: dict[str, Retriever] = {
        "hidden": _hidden(run, passages, kept),
        "dense": Vectors(passages, sentences.of_passages, sentences.of_question, sentences.lacks),
        "annotated": Labels(known, run.config.data.seed),
        "random": Control(passages, random_scores(passages, run.config.seed)),
        "length": Control(passages, _lengths(run, reread)),
    }
    return found


class _Kept:
    """Vectors of a run's passages: those that it kept, else made now and kept.

    Args:
        run: the run.
        text: the fingerprint of its corpus, where that is known.
        reread: its corpus, read where the vectors have to be made.
    """

    def __init__(self, run: Opened, text: str | None, reread: Reread):
        self._run, self._text, self._reread = run, text, reread

    def get(
        self, name: str, made: dict, what: str, why: str, compute: Callable, on_progress: Progress
    ) -> np.ndarray:
        """Float32 [C, D].

        Args:
            name, made: as for `vectors.kept`.
            what: they are, to be told.
            why: the corpus is read.
            compute: makes them of a corpus and a workdir; told how many are there.
            on_progress: told what is done.
        """
        on_progress(f"reading {what}", 0, 0)
        if self._text is not None:
            kept = vectors.kept(self._run.path, name, made, self._text)
            if kept is not None:
                return kept
        corpus = self._reread.get(on_progress, why)
        total = len(corpus.passages)

        def on_rows(done: int) -> None:
            on_progress(f"{what} of the passages", done, total)

        return compute(corpus, Workdir(self._run.path), on_rows)


def _hidden(run: Opened, passages: Passages, kept: _Kept) -> Vectors:
    poolers: dict = {}

    def of_passages(method: Method, on_progress: Progress) -> np.ndarray:
        layer = method.layer

        def compute(corpus, workdir, on_rows):
            how = run.config, corpus, run.trained, workdir, layer, "corpus"
            return vectors.hidden_states(*how, on_rows)

        return kept.get(
            f"hidden-{layer}-corpus",
            vectors.made_of_hidden_states(run.trained, layer),
            "hidden states",
            "to compute hidden states, which the run did not",
            compute,
            on_progress,
        )

    def of_question(method: Method, question: Question) -> np.ndarray:
        layer = method.layer
        if layer not in poolers:
            poolers[layer] = vectors.make_pooler(run.trained, run.tokenizer, layer)
        buckets = batches.buckets(run.config.model.context)
        layout = batches.BatchLayout(buckets, 1, run.tokenizer.pad)
        return poolers[layer].rows(question.table, np.arange(1), layout)

    return Vectors(passages, of_passages, of_question)


class _Sentences:
    """A sentence encoder's vectors of a run's passages, and of questions."""

    def __init__(self, run: Opened, kept: _Kept):
        self._run, self._kept = run, kept
        self._encoder = None

    def lacks(self, method: Method) -> str | None:
        """Why it cannot be asked; None where it can."""
        if not self._run.config.dense.model:
            return "the run's config names no sentence encoder (dense.model)"
        try:
            dense.check_installed()
        except dense.DenseError as error:
            return str(error)
        return None

    def of_passages(self, method: Method, on_progress: Progress) -> np.ndarray:
        """Those that were kept, or made now and kept: float32 [C, D]."""
        config = self._run.config

        def compute(corpus, workdir, on_rows):
            how = config, self._made(), corpus, workdir, "corpus", corpus.text_of
            return vectors.sentences(*how, on_rows)

        return self._kept.get(
            "dense-corpus",
            vectors.made_of_sentences(config),
            "sentence vectors",
            "to encode sentences, which the run did not",
            compute,
            on_progress,
        )

    def of_question(self, method: Method, question: Question) -> np.ndarray:
        """That of prompt and target, float32 [1, D]."""
        return self._made().encode([question.text])

    def _made(self) -> dense.SentenceEncoder:
        if self._encoder is None:
            self._encoder = dense.SentenceEncoder(self._run.config.dense.model)
        return self._encoder


def _lengths(run: Opened, reread: Reread) -> Callable:
    def scores(method: Method, question: Question, on_progress: Progress) -> np.ndarray:
        if run.remembered is not None:
            return run.remembered.lengths.astype(np.float32)
        corpus = reread.get(on_progress, "to count tokens, which the run did not keep,")
        return vectors.scored_tokens(corpus.passages).astype(np.float32)

    return scores
