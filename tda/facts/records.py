"""The two records of a fact-tracing corpus, passages and queries, and their validation.

The field names are those of the public release of Chang et al. (2024), "Scalable Influence and Fact
Tracing for Large Language Model Pretraining".
"""

import dataclasses
from collections.abc import Callable, Mapping
from typing import Any

from tda.data.jsonl import RecordError, half_character


@dataclasses.dataclass(frozen=True, slots=True)
class Triple:
    """One fact that a sentence is annotated with.

    Attributes:
        fact_id: Identifier of the fact, or None where the corpus gives only the three URIs.
        entity0: Name of the subject, or None where the corpus doesn't give it.
        entity1: Name of the object, or None where the corpus doesn't give it.
        entity0_uri: URI of the subject.
        predicate_uri: URI of the relation.
        entity1_uri: URI of the object.
        subject_initial: Whether the sentence starts with the subject; None where unknown.
    """

    fact_id: str | None
    entity0: str | None
    entity1: str | None
    entity0_uri: str
    predicate_uri: str
    entity1_uri: str
    subject_initial: bool | None = None

    @property
    def uris(self) -> tuple[str, str, str]:
        """The triple (entity0_uri, predicate_uri, entity1_uri)."""
        return self.entity0_uri, self.predicate_uri, self.entity1_uri


@dataclasses.dataclass(frozen=True, slots=True)
class Sentence:
    """One passage of the corpus.

    Attributes:
        sentence_id: Unique identifier.
        text: The passage; never blank.
        abstract_uri: The document that it comes from.
        sent_idx_in_abst: Position of the sentence in that document, from 0.
        fact_triples: The facts that it is annotated with.
    """

    sentence_id: str
    text: str
    abstract_uri: str | None = None
    sent_idx_in_abst: int | None = None
    fact_triples: tuple[Triple, ...] = ()


@dataclasses.dataclass(frozen=True, slots=True)
class Fact:
    """One query: a fact, its prompts, and the target `entity1`.

    Attributes:
        fact_id: Unique identifier.
        entity0: Name of the subject.
        relation: Name of the relation.
        entity1: Name of the object: the target of the prompts.
        entity0_uri: URI of the subject.
        predicate_uri: URI of the relation.
        entity1_uri: URI of the object.
        entity0_alias: Other names of the subject.
        entity1_alias: Other names of the object.
        trex_sentences: Identifiers of the sentences that are annotated with the fact.
        prompt0: The default prompt; it ends right before the target, without a space.
        prompt1: A paraphrase of it.
        prompt2: Another paraphrase.
        c4_frequency: How often the fact occurs in C4, by string matching.
        is_repetition: Whether subject and object repeat one another ("Mexico", "Mexico City").
        n_objects_same_subject: Number of objects that the subject has under this relation.
        kilt_id: Identifier of the fact in KILT.
    """

    fact_id: str
    entity0: str
    relation: str
    entity1: str
    entity0_uri: str
    predicate_uri: str
    entity1_uri: str
    entity0_alias: tuple[str, ...]
    entity1_alias: tuple[str, ...]
    trex_sentences: tuple[str, ...]
    prompt0: str
    prompt1: str | None = None
    prompt2: str | None = None
    c4_frequency: int | None = None
    is_repetition: bool | None = None
    n_objects_same_subject: int | None = None
    kilt_id: str | None = None

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
        d: The object. Fields not known here are ignored; an absent, null or empty optional field
            is None.
        where: Its place, for error messages, such as "sentences.jsonl.gz, line 17".

    Returns:
        The sentence.

    Raises:
        RecordError: A field is missing, of the wrong type or no Unicode, or the text is blank.
    """
    d = _mapping(d, where, "a sentence")
    text = _field(d, "text", where, _is_string, "a string")
    if not text.strip():
        raise RecordError(f"{where}: field 'text' is blank; give the passage a text or drop it")
    triples = _field(d, "fact_triples", where, _is_list, "a list of triples", default=[])
    return Sentence(
        sentence_id=_name(d, "sentence_id", where),
        text=text,
        abstract_uri=_optional_string(d, "abstract_uri", where),
        sent_idx_in_abst=_optional_count(d, "sent_idx_in_abst", where),
        fact_triples=tuple(
            _triple(triple, f"{where}: field 'fact_triples', item {i}")
            for i, triple in enumerate(triples)
        ),
    )


def fact_from_dict(d: Any, where: str) -> Fact:
    """Validates one decoded JSON object as a fact.

    Args:
        d: The object. Fields not known here are ignored; an absent, null or empty optional field
            is None, an absent list is empty, and absent URIs fall back on the names.
        where: Its place, for error messages, such as "facts.jsonl.gz, line 17".

    Returns:
        The fact.

    Raises:
        RecordError: A field is missing, of the wrong type or no Unicode.
    """
    d = _mapping(d, where, "a fact")
    entity0, relation, entity1 = (
        _name(d, key, where) for key in ("entity0", "relation", "entity1")
    )
    prompt0 = _name(d, "prompt0", where)
    return Fact(
        fact_id=_name(d, "fact_id", where),
        entity0=entity0,
        relation=relation,
        entity1=entity1,
        entity0_uri=_optional_string(d, "entity0_uri", where) or entity0,
        predicate_uri=_optional_string(d, "predicate_uri", where) or relation,
        entity1_uri=_optional_string(d, "entity1_uri", where) or entity1,
        entity0_alias=_strings(d, "entity0_alias", where),
        entity1_alias=_strings(d, "entity1_alias", where),
        trex_sentences=_strings(d, "trex_sentences", where),
        prompt0=prompt0,
        prompt1=_optional_string(d, "prompt1", where),
        prompt2=_optional_string(d, "prompt2", where),
        c4_frequency=_optional_count(d, "c4_frequency", where),
        is_repetition=_optional_bool(d, "is_repetition", where),
        n_objects_same_subject=_optional_count(d, "n_objects_same_subject", where),
        kilt_id=_optional_string(d, "kilt_id", where),
    )


def _triple(value: Any, where: str) -> Triple:
    """One item of `fact_triples`: an object, or the bare list of its three URIs."""
    # The public description of the release leaves the shape of an item open, so both are read.
    if isinstance(value, list):
        if len(value) != 3 or not all(_is_name(uri) for uri in value):
            raise RecordError(
                f"{where}: found {_shown(value)}; a triple given as a list is"
                " [entity0_uri, predicate_uri, entity1_uri], three non-empty strings"
            )
        _check_characters(value, where)
        return Triple(None, None, None, *value)
    d = _mapping(value, where, "a triple, or a list of its three URIs")
    fact_id = _optional_string(d, "fact_id", where)
    # An id names the fact; without one the three URIs must.
    uri = _name if fact_id is None else _uri_beside_an_id
    return Triple(
        fact_id=fact_id,
        entity0=_optional_string(d, "entity0", where),
        entity1=_optional_string(d, "entity1", where),
        entity0_uri=uri(d, "entity0_uri", where),
        predicate_uri=uri(d, "predicate_uri", where),
        entity1_uri=uri(d, "entity1_uri", where),
        subject_initial=_optional_bool(d, "subject_initial", where),
    )


def _uri_beside_an_id(d: Mapping[str, Any], key: str, where: str) -> str:
    return _optional_string(d, key, where) or ""


_REQUIRED = object()


def _field(
    d: Mapping[str, Any],
    key: str,
    where: str,
    accepts: Callable[[Any], bool],
    expected: str,
    default: Any = _REQUIRED,
) -> Any:
    value = d.get(key)
    if value is None and default is not _REQUIRED:
        return default
    if key not in d:
        raise RecordError(
            f"{where}: field '{key}' is missing (found {_shown(sorted(d))}); add it as {expected}"
        )
    if not accepts(value):
        raise RecordError(f"{where}: field '{key}' is {_shown(value)}; it must be {expected}")
    _check_characters(value, f"{where}: field '{key}'")
    return value


def _check_characters(value: Any, where: str) -> None:
    for text in value if isinstance(value, list) else [value]:
        if isinstance(text, str) and (half := half_character(text)):
            raise RecordError(f"{where} has {half}")


def _mapping(value: Any, where: str, expected: str) -> Mapping[str, Any]:
    if not isinstance(value, Mapping):
        raise RecordError(f"{where}: found {_shown(value)}; {expected} must be a JSON object")
    return value


def _name(d: Mapping[str, Any], key: str, where: str) -> str:
    return _field(d, key, where, _is_name, "a non-empty string")


def _optional_string(d: Mapping[str, Any], key: str, where: str) -> str | None:
    # An empty string says no more than null does, and the TFDS features store None as one.
    return _field(d, key, where, _is_string, "a string or null", default=None) or None


def _optional_count(d: Mapping[str, Any], key: str, where: str) -> int | None:
    return _field(d, key, where, _is_count, "a whole number from 0 up, or null", default=None)


def _optional_bool(d: Mapping[str, Any], key: str, where: str) -> bool | None:
    return _field(
        d, key, where, lambda value: isinstance(value, bool), "true, false or null", default=None
    )


def _strings(d: Mapping[str, Any], key: str, where: str) -> tuple[str, ...]:
    def accepts(value: Any) -> bool:
        return _is_list(value) and all(_is_string(item) for item in value)

    return tuple(_field(d, key, where, accepts, "a list of strings", default=()))


def _is_string(value: Any) -> bool:
    return isinstance(value, str)


def _is_name(value: Any) -> bool:
    return isinstance(value, str) and bool(value.strip())


def _is_list(value: Any) -> bool:
    return isinstance(value, list)


def _is_count(value: Any) -> bool:
    # bool is an int in Python; a true where a number belongs is a mistake in the file.
    return isinstance(value, int) and not isinstance(value, bool) and value >= 0


def _shown(value: Any) -> str:
    shown = repr(value)
    return shown if len(shown) <= 80 else shown[:77] + "..."
