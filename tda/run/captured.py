"""The gradients of a training's own steps: their store, and the methods that rank by them.

To first order, training on an example at step t changes a query's loss by −η_t ⟨part, P_t ∇L_q⟩:
the learning rate, the example's part of the step's gradient, and the query's gradient at the
parameters of that step, times Adam's preconditioner P_t = 1/√V or not (Wang et al. 2024, *Data
Shapley in one training run*, first order). An example's score is the sum over the steps that it was
trained on. The query's gradient is taken at the kept checkpoint nearest to each step. Momentum,
clipping and weight decay are left out.
"""

import functools
import itertools
from collections.abc import Iterator

import numpy as np

from tda import store as stores
from tda.encoding.captured import TrainingRows, read_rates
from tda.methods import Method
from tda.retrieval import by_score
from tda.run import capturing, checkpoints, train
from tda.run.gradient_retrievers import Encodings
from tda.run.retrievers import Result, Retriever, tell
from tda.run.run import Corpus, Run
from tda.runtime import processes, progress

# Bytes of float32 scores that are held at a time, and rows that are read at a time.
_SCORES, _STEP = 1 << 30, 4096


class Captured(Retriever):
    """Methods that rank by the gradients of the training's own steps."""

    searches_together = True

    def __init__(self, run: Run):
        super().__init__(run)
        self._at_step = functools.cache(lambda step: Encodings(run.at_step(step)))

    def _path(self) -> str:
        return capturing.path_of(self.run.config, self.run.workdir, self.run.trained.fingerprint)

    def lacks(self, method):
        """Returns what is missing: None if the training kept its gradients."""
        return capturing.lacks(self.run.config, self.run.workdir, self.run.trained.fingerprint)

    def provenance(self, method):
        """Returns the captured gradients, and those of the queries at every checkpoint."""
        steps = checkpoints.steps_of(self.run, method)
        return [
            self._path().rpartition("/")[2],
            *(self.run.provenance(method.query_gradients, step) for step in steps),
        ]

    def prepare(self, methods, later=()):
        """Encodes the queries at every checkpoint.

        Raises:
            StoreError: the training kept no gradients, or those of other settings.
        """
        method = next(iter(methods.values()))
        why = processes.on_first_process("look for captured rows", lambda: self.lacks(method))
        if why:
            raise stores.StoreError(f"{method.title}: {why}")
        for method in methods.values():
            for step in checkpoints.steps_of(self.run, method):
                self._at_step(step).run_queries(method.query_gradients)

    def search(self, queries, methods, k, on_progress=None):
        """See `Retriever`."""
        results = {}
        # Methods of the same checkpoints share a scan, their queries side by side.
        sharing: dict[tuple[int, ...], dict[str, Method]] = {}
        for name, method in methods.items():
            steps = tuple(checkpoints.steps_of(self.run, method))
            sharing.setdefault(steps, {})[name] = method
        for steps, of_steps in sharing.items():
            gradients = []
            for step in steps:
                tell(on_progress, f"opening the checkpoint of step {step}")
                at, kinds = self._at_step(step), [m.query_gradients for m in of_steps.values()]
                gradients.append(
                    np.concatenate([at.of_queries(queries, kind, on_progress) for kind in kinds])
                )
            scores = self._scores(steps, np.stack(gradients))
            for name in of_steps:
                of_method = itertools.islice(scores, len(queries))
                ranked = by_score.rank(of_method, len(queries), k, queries.correct, self.withdrawn)
                results[name] = Result(ranked, {"checkpoints": list(steps)})
        return results

    def release(self, methods):
        """Frees the models and the gradients of the checkpoints."""
        self._at_step.cache_clear()

    def _scores(self, steps: tuple[int, ...], queries_SxQxE: np.ndarray) -> Iterator[np.ndarray]:
        """Yields the scores of all passages for each query in turn, float32 [C]."""
        run, store = self.run, stores.open_store(self._path())
        layout, seed = run.trained.batches or (
            train.total_steps(run.config, run.corpus)[1],
            run.config.seed,
        )
        rows = TrainingRows.of(run.corpus.training, layout, run.total_steps, seed)
        passages = _passages_of(run.corpus, rows)
        rates = read_rates(self._path())[rows.steps]
        # Steps after the traced checkpoint had no effect on it.
        rates[rows.steps >= run.trained.step] = 0
        nearest = np.abs(rows.steps[:, None] + 0.5 - np.array(steps)).argmin(axis=1)
        at_once = max(1, _SCORES // (4 * run.corpus.rows))
        for first in range(0, queries_SxQxE.shape[1], at_once):
            q_SxQxE = queries_SxQxE[:, first : first + at_once]
            scores_CxQ = np.zeros((run.corpus.rows, q_SxQxE.shape[1]), np.float32)
            with progress.bar(store.rows, "search captured gradients", "row") as bar:
                for piece in store.scan(_STEP):
                    at = slice(piece.first, piece.first + len(piece))
                    counts = piece.valid & (passages[at] >= 0) & (rates[at] > 0)
                    x_RxE = piece.decoded(store.form)[counts]
                    x_RxE *= rates[at][counts][:, None]
                    for s in range(len(steps)):
                        chosen = nearest[at][counts] == s
                        product_RxQ = x_RxE[chosen] @ q_SxQxE[s].T
                        np.add.at(scores_CxQ, passages[at][counts][chosen], product_RxQ)
                    bar.update(len(piece))
            yield from np.ascontiguousarray(scores_CxQ.T)


def _passages_of(corpus: Corpus, rows: TrainingRows) -> np.ndarray:
    """Returns the passage of each captured row, int64 [R]; −1 for text that is no passage."""
    if corpus.training is corpus.passages:
        return rows.sequences
    numbers = {name: i for i, name in enumerate(corpus.passages.ids)}
    of_sequence = np.array([numbers.get(name, -1) for name in corpus.training.ids], np.int64)
    return of_sequence[rows.sequences]
