"""Retrievers of a finished run that take no gradients: vectors of texts, labels, controls."""

import functools

import numpy as np

from tda.live.questions import Question
from tda.live.retrievers import Control, Labels, Passages, Retriever, Vectors, random_scores
from tda.methods import Method
from tda.retrieval import dense
from tda.run import vectors
from tda.run.run import Run
from tda.runtime.progress import Progress


def others(run: Run, passages: Passages) -> dict[str, Retriever]:
    """The retrievers by name.

    Args:
        run: the run.
        passages: its corpus.
    """
    config, corpus = run.config, run.corpus
    lengths_C = corpus.lengths.astype(np.float32)
    return {
        "hidden": _hidden(run, passages),
        "dense": _dense(run, passages),
        "annotated": Labels(corpus.known, config.data.seed),
        "random": Control(passages, random_scores(passages, config.seed)),
        "length": Control(passages, lambda method, question, on_progress: lengths_C),
    }


def _counted(run: Run, description: str, on_progress: Progress):
    total = run.corpus.rows
    return lambda done: on_progress(f"{description} of the passages", done, total)


def _hidden(run: Run, passages: Passages) -> Vectors:
    pooler = functools.cache(functools.partial(vectors.make_pooler, run))

    def of_passages(method: Method, on_progress: Progress) -> np.ndarray:
        on_rows = _counted(run, "hidden states", on_progress)
        layer = method.layer
        return vectors.hidden_states(run, pooler(layer), layer, "corpus", on_rows)

    def of_question(method: Method, question: Question) -> np.ndarray:
        layout = run.corpus.layout(1)
        return pooler(method.layer).rows(question.table, np.arange(1), layout)

    return Vectors(passages, of_passages, of_question)


def _dense(run: Run, passages: Passages) -> Vectors:
    encoder = functools.cache(lambda: dense.SentenceEncoder(run.config.dense.model))

    def lacks(method: Method) -> str | None:
        if not run.config.dense.model:
            return "the run's config names no sentence encoder (dense.model)"
        try:
            dense.check_installed()
        except dense.DenseError as error:
            return str(error)
        return None

    def of_passages(method: Method, on_progress: Progress) -> np.ndarray:
        on_rows = _counted(run, "sentence vectors", on_progress)
        return vectors.sentence_vectors(run, encoder, "corpus", on_rows)

    def of_question(method: Method, question: Question) -> np.ndarray:
        return encoder().encode([question.text])

    return Vectors(passages, of_passages, of_question, lacks)
