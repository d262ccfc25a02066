"""A method that joins the rankings of others by their ranks."""

from collections.abc import Callable

from tda.methods import Method
from tda.retrieval import candidates
from tda.run.first_stage import FirstStage
from tda.run.retrievers import Result, Retriever
from tda.run.run import Run


class Fusion(Retriever):
    """Reciprocal-rank fusion of a method's candidates (Cormack et al. 2009).

    A passage that shares no word with the query has no rank among BM25's.

    Args:
        run: the run.
        make: as for `FirstStage`.
    """

    def __init__(self, run: Run, make: Callable[[Method], Callable[[Run], Retriever]]):
        super().__init__(run)
        self._first = FirstStage(run, make)

    def lacks(self, method):
        """Returns what is missing for the rankings that are joined, or None."""
        return self._first.lacks(method)

    def provenance(self, method):
        """Returns the names of the joined rankings, of which only matches count."""
        return [self._first.ranking_names(method), "matches"]

    def search(self, queries, methods, k, on_progress=None):
        """See `Retriever`."""
        results = {}
        for name, method in methods.items():
            # BM25 fills its list up with unmatched passages, by row: their ranks would count fully.
            rankings = list(self._first.rank_matches(method, queries, on_progress).values())
            fused = candidates.fuse(rankings)
            results[name] = Result(candidates.rank(rankings[0], fused, k, queries.correct))
        return results
