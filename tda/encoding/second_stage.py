"""The second stage of `tda.trace`: a method's first passages, scored again by whole gradients."""

import dataclasses
import functools
from collections.abc import Sequence

import numpy as np

from tda.data.batches import BatchLayout, draw
from tda.data.tokens import TokenTable
from tda.encoding.settings import TraceSettings
from tda.gradients import kronecker, pair_metrics, pair_products
from tda.gradients.factors import GradientFactors
from tda.gradients.kronecker import Curvature
from tda.gradients.moments.scales import Scale
from tda.gradients.pair_metrics import Metric, Moments
from tda.gradients.second_stage import Pairs, PairScorer
from tda.methods import Method
from tda.retrieval import candidates
from tda.retrieval.ranked import Ranked
from tda.runtime import progress

# The most passages that R is computed from, and the bytes of the queries' factors in memory.
_SAMPLE, _MEMORY = 4096, 4 << 30


class WholeGradients:
    """Scores of a corpus's passages without projection.

    Args:
        settings: the arguments of `tda.trace`.
        table: the passages.
        layout: how they are batched.
        scales: 1/√V by path, for methods with correction.
        curvature: EK-FAC's factors by path, for its methods.

    Raises:
        ValueError: a parameter is not a matrix that its layer multiplies by; the message names it.
    """

    def __init__(
        self,
        settings: TraceSettings,
        table: TokenTable,
        layout: BatchLayout,
        scales: dict[str, Scale] | None,
        curvature: dict[str, Curvature] | None = None,
    ):
        self._settings, self._table, self._layout, self._scales = settings, table, layout, scales
        self._curvature = curvature
        # Made once for all questions.
        self._whitened = functools.cache(lambda damping: self._whiten(self._moments, damping))
        self._factors = GradientFactors(
            settings.model, settings.sites(), settings.loss, settings.mesh
        )

    @functools.cached_property
    def _plain(self) -> Metric:
        sites = self._settings.sites()
        if self._curvature is not None:
            return pair_metrics.ekfac(sites, self._curvature, kronecker.DAMPING)
        if self._scales is None:
            return pair_metrics.identity(sites)
        return pair_metrics.corrected(sites, self._scales)

    @functools.cached_property
    def _moments(self) -> Moments:
        rows = draw(len(self._table), _SAMPLE, self._settings.moments.seed)
        return pair_products.fit_moments(
            self._factors, self._plain, self._layout, self._table, rows
        )

    def _whiten(self, moments: Moments, damping: float) -> Metric:
        damping = pair_metrics.DAMPING if damping < 0 else damping
        metric = pair_metrics.whitened(self._plain, moments, damping)
        seed = self._settings.moments.seed
        return pair_products.balanced(self._factors, metric, self._layout, self._table, seed)

    def _metric(self, method: Method, queries: TokenTable, damping: float) -> Metric:
        if method.hessian == "none":
            return self._plain
        if method.hessian == "train":
            return self._whitened(damping)
        rows = np.arange(len(queries))
        # A query may be longer than every passage.
        longest, lengths = int(queries.lengths.max()) - 1, self._layout.bucket_lengths
        layout = self._layout
        if longest > lengths[-1]:
            layout = dataclasses.replace(layout, bucket_lengths=(*lengths, longest))
        of_queries = pair_products.fit_moments(self._factors, self._plain, layout, queries, rows)
        mixed, weight, k = pair_metrics.mixture(self._moments, of_queries)
        progress.tell(
            f"second stage: R of {len(rows):,d} queries mixed in, λ = {weight:.3f}, k = {k:,d}"
        )
        return self._whiten(mixed, damping)

    def rank(
        self,
        queries: TokenTable,
        first: Sequence[Ranked],
        method: Method,
        k: int,
        damping: float = -1.0,
    ) -> Ranked:
        """Ranks the proponents of first rankings again; the result has no opponents.

        Args:
            queries: the queries, none longer than the longest passage may be.
            first: the first rankings.
            method: decides correction, R and norm; R of a matrix is the product of the second
                moments of its rows and of its columns.
            k: the number of proponents.
            damping: of R, in mean eigenvalues of a factor; below 0, `pair_metrics.DAMPING`.
        """
        lists = candidates.unite(first)
        pairs = Pairs.of_lists(lists)
        metric = self._metric(method, queries, damping)
        scorer = PairScorer(self._factors, {"": (metric, method.unit_norm)}, self._layout, _MEMORY)
        total = len(pairs.rows) * scorer.passes(queries, np.unique(pairs.queries))
        with progress.bar(total, "second stage", "passage") as bar:
            scores = scorer.score(queries, self._table, pairs, on_passages=bar.update)
        return candidates.rank(first[0], pairs.by_query(scores[""], len(lists)), k)
