"""Live questions by methods that sum over checkpoints or change passages' gradients first."""

import functools

from tda import store as stores
from tda.live.live_stores import encoded_kinds
from tda.live.questions import Question
from tda.live.tracer import Tracer
from tda.methods import Method
from tda.retrieval import exact
from tda.retrieval.ranked import Ranked
from tda.run import checkpoints, vectors
from tda.run.checkpoints import Part, Summed
from tda.run.run import Run
from tda.runtime.progress import Progress, counted


class Checkpoints:
    """Sums over the checkpoints of a finished run (`tda.live.retrievers.Retriever`).

    Args:
        run: the run.
    """

    def __init__(self, run: Run):
        self._run = run
        self._at_step = functools.cache(self._open)

    def lacks(self, method: Method) -> str | None:
        """Why a method cannot be asked; None where it can."""
        if method.hessian == "mixed":
            return "a sum over checkpoints takes R none or train"
        steps = checkpoints.steps_of(self._run, method)
        lacking = [s for s in steps if not self._has(s, method)]
        if lacking:
            return (
                f"it sums over the checkpoints {', '.join(map(str, steps))}, and the run has no "
                f"store of gradients of {', '.join(map(str, lacking))}: it was not asked for, or "
                "it went when it was searched (several.keep_stores=False)"
            )
        return None

    def _has(self, step: int, method: Method) -> bool:
        pairs = (("corpus", method.gradients), ("queries", method.query_gradients))
        return all(stores.finished(self._run.store_path(name, k, step)) for name, k in pairs)

    def search(self, method: Method, question: Question, k: int, on_progress: Progress) -> Ranked:
        """The k passages of one question."""
        summed = self._summed(method, question, on_progress)
        on_rows = counted(on_progress, "searching passages of all checkpoints", summed.source.rows)
        scorers = {"": summed.scorer}
        return exact.search(summed.queries_QxE, summed.source, scorers, k, on_rows=on_rows)[""]

    def _summed(self, method: Method, question: Question, on_progress: Progress) -> Summed:
        steps = checkpoints.steps_of(self._run, method)
        parts = [self._part(s, method, question, on_progress) for s in steps]
        weights = checkpoints.weights(self._run, method, steps)
        return checkpoints.combined(method, parts, steps, weights)

    def _open(self, step: int) -> tuple[Run, dict, Tracer]:
        run = self._run.at_step(step)
        encoded = encoded_kinds(run)
        corpus = run.corpus
        model, folder = run.trained.model, run.workdir / "live"
        context = run.config.model.context
        tracer = Tracer(
            model, corpus.tokenizer, context, encoded, run.hessian, folder, corpus.known
        )
        return run, encoded, tracer

    def _part(self, step: int, method: Method, question: Question, on_progress: Progress) -> Part:
        on_progress(f"opening the checkpoint of step {step}", 0, 0)
        run, encoded, tracer = self._at_step(step)
        q_1xE = tracer.gradient(question, method.query_gradients, on_progress)
        roots, probabilities = [], None
        if method.hessian == "train":
            kind = method.gradients
            roots = tracer.scorer(method, question, kind, on_progress).roots
        if method.passages == "unsure":
            on_progress("likelihood of the passages", 0, 0)
            probabilities = vectors.probabilities(run)
        return Part(encoded[method.gradients].store, q_1xE, roots, probabilities)
