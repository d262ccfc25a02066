"""The TFDS features of the records, shared by every builder, and reading without TensorFlow.

A TFDS dataset has one feature spec for all its splits, so the spec is the union of both records'
fields (they share no name): a sentence leaves the fields of a fact blank, and the other way round.
TFDS features have no null either. An optional string is stored as "" for None (validation reads an
empty string as None, so nothing else is), an optional number or truth value as -1.
"""

import dataclasses
import importlib
import os
from collections.abc import Callable, Mapping, Sequence
from typing import Any, Generic, TypeVar, overload

import numpy as np
import tensorflow_datasets as tfds

from tda.facts.records import Fact, Sentence, Triple

Record = TypeVar("Record", Sentence, Fact)

_NONE = -1


_SENTENCE = {
    "sentence_id": tfds.features.Text(),
    "text": tfds.features.Text(),
    "abstract_uri": tfds.features.Text(),
    "sent_idx_in_abst": np.int64,
    "fact_triples": tfds.features.Sequence(
        {
            "fact_id": tfds.features.Text(),
            "entity0": tfds.features.Text(),
            "entity1": tfds.features.Text(),
            "entity0_uri": tfds.features.Text(),
            "predicate_uri": tfds.features.Text(),
            "entity1_uri": tfds.features.Text(),
            "subject_initial": np.int64,
        }
    ),
}
_FACT = {
    "fact_id": tfds.features.Text(),
    "entity0": tfds.features.Text(),
    "relation": tfds.features.Text(),
    "entity1": tfds.features.Text(),
    "entity0_uri": tfds.features.Text(),
    "predicate_uri": tfds.features.Text(),
    "entity1_uri": tfds.features.Text(),
    "entity0_alias": tfds.features.Sequence(tfds.features.Text()),
    "entity1_alias": tfds.features.Sequence(tfds.features.Text()),
    "trex_sentences": tfds.features.Sequence(tfds.features.Text()),
    "prompt0": tfds.features.Text(),
    "prompt1": tfds.features.Text(),
    "prompt2": tfds.features.Text(),
    "c4_frequency": np.int64,
    "is_repetition": np.int64,
    "n_objects_same_subject": np.int64,
    "kilt_id": tfds.features.Text(),
}


def record_features() -> tfds.features.FeaturesDict:
    """Returns the feature spec that the splits `sentences` and `facts` of every builder share."""
    return tfds.features.FeaturesDict({**_SENTENCE, **_FACT})


def encode_sentence(sentence: Sentence) -> dict[str, Any]:
    """Returns the TFDS example of a sentence."""
    return _blank(_FACT) | {
        "sentence_id": sentence.sentence_id,
        "text": sentence.text,
        "abstract_uri": sentence.abstract_uri or "",
        "sent_idx_in_abst": _encode_number(sentence.sent_idx_in_abst),
        "fact_triples": [
            dataclasses.asdict(triple)
            | {
                "fact_id": triple.fact_id or "",
                "entity0": triple.entity0 or "",
                "entity1": triple.entity1 or "",
                "subject_initial": _encode_number(triple.subject_initial),
            }
            for triple in sentence.fact_triples
        ],
    }


def decode_sentence(example: Mapping[str, Any]) -> Sentence:
    """Returns the sentence of a TFDS example; the inverse of `encode_sentence`."""
    triples = example["fact_triples"]
    columns = [triples[field.name] for field in dataclasses.fields(Triple)]
    return Sentence(
        sentence_id=_text(example["sentence_id"]),
        text=_text(example["text"]),
        abstract_uri=_text(example["abstract_uri"]) or None,
        sent_idx_in_abst=_decode_number(example["sent_idx_in_abst"]),
        fact_triples=tuple(
            Triple(
                fact_id=_text(fact_id) or None,
                entity0=_text(entity0) or None,
                entity1=_text(entity1) or None,
                entity0_uri=_text(entity0_uri),
                predicate_uri=_text(predicate_uri),
                entity1_uri=_text(entity1_uri),
                subject_initial=_decode_bool(subject_initial),
            )
            for (
                fact_id,
                entity0,
                entity1,
                entity0_uri,
                predicate_uri,
                entity1_uri,
                subject_initial,
            ) in zip(*columns, strict=True)
        ),
    )


def encode_fact(fact: Fact) -> dict[str, Any]:
    """Returns the TFDS example of a fact."""
    return _blank(_SENTENCE) | {
        **dataclasses.asdict(fact),
        "entity0_alias": list(fact.entity0_alias),
        "entity1_alias": list(fact.entity1_alias),
        "trex_sentences": list(fact.trex_sentences),
        "prompt1": fact.prompt1 or "",
        "prompt2": fact.prompt2 or "",
        "c4_frequency": _encode_number(fact.c4_frequency),
        "is_repetition": _encode_number(fact.is_repetition),
        "n_objects_same_subject": _encode_number(fact.n_objects_same_subject),
        "kilt_id": fact.kilt_id or "",
    }


def decode_fact(example: Mapping[str, Any]) -> Fact:
    """Returns the fact of a TFDS example; the inverse of `encode_fact`."""
    return Fact(
        fact_id=_text(example["fact_id"]),
        entity0=_text(example["entity0"]),
        relation=_text(example["relation"]),
        entity1=_text(example["entity1"]),
        entity0_uri=_text(example["entity0_uri"]),
        predicate_uri=_text(example["predicate_uri"]),
        entity1_uri=_text(example["entity1_uri"]),
        entity0_alias=tuple(map(_text, example["entity0_alias"])),
        entity1_alias=tuple(map(_text, example["entity1_alias"])),
        trex_sentences=tuple(map(_text, example["trex_sentences"])),
        prompt0=_text(example["prompt0"]),
        prompt1=_text(example["prompt1"]) or None,
        prompt2=_text(example["prompt2"]) or None,
        c4_frequency=_decode_number(example["c4_frequency"]),
        is_repetition=_decode_bool(example["is_repetition"]),
        n_objects_same_subject=_decode_number(example["n_objects_same_subject"]),
        kilt_id=_text(example["kilt_id"]) or None,
    )


class RecordSequence(Sequence, Generic[Record]):
    """The records of a random-access source, each decoded on access.

    Args:
        source: Anything with `len` and integer indexing, such as a TFDS data source.
        decode: From an example of the source to a record.
    """

    def __init__(self, source: Any, decode: Callable[[Any], Record]):
        self._source = source
        self._decode = decode

    def __len__(self) -> int:
        return len(self._source)

    @overload
    def __getitem__(self, index: int) -> Record: ...

    @overload
    def __getitem__(self, index: slice) -> list[Record]: ...

    def __getitem__(self, index):
        if isinstance(index, slice):
            return [self[i] for i in range(*index.indices(len(self)))]
        if not -len(self) <= index < len(self):
            raise IndexError(f"record {index} of {len(self)}")
        return self._decode(self._source[int(index) % len(self)])


def load_tfds(
    name: str, data_dir: str | os.PathLike[str], **builder_kwargs: Any
) -> tuple[RecordSequence[Sentence], list[Fact]]:
    """Opens one of this package's TFDS datasets, preparing it first if it does not exist yet.

    TensorFlow is neither needed nor imported.

    Args:
        name: "world_facts" or "trex".
        data_dir: Directory that TFDS keeps its datasets in.
        **builder_kwargs: Arguments of the builder, such as `config="sample"` of trex.

    Returns:
        The sentences, read lazily, and the facts, both in the order they were generated in.

    Raises:
        ValueError: There is no such dataset.
    """
    if name not in ("world_facts", "trex"):
        raise ValueError(f"no dataset {name!r}; choose 'world_facts' or 'trex'")
    # Imported here, because the builders import this module for the features.
    module = importlib.import_module(f"tda.facts.{name}.builder")
    builder = module.Builder(
        data_dir=os.fspath(data_dir), file_format="array_record", **builder_kwargs
    )
    builder.download_and_prepare()
    return read_prepared(builder)


def read_prepared(
    builder: tfds.core.DatasetBuilder,
) -> tuple[RecordSequence[Sentence], list[Fact]]:
    """Opens the two splits of a prepared builder, as `load_tfds` returns them."""

    def source(split: str, fields: Mapping[str, Any], from_example: Callable) -> RecordSequence:
        # Read raw and parsed here, to skip the blank fields of the other record: twice as fast.
        raw = builder.as_data_source(
            split=split, deserialize_method=tfds.decode.DeserializeMethod.RAW_BYTES
        )
        spec = tfds.features.FeaturesDict(fields)
        return RecordSequence(raw, lambda row: from_example(spec.deserialize_example_np(row)))

    sentences = source("sentences", _SENTENCE, decode_sentence)
    return sentences, list(source("facts", _FACT, decode_fact))


def _blank(fields: Mapping[str, Any]) -> dict[str, Any]:
    def blank(feature: Any) -> Any:
        if isinstance(feature, tfds.features.Sequence):
            return []
        return "" if isinstance(feature, tfds.features.Text) else _NONE

    return {name: blank(feature) for name, feature in fields.items()}


def _text(value: bytes | str) -> str:
    return value.decode("utf-8") if isinstance(value, bytes) else str(value)


def _encode_number(value: int | bool | None) -> int:
    return _NONE if value is None else int(value)


def _decode_number(value: Any) -> int | None:
    return None if int(value) == _NONE else int(value)


def _decode_bool(value: Any) -> bool | None:
    return None if int(value) == _NONE else bool(value)
