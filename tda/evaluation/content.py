"""How retrieved passages relate to a query: they state its fact, or only something near it.

A passage that raises the target's probability need not state the fact: it may state the same of
another subject, or only name the target. How a method's first passages divide among these kinds,
and what a step on each kind does, shows where a tail-patch score comes from.
"""

from collections.abc import Callable, Iterable, Sequence

import numpy as np

from tda.evaluation import frequency, ranking, statistics, summary
from tda.facts.records import Fact, Triple

# The closest kind first; a passage is of the first kind that fits.
KINDS = (
    "states the fact",
    "states it of another subject",
    "names the target",
    "states the relation, of another object",
    "none of these",
)


class Content:
    """Classifies how passages of a corpus relate to some queries; reads each passage once.

    Args:
        facts: the queries.
        correct: the rows that state each query's fact.
        text_of: returns a row's text, which names the target by its name or an alias, as in
            `tda.evaluation.frequency`.
        triples_of: returns a row's annotations. Relations and objects are compared by URI, so a
            triple without URIs states nothing about another subject.
    """

    def __init__(
        self,
        facts: Sequence[Fact],
        correct: Sequence[np.ndarray],
        text_of: Callable[[int], str],
        triples_of: Callable[[int], Iterable[Triple]],
    ):
        targets: dict[tuple[str, ...], int] = {}
        self._queries = [
            (
                fact,
                set(np.asarray(rows).tolist()),
                targets.setdefault(
                    frequency.entity(fact.entity1, fact.entity1_alias), len(targets)
                ),
            )
            for fact, rows in zip(facts, correct, strict=True)
        ]
        self._names = frequency.Names(list(targets))
        self._text_of, self._triples_of = text_of, triples_of
        self._rows: dict[int, tuple[set[int], set[tuple[str, str]]]] = {}

    def kinds(self, passages_QxK: np.ndarray) -> np.ndarray:
        """Returns the kind of each passage for the query that retrieved it.

        Args:
            passages_QxK: int, rows of passages; below 0 for none.

        Returns:
            int64 [Q, K], indices into `KINDS`; −1 where there is no passage.
        """
        out = np.full(passages_QxK.shape, -1, np.int64)
        for q, (fact, correct, target) in enumerate(self._queries):
            for i, row in enumerate(passages_QxK[q].tolist()):
                if row < 0:
                    continue
                named, stated = self._read(row)
                fits = (
                    row in correct,
                    (fact.predicate_uri, fact.entity1_uri) in stated,
                    target in named,
                    any(relation == fact.predicate_uri for relation, _ in stated),
                    True,
                )
                out[q, i] = fits.index(True)
        return out

    def _read(self, row: int) -> tuple[set[int], set[tuple[str, str]]]:
        """Returns the targets that a passage names, and (relation, object) of its triples."""
        if row not in self._rows:
            stated = {(t.predicate_uri, t.entity1_uri) for t in self._triples_of(row)}
            self._rows[row] = self._names(self._text_of(row)), stated
        return self._rows[row]


def shares(kinds_QxK: np.ndarray, count: int = len(KINDS)) -> np.ndarray:
    """Returns each kind's share of a query's passages, float64 [Q, kinds]; NaN without passages.

    `count` is the number of kinds.
    """
    count_Qx1 = (kinds_QxK >= 0).sum(axis=1, keepdims=True)
    of_kind = np.stack([(kinds_QxK == k).sum(axis=1) for k in range(count)], axis=1)
    return np.where(count_Qx1 > 0, of_kind / np.maximum(count_Qx1, 1), np.nan)


def by_kind(kinds_QxK: np.ndarray, figures_QxK: np.ndarray, count: int = len(KINDS)) -> np.ndarray:
    """Returns the mean figure of all pairs of a query and a passage of each kind: float64 [kinds].

    A NaN was not measured. Means are over pairs and not over queries, since few queries have
    passages of every kind.
    """
    return np.array([ranking.mean(figures_QxK[kinds_QxK == k]) for k in range(count)])


def by_rank(kinds_QxK: np.ndarray, count: int = len(KINDS)) -> np.ndarray:
    """Returns each kind's share of the passages at each rank: float64 [K, kinds].

    NaN where no query has a passage.
    """
    return np.stack(
        [ranking.mean(shares(rank_Q[:, None], count), axis=0) for rank_Q in kinds_QxK.T]
    )


def figures(
    names: Sequence[str],
    kinds_QxK: np.ndarray,
    steps_QxK: np.ndarray,
    *,
    knowledge_Q: np.ndarray,
    **bootstrap: int,
) -> dict[str, dict]:
    """Returns the figures of each kind, as JSON values.

    Args:
        names: the kinds.
        kinds_QxK: the kinds of a method's proponents, as indices into `names`; −1 for no passage.
        steps_QxK: the tail-patch of each pair, float64; NaN where it was not measured.
        knowledge_Q: what the model knows of each query (`tda.evaluation.summary.knowledge`).
        **bootstrap: resamples and seed of the intervals (`tda.evaluation.statistics.intervals`).

    Returns:
        For each name its "share" of the proponents with "interval", the share "by_rank" and
        "by_prior", of each group of `knowledge_Q`; the mean "tail_patch" over "n_tail_patches"
        pairs.
    """
    count = len(names)
    shares_QxN = shares(kinds_QxK, count)
    steps, by_rank_KxN = by_kind(kinds_QxK, steps_QxK, count), by_rank(kinds_QxK, count)
    known = {
        group: ranking.mean(shares_QxN[knowledge_Q == i], axis=0)
        for i, group in enumerate(summary.KNOWLEDGE)
        if np.any(knowledge_Q == i)
    }
    return {
        name: {
            "share": summary.number(interval.mean),
            "interval": [summary.number(interval.low), summary.number(interval.high)],
            "by_rank": [summary.number(x) for x in by_rank_KxN[:, k]],
            "by_prior": {group: summary.number(share_N[k]) for group, share_N in known.items()},
            "tail_patch": summary.number(steps[k]),
            "n_tail_patches": int(np.sum((kinds_QxK == k) & np.isfinite(steps_QxK))),
        }
        for k, (name, interval) in enumerate(
            zip(names, statistics.intervals(shares_QxN, **bootstrap), strict=True)
        )
    }
