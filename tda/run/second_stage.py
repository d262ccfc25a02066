"""Methods of the second stage: a first stage's candidates, scored without any projection."""

import contextlib
import dataclasses
import functools
from collections.abc import Callable

import numpy as np

from tda import methods as method_lib
from tda.gradients import pair_products
from tda.gradients.factors import GradientFactors
from tda.gradients.pair_products import Metric
from tda.gradients.second_stage import Pairs, PairScorer
from tda.methods import Method
from tda.retrieval import by_score, candidates, ranked
from tda.retrieval.ranked import Ranked
from tda.run import curvature, moments
from tda.run.retrievers import Queries, Result, Retriever, tell
from tda.run.run import Run
from tda.runtime import progress, sharding
from tda.runtime.fingerprint import fingerprint, plain
from tda.runtime.groups import ONE_GROUP


def first_methods(config, chosen: dict[str, Method]) -> dict[str, Method]:
    """Returns the methods that find the candidates of the chosen methods; none if all passages are.

    Raises:
        ValueError: a candidate method is itself of the second stage, or there are fewer candidates
            than passages to show.
    """
    # A run that was finished before there was this section has none.
    if "rerank" not in config or not config.rerank.passages:
        return {}
    if not any(m.retriever == "rerank" for m in chosen.values()):
        return {}
    first = method_lib.parse(config.rerank.candidates)
    if wrong := [n for n, m in first.items() if m.retriever == "rerank"]:
        raise ValueError(
            f"rerank.candidates={config.rerank.candidates!r}: {', '.join(wrong)} score the "
            "candidates of others; name methods of the first stage, such as trackstar,bm25"
        )
    if config.rerank.passages < config.eval.top_k:
        raise ValueError(
            f"rerank.passages={config.rerank.passages} is below eval.top_k={config.eval.top_k}: "
            "rankings would end before; use at least as many, or 0 for every passage"
        )
    return first


def check(config, method: Method) -> None:
    """Checks that a method's C is one that whole gradients can have.

    Raises:
        ValueError: it is not; the message says what to use.
    """
    if method.several or method.steps_by_adam or method.passages != "plain":
        raise ValueError(
            f"{method.title}: a method without projection takes plain gradients of one checkpoint"
        )
    if method.hessian not in ("none", "train"):
        raise ValueError(f"{method.title}: R without projection is none or train")
    if method.curvature == "logra" or (method.curvature != "none" and method.hessian != "none"):
        raise ValueError(f"{method.title}: without projection there is EK-FAC alone, or R alone")
    if method.hessian == "train" and method.corrected and config.gradients.correction == "adam":
        raise ValueError(f"{method.title}: {pair_products.NOT_FACTORED}")


def first_stage(run: Run, chosen: dict[str, Method]) -> Run | None:
    """Returns the run of the methods that find candidates; None if there are none."""
    first = first_methods(run.config, chosen)
    if not first:
        return None
    config = run.config.copy_and_resolve_references()
    config.methods, config.eval.top_k = ",".join(first), config.rerank.passages
    return dataclasses.replace(run, config=config)


class SecondStage(Retriever):
    """Scores candidates by whole gradients, of all methods of the second stage in one pass.

    Args:
        run: the run.
        make: returns the function that makes a method's retriever.
    """

    shares_search = True
    # They share the passages' gradients.
    searches_together = True

    def __init__(self, run: Run, make: Callable[[Method], Callable[[Run], Retriever]]):
        super().__init__(run)
        config = run.config
        # Any of them: whether there is a first stage does not depend on which.
        any_method = {"": Method("", retriever="rerank")}
        self._first_run = first_stage(run, any_method)
        self._first = first_methods(config, any_method)
        self._retrievers: dict[str, Retriever] = {}
        self._make = make
        self._factors = functools.cache(self._make_factors)
        self._metrics: dict[str, Metric] = {}

    def _retriever(self, name: str) -> Retriever:
        if name not in self._retrievers:
            self._retrievers[name] = self._make(self._first[name])(self._first_run)
        return self._retrievers[name]

    def lacks(self, method):
        """Returns what candidates or metric lack, or None."""
        for name, first in self._first.items():
            if why := self._retriever(name).lacks(first):
                return f"its candidates come from {name}: {why}"
        file = curvature.file_of_metric(self.run, method)
        if file is not None and not file.exists():
            return "the run has kept no curvature for it: the method was not run"
        return None

    def provenance(self, method):
        """Gradients, metric and candidates."""
        names = [self._retriever(n).ranking_name(m) for n, m in self._first.items()]
        return [*self._gradients(method), names]

    def _gradients(self, method: Method) -> list:
        provenance = self.run.provenance(method.gradients)
        provenance.pop("projection")
        if method.hessian != "none":
            provenance |= {"R": self.run.curvature_provenance("whole"), "damping": self._damping}
        return [provenance]

    @property
    def _damping(self) -> float:
        """What is added to the factors of R, in mean eigenvalues."""
        damping = self.run.config.hessian.damping
        return pair_products.DAMPING if damping < 0 else damping

    def search(self, queries, methods, k, on_progress=None):
        """See `Retriever`."""
        run, first = self.run, self._rank_first(queries, on_progress)
        count = run.corpus.rows
        lists = (
            candidates.unite(list(first.values())) if first else [np.arange(count)] * len(queries)
        )
        pairs = Pairs.of_lists(lists)
        outputs: dict[str, dict[str, Method]] = {}
        for name, method in methods.items():
            output = method.output or run.config.gradients.output
            outputs.setdefault(output, {})[name] = method
        results: dict[str, Result] = {}
        for output, sharing in outputs.items():
            scores = self._scores(output, sharing, queries, pairs, on_progress)
            for name, scores_P in (scores or {}).items():
                by_query = pairs.by_query(scores_P, len(queries))
                results[name] = Result(
                    self._ranked(first, by_query, len(queries), k, queries.correct)
                )
        return results

    def _ranked(self, first: dict[str, Ranked], by_query, count: int, k: int, correct) -> Ranked:
        if first:
            return candidates.rank(next(iter(first.values())), by_query, k, correct)
        withdrawn = self.withdrawn

        def all_scores():
            for _, scores_C in by_query:
                scores_C[withdrawn] = -np.inf
                yield scores_C

        return by_score.rank(all_scores(), count, k, correct)

    def _rank_first(self, queries: Queries, on_progress) -> dict[str, Ranked]:
        """Returns the rankings that candidates come from: a run has them on disk by now."""
        rankings = {}
        for name, method in self._first.items():
            retriever, depth = self._retriever(name), self.run.config.rerank.passages
            if self.run.live:
                result = retriever.search(queries, {name: method}, depth, on_progress)[name]
                rankings[name] = result.ranked
            else:
                file = self.run.workdir / "retrieval" / f"{retriever.ranking_name(method)}.npz"
                rankings[name] = ranked.load(file)
        return rankings

    def _make_factors(self, output: str) -> GradientFactors:
        kind = Method("").gradients
        return GradientFactors(self.run.trained.model, self.run.sites(kind), output)

    def _scores(self, output: str, methods: dict[str, Method], queries, pairs, on_progress):
        """Returns the scores of pairs by method; None in all processes but the first."""
        run = self.run
        tell(on_progress, "preparing gradients without projection")
        factors = self._factors(output)
        metrics = {n: (self._metric(m, factors), m.unit_norm) for n, m in methods.items()}
        scorer = PairScorer(factors, metrics, run.layout, int(run.config.search.memory_gib * 2**30))
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
                on_rows = stack.enter_context(progress.bar(total, title, "passage")).update
            identity = plain([identity, list(methods)])
            passages = run.corpus.passages
            return scorer.score(queries.table, passages, pairs, groups, identity, on_rows)

    def _metric(self, method: Method, factors: GradientFactors) -> Metric:
        run, kind = self.run, method.gradients
        name = fingerprint(plain([dataclasses.asdict(kind), method.hessian]))
        if name not in self._metrics:
            sites = run.sites(kind)
            if kind.curvature == "ekfac":
                fitted = curvature.factors(run, kind)
                metric = pair_products.ekfac(sites, fitted, run.config.curvature.damping)
            elif kind.corrected:
                metric = pair_products.corrected(sites, moments.inverse_root_moments(run, kind))
            else:
                metric = pair_products.identity(sites)
            if method.hessian == "train":
                sums = curvature.whole_moments(run, method, factors, metric)
                metric = pair_products.whitened(metric, sums, self._damping)
            self._metrics[name] = metric
        return self._metrics[name]

    def release(self, methods):
        """Drops the metrics and what is compiled."""
        self._metrics.clear()
        self._factors.cache_clear()
