"""A document of a corpus, and how a record with named fields is read as one."""

import dataclasses
import math
import numbers
from collections.abc import Collection, Container, Mapping

import numpy as np

from tda.data.chats import parse_messages
from tda.data.folders import CorpusError
from tda.data.jsonl import half_character

# What transformers puts in labels for a token that the loss leaves out.
_NOT_SCORED = -100
# Fields that hold a document's id, in order of preference.
_IDS = ("id", "sentence_id", "doc_id", "docid", "_id")
# The fields that may replace a text; of those of token ids only the first is required.
_COMPLETION = ("prompt", "completion")
_TOKEN_IDS = ("input_ids", "attention_mask", "labels")
_CHAT = ("messages",)


class UndecodableError(CorpusError):
    """A record that is not UTF-8."""

    @classmethod
    def at(cls, place: str, error: UnicodeDecodeError) -> "UndecodableError":
        """Returns the error of a record's place, given that of Python."""
        return cls(f"{place}: not UTF-8 ({error.reason} at byte {error.start})")


@dataclasses.dataclass(frozen=True, slots=True)
class Document:
    """A document of a corpus.

    Attributes:
        id: the document's name in the corpus.
        text: the document's text, which may be blank.
        prompt: text before it that carries no loss.
        tokens: the document's token ids, in place of a text; the tokenizer adds nothing to them.
        scored: which of `tokens` the loss counts; all if None.
        messages: the messages of a chat, in place of a text; the tokenizer's template turns them
            into a text, and the loss counts only the assistant's.
    """

    id: str
    text: str
    prompt: str = ""
    tokens: tuple[int, ...] | None = None
    scored: tuple[bool, ...] | None = None
    messages: tuple[dict, ...] = ()


def _first_of(names: str | None, record: Container[str]) -> str | None:
    """Returns the first of comma-separated fields that a record has; `names` if it has none."""
    if names is None or names in record:
        return names
    return next((name for name in names.split(",") if name in record), names)


def document_of(
    record, place: str, default_id: str, text_field: str, id_field: str | None
) -> Document:
    """Returns a record's document.

    A missing text (`is_missing`) is blank. A record without `text_field` may have "prompt" and
    "completion", with the loss on the completion only; the "messages" of a chat, with the loss on
    the assistant's; or token ids in "input_ids", without those that "attention_mask" leaves out,
    and with the loss on those whose "labels" are not -100.

    Args:
        record: a mapping of fields.
        place: the record's place, for messages.
        default_id: the document's id if the record has none.
        text_field, id_field: the fields of the text and the id; by default the id's usual names. Of
            several, as in "text,abstract", the first that the record has counts.

    Raises:
        CorpusError: a field is missing or has a wrong value.
    """
    if not isinstance(record, Mapping):
        raise CorpusError(f"{place}: a document must be an object, not {type(record).__name__}")
    prompt, tokens, scored, messages = "", None, None, ()
    text_field, id_field = (_first_of(names, record) for names in (text_field, id_field))
    form = () if text_field in record else _form_without_text(record)
    if form == _COMPLETION:
        text_field, prompt = "completion", record["prompt"]
        if not isinstance(prompt, str) or half_character(prompt):
            raise CorpusError(f"{place}: 'prompt' is {type(prompt).__name__}, or no Unicode text")
    elif form == _TOKEN_IDS:
        tokens, scored = _token_ids(record, place)
        record = {**record, text_field: ""}
    elif form == _CHAT:
        try:
            messages = parse_messages(record["messages"])
        except ValueError as error:
            raise CorpusError(f"{place}: 'messages': {error}") from error
        record = {**record, text_field: ""}
    for field in (text_field, id_field):
        if field is not None and field not in record:
            raise CorpusError(
                f"{place}: there is no field {field!r}; the fields are "
                f"{', '.join(map(str, record)) or 'none'}; name it by text_field or id_field"
            )
    text = "" if is_missing(record[text_field]) else record[text_field]
    text = _decoded(text, place) if isinstance(text, bytes) else text
    if not isinstance(text, str):
        columns = ""
        if isinstance(text, list | Mapping):
            columns = (
                "; if this object holds columns, write rows: one object for each document, such as "
                "by to_json(orient='records', lines=True) of pandas"
            )
        raise CorpusError(f"{place}: {text_field!r} is {type(text).__name__}, not a text{columns}")
    id_field = id_field or next((f for f in _IDS if not is_missing(record.get(f))), None)
    name = default_id if id_field is None else record[id_field]
    if (
        isinstance(name, bool)
        or not isinstance(name, str | bytes | numbers.Real)
        or is_missing(name)
    ):
        raise CorpusError(
            f"{place}: the id in {id_field!r} is {name!r}, not a string or a number; name another "
            "field by id_field"
        )
    name = _decoded(name, place) if isinstance(name, bytes) else str(name)
    for field, value in ((text_field, text), (id_field, name)):
        if field is not None and (half := half_character(value)):
            raise CorpusError(f"{place}: field {field!r} has {half}")
    return Document(name, text, prompt, tokens, scored, messages)


def _token_ids(record: Mapping, place: str) -> tuple[tuple[int, ...], tuple[bool, ...] | None]:
    """Returns a record's token ids, and which of them the loss counts."""
    arrays = {}
    for field in _TOKEN_IDS:
        if record.get(field) is not None:
            try:
                arrays[field] = np.asarray(record[field])
            except ValueError as error:  # lists of several lengths
                raise CorpusError(f"{place}: {field!r} is not a list of whole numbers") from error
    ids = arrays.pop("input_ids", np.zeros(()))
    _check_ids(ids, "'input_ids'", place)
    for field, values in arrays.items():
        if values.shape != ids.shape:
            raise CorpusError(f"{place}: {field!r} has another length than 'input_ids'")
    attended = arrays.get("attention_mask", np.ones(len(ids))).astype(bool)
    scored = None
    if "labels" in arrays:
        labels = arrays["labels"]
        scored = labels != _NOT_SCORED
        if (labels != ids)[scored].any():
            raise CorpusError(
                f"{place}: 'labels' differ from 'input_ids' where they are not {_NOT_SCORED}; "
                "labels are the ids of the same positions, not of the next ones"
            )
        if not (scored & attended).any():
            raise CorpusError(f"{place}: 'labels' leave every token out of the loss")
        scored = tuple(scored[attended].tolist())
    return tuple(ids[attended].tolist()), scored


def with_checked_tokens(document: Document, place: str) -> Document:
    """Returns a document of Python's with its token ids and their mask as tuples.

    Raises:
        CorpusError: the ids are no list of whole numbers, or the mask does not fit them.
    """
    if document.tokens is None:
        return document
    ids = _check_ids(_as_list(document.tokens), "the tokens", place)
    scored = None if document.scored is None else _as_list(document.scored)
    if document.scored is not None and (
        scored is None or scored.dtype != bool or len(scored) != len(ids)
    ):
        raise CorpusError(
            f"{place}: 'scored' is not a list of {len(ids)} booleans, one for each token"
        )
    mask = None if scored is None else tuple(scored.tolist())
    return dataclasses.replace(document, tokens=tuple(ids.tolist()), scored=mask)


def _check_ids(ids: np.ndarray | None, name: str, place: str) -> np.ndarray:
    if ids is None or ids.ndim != 1 or not (np.issubdtype(ids.dtype, np.integer) or not len(ids)):
        raise CorpusError(f"{place}: {name} are not a list of whole numbers")
    check_token_ids(ids.tolist(), place)
    return ids


def _as_list(values) -> np.ndarray | None:
    """Returns values as an array of one axis; None if they are none."""
    try:
        array = np.asarray(values)
    except ValueError:  # lists of several lengths
        return None
    return array if array.ndim == 1 else None


def check_token_ids(ids: Collection[int], place: str) -> None:
    """Checks that token ids are in the range of int32, from 0.

    Raises:
        CorpusError: one is negative, or beyond 32 bits.
    """
    for extreme in (min(ids, default=0), max(ids, default=0)):
        if not 0 <= extreme < 1 << 31:
            raise CorpusError(f"{place}: {extreme} is no token id; they are numbers from 0 up")


def _decoded(text: bytes, place: str) -> str:
    try:
        return text.decode("utf-8")
    except UnicodeDecodeError as error:
        raise UndecodableError.at(place, error) from error


def is_missing(value) -> bool:
    """Returns whether a value is None, NaN, or what pandas puts for a missing one."""
    if isinstance(value, float | np.floating):
        return math.isnan(value)
    return value is None or type(value).__name__ in ("NAType", "NaTType")


def _form_without_text(names: Collection[str]) -> tuple[str, ...]:
    """Returns the fields that replace the text; none if there are none."""
    for form, needed in ((_COMPLETION, _COMPLETION), (_TOKEN_IDS, _TOKEN_IDS[:1]), (_CHAT, _CHAT)):
        if set(needed) <= set(names):
            return form
    return ()


def columns_of(names: list[str], file, text_field: str, id_field: str | None) -> list[str]:
    """Returns the columns that a document needs, so that the others need not be read."""
    text_field, id_field = (_first_of(field, names) for field in (text_field, id_field))
    form = () if text_field in names else _form_without_text(names)
    for field in (id_field,) if form else (text_field, id_field):
        if field is not None and field not in names:
            raise CorpusError(
                f"{file}: there is no column {field!r}; the columns are {', '.join(names)}; "
                "name it by text_field or id_field"
            )
    needed = {text_field, id_field, *form} | ({*_IDS} if id_field is None else set())
    return [n for n in names if n in needed]
