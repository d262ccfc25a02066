"""The summary of a record: a row of plain values for the list, the filter and the metrics."""

import math
import sys
from collections.abc import Callable
from typing import Any

from tda.results import KNOWN_BEYOND_PRIOR, ResultsError
from tda.runtime.fingerprint import fingerprint

# Characters of a text in a summary: a list of queries shows their beginnings.
TEXT_LIMIT = 1000

_NUMBER, _MARK = (int, float), (bool, int)
# The lists that have an entry for each proponent or opponent, and the types of their entries.
_LISTS = {
    "proponents": {
        "proponent_ids": str,
        "proponent_scores": _NUMBER,
        "proponent_correct": _MARK,
        "proponent_ais_scores": _NUMBER,
        "proponent_ais_best_windows": str,
    },
    "opponents": {"opponent_ids": str, "opponent_scores": _NUMBER},
}


class _Record:
    """Reads the fields of a record; an error names `where` and the field."""

    def __init__(self, item, where: str):
        if not isinstance(item, dict):
            raise ResultsError(f"{where}: a record must be an object, not {type(item).__name__}")
        self.item, self.where, self.lists = item, where, {}
        for kind, fields in _LISTS.items():
            self.lists[kind] = self.list(kind, str, required=kind == "proponents") or []
            for name, of in fields.items():
                values = self.lists[name] = self.list(name, of)
                if values is not None and len(values) != len(self.lists[kind]):
                    counts = f"{len(values)} {name}, but {len(self.lists[kind])} {kind}"
                    raise ResultsError(f"{where}: {counts}")

    def field(self, name: str, of, required: bool = False):
        value = self.item.get(name)
        if value is None and required:
            raise ResultsError(f"{self.where}: field {name!r} is missing")
        if value is not None and not isinstance(value, of):
            raise ResultsError(f"{self.where}: field {name!r} has type {type(value).__name__}")
        return value

    def text(self, name: str, required: bool = False) -> str | None:
        value = self.field(name, (str, int), required)
        return None if value is None else _cut(str(value))

    def repeated(self, name: str) -> str | None:
        # A few names repeat in thousands of rows: each is in memory once.
        value = self.text(name)
        return None if value is None else sys.intern(value)

    def number(self, name: str):
        value = self.field(name, _NUMBER)
        self._check_size(value, f"field {name!r} is")
        return _finite(value)

    def list(self, name: str, of, required: bool = False):
        values = self.field(name, list, required)
        for i, value in enumerate(values or []):
            if not isinstance(value, of):
                kind = type(value).__name__
                raise ResultsError(f"{self.where}: field {name!r}, item {i}: type {kind}")
            if of is _NUMBER:
                self._check_size(value, f"field {name!r}, item {i}:")
        return values

    def first(self, name: str):
        """Returns the first of a list of scores."""
        return _finite(self.lists[name][0]) if self.lists[name] else None

    def _check_size(self, value, place: str) -> None:
        # JSON writes integers of any length, which Python reads.
        try:
            float(value or 0)
        except OverflowError as error:
            text = f"{self.where}: {place} too large for a floating-point number"
            raise ResultsError(text) from error


def _query(record: _Record) -> str | None:
    # The full texts: those of a summary are cut, and few-shot prompts begin alike.
    texts = ("example_id", "inputs_plaintext", "targets_plaintext")
    if record.text("example_id") is None:
        return None
    return query_key(*(str(record.item.get(f)) for f in texts))


def _prediction(record: _Record) -> str | None:
    generations = record.list("8b_generations", str)
    return _cut(generations[0]) if generations else None


def _bucket(record: _Record) -> str | None:
    bucket, frequency = record.item.get("c4_frequency_bucket"), record.number("c4_frequency")
    if isinstance(bucket, str | int | float) and not isinstance(bucket, bool):
        return sys.intern(_cut(str(bucket)))
    return None if frequency is None else sys.intern(bucket_of(int(frequency)))


def _is_stated(record: _Record) -> bool | None:
    mark, rank = record.field("is_8b_correct", _MARK), record.number("target_rank")
    if mark is None:
        return None if rank is None else rank == 1
    return bool(mark)


def _probability(record: _Record) -> float | None:
    nats = record.number("target_nats")
    return None if nats is None else _finite(math.exp(min(0.0, -nats)))


def _beyond_prior(record: _Record) -> float | None:
    nats, prior = record.number("target_nats"), record.number("target_prior_nats")
    return None if nats is None or prior is None else prior - nats


def _knowledge(record: _Record) -> str | None:
    beyond = _beyond_prior(record)
    if beyond is None or not _is_stated(record):
        return None
    return "knows" if beyond >= KNOWN_BEYOND_PRIOR else "guesses"


def _marks(record: _Record) -> str | None:
    marks, item = record.lists["proponent_correct"], record.item
    # If no passage can be correct, the query has no marks; a run's tables leave it out too.
    hopeless = item.get("has_trex_sentence") is False or item.get("first_correct_rank") == 0
    return None if marks is None or hopeless else "".join("1" if m else "0" for m in marks)


def _entailment(record: _Record) -> list | None:
    scores = record.lists["proponent_ais_scores"]
    return None if scores is None else [_finite(x) for x in scores]


# The fields of a row: plain values, each None where the record lacks it. Every text is cut after
# TEXT_LIMIT characters.
FIELDS: dict[str, Callable[[_Record], Any]] = {
    "query": _query,  # identifies the query in other files (`query_key`); None without an id
    "id": lambda record: record.text("example_id"),
    "set": lambda record: record.repeated("query_set"),
    "prompt": lambda record: record.text("inputs_plaintext", required=True),
    "target": lambda record: record.text("targets_plaintext", required=True),
    "truth": lambda record: record.text("groundtruth"),
    "relation": lambda record: record.repeated("relation"),
    "prediction": _prediction,  # the first of the model's generations
    "frequency": lambda record: record.number("c4_frequency"),  # passages that state the fact
    "bucket": _bucket,  # its power of ten
    "model_correct": _is_stated,  # whether the model states the target
    "confidence": lambda record: record.number("8b_confidence"),  # from 0 to 1
    "target_rank": lambda record: record.number("target_rank"),  # from 1
    "probability": _probability,  # of the target
    "beyond": _beyond_prior,  # nats: log p of the target less its mean after other prompts
    "knowledge": _knowledge,  # "knows" or "guesses" a target that the model states
    "n": lambda record: len(record.lists["proponents"]),
    "top": lambda record: record.first("proponent_scores"),
    "bottom": lambda record: record.first("opponent_scores"),
    "correct": _marks,  # the proponents' marks in order, such as "0110"
    "entailment": _entailment,  # the proponents' scores, from 0 to 1
    "error": lambda record: None,  # what is wrong with a line that is not a record
}


def summarise(item, where: str) -> dict:
    """Returns the row of a record, with a value or None for each of `FIELDS`.

    Only prompt, target and proponents are required: files of the paper's release lack ids, scores
    and opponents. Any field that is present must have its type.

    Args:
        item: the record, a JSON value.
        where: its place, for errors, such as "bm25.jsonl, line 3".

    Raises:
        ResultsError: a field is missing, has another type, or is too large a number; the message
            names it.
    """
    record = _Record(item, where)
    return {name: read(record) for name, read in FIELDS.items()}


def query_key(example: str, prompt: str, target: str) -> str:
    """Returns a hash of a query's id and full texts, which identifies it among files.

    An id alone does not: several traces may number different queries 0, 1, ….
    """
    return fingerprint([example, prompt, target])


def malformed(message: str) -> dict:
    """Returns the row of a line that is not a record."""
    return dict.fromkeys(FIELDS) | {"error": message}


def bucket_of(frequency: int) -> str:
    """Returns the paper's bucket of a fact frequency: six buckets, by powers of ten."""
    if frequency < 1:
        return "0"
    # Rounding must not put a power of ten into the lower bucket.
    power = min(int(math.log10(frequency) + 1e-9), 5)
    return f"{10**power:,} to {10 ** (power + 1) - 1:,}" if power < 5 else "100,000 or more"


def _finite(x):
    return x if x is not None and math.isfinite(x) else None


def _cut(text: str) -> str:
    return text if len(text) <= TEXT_LIMIT else text[:TEXT_LIMIT] + "…"
