"""Methods of the second stage: a first stage's candidates, scored without any projection."""

import contextlib
import dataclasses
import functools
from collections.abc import Callable

import numpy as np

from tda.gradients import pair_metrics, pair_products
from tda.gradients.factors import GradientFactors
from tda.gradients.pair_metrics import Metric
from tda.gradients.second_stage import Pairs, PairScorer
from tda.methods import Method
from tda.retrieval import by_score, candidates
from tda.retrieval.hessian_settings import HessianSettings
from tda.retrieval.ranked import Ranked
from tda.run import curvature, moments
from tda.run.first_stage import FirstStage
from tda.run.retrievers import Result, Retriever, tell
from tda.run.run import Run, memory_bytes
from tda.runtime import processes, progress, sharding
from tda.runtime.fingerprint import fingerprint, plain
from tda.runtime.groups import ONE_GROUP


def check(config, method: Method) -> None:
    """Checks that a method can be computed from whole gradients.

    Raises:
        ValueError: it cannot; the message says what to use.
    """
    if method.several or method.steps_by_adam or method.passages != "plain":
        raise ValueError(
            f"{method.title}: a method without projection takes plain gradients of one checkpoint"
        )
    if method.query_output:
        raise ValueError(
            f"{method.title}: a method without projection differentiates one function of passages "
            "and queries; name it by output"
        )
    if (
        method.hessian == "mixed"
        and HessianSettings(**config.hessian).evaluation_of(method) != "all"
    ):
        raise ValueError(
            f"{method.title}: R_eval without projection is of all queries; use "
            "hessian.evaluation=all, or a method with R of the passages alone"
        )
    if method.curvature == "logra" or (method.curvature != "none" and method.hessian != "none"):
        raise ValueError(f"{method.title}: without projection there is EK-FAC alone, or R alone")
    if method.hessian != "none" and method.corrected and config.gradients.correction == "adam":
        raise ValueError(f"{method.title}: {pair_metrics.NOT_FACTORED}")


class SecondStage(Retriever):
    """Scores candidates by whole gradients, for all methods of the second stage in one pass.

    Args:
        run: the run.
        make: as for `FirstStage`.
    """

    shares_search = True
    # They share the passages' gradients.
    searches_together = True

    def __init__(self, run: Run, make: Callable[[Method], Callable[[Run], Retriever]]):
        super().__init__(run)
        self._first = FirstStage(run, make)
        self._factors = functools.cache(self._make_factors)
        self._metrics: dict[str, Metric] = {}
        self._notes: dict[str, dict] = {}

    def lacks(self, method):
        """Returns what is missing for the candidates or the metric, or None."""
        if why := self._first.lacks(method):
            return why
        if not all(file.exists() for file in curvature.files_of_metric(self.run, method)):
            return "the run has no curvature on disk for it: the method was not run"
        return None

    def provenance(self, method):
        """Returns what identifies gradients, metric and candidates."""
        parts = [*self._gradients(method), self._first.ranking_names(method)]
        if (evaluated := self._evaluated) is not None:
            parts.append({"queries": evaluated})
        return parts

    @functools.cached_property
    def _evaluated(self) -> list[int] | None:
        """The queries whose candidates are scored: of a run those that it evaluates; None: all."""
        if self.run.live or not self.run.config.rerank.passages:
            return None
        evaluated = self.run.evaluated
        return None if len(evaluated) == len(self.run.corpus.prompts) else evaluated.tolist()

    def _gradients(self, method: Method) -> list:
        provenance = self.run.provenance(method.gradients)
        provenance.pop("projection")
        if method.hessian != "none":
            provenance |= {"R": self.run.curvature_provenance("whole"), "damping": self._damping}
            provenance["tables"] = "balanced by others"
        if method.hessian == "mixed":
            h = self.run.config.hessian
            queries = self.run.corpus.fingerprint["queries"]
            provenance["R of queries"] = [queries, h.weight, h.component]
        return [provenance]

    @property
    def _damping(self) -> float:
        """The damping of R's factors, in mean eigenvalues."""
        damping = self.run.config.hessian.damping
        return pair_metrics.DAMPING if damping < 0 else damping

    def search(self, queries, methods, k, on_progress=None):
        """See `Retriever`."""
        run, count = self.run, self.run.corpus.rows
        groups: dict[tuple[str, str], dict[str, Method]] = {}
        for name, method in methods.items():
            output = method.output or run.config.gradients.output
            groups.setdefault((method.candidates, output), {})[name] = method
        results: dict[str, Result] = {}
        for (_, output), sharing in groups.items():
            first = self._first.rank(next(iter(sharing.values())), queries, on_progress)
            united = candidates.unite(list(first.values())) if first else None
            every = [np.arange(count)] * len(queries)
            lists = every if united is None else united
            if self._evaluated is not None:
                none = np.zeros(0, np.int64)
                is_evaluated = np.isin(np.arange(len(queries)), self._evaluated)
                lists = [x if e else none for x, e in zip(lists, is_evaluated, strict=True)]
            pairs = Pairs.of_lists(lists)
            scores = self._scores(output, sharing, queries, pairs, on_progress)
            for name, scores_P in (scores or {}).items():
                by_query = pairs.by_query(scores_P, len(queries))
                note = self._notes.get(self._name_of_metric(sharing[name]), {})
                results[name] = Result(
                    self._ranked(first, by_query, len(queries), k, queries.correct), note
                )
        return results

    def _ranked(self, first: dict[str, Ranked], by_query, count: int, k: int, correct) -> Ranked:
        if first:
            return candidates.rank(next(iter(first.values())), by_query, k, correct)
        scores = (scores_C for _, scores_C in by_query)
        return by_score.rank(scores, count, k, correct, self.withdrawn)

    def _make_factors(self, output: str) -> GradientFactors:
        kind = Method("").gradients
        return GradientFactors(self.run.trained.model, self.run.sites(kind), output)

    def _scores(self, output: str, methods: dict[str, Method], queries, pairs, on_progress):
        """Returns the scores of pairs by method; None in all processes but the first."""
        run = self.run
        tell(on_progress, "preparing gradients without projection")
        factors = self._factors(output)
        metrics = {n: (self._metric(m, factors), m.unit_norm) for n, m in methods.items()}
        scorer = PairScorer(factors, metrics, run.layout, memory_bytes(run.config))
        total = len(pairs.rows) * scorer.passes(queries.table, np.unique(pairs.queries))
        identity = [self._gradients(m) for m in methods.values()]
        groups = ONE_GROUP
        if not run.live:
            print(f"second stage: {len(pairs.queries):,} pairs: {', '.join(methods)}")
            is_joint = not sharding.is_local(run.trained.mesh)
            groups = dataclasses.replace(run.groups, is_joint=is_joint)
        with contextlib.ExitStack() as stack:
            if on_progress is not None:
                on_rows = progress.counted(on_progress, "scoring without projection", total)
            else:
                title = f"second stage ({', '.join(methods)})"
                bar = stack.enter_context(progress.bar(total, title, "passage", saves_work=True))

                def on_rows(count: int) -> None:
                    bar.update(count)
                    # A group may take longer than the time between a notice and the kill.
                    processes.check_preemption(groups.is_joint)

            identity = plain([identity, list(methods)])
            passages = run.corpus.passages
            return scorer.score(queries.table, passages, pairs, groups, identity, on_rows)

    def _name_of_metric(self, method: Method) -> str:
        return fingerprint(plain([dataclasses.asdict(method.gradients), method.hessian]))

    def _metric(self, method: Method, factors: GradientFactors) -> Metric:
        run, kind = self.run, method.gradients
        name = self._name_of_metric(method)
        if name not in self._metrics:
            sites = run.sites(kind)
            if kind.curvature == "ekfac":
                fitted = curvature.factors(run, kind)
                metric = pair_metrics.ekfac(sites, fitted, run.config.curvature.damping)
            elif kind.corrected:
                metric = pair_metrics.corrected(sites, moments.inverse_root_moments(run, kind))
            else:
                metric = pair_metrics.identity(sites)
            if method.hessian != "none":
                sums = curvature.whole_moments(run, method, factors, metric)
                note: dict = {"damping": self._damping}
                if method.hessian == "mixed":
                    of_queries = curvature.whole_moments(run, method, factors, metric, "queries")
                    h = run.config.hessian
                    mixed = pair_metrics.mixture(sums, of_queries, h.weight, h.component)
                    sums, weight, k = mixed
                    note |= {"lambda": weight, "component": k, "evaluation": "all"}
                metric = pair_metrics.whitened(metric, sums, self._damping)
                seed = run.config.curvature.seed
                passages = run.corpus.passages
                metric = pair_products.balanced(factors, metric, run.layout, passages, seed)
                self._notes[name] = note
            self._metrics[name] = metric
        return self._metrics[name]

    def release(self, methods):
        """Frees the metrics and the compiled programs."""
        self._metrics.clear()
        self._factors.cache_clear()
