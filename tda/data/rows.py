"""Reads queries and passages in users' forms: tuples, texts, or rows with named fields.

A row with names (a dict, a row of `datasets`, of pandas, a named tuple) is read by its names, never
by the order of its fields. Any other form than the documented ones is refused.
"""

import dataclasses
import math
import numbers
import os
import sys
from collections.abc import Iterable, Iterator, Mapping, MappingView, Sequence, Set
from typing import Any

import numpy as np

from tda.data.documents import (
    Document,
    check_token_ids,
    document_of,
    is_missing,
    with_checked_tokens,
)
from tda.data.folders import CorpusError
from tda.data.jsonl import half_character

_QUERY_FORMS = (
    "give (prompt, target), (id, prompt, target), or a dict with the keys 'prompt' and 'target' "
    "(and 'id')"
)
_PASSAGE_FORMS = (
    "give a text, (id, text), a list of token ids, a Document, or a dict with the text in a field"
)


@dataclasses.dataclass(frozen=True, slots=True)
class Query:
    """A prompt and the continuation whose passages are looked for.

    Attributes:
        id: the query's name.
        prompt, target: the texts.
        tokens: the token ids of prompt and target, if they are known (a continuation that the model
            itself produced); the texts are then for display only.
    """

    id: str
    prompt: str
    target: str
    tokens: tuple[tuple[int, ...], tuple[int, ...]] | None = None


@dataclasses.dataclass(frozen=True)
class Question(Query):
    """A live question: with another target, what makes the model say the one rather than the other.

    Attributes:
        contrast: the other target; empty for none.
    """

    contrast: str = ""


def parse_queries(queries: Iterable, places: Sequence[str] | None = None) -> list[Query]:
    """Returns the queries; one without an id is named by its number, from 0.

    Args:
        queries: an iterable of (prompt, target), (id, prompt, target), `Query`, or rows with the
            fields "prompt" and "target", and "id" if they have names; other fields are ignored.
        places: where each row is from, for messages; None names a row by its number.

    Raises:
        ValueError: a row is none of these, a text is not a string, or two queries have one id; the
            message says which row it is and what was given.
    """
    _check_container(queries, "queries", _QUERY_FORMS)

    def place(i: int) -> str:
        return f"query {i}" if places is None else places[i]

    parsed = [_query(i, row, place(i)) for i, row in enumerate(queries)]
    if not parsed:
        raise ValueError("there are no queries")
    numbers_by_id: dict[str, int] = {}
    for i, query in enumerate(parsed):
        if (before := numbers_by_id.setdefault(query.id, i)) != i:
            raise ValueError(
                f"{place(before)} and {place(i)} both have the id {query.id!r}; give them "
                "different ids"
            )
    return parsed


def parse_passages(
    passages: Iterable, text_field: str | None = None, id_field: str | None = None
) -> Iterator[Document]:
    """Yields the documents of an iterable; one without an id is named by its number, from 0.

    Args:
        passages: an iterable of texts, of (id, text), of lists of token ids, of `Document`, or of
            rows with named fields; or a source of these by number (`__len__` and `__getitem__`),
            such as a Grain source.
        text_field, id_field: the names of a row's fields, as in `tda.data.corpora.Corpus`; None for
            the usual ones.

    Raises:
        CorpusError: a row is none of these, its text is not a string, or it has no named fields
            where one is given; the message says which row it is and what was given.
    """
    _check_container(passages, "passages", _PASSAGE_FORMS, CorpusError)
    names = {"text_field": text_field, "id_field": id_field}
    named = [f"{name}={field!r}" for name, field in names.items() if field is not None]
    if hasattr(passages, "__len__") and len(passages) == sys.maxsize:
        raise CorpusError(
            f"passages is a {type(passages).__name__} without an end, such as Grain's .repeat() "
            "makes; give the source that it repeats"
        )
    # A source of rows by number, such as Grain's, may have no end for an iteration to find.
    if not isinstance(passages, Iterable) and hasattr(passages, "__len__"):
        passages = map(passages.__getitem__, range(len(passages)))
    for i, row in enumerate(passages):
        if named and _as_mapping(row) is None:
            raise CorpusError(
                f"{' and '.join(named)} has no effect on passage {i}, {_shown(row)}, which has no "
                "named fields; leave it out, or give rows such as {'id': …, 'text': …}"
            )
        yield _passage(i, row, text_field or "text", id_field)


def _query(i: int, row: Any, place: str) -> Query:
    if isinstance(row, Query) and row.tokens is not None:
        return _query_of_tokens(row, place)
    fields = dataclasses.asdict(row) if isinstance(row, Query) else _as_mapping(row)
    if fields is not None:
        missing = [k for k in ("prompt", "target") if k not in fields]
        if missing:
            raise ValueError(
                f"{place} has no field {missing[0]!r}; its fields are "
                f"{', '.join(map(str, fields)) or 'none'}; {_QUERY_FORMS}"
            )
        name = fields.get("id")
        values = None if is_missing(name) else name, fields["prompt"], fields["target"]
    else:
        texts = _as_tuple(row)
        if texts is None or len(texts) not in (2, 3):
            raise ValueError(f"{place} is {_shown(row)}; {_QUERY_FORMS}")
        values = (None, *texts) if len(texts) == 2 else texts
        if len(texts) == 3 and texts[0] is None:
            raise ValueError(f"{place} has the id None; give a name, or (prompt, target)")
    name, prompt, target = values
    for field, text in (("prompt", prompt), ("target", target)):
        if not isinstance(text, str):
            raise ValueError(f"{place}: the {field} is {_shown(text)}, not a string; give its text")
    return Query(str(i) if name is None else _name(name, place, ValueError), prompt, target)


def _query_of_tokens(query: Query, place: str) -> Query:
    for field, ids in zip(("prompt", "target"), query.tokens, strict=True):
        if not all(map(is_whole, ids)):
            raise ValueError(f"{place}: the tokens of the {field} are {_shown(ids)}; give ids")
    return dataclasses.replace(query, id=_name(query.id, place, ValueError))


def _passage(i: int, row: Any, text_field: str, id_field: str | None) -> Document:
    place = f"passage {i}"
    if isinstance(row, Document):
        for field, text in (("text", row.text), ("prompt", row.prompt)):
            if not isinstance(text, str):
                raise CorpusError(f"{place}: the {field} is {_shown(text)}, not a string")
        row = with_checked_tokens(row, place)
        return dataclasses.replace(row, id=_name(row.id, place, CorpusError))
    if isinstance(row, str):
        return Document(str(i), row)
    fields = _as_mapping(row)
    if fields is not None:
        return document_of(fields, place, str(i), text_field, id_field)
    pair = _as_tuple(row)
    if pair and all(is_whole(x) for x in pair):
        check_token_ids(pair, place)
        return Document(str(i), "", tokens=tuple(map(int, pair)))
    if pair is None or len(pair) != 2 or not isinstance(pair[1], str):
        raise CorpusError(f"{place} is {_shown(row)}; {_PASSAGE_FORMS}")
    return Document(_name(pair[0], place, CorpusError), pair[1])


def _check_container(rows: Any, label: str, forms: str, error: type[ValueError] = ValueError):
    """Checks that `rows` is an iterable of rows, and not a row or a container without order."""
    is_array_of_one = isinstance(rows, np.ndarray) and not rows.ndim
    if is_array_of_one or isinstance(rows, str | bytes | os.PathLike):
        raise error(f"{label} is {_shown(rows)}, not a list; {forms} for each")
    if isinstance(rows, Mapping):
        raise error(
            f"{label} is a {type(rows).__name__} with the keys {_keys(rows)}, not a list of rows; "
            "give list(x.items()) of a dict of texts by id, [x] of a single row, x['train'] of a "
            "DatasetDict"
        )
    # The keys and the items of a dict are in order.
    if isinstance(rows, Set) and not isinstance(rows, MappingView):
        raise error(f"{label} is a {type(rows).__name__}, which has no order; give a list")
    if hasattr(rows, "columns") and hasattr(rows, "to_dict"):
        raise error(
            f"{label} is a {type(rows).__name__}, whose iteration gives the names of its columns; "
            "give its rows: x.to_dict('records')"
        )
    if not isinstance(rows, Iterable) and not hasattr(rows, "__getitem__"):
        raise error(f"{label} is {_shown(rows)}, not an iterable; {forms} for each")


def _as_mapping(row: Any) -> Mapping | None:
    """Returns the fields of a row with names; None if it has none."""
    if isinstance(row, Mapping):
        return row
    if isinstance(row, tuple) and hasattr(row, "_asdict"):
        return row._asdict()
    if isinstance(row, np.void) and row.dtype.names:
        return dict(zip(row.dtype.names, row.tolist(), strict=True))
    # A row of pandas (a Series): an index of names, and values.
    if hasattr(row, "to_dict") and hasattr(row, "index"):
        return row.to_dict()
    return None


def _as_tuple(row: Any) -> tuple | None:
    if isinstance(row, np.ndarray):
        return tuple(row.tolist()) if row.ndim == 1 else None
    return tuple(row) if isinstance(row, tuple | list) else None


def _name(name: Any, place: str, error: type[ValueError]) -> str:
    if isinstance(name, str):
        if half := half_character(name):
            raise error(f"{place}: the id has {half}")
        return name
    if is_whole(name):
        return str(int(name))
    raise error(f"{place} has the id {_shown(name)}; give a string or a whole number")


def is_whole(value: Any) -> bool:
    """Returns whether a value is a whole number, of Python or NumPy, and no bool."""
    return isinstance(value, numbers.Integral) and not isinstance(value, bool)


def _keys(rows: Mapping) -> str:
    names = [repr(k) for _, k in zip(range(5), rows, strict=False)]
    return ", ".join(names) + (", …" if len(rows) > 5 else "")


def _shown(value: Any) -> str:
    """Returns a value and its type, short enough for a message."""
    if value is None:
        return "None"
    if isinstance(value, float) and math.isnan(value):
        return "NaN (a missing value)"
    text = repr(value)
    text = text if len(text) <= 80 else f"{text[:79]}…"
    return f"{text} ({type(value).__name__})"
