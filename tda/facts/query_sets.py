"""Sets of queries from public files, each in its own form, as prompts and targets."""

import collections
import json
import os
from collections.abc import Iterator, Mapping
from typing import Any

from tda.data import jsonl, readers, rows
from tda.facts.records import Fact
from tda.results import with_current_names


def read(path: jsonl.Paths) -> list[Fact]:
    """Reads the queries of a file of JSON lines, or of a .tsv file, by the fields of each record.

    - `prompt` and `target`, with an `id` or not.
    - `prompt`, `targets` and `label`: the right one of several (COPA, PIQA).
    - `question` and `answer`: word problems, asked as "Q: … A:".
    - `question`, `obj` and `possible_answers`, the target and all of its names: open questions
      (PopQA), asked alike.
    - `prompt` and `original_ending`: openings of stories.
    - `prompt`, `attribute`, `subject` and `relation_id`: facts (known_1000).
    - records of results (`tda.results`) with sampled answers: the model's wrong answers. The target
      is its most frequent answer; records of stated targets, or without answers, are left out.

    Raises:
        ValueError: a record has none of these forms; the message names it.
        FileNotFoundError, tda.data.jsonl.RecordError: as for `iter_records`.
    """
    records = list(_records(path))
    try:
        queries = rows.parse_queries(records)
    except ValueError as error:
        raise ValueError(f"data.queries={path}: {error}") from error
    return [
        Fact(
            q.id, _text(r, "subject"), _text(r, "relation_id"), q.target, "", "", "",
            _names(r, "s_aliases"), _names(r, "possible_answers"), (), prompt0=q.prompt,
            other_choices=_names(r, "other_choices"),
        )
        for q, r in zip(queries, records, strict=True)
    ]  # fmt: skip


def _text(record: Any, field: str) -> str:
    value = record.get(field, "") if isinstance(record, Mapping) else ""
    return value if isinstance(value, str) else ""


def _names(record: Any, field: str) -> tuple[str, ...]:
    """Returns a list of names, which a .tsv file has as JSON; empty where it is absent."""
    value = record.get(field) if isinstance(record, Mapping) else None
    if isinstance(value, str):
        try:
            value = json.loads(value)
        except json.JSONDecodeError as error:
            raise jsonl.RecordError(
                f'{field}={value!r} is no list in JSON ({error.msg}); write ["name", …]'
            ) from error
    return tuple(x for x in value or () if isinstance(x, str))


def _read(path: jsonl.Paths) -> Iterator[tuple[str, Any]]:
    for file in jsonl.expand(path):
        if ".tsv" in os.path.basename(file):
            yield from ((place, row) for _, place, row in readers.rows_of_csv(file))
        else:
            yield from jsonl.iter_records(file)


def _records(path: jsonl.Paths) -> Iterator[Any]:
    """Yields records with the fields prompt and target where their form is known."""
    for where, record in _read(path):
        record = with_current_names(record)
        if not isinstance(record, Mapping):
            yield record
        elif "8b_generations" in record or "inputs_plaintext" in record:
            if (answer := _wrong_answer(record)) is not None:
                asked_again = {"id": record.get("example_id"), "target": answer}
                yield {**record, **asked_again, "prompt": record.get("inputs_plaintext")}
        elif "targets" in record and "label" in record:
            yield {**record, **_choices(record, where)}
        elif "question" in record and "possible_answers" in record:
            prompt, prop = f"Q: {record['question']}\n\nA:", record.get("prop")
            named = {"subject": record.get("subj"), "relation_id": prop}
            yield {**record, **named, "prompt": prompt, "target": record.get("obj")}
        elif "question" in record and "answer" in record:
            prompt = f"Q: {record['question']}\n\nA:"
            yield {**record, "prompt": prompt, "target": record["answer"]}
        elif "original_ending" in record:
            yield {**record, "target": record["original_ending"]}
        elif "attribute" in record:
            yield {"id": record.get("known_id"), **record, "target": record["attribute"]}
        else:
            yield record


def _choices(record: Mapping, where: str) -> dict:
    targets, label = record["targets"], record["label"]
    is_choice = isinstance(targets, list) and isinstance(label, int) and 0 <= label < len(targets)
    if not is_choice:
        raise jsonl.RecordError(
            f"{where}: label={label!r} is no place in targets, from 0; give the right one's"
        )
    return {"target": targets[label], "other_choices": targets[:label] + targets[label + 1 :]}


def _wrong_answer(record: Mapping) -> str | None:
    """Returns a model's wrong answer; None if it states the target or gives no answer."""
    answers = [text.strip() for text in record.get("8b_generations") or () if text.strip()]
    if record.get("is_8b_correct") or not answers:
        return None
    # Of equally frequent ones the first.
    return collections.Counter(answers).most_common(1)[0][0]
