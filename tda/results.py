"""Results records in the authors' format: one JSON line a query, with its ranked passages."""

import json
from collections.abc import Iterable, Iterator

from tda.runtime import atomic_file

_LISTS = {
    "proponents": str,
    "proponent_ids": str,
    "proponent_scores": float,
    "opponents": str,
    "opponent_ids": str,
    "opponent_scores": float,
}
_REQUIRED = ("example_id", "query_set", "inputs_plaintext", "targets_plaintext", *_LISTS)


class ResultsError(ValueError):
    """A results file is not in the format."""


def record(
    example_id: str,
    query_set: str,
    prompt: str,
    target: str,
    proponents: list[tuple[str, str, float]],
    opponents: list[tuple[str, str, float]],
    **optional,
) -> dict:
    """One query's record.

    Args:
        example_id: id of the query.
        query_set: name of the set of queries.
        prompt, target: the query's text.
        proponents, opponents: (passage id, text, score), most extreme first.
        **optional: further fields of the format: fact_id, relation, groundtruth,
            proponent_correct, …. The names are the release's, whatever the run's model and corpus
            are: "8b_generations" and "8b_confidence" are its own model's samples and their share
            that states the target, "is_8b_correct" whether greedy decoding states it,
            "c4_frequency" and "c4_frequency_bucket" how many passages of its own corpus name both
            entities.
    """
    out = {
        "example_id": example_id,
        "query_set": query_set,
        "inputs_plaintext": prompt,
        "targets_plaintext": target,
    }
    for kind, found in (("proponent", proponents), ("opponent", opponents)):
        out[f"{kind}s"] = [text for _, text, _ in found]
        out[f"{kind}_ids"] = [name for name, _, _ in found]
        out[f"{kind}_scores"] = [float(score) for _, _, score in found]
    return out | optional


def write(path, records: Iterable[dict]) -> None:
    """Writes records to `path` as JSON lines; the file appears whole or not at all."""
    with atomic_file.open_atomic(path) as out:
        for item in records:
            out.write(json.dumps(item, ensure_ascii=False) + "\n")


def read(path) -> Iterator[dict]:
    """The records of a results file, checked.

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
            yield item


def check(item, where: str) -> None:
    """Raises a ResultsError, naming `where` and the field, unless `item` is a record."""
    if not isinstance(item, dict):
        raise ResultsError(f"{where}: a record must be an object, not {type(item).__name__}")
    for field in _REQUIRED:
        if field not in item:
            raise ResultsError(f"{where}: field {field!r} is missing")
    for kind in ("proponent", "opponent"):
        lengths = {len(item[f]) for f in (f"{kind}s", f"{kind}_ids", f"{kind}_scores")}
        if len(lengths) > 1:
            raise ResultsError(f"{where}: {kind}s, their ids and their scores differ in number")
