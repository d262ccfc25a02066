"""Scores by what passages have in common, a source or a year: sums, or shares of the first ones."""

import dataclasses
import functools
import math
from collections.abc import Iterable, Mapping, Sequence

import numpy as np

from tda.data.corpora import Corpus
from tda.data.tokenised import place_of
from tda.evaluation import statistics
from tda.viewer.results_file import ResultsFile

# The label of passages of documents that have none.
_NO_LABEL = "not in the corpus"


def label_of(labels: Mapping[str, str], passage: str) -> str | None:
    """Returns a passage's label: its own, or that of its document; None if neither has one."""
    return labels.get(passage, labels.get(place_of(passage)[0]))


def complete_scores(records: Iterable[Mapping]) -> tuple[list[str], np.ndarray] | None:
    """Returns the ids of all passages, and each query's scores of them, float64 [Q, C].

    None if a record does not rank all of them. Of n passages the first k and the last k are all
    only if these overlap.
    """
    scores, overlap = [], True
    for r in records:
        proponents, opponents = (
            dict(zip(r[f"{kind}_ids"], r[f"{kind}_scores"], strict=True))
            for kind in ("proponent", "opponent")
        )
        overlap = overlap and not proponents.keys().isdisjoint(opponents)
        scores.append(proponents | opponents)
    passages = list(dict.fromkeys(name for s in scores for name in s))
    if not passages or not overlap or min(map(len, scores)) < len(passages):
        return None
    return passages, np.array([[s[name] for name in passages] for s in scores], np.float64)


class FiguresByLabel:
    """The figures of a viewer's page by metadata (`tda.viewer.collection.Groups`).

    Args:
        labels: for each key, such as "source", the labels by the ids of documents or passages.

    Attributes:
        keys: the keys.
    """

    def __init__(self, labels: Mapping[str, Mapping[str, str]]):
        self._labels = labels
        self.keys = tuple(labels)
        self._rankings = functools.lru_cache(maxsize=16)(_rankings)
        self._figures = functools.lru_cache(maxsize=256)(self._compute)

    def figures(self, file: ResultsFile, key: str, row: int | None = None) -> dict:
        """Returns the figures of a results file's passages by the labels of a key.

        Args:
            file: the results.
            key: the key.
            row: the row of one query; None for the mean of all queries.

        Returns:
            {"complete", "queries", "passages", "groups"}. If the file ranks all passages for every
            query, "complete" is true and a group is a `tda.evaluation.statistics.GroupSum`;
            otherwise its mean is its share of a query's proponents, of which there are at most
            "passages", and its size the number of those proponents.
        """
        return self._figures(file, key, row)

    def _compute(self, file: ResultsFile, key: str, row: int | None) -> dict:
        records, is_complete = self._rankings(file)
        if row is not None:
            records = {row: records[row]} if row in records else {}
        chosen, groups, passages = list(records.values()), [], 0
        if chosen and is_complete:
            names, table_QxC = complete_scores(chosen)
            passages = len(names)
            sums = statistics.group_sums(table_QxC, self._named(key, names))
            groups = [dataclasses.asdict(g) for g in sums]
        elif chosen:
            passages = max(len(r["proponent_ids"]) for r in chosen)
            groups = self._shares(key, [r["proponent_ids"] for r in chosen])
        for group in groups:
            group |= {k: None for k, x in group.items() if isinstance(x, float) and math.isnan(x)}
        return {
            "complete": is_complete,
            "queries": len(chosen),
            "passages": passages,
            "groups": groups,
        }

    def _named(self, key: str, passages: Iterable[str]) -> list[str]:
        labels = (label_of(self._labels[key], name) for name in passages)
        return [_NO_LABEL if label is None else str(label) for label in labels]

    def _shares(self, key: str, proponents: list[list[str]]) -> list[dict]:
        rows = [self._named(key, names) for names in proponents]
        labels = sorted({label for row in rows for label in row})
        # A query without proponents has no shares: NaN, which means leave out.
        counts_QxG = np.array([[row.count(label) for label in labels] for row in rows], float)
        with np.errstate(invalid="ignore"):
            shares_QxG = counts_QxG / counts_QxG.sum(axis=1, keepdims=True)
        groups = [
            dataclasses.asdict(i) | {"label": label, "size": int(n)}
            for i, label, n in zip(
                statistics.intervals(shares_QxG), labels, counts_QxG.sum(axis=0), strict=True
            )
        ]
        return sorted(groups, key=lambda g: -g["mean"])


def of_corpus(path: str | None, fields: Sequence[str]) -> FiguresByLabel | None:
    """Returns the figures by fields of a corpus's documents; None if neither is given.

    Args:
        path: the corpus (`tda.data.corpora.Corpus`).
        fields: fields of its documents, the keys.

    Raises:
        ValueError: one is given without the other.
    """
    if bool(fields) != bool(path):
        raise ValueError(
            "--by names fields of the documents in --metadata; give both, as in "
            "--metadata=corpus.jsonl --by=source,year"
        )
    if not path:
        return None
    documents = Corpus(path)
    return FiguresByLabel({field: documents.labels(field) for field in fields})


def _rankings(file: ResultsFile) -> tuple[dict[int, dict], bool]:
    """Returns the ids and scores of a file's records by row, and whether they are complete."""
    fields = [f"{kind}_{x}" for kind in ("proponent", "opponent") for x in ("ids", "scores")]
    records = {}
    for row, error in enumerate(file.columns["error"]):
        record = {} if error else file.record(row)
        if record.get("proponent_ids"):
            records[row] = {f: record.get(f) or [] for f in fields}
    has_scores = all(
        len(r[f"{kind}_ids"]) == len(r[f"{kind}_scores"])
        for r in records.values()
        for kind in ("proponent", "opponent")
    )
    return records, has_scores and complete_scores(records.values()) is not None
