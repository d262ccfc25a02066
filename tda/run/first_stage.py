"""The first stage of methods that take the first passages of other methods as candidates."""

import dataclasses
from collections.abc import Callable

from tda import methods as method_lib
from tda.methods import Method
from tda.retrieval import candidates, ranked
from tda.retrieval.ranked import Ranked
from tda.run.retrievers import Queries, Retriever
from tda.run.run import Run
from tda.runtime.progress import Progress


def first_methods(config, chosen: dict[str, Method]) -> dict[str, Method]:
    """Returns the methods that find candidates for the chosen ones; none if every passage is one.

    Raises:
        ValueError: such a method takes candidates itself, there are fewer candidates than passages
            to show, or a method names candidates of its own and every passage is one.
    """
    chosen = {n: m for n, m in chosen.items() if m.takes_candidates}
    if not chosen:
        return {}
    if not config.rerank.passages:
        for method in chosen.values():
            if method.candidates:
                raise ValueError(
                    f"{method.title} takes the first passages of {method.candidates}, and "
                    "rerank.passages=0 scores every passage; give a number, such as "
                    "rerank.passages=100"
                )
        return {}
    first: dict[str, Method] = {}
    for method in chosen.values():
        names = method.candidates or config.rerank.candidates
        first |= method_lib.parse(names)
        if wrong := [n for n, m in first.items() if m.takes_candidates]:
            raise ValueError(
                f"rerank.candidates={names!r}: {', '.join(wrong)} score the candidates of others; "
                "name methods of the first stage, such as trackstar,bm25"
            )
    if config.rerank.passages < config.eval.top_k:
        raise ValueError(
            f"rerank.passages={config.rerank.passages} is below eval.top_k={config.eval.top_k}: "
            "rankings would be too short; use at least as many, or 0 for every passage"
        )
    return first


def with_first(config, chosen: dict[str, Method]) -> dict[str, Method]:
    """Returns the chosen methods and those that find their candidates; errors as above."""
    return chosen | first_methods(config, chosen)


def first_stage(run: Run, chosen: dict[str, Method]) -> Run | None:
    """Returns the run of the methods that find candidates; None if there are none."""
    first = first_methods(run.config, chosen)
    if not first:
        return None
    config = run.config.copy_and_resolve_references()
    config.methods, config.eval.top_k = ",".join(first), config.rerank.passages
    return dataclasses.replace(run, config=config)


class FirstStage:
    """The rankings that the methods of a run take candidates from.

    Args:
        run: the run.
        make: returns the function that makes a method's retriever.
    """

    def __init__(self, run: Run, make: Callable[[Method], Callable[[Run], Retriever]]):
        self._run, self._make = run, make
        self._retrievers: dict[str, Retriever] = {}

    def _retrievers_of(self, method: Method) -> dict[str, tuple[Method, Retriever]]:
        """Returns the methods that find a method's candidates, with their retrievers."""
        run = first_stage(self._run, {"": method})
        first = {} if run is None else method_lib.parse(run.config.methods)
        for name in first:
            if name not in self._retrievers:
                self._retrievers[name] = self._make(first[name])(run)
        return {name: (m, self._retrievers[name]) for name, m in first.items()}

    def lacks(self, method: Method) -> str | None:
        """Returns what is missing to find a method's candidates, or None."""
        for name, (first, retriever) in self._retrievers_of(method).items():
            if why := retriever.lacks(first):
                return f"its candidates come from {name}: {why}"
        return None

    def ranking_names(self, method: Method) -> list[str]:
        """Returns the file names of the rankings that a method takes candidates from."""
        return [r.ranking_name(first) for first, r in self._retrievers_of(method).values()]

    def rank(
        self, method: Method, queries: Queries, on_progress: Progress | None
    ) -> dict[str, Ranked]:
        """Returns the rankings of a method's candidates: a run has them on disk."""
        rankings, depth = {}, self._run.config.rerank.passages
        for name, (first, retriever) in self._retrievers_of(method).items():
            if self._run.live:
                result = retriever.search(queries, {name: first}, depth, on_progress)[name]
                rankings[name] = result.ranked
            else:
                file = self._run.workdir / "retrieval" / f"{retriever.ranking_name(first)}.npz"
                rankings[name] = ranked.load(file)
        return rankings

    def rank_matches(
        self, method: Method, queries: Queries, on_progress: Progress | None
    ) -> dict[str, Ranked]:
        """Returns the rankings of `rank` without passages that only fill them up."""
        rankings = self.rank(method, queries, on_progress)
        for name, (_, retriever) in self._retrievers_of(method).items():
            if retriever.zero_is_no_match:
                rankings[name] = candidates.without_unmatched(rankings[name])
        return rankings
