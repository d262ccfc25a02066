"""Live questions by methods that sum over checkpoints or change passages' gradients first."""

import dataclasses

import numpy as np

from tda.live import Encoded, Hessian, Question, Tracer, live_stores, opened
from tda.live.opened import Opened
from tda.methods import METHODS, Gradients, Method
from tda.retrieval import exact
from tda.retrieval.ranked import Ranked
from tda.run import checkpoints, vectors
from tda.run.checkpoints import Part, Summed
from tda.run.remembered import Known, Reread
from tda.runtime.progress import Progress, counted


@dataclasses.dataclass(frozen=True)
class _Then:
    """The run at one of its checkpoints."""

    run: Opened
    encoded: dict[Gradients, Encoded]
    tracer: Tracer


class Checkpoints:
    """Sums over the checkpoints of a finished run (`tda.live.retrievers.Retriever`).

    Args:
        run: the run.
        reread: its corpus, where that is needed.
        how: how R is made.
        known: the run's queries.
    """

    def __init__(self, run: Opened, reread: Reread, how: Hessian, known: Known | None):
        self._run, self._reread, self._how, self._known = run, reread, how, known
        self._opened: dict[int, _Then] = {}

    def lacks(self, method: Method) -> str | None:
        """Why a method cannot be asked; None where it can."""
        if method.hessian == "mixed":
            return "a sum over checkpoints takes R none or train"
        if self._run.remembered is None:
            return (
                "the run kept no lengths of its passages; run experiments.trace with this workdir "
                "once more, which computes nothing anew"
            )
        steps = checkpoints.steps_of(self._run.config, self._run.trained, method)
        gone = [s for s in steps if not self._has(s, method)]
        if gone:
            return (
                f"it sums over the checkpoints {', '.join(map(str, steps))}, and the run has no "
                f"store of gradients of {', '.join(map(str, gone))}: it was not asked for, or it "
                "went when it was searched (several.keep_stores=False)"
            )
        return None

    def _has(self, step: int, method: Method) -> bool:
        stores, config = opened.stores_of(self._run, step), self._run.config
        found = live_stores.fitting_of(stores["corpus"], method.gradients, config)
        asked = live_stores.fitting_of(stores["queries"], method.query_gradients, config)
        return bool(found and asked)

    def search(self, method: Method, question: Question, k: int, on_progress: Progress) -> Ranked:
        """The k passages of one question."""
        found = self._summed(method, question, on_progress)
        what = "searching passages of all checkpoints"
        on_rows = counted(on_progress, what, found.source.rows)
        scorers = {"": found.scorer}
        return exact.search(found.queries_QxE, found.source, scorers, k, on_rows=on_rows)[""]

    def _summed(self, method: Method, question: Question, on_progress: Progress) -> Summed:
        config, trained = self._run.config, self._run.trained
        steps = checkpoints.steps_of(config, trained, method)
        parts = [self._part(self._at(s, on_progress), method, question, on_progress) for s in steps]
        total = trained.fingerprint["steps"]
        counts = checkpoints.weights_of(config, total, method, steps)
        return checkpoints.combined(method, parts, steps, counts)

    def _at(self, step: int, on_progress: Progress) -> _Then:
        if step not in self._opened:
            on_progress(f"opening the checkpoint of step {step}", 0, 0)
            run = opened.at_step(self._run, step)
            encoded = live_stores.encoded(run, self._reread)
            # LESS has queries, and no passages, without correction.
            for what in {m.query_gradients for m in METHODS.values()} - encoded.keys():
                if asked := live_stores.fitting_of(run.queries, what, run.config):
                    encoded[what] = live_stores.encoded_as(asked[0], run, self._reread)
            whole = run.trained.model, run.tokenizer, run.config.model.context
            tracer = Tracer(*whole, encoded, self._how, run.path / "live", self._known)
            self._opened[step] = _Then(run, encoded, tracer)
        return self._opened[step]

    def _part(self, then: _Then, method: Method, question: Question, on_progress: Progress) -> Part:
        own = method.gradients
        e = then.encoded[own]
        q_1xE = then.tracer.gradient(question, method.query_gradients, on_progress)
        roots, probabilities = [], None
        if method.hessian == "train":
            scorer = then.tracer.roots.scorer(method, question.number, own, on_progress)
            roots = scorer.roots
        if method.passages == "unsure":
            probabilities = self._probabilities(then.run, on_progress)
        return Part(e.store, q_1xE, roots, probabilities)

    def _probabilities(self, run: Opened, on_progress: Progress) -> np.ndarray:
        there = run.remembered
        text = there.fingerprint["corpus"]
        kept = vectors.kept(run.path, "nats", vectors.made_of_nats(run.trained), text)
        if kept is None:
            corpus = self._reread.get(on_progress, "to compute how likely passages are")
            on_progress("likelihood of the passages", 0, 0)
            return vectors.probabilities(run.config, corpus, run.trained, run.path)
        return vectors.mean_probabilities(kept, there.lengths)
