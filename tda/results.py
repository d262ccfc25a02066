"""Results files in the authors' format: a JSON line for each query, with its ranked passages."""

import json
import os
from collections.abc import Iterable, Iterator
from typing import Any

from tda.runtime import atomic_file

_LISTS = {
    "proponents": str,
    "proponent_ids": str,
    "proponent_scores": float,
    "opponents": str,
    "opponent_ids": str,
    "opponent_scores": float,
}
# Current names of the fields of the release's older files.
OLDER_NAMES = {
    "temperature_samples": "8b_generations",
    "model_confidence": "8b_confidence",
    "fact_frequency": "c4_frequency",
    "frequency_bucket": "c4_frequency_bucket",
    "ground_truth": "groundtruth",
    "trex_id": "fact_id",
}
# In nats. A stated target counts as known if the query's own prompt makes it e times as likely as
# prompts about other subjects do; below that, the relation alone suggests it.
KNOWN_BEYOND_PRIOR = 1.0
_REQUIRED = ("example_id", "query_set", "inputs_plaintext", "targets_plaintext", *_LISTS)


class ResultsError(ValueError):
    """A file that is not in the format of results files."""


def record(
    example_id: str,
    query_set: str,
    prompt: str,
    target: str,
    proponents: list[tuple[str, str, float]],
    opponents: list[tuple[str, str, float]],
    **optional: Any,
) -> dict:
    """Returns the record of a query.

    Args:
        example_id: the query's id.
        query_set: the name of the set of queries.
        prompt, target: the query's text.
        proponents, opponents: (passage id, text, score), most extreme first.
        **optional: further fields of the format: fact_id, relation, groundtruth,
            proponent_correct, …. Their names are those of the authors' release, whatever the run's
            model and corpus are: "8b_generations" are samples of the run's model, "8b_confidence"
            is the share of them that state the target, "is_8b_correct" is whether greedy decoding
            states it; "c4_frequency" and "c4_frequency_bucket" say how many passages of the run's
            corpus name both entities; "proponent_ais_scores" and "proponent_ais_best_windows" are
            a judge's scores of the proponents, and the text of the window that has each.
    """
    out: dict = {
        "example_id": example_id,
        "query_set": query_set,
        "inputs_plaintext": prompt,
        "targets_plaintext": target,
    }
    for kind, passages in (("proponent", proponents), ("opponent", opponents)):
        out[f"{kind}s"] = [text for _, text, _ in passages]
        out[f"{kind}_ids"] = [name for name, _, _ in passages]
        out[f"{kind}_scores"] = [float(score) for _, _, score in passages]
    return out | optional


def write(path: str | os.PathLike, records: Iterable[dict]) -> None:
    """Writes records to `path` as JSON lines; the file appears whole or not at all."""
    with atomic_file.open_atomic(path) as out:
        for item in records:
            out.write(json.dumps(item, ensure_ascii=False) + "\n")


def read(path: str | os.PathLike) -> Iterator[dict]:
    """Reads and checks the records of a results file.

    Raises:
        ResultsError: a line is not a record; the message names file, line and field.
    """
    with open(path, encoding="utf-8") as lines:
        for number, line in enumerate(lines, 1):
            where = f"{path}, line {number}"
            try:
                item = json.loads(line)
            except json.JSONDecodeError as error:
                raise ResultsError(f"{where}: not JSON ({error})") from error
            check(item, where)
            yield with_current_names(item)


def with_current_names(item: Any) -> Any:
    """Returns a record whose fields have their current names, which win over older ones.

    A value that is no record is returned unchanged.
    """
    if not isinstance(item, dict) or not OLDER_NAMES.keys() & item.keys():
        return item
    return {OLDER_NAMES.get(field, field): value for field, value in item.items()} | {
        field: item[field] for field in OLDER_NAMES.values() if field in item
    }


def check(item: Any, where: str) -> None:
    """Checks that `item` is a record.

    Raises:
        ResultsError: it is not; the message names `where` and the field.
    """
    if not isinstance(item, dict):
        raise ResultsError(f"{where}: a record must be an object, not {type(item).__name__}")
    for field in _REQUIRED:
        if field not in item:
            raise ResultsError(f"{where}: field {field!r} is missing")
    for kind in ("proponent", "opponent"):
        lengths = {len(item[f]) for f in (f"{kind}s", f"{kind}_ids", f"{kind}_scores")}
        if len(lengths) > 1:
            raise ResultsError(f"{where}: {kind}s, their ids and their scores differ in number")
