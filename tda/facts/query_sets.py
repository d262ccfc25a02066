"""Sets of queries from public files, each in its own form, as prompts and targets."""

import collections
import json
import os
from collections.abc import Iterator, Mapping
from typing import Any

from tda.data import jsonl, readers, rows
from tda.facts.names import begins_with
from tda.facts.records import Fact
from tda.results import with_current_names


def read(path: jsonl.Paths) -> list[Fact]:
    """Reads the queries of a file of JSON lines, or of a .tsv file, by the fields of each record.

    - records of results (`tda.results`) with sampled answers: the model's wrong answers. The target
      is its most frequent answer that does not state the target; records of targets that greedy
      decoding states, and those without such an answer, are left out.
    - `prompt`, `targets` and `label`: the right one of several (COPA, PIQA).
    - `prompt` and `target`, with an `id` or not.
    - `question`, `obj` and `possible_answers`, the target and all of its names: open questions
      (PopQA), asked as "Q: … A:".
    - `question` and `answer`: word problems, asked alike.
    - `prompt` and `original_ending`: openings of stories.
    - `prompt`, `attribute`, `subject` and `relation_id`: facts (known_1000).

    The first form that fits counts.

    Raises:
        ValueError: a record has none of these forms; the message names it.
        FileNotFoundError, tda.data.jsonl.RecordError: as for `iter_records`.
    """
    placed = list(_records(path))
    records, places = [record for _, record in placed], [where for where, _ in placed]
    try:
        queries = rows.parse_queries(records, places)
    except ValueError as error:
        raise ValueError(f"data.queries={path}: {error}") from error
    return [
        Fact(
            q.id, _text(r, "subject"), _text(r, "relation_id"), q.target, "", "", "",
            _names(r, "s_aliases", where), _names(r, "possible_answers", where), (),
            prompt0=q.prompt, other_choices=_names(r, "other_choices", where),
        )
        for q, (where, r) in zip(queries, placed, strict=True)
    ]  # fmt: skip


def _text(record: Any, field: str) -> str:
    value = record.get(field, "") if isinstance(record, Mapping) else ""
    return value if isinstance(value, str) else ""


def _names(record: Any, field: str, where: str) -> tuple[str, ...]:
    """Returns a list of names, which a .tsv file has as JSON; empty where it is absent.

    Raises:
        RecordError: the field is no list of strings.
    """
    value = record.get(field) if isinstance(record, Mapping) else None
    if isinstance(value, str):
        try:
            value = json.loads(value)
        except json.JSONDecodeError as error:
            raise jsonl.RecordError(
                f'{where}: {field}={value!r} is no list in JSON ({error.msg}); write ["name", …]'
            ) from error
    if value is None:
        return ()
    if not isinstance(value, list) or not all(isinstance(x, str) for x in value):
        raise jsonl.RecordError(f"{where}: {field}={value!r} is no list of strings; give one")
    return tuple(value)


def _read(path: jsonl.Paths) -> Iterator[tuple[str, Any]]:
    for file in jsonl.expand(path):
        if ".tsv" in os.path.basename(file):
            yield from ((place, row) for _, place, row in readers.rows_of_csv(file))
        else:
            yield from jsonl.iter_records(file)


def _records(path: jsonl.Paths) -> Iterator[tuple[str, Any]]:
    """Yields places and records, with the fields prompt and target where their form is known."""
    for where, record in _read(path):
        record = with_current_names(record)
        if not isinstance(record, Mapping):
            yield where, record
        elif (fields := _fields(record, where)) is not None:
            yield where, {**record, **fields}


def _fields(record: Mapping, where: str) -> dict | None:
    """Returns what a record lacks by its form, or has by other names; None to leave it out."""
    if "8b_generations" in record or "inputs_plaintext" in record:
        answer, prompt = _wrong_answer(record, where), record.get("inputs_plaintext")
        if answer is None:
            return None
        return {"id": record.get("example_id"), "prompt": prompt, "target": answer}
    if "targets" in record and "label" in record:
        return _choices(record, where)
    if "prompt" in record and "target" in record:
        return {}
    if "question" in record and "possible_answers" in record:
        named = {"subject": record.get("subj"), "relation_id": record.get("prop")}
        return named | {"prompt": _question(record, where), "target": record.get("obj")}
    if "question" in record and "answer" in record:
        return {"prompt": _question(record, where), "target": record["answer"]}
    if "original_ending" in record:
        return {"target": record["original_ending"]}
    if "attribute" in record:
        name = record.get("id", record.get("known_id"))
        return {"id": name, "target": record["attribute"]}
    return {}


def _question(record: Mapping, where: str) -> str:
    question = record["question"]
    if not isinstance(question, str) or not question.strip():
        raise jsonl.RecordError(f"{where}: the question is {question!r}; give its text")
    return f"Q: {question}\n\nA:"


def _choices(record: Mapping, where: str) -> dict:
    targets, label = record["targets"], record["label"]
    is_choice = isinstance(targets, list) and rows.is_whole(label) and 0 <= label < len(targets)
    if not is_choice:
        raise jsonl.RecordError(
            f"{where}: label={label!r} is no place in targets, from 0; give the right one's"
        )
    return {"target": targets[label], "other_choices": targets[:label] + targets[label + 1 :]}


def _wrong_answer(record: Mapping, where: str) -> str | None:
    """Returns a model's wrong answer; None if it states the target or gives no other answer."""
    target = _text(record, "targets_plaintext")
    generations = (text.strip() for text in _names(record, "8b_generations", where))
    # Greedy decoding may miss a target that samples state.
    answers = [text for text in generations if text and not begins_with(text, [target])]
    if record.get("is_8b_correct") or not answers:
        return None
    # Of equally frequent ones the first.
    return collections.Counter(answers).most_common(1)[0][0]
