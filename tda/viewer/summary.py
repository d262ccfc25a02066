"""The summary of a record: the row of plain values that list, filter and metrics work with."""

import math
import sys

from tda.results import ResultsError
from tda.runtime.fingerprint import fingerprint

# A list of thousands of queries shows the beginning of each; the record has all of it.
TEXT_LIMIT = 1000

FIELDS = (
    "query",
    "id",
    "set",
    "prompt",
    "target",
    "truth",
    "relation",
    "prediction",
    "frequency",
    "bucket",
    "model_correct",
    "confidence",
    "target_rank",
    "probability",
    "n",
    "top",
    "bottom",
    "correct",
    "entailment",
    "error",
)

_NUMBER = (int, float)
_TOO_LARGE = "too large for a floating-point number"


def summarise(item, where: str) -> dict:
    """Returns the row of a record, with a value or None for each of `FIELDS`.

    Only prompt, target and proponents are required: files of the paper's release lack ids, scores
    and opponents. Any field that is present must have its type.

    Args:
        item: the record, a JSON value.
        where: its place, for errors, such as "bm25.jsonl, line 3".

    Returns:
        query: identifies the query in other files, see `query_key`; None without an id; id, set,
        prompt, target, truth, relation, prediction: strings; frequency: passages that
        state the fact; bucket: its power of ten; model_correct: whether the model states the
        target; confidence, probability: in [0, 1]; target_rank: from 1; n: proponents; top,
        bottom: the first proponent's and the first opponent's score; correct: the proponents'
        marks in order, such as "0110", None where the record says that no passage at all is
        correct; entailment: their scores in [0, 1]; error: None.

    Raises:
        ResultsError: a field is missing, has another type, or is too large a number; the message
            names it.
    """
    if not isinstance(item, dict):
        raise ResultsError(f"{where}: a record must be an object, not {type(item).__name__}")
    counts = {}
    for kind in ("proponent", "opponent"):
        texts = _list(item, f"{kind}s", str, where, required=kind == "proponent")
        counts[kind] = len(texts or [])
        for field, of in ((f"{kind}_ids", str), (f"{kind}_scores", _NUMBER)):
            values = _list(item, field, of, where)
            _same_number(values, counts[kind], field, f"{kind}s", where)
    correct = _list(item, "proponent_correct", (bool, int), where)
    entailment = _list(item, "proponent_ais_scores", _NUMBER, where)
    _same_number(correct, counts["proponent"], "proponent_correct", "proponents", where)
    _same_number(entailment, counts["proponent"], "proponent_ais_scores", "proponents", where)
    if item.get("has_trex_sentence") is False or item.get("first_correct_rank") == 0:
        correct = None  # no passage could be correct: a run's tables leave such a query out too
    frequency = _number(item, "c4_frequency", where)
    rank, nats = (_number(item, f, where) for f in ("target_rank", "target_nats"))
    model_correct = _optional(item, "is_8b_correct", (bool, int), where)
    if model_correct is None and rank is not None:
        model_correct = rank == 1
    generations = _list(item, "8b_generations", str, where)
    scores, low = item.get("proponent_scores"), item.get("opponent_scores")
    example = _text(item, "example_id", where)
    prompt = _text(item, "inputs_plaintext", where, required=True)
    target = _text(item, "targets_plaintext", where, required=True)
    return {
        "query": None if example is None else _query_key_of(item),
        "id": example,
        "set": _repeated(_text(item, "query_set", where)),
        "prompt": prompt,
        "target": target,
        "truth": _text(item, "groundtruth", where),
        "relation": _repeated(_text(item, "relation", where)),
        "prediction": _cut(generations[0]) if generations else None,
        "frequency": frequency,
        "bucket": _repeated(_bucket(item, frequency)),
        "model_correct": None if model_correct is None else bool(model_correct),
        "confidence": _number(item, "8b_confidence", where),
        "target_rank": rank,
        "probability": None if nats is None else _finite(math.exp(min(0.0, -nats))),
        "n": counts["proponent"],
        "top": _finite(scores[0]) if scores else None,
        "bottom": _finite(low[0]) if low else None,
        "correct": None if correct is None else "".join("1" if c else "0" for c in correct),
        "entailment": None if entailment is None else [_finite(x) for x in entailment],
        "error": None,
    }


def query_key(example: str, prompt: str, target: str) -> str:
    """Returns a hash that identifies a query among files: its id, and the whole of its texts.

    An id alone does not: results of several traces may number different queries 0, 1, ….
    """
    return fingerprint([example, prompt, target])


def malformed(message: str) -> dict:
    """Returns the row of a line that is not a record."""
    return dict.fromkeys(FIELDS) | {"error": message}


def bucket_of(frequency: int) -> str:
    """Returns the paper's bucket of a fact frequency: six buckets, by powers of ten."""
    if frequency < 1:
        return "0"
    # Rounding must not put a power of ten into the bucket below it.
    power = min(int(math.log10(frequency) + 1e-9), 5)
    return f"{10**power:,} to {10 ** (power + 1) - 1:,}" if power < 5 else "100,000 or more"


def _bucket(item: dict, frequency) -> str | None:
    bucket = item.get("c4_frequency_bucket")
    if isinstance(bucket, str | int | float) and not isinstance(bucket, bool):
        return _cut(str(bucket))
    return None if frequency is None else bucket_of(int(frequency))


def _query_key_of(item: dict) -> str:
    # The texts in full: those of a summary are cut, and few-shot prompts begin alike.
    fields = ("example_id", "inputs_plaintext", "targets_plaintext")
    return query_key(*(str(item[f]) for f in fields))


def _optional(item: dict, field: str, of, where: str):
    value = item.get(field)
    if value is not None and not isinstance(value, of):
        raise ResultsError(f"{where}: field {field!r} has type {type(value).__name__}")
    return value


def _list(item: dict, field: str, of, where: str, required: bool = False) -> list | None:
    value = _optional(item, field, list, where)
    if value is None and required:
        raise ResultsError(f"{where}: field {field!r} is missing")
    for i, part in enumerate(value or []):
        if not isinstance(part, of):
            raise ResultsError(f"{where}: field {field!r}, item {i}: type {type(part).__name__}")
        if of is _NUMBER and _too_large(part):
            raise ResultsError(f"{where}: field {field!r}, item {i}: {_TOO_LARGE}")
    return value


def _same_number(values: list | None, count: int, field: str, other: str, where: str) -> None:
    if values is not None and len(values) != count:
        raise ResultsError(f"{where}: {len(values)} {field}, but {count} {other}")


def _text(item: dict, field: str, where: str, required: bool = False) -> str | None:
    value = _optional(item, field, (str, int), where)
    if value is None and required:
        raise ResultsError(f"{where}: field {field!r} is missing")
    return None if value is None else _cut(str(value))


def _number(item: dict, field: str, where: str):
    value = _optional(item, field, _NUMBER, where)
    if value is not None and _too_large(value):
        raise ResultsError(f"{where}: field {field!r} is {_TOO_LARGE}")
    return _finite(value)


def _too_large(x) -> bool:
    # JSON writes integers of any length, which Python reads.
    try:
        float(x)
    except OverflowError:
        return True
    return False


def _finite(x):
    return x if x is not None and math.isfinite(x) else None


def _cut(text: str) -> str:
    return text if len(text) <= TEXT_LIMIT else text[:TEXT_LIMIT] + "…"


def _repeated(text: str | None) -> str | None:
    # A few names repeated in thousands of rows: each is held in memory once.
    return None if text is None else sys.intern(text)
