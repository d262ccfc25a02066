"""Retrievers to compare methods with: the labels themselves, and scores that ignore the query."""

from collections.abc import Iterable

import numpy as np

from tda.methods import GradientKind, Method
from tda.retrieval import annotated, by_score, exact
from tda.run import encode
from tda.run.retrievers import Queries, Result, Retriever, tell
from tda.run.run import Run
from tda.runtime.fingerprint import seed_of
from tda.runtime.progress import Progress


class Labels(Retriever):
    """The passages annotated with each query's fact; only the run's own queries have any."""

    def provenance(self, method):
        """Returns the seed of the draw."""
        return [self.run.config.data.seed]

    def search(self, queries, methods, k, on_progress=None):
        """See `Retriever`."""
        correct, ids = self.run.corpus.correct["all"], self.run.corpus.query_ids
        none = np.zeros(0, np.int64)
        rows = [none if n is None else correct[n] for n in queries.numbers]
        names = ["" if n is None else ids[n] for n in queries.numbers]
        ranked = annotated.ranked(names, rows, k, self.run.config.data.seed)
        return dict.fromkeys(methods, Result(ranked))


class _Control(Retriever):
    """Scores that do not depend on the query's content, which a subclass computes."""

    def _scores(
        self, queries: Queries, method: Method, on_progress: Progress | None
    ) -> Iterable[np.ndarray]:
        raise NotImplementedError

    def search(self, queries, methods, k, on_progress=None):
        """See `Retriever`."""
        k = min(k, self.run.corpus.rows - len(self.withdrawn))
        results = {}
        for name, method in methods.items():
            scores = self._scores(queries, method, on_progress)
            ranked = by_score.rank(scores, len(queries), k, queries.correct, self.withdrawn)
            results[name] = Result(ranked)
        return results


class Random(_Control):
    """Random scores: a function of the query's number, or of its text if it is not the run's."""

    def provenance(self, method):
        """Returns the seed."""
        return [self.run.config.seed]

    def _scores(self, queries, method, on_progress):
        rows, seed = self.run.corpus.rows, self.run.config.seed
        for number, text in zip(queries.numbers, queries.texts, strict=True):
            if number is not None:
                yield by_score.random_scores(rows, seed, number)
                continue
            # The same question gets the same passages in every session.
            yield by_score.random_scores(rows, seed, *seed_of(text.encode()).tolist())


class Length(_Control):
    """The number of scored tokens of each passage."""

    def _scores(self, queries, method, on_progress):
        lengths_C = self.run.corpus.lengths.astype(np.float32)
        return (lengths_C for _ in range(len(queries)))


class GradientNorm(_Control):
    """Norms of the passages' gradients."""

    def __init__(self, run: Run):
        super().__init__(run)
        self._norms: dict[GradientKind, np.ndarray] = {}

    def lacks(self, method):
        """Returns why there are no gradients, or None if there are."""
        return encode.missing_stores(self.run, method.gradients, "corpus")

    def prepare(self, methods, later=()):
        """Encodes the corpus."""
        for kind in dict.fromkeys(m.gradients for m in methods.values()):
            encode.encode(self.run, kind)

    def _scores(self, queries, method, on_progress):
        kind = method.gradients
        if kind not in self._norms:
            tell(on_progress, "norms of gradients")
            source = encode.encode_passages(self.run, kind)
            step = exact.step_rows(source.rows, source.form.width)
            self._norms[kind] = by_score.norms(source, step)
        return (self._norms[kind] for _ in range(len(queries)))

    def provenance(self, method):
        """Returns what identifies the gradients."""
        return encode.ranking_provenance(self.run, method.gradients)
