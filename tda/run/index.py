"""Search through an approximate index, where the config wants one and the corpus is large enough.

Ranks of correct passages are known only as deep as the index is asked; a correct passage that it
does not return counts as the last of the corpus, so MRR and recall are lower bounds.
"""

from collections.abc import Callable

import numpy as np

from tda.retrieval import exact
from tda.retrieval import scorer as scoring
from tda.retrieval.ranked import Ranked
from tda.retrieval.scann import build, part
from tda.retrieval.scorer import Scorer
from tda.retrieval.sources import Source
from tda.run.run import NO_STORE, Run

KINDS = ("none", "scann")


def check(config) -> None:
    """Nothing, where the search section of a config can be obeyed.

    Raises:
        ValueError: it cannot; names the key.
        ScannError: ScaNN is not installed.
    """
    s = config.search
    if s.index not in KINDS:
        raise ValueError(f"unknown search.index={s.index!r}; use {' or '.join(KINDS)}")
    if s.index == "none":
        return
    if config.store.dtype == NO_STORE:
        raise ValueError("search.index=scann needs a store to index; give store.dtype")
    if s.depth < config.eval.top_k:
        raise ValueError(f"search.depth={s.depth} is less than eval.top_k={config.eval.top_k}")
    part.version()


def settings(config, source: Source) -> build.Settings | None:
    """How the corpus is indexed; None where exact search is to be used, and says why."""
    s = config.search
    changes = {k: v for k, v in s.scann.items() if v is not None}
    found = build.settings_for(
        source.rows, source.form.width, config.eval.top_k, int(s.memory_gib * 2**30), **changes
    )
    if found is None:
        print(
            f"search.index=scann: {source.rows:,} rows of {source.form.width:,} numbers are "
            "searched exactly, which is quick enough and has a recall of 1"
        )
    return found


def search(
    run: Run,
    source: Source,
    queries_QxE: np.ndarray,
    scorers: dict[str, Scorer],
    correct: dict[str, list[np.ndarray]],
    fingerprints: dict[str, str],
    exactly: Callable[..., dict[str, Ranked]],
) -> tuple[dict[str, Ranked], dict[str, dict]]:
    """What every method ranks, and what is to be told of its index.

    Args:
        run: the run.
        source, queries_QxE: gradients of the corpus and of the queries.
        scorers: the methods, by name.
        correct: for each set of labels, the correct rows of each query.
        fingerprints: of all that decides a method's encodings, by name.
        exactly: exact search by queries, scorers, k and correct rows.
    """
    config = run.config
    k = config.eval.top_k
    chosen = settings(config, source) if config.search.index == "scann" else None
    if chosen is None:
        return exactly(queries_QxE, scorers, k, correct), {}
    ranked, told = {}, {}
    for name, scorer in scorers.items():
        asked = _sample(config, len(queries_QxE))
        encodings_QxE = np.asarray(
            scoring.encode(queries_QxE, scorer.whitening, scorer.unit_norm, source.form.widths)
        )

        def check_against(asked=asked, encodings=encodings_QxE, name=name, scorer=scorer):
            found = exactly(queries_QxE[asked], {name: scorer}, 10, {})[name]
            return encodings[asked], found

        index = build.build(
            run.workdir / "indices" / fingerprints[name],
            lambda first, scorer=scorer: scoring.encode_source(
                source, scorer, exact.step_rows(source.form.width)
            ),
            source.rows,
            source.form.width,
            chosen,
            {"encodings": fingerprints[name]},
            check_against,
        )
        deep = index.search(encodings_QxE, min(config.search.depth, source.rows))
        ranked[name] = _cut(deep, k, correct, source.rows)
        told[name] = {"index": {"settings": vars(chosen), "recall": index.recall}}
    return ranked, told


def _sample(config, queries: int) -> np.ndarray:
    count = min(queries, config.search.recall_queries)
    return np.sort(np.random.default_rng(config.data.seed).permutation(queries)[:count])


def _cut(deep: Ranked, k: int, correct, rows: int) -> Ranked:
    """The first k, and the ranks of the first correct passages among all that were returned."""
    ranks = {
        label: np.array([_rank(deep.proponents[q], c, rows) for q, c in enumerate(lists)], np.int64)
        for label, lists in correct.items()
    }
    return Ranked(
        deep.proponents[:, :k],
        deep.proponent_scores[:, :k],
        deep.opponents[:, :k],
        deep.opponent_scores[:, :k],
        ranks,
    )


def _rank(found_K: np.ndarray, correct: np.ndarray, rows: int) -> int:
    if not len(correct):
        return 0
    at = np.flatnonzero(np.isin(found_K, correct))
    return int(at[0]) + 1 if len(at) else rows


def describe(notes: dict) -> list[str]:
    """Describes the indices that were searched, a line for each."""
    lines = []
    for name, note in notes.items():
        if "index" in note:
            r = note["index"]["recall"]
            lines.append(
                f"{name}: searched through a ScaNN index, recall@{r['k']} against exact search "
                f"over {r['queries']} queries: proponents {r['proponents']:.3f}, opponents "
                f"{r['opponents']:.3f}"
            )
    return lines
