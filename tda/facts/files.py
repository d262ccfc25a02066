"""Reads passages and facts from JSON lines, and checks every record."""

from collections.abc import Callable, Iterator
from typing import Any, TypeVar

from tda.data.jsonl import Paths, RecordError, iter_records
from tda.facts.records import Fact, Sentence, fact_from_dict, sentence_from_dict

Record = TypeVar("Record", Sentence, Fact)


def iter_sentences(path: Paths) -> Iterator[Sentence]:
    """Streams passages, in the order of the files; only their ids stay in memory.

    Args:
        path: A file, a glob pattern (its matches are read in sorted order), or a list of files.

    Raises:
        FileNotFoundError: No such file.
        RecordError: A file or a record cannot be used, two records share an id, or there are none.
    """
    return _validated(path, sentence_from_dict, "sentence_id")


def iter_facts(path: Paths) -> Iterator[Fact]:
    """Streams facts; arguments and errors are those of `iter_sentences`."""
    return _validated(path, fact_from_dict, "fact_id")


def _validated(
    path: Paths, from_dict: Callable[[Any, str], Record], id_field: str
) -> Iterator[Record]:
    place_of: dict[str, str] = {}
    for where, value in iter_records(path):
        record = from_dict(value, where)
        record_id = getattr(record, id_field)
        if record_id in place_of:
            raise RecordError(
                f"{where}: field '{id_field}' is {record_id!r}, as in {place_of[record_id]};"
                " ids must be unique, drop or rename one of the two"
            )
        place_of[record_id] = where
        yield record
