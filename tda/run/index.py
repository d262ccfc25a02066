"""Search through an approximate index, if the config asks for one and the corpus is large enough.

Ranks of correct passages are known only as deep as the index is searched; a correct passage that it
does not return counts as the last of the corpus, so MRR and recall are lower bounds.
"""

import dataclasses
import functools
from collections.abc import Callable

import numpy as np

from tda import methods
from tda.retrieval import ranked
from tda.retrieval import scorer as scoring
from tda.retrieval.ranked import Ranked
from tda.retrieval.scann import index as scann_index
from tda.retrieval.scann import part
from tda.retrieval.scann.settings import Settings, settings_for
from tda.retrieval.scorer import Scorer
from tda.retrieval.sources import Source
from tda.run import first_stage
from tda.run.run import NO_STORE, Run, memory_bytes


def check(config) -> None:
    """Checks the search section of a config.

    Raises:
        ValueError: a value conflicts with another; the message names the key.
        ScannError: ScaNN is not installed.
    """
    s = config.search
    if s.index == "none":
        return
    if config.store.dtype == NO_STORE:
        raise ValueError("search.index=scann needs a store to index; give store.dtype")
    # An index returns no more rows than it is searched for.
    if s.depth < config.eval.top_k:
        raise ValueError(f"search.depth={s.depth} is less than eval.top_k={config.eval.top_k}")
    finders = first_stage.first_methods(config, methods.parse(config.methods))
    indexed = [name for name, method in finders.items() if method.shares_scan]
    if indexed and s.depth < config.rerank.passages:
        raise ValueError(
            f"search.depth={s.depth} is less than rerank.passages={config.rerank.passages}, the "
            f"candidates to take from the index of {', '.join(indexed)}; raise search.depth, or "
            "lower rerank.passages"
        )
    try:
        # The rule sets `part_rows`, and leaves what else conflicts at these defaults.
        Settings(**({"part_rows": 1} | _changes(config)))
    except ValueError as error:
        raise ValueError(f"search.scann.{error}") from error
    part.import_scann()


def _changes(config) -> dict:
    """Returns the settings of ScaNN that the config sets itself."""
    return {k: v for k, v in config.search.scann.items() if v is not None}


def choose(config, rows: int, width: int) -> Settings | None:
    """Returns the settings of an index of rows of `width` numbers; None if search is exact.

    Raises:
        ValueError: search.memory_gib is too little for such rows.
    """
    if config.search.index == "none":
        return None
    try:
        return settings_for(
            rows, width, config.eval.top_k, memory_bytes(config), **_changes(config)
        )
    except ValueError as error:
        raise ValueError(f"search.memory_gib={config.search.memory_gib}: {error}") from error


def settings(config, source: Source) -> Settings | None:
    """Returns the settings of the index; None, after printing why, if the search is exact."""
    chosen = choose(config, source.rows, source.form.width)
    if chosen is None:
        print(
            f"search.index=scann: {source.rows:,} rows of {source.form.width:,} numbers are "
            "searched exactly, which is quick enough and has a recall of 1"
        )
    return chosen


def search(
    run: Run,
    source: Source,
    queries_QxE: np.ndarray,
    scorers: dict[str, Scorer],
    correct: dict[str, list[np.ndarray]],
    fingerprints: dict[str, str],
    exactly: Callable[..., dict[str, Ranked]],
    k: int,
) -> tuple[dict[str, Ranked], dict[str, dict]]:
    """Returns the ranking of every method, and notes on its index for tables, by name.

    Args:
        run: the run.
        source: gradients of the corpus.
        queries_QxE: gradients of the queries.
        scorers: the scorer of each method.
        correct: for each set of labels, the correct rows of each query.
        fingerprints: a hash of each method's encodings, which names its index.
        exactly: exact search by queries, scorers, k and correct rows.
        k: number of proponents and of opponents of each query.
    """
    config = run.config
    chosen = settings(config, source) if config.search.index == "scann" else None
    if chosen is None:
        return exactly(queries_QxE, scorers, k, correct), {}
    # Recall is measured on a sample: exact search for all queries would cost what the index saves.
    count = min(len(queries_QxE), config.search.recall_queries)
    rng = np.random.default_rng(config.data.seed)
    sample = np.sort(rng.permutation(len(queries_QxE))[:count])
    rankings, notes = {}, {}
    for name, scorer in scorers.items():
        encodings_QxE = np.asarray(
            scoring.encode(queries_QxE, scorer.whitening, scorer.unit_norm, source.form.widths)
        )

        def rank_sample(encodings_QxE=encodings_QxE, name=name, scorer=scorer):
            exact = exactly(queries_QxE[sample], {name: scorer}, 10, {})
            return encodings_QxE[sample], exact.get(name)

        encodings = scann_index.Encodings(
            functools.partial(scoring.read_encodings, source, scorer),
            source.rows,
            source.form.width,
            {"encodings": fingerprints[name]},
        )
        directory = run.workdir / "indices" / fingerprints[name]
        check_recall = rank_sample if count else None
        index = scann_index.build(directory, encodings, chosen, check_recall, run.groups)
        deep = index.search(
            encodings_QxE,
            min(config.search.depth, source.rows),
            getattr(source, "withdrawn", None),
            # As many as the first k rows need: deeper ranks are not worth more reads.
            candidates=scann_index.CANDIDATES * k,
        )
        if deep is None:
            continue  # another process merges the parts' rankings
        rankings[name] = _cut(deep, k, correct, source.rows)
        notes[name] = {"index": {"settings": vars(chosen), "recall": index.recall}}
    return rankings, notes


def _cut(deep: Ranked, k: int, correct, rows: int) -> Ranked:
    """Returns the first k rows, with the first correct rank among all rows that were returned."""

    def rank(proponents_K: np.ndarray, correct_rows: np.ndarray) -> int:
        # Rank 0 stands for a query without correct passages.
        if not len(correct_rows):
            return 0
        places = np.flatnonzero(np.isin(proponents_K, correct_rows))
        return int(places[0]) + 1 if len(places) else rows

    ranks = {
        label: np.array([rank(deep.proponents[q], c) for q, c in enumerate(lists)], np.int64)
        for label, lists in correct.items()
    }
    return dataclasses.replace(ranked.shorten(deep, k), first_ranks=ranks)


def describe(notes: dict) -> list[str]:
    """Describes the indices that were searched, a line for each."""
    lines = []
    for name, note in notes.items():
        if "index" in note:
            lines.append(f"{name}: searched through a ScaNN index, {_recall(note['index'])}")
    return lines


def _recall(note: dict) -> str:
    r = note["recall"]
    if r is None:
        return "whose recall was not measured (search.recall_queries=0)"
    return (
        f"recall@{r['k']} against exact search over {r['queries']} queries: proponents "
        f"{r['proponents']:.3f}, opponents {r['opponents']:.3f}"
    )
