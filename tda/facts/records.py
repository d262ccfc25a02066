"""The two records of a fact-tracing corpus, passages and queries, and their validation.

The field names are those of the public release of Chang et al. (2024), "Scalable Influence and Fact
Tracing for Large Language Model Pretraining".
"""

import dataclasses
from collections.abc import Callable, Mapping
from typing import Any, get_type_hints

from tda.data.jsonl import RecordError, half_character


@dataclasses.dataclass(frozen=True, slots=True)
class Triple:
    """One fact that a sentence is annotated with."""

    fact_id: str | None
    """None if the corpus gives only the three URIs."""
    entity0: str | None
    """Name of the subject, if the corpus gives it; `entity1` is that of the object."""
    entity1: str | None
    entity0_uri: str
    predicate_uri: str
    """URI of the relation."""
    entity1_uri: str
    subject_initial: bool | None = None
    """Whether the sentence starts with the subject; None if unknown."""

    @property
    def uris(self) -> tuple[str, str, str]:
        """The triple (entity0_uri, predicate_uri, entity1_uri)."""
        return self.entity0_uri, self.predicate_uri, self.entity1_uri


@dataclasses.dataclass(frozen=True, slots=True)
class Sentence:
    """One passage of the corpus."""

    sentence_id: str
    text: str
    """Never blank."""
    abstract_uri: str | None = None
    """The document that it comes from."""
    sent_idx_in_abst: int | None = None
    """Position of the sentence in that document, from 0."""
    fact_triples: tuple[Triple, ...] = ()
    """The facts that it is annotated with."""


@dataclasses.dataclass(frozen=True, slots=True)
class Fact:
    """One query: a fact, its prompts, and their target, `entity1`."""

    fact_id: str
    entity0: str
    """Name of the subject."""
    relation: str
    entity1: str
    """Name of the object."""
    entity0_uri: str
    predicate_uri: str
    """URI of the relation."""
    entity1_uri: str
    entity0_alias: tuple[str, ...]
    """Other names of the subject."""
    entity1_alias: tuple[str, ...]
    trex_sentences: tuple[str, ...]
    """Identifiers of the sentences that are annotated with the fact."""
    prompt0: str
    """The default prompt; it ends right before the target, without a space."""
    prompt1: str | None = None
    """A paraphrase of it, as `prompt2` is."""
    prompt2: str | None = None
    c4_frequency: int | None = None
    """How often the fact occurs in C4, by string matching."""
    is_repetition: bool | None = None
    """Whether subject and object repeat one another ("Mexico", "Mexico City")."""
    n_objects_same_subject: int | None = None
    """Number of objects that the subject has under this relation."""
    kilt_id: str | None = None
    """Identifier of the fact in KILT."""
    other_choices: tuple[str, ...] = ()
    """Targets to choose from beside the right one, where a query has such."""

    @property
    def uris(self) -> tuple[str, str, str]:
        """The triple (entity0_uri, predicate_uri, entity1_uri)."""
        return self.entity0_uri, self.predicate_uri, self.entity1_uri

    def prompt(self, i: int) -> str:
        """Returns prompt i of 0, 1, 2.

        Raises:
            RecordError: The fact has no such prompt.
        """
        prompts = (self.prompt0, self.prompt1, self.prompt2)
        if i not in range(len(prompts)):
            raise RecordError(f"fact {self.fact_id!r}: prompt {i} asked for; choose 0, 1 or 2")
        if prompts[i] is None:
            raise RecordError(f"fact {self.fact_id!r} has no 'prompt{i}': use prompt0, or add it")
        return prompts[i]


def sentence_from_dict(d: Any, where: str) -> Sentence:
    """Validates one decoded JSON object as a passage.

    Args:
        d: The object. Unknown fields are ignored; an absent, null or empty optional field is None.
        where: Its place, for error messages, such as "sentences.jsonl.gz, line 17".

    Returns:
        The sentence.

    Raises:
        RecordError: A field is missing, of the wrong type or no Unicode, or the text is blank.
    """
    values = _fields(_mapping(d, where, "a sentence"), where, HINTS[Sentence])
    values["fact_triples"] = tuple(
        _triple(triple, f"{where}: field 'fact_triples', item {i}")
        for i, triple in enumerate(values["fact_triples"])
    )
    return Sentence(**values)


def fact_from_dict(d: Any, where: str) -> Fact:
    """Validates one decoded JSON object as a fact, as `sentence_from_dict` does a passage.

    An absent list is empty, and absent URIs fall back on the names.
    """
    d = _mapping(d, where, "a fact")
    names = zip(_URIS, ("entity0", "relation", "entity1"), strict=True)
    uris = {uri: d.get(uri) or d.get(name) for uri, name in names}
    return Fact(**_fields({**d, **uris}, where, HINTS[Fact]))


def _triple(value: Any, where: str) -> Triple:
    """Validates one item of `fact_triples`: an object, or the bare list of its three URIs."""
    # The public description of the release does not give the form of an item, so both are read.
    if isinstance(value, list):
        if len(value) != 3:
            raise RecordError(
                f"{where}: found {_shown(value)}; a triple given as a list is"
                " [entity0_uri, predicate_uri, entity1_uri], three non-empty strings"
            )
        value = dict(zip(_URIS, value, strict=True))
    d, hints = _mapping(value, where, "a triple, or a list of its three URIs"), HINTS[Triple]
    if d.get("fact_id"):
        # An id names the fact; without one the three URIs must.
        hints = hints | dict.fromkeys(_URIS, str | None)
    values = _fields(d, where, hints)
    return Triple(**values | {uri: values[uri] or "" for uri in _URIS})


HINTS = {record: get_type_hints(record) for record in (Sentence, Fact, Triple)}
_URIS = ("entity0_uri", "predicate_uri", "entity1_uri")
_REQUIRED = object()


def _is_count(value: Any) -> bool:
    # bool is an int in Python, but `true` instead of a number is a mistake in the file.
    return isinstance(value, int) and not isinstance(value, bool) and value >= 0


@dataclasses.dataclass(frozen=True)
class _Rule:
    """The allowed values of a field of one type in JSON."""

    expected: str
    """The type in the words of an error."""
    accepts: Callable[[Any], bool]
    default: Any = None
    """The value of an absent or null field."""
    convert: Callable[[Any], Any] = lambda value: value
    """From a JSON value to that of the record."""


_RULES: dict[Any, _Rule] = {
    str: _Rule("a non-empty string", lambda v: isinstance(v, str) and bool(v.strip()), _REQUIRED),
    # An empty string means the same as null, and the TFDS features store None as one.
    str | None: _Rule("a string or null", lambda v: isinstance(v, str), None, lambda v: v or None),
    int | None: _Rule("a whole number from 0 up, or null", _is_count),
    bool | None: _Rule("true, false or null", lambda v: isinstance(v, bool)),
    tuple[str, ...]: _Rule(
        "a list of strings",
        lambda v: isinstance(v, list) and all(isinstance(x, str) for x in v),
        (),
        tuple,
    ),
    tuple[Triple, ...]: _Rule("a list of triples", lambda v: isinstance(v, list), ()),
}


def _fields(d: Mapping[str, Any], where: str, hints: Mapping[str, Any]) -> dict[str, Any]:
    """Returns the checked values of the fields with these types."""
    values = {}
    for key, hint in hints.items():
        rule, value = _RULES[hint], d.get(key)
        if value is None and rule.default is not _REQUIRED:
            values[key] = rule.default
            continue
        if key not in d:
            keys = _shown(sorted(d))
            raise RecordError(
                f"{where}: field '{key}' is missing (found {keys}); add it as {rule.expected}"
            )
        if not rule.accepts(value):
            raise RecordError(
                f"{where}: field '{key}' is {_shown(value)}; it must be {rule.expected}"
            )
        for text in value if isinstance(value, list) else [value]:
            if isinstance(text, str) and (half := half_character(text)):
                raise RecordError(f"{where}: field '{key}' has {half}")
        values[key] = rule.convert(value)
    return values


def _mapping(value: Any, where: str, expected: str) -> Mapping[str, Any]:
    if not isinstance(value, Mapping):
        raise RecordError(f"{where}: found {_shown(value)}; {expected} must be a JSON object")
    return value


def _shown(value: Any) -> str:
    shown = repr(value)
    return shown if len(shown) <= 80 else shown[:77] + "..."
