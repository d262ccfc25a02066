"""The TFDS features of the records, shared by every builder, and reading without TensorFlow.

A TFDS dataset has one feature spec for all its splits, so the spec is the union of both records'
fields (they share no name): a sentence leaves the fields of a fact blank, and the other way round.
TFDS features have no null either. An optional string is stored as "" for None (validation reads an
empty string as None, so nothing else is), an optional number or truth value as -1.
"""

import contextlib
import importlib
import os
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any, Generic, TypeVar, get_type_hints, overload

import numpy as np
import tensorflow_datasets as tfds
from tensorflow_datasets.proto import tf_example_pb2

from tda.facts.records import Fact, Sentence, Triple

Record = TypeVar("Record", Sentence, Fact)

_NONE = -1
# Records that are read together: several times faster than one by one.
_CHUNK = 4096
_HINTS = {record: get_type_hints(record) for record in (Sentence, Fact, Triple)}


def _feature(hint: Any) -> Any:
    """Returns the TFDS feature of a field with this type."""
    if hint == tuple[Triple, ...]:
        return tfds.features.Sequence(_spec(Triple))
    if hint == tuple[str, ...]:
        return tfds.features.Sequence(tfds.features.Text())
    return tfds.features.Text() if hint in (str, str | None) else np.int64


def _spec(record: type) -> dict[str, Any]:
    return {name: _feature(hint) for name, hint in _HINTS[record].items()}


_SPECS = {record: _spec(record) for record in _HINTS}
_SENTENCE, _FACT = _SPECS[Sentence], _SPECS[Fact]


def record_features() -> tfds.features.FeaturesDict:
    """Returns the feature spec that the splits `sentences` and `facts` of every builder share."""
    return tfds.features.FeaturesDict({**_SENTENCE, **_FACT})


def encode_sentence(sentence: Sentence) -> dict[str, Any]:
    """Returns the TFDS example of a sentence."""
    return _blank(_FACT) | _encode(sentence)


def encode_fact(fact: Fact) -> dict[str, Any]:
    """Returns the TFDS example of a fact."""
    return _blank(_SENTENCE) | _encode(fact)


def _encode(record: Sentence | Fact | Triple) -> dict[str, Any]:
    def encode(value: Any, feature: Any) -> Any:
        if isinstance(feature, tfds.features.Sequence):
            return [_encode(x) if isinstance(x, Triple) else x for x in value]
        if isinstance(feature, tfds.features.Text):
            return value or ""
        return _NONE if value is None else int(value)

    return {n: encode(getattr(record, n), f) for n, f in _SPECS[type(record)].items()}


def decode_sentence(example: Mapping[str, Any]) -> Sentence:
    """Returns the sentence of a TFDS example; the inverse of `encode_sentence`."""
    return _decode(Sentence, example)


def decode_fact(example: Mapping[str, Any]) -> Fact:
    """Returns the fact of a TFDS example; the inverse of `encode_fact`."""
    return _decode(Fact, example)


def _decode(record: type, example: Mapping[str, Any]) -> Any:
    return record(**{name: decode(example[name]) for name, decode in _DECODERS[record].items()})


def _decoder(hint: Any) -> Callable[[Any], Any]:
    """Returns the function that decodes a field of this type."""
    decoders: dict[Any, Callable[[Any], Any]] = {
        str: _text,
        str | None: lambda value: _text(value) or None,
        int | None: lambda value: None if int(value) == _NONE else int(value),
        bool | None: lambda value: None if int(value) == _NONE else bool(value),
        tuple[str, ...]: lambda value: tuple(map(_text, value)),
        tuple[Triple, ...]: _decode_triples,
    }
    return decoders[hint]


def _decode_triples(columns: Mapping[str, Any]) -> tuple[Triple, ...]:
    # TFDS keeps a sequence of objects as a column for each of their fields.
    rows = zip(*(columns[name] for name in _HINTS[Triple]), strict=True)
    return tuple(_decode(Triple, dict(zip(_HINTS[Triple], row, strict=True))) for row in rows)


def _text(value: bytes | str) -> str:
    return value.decode("utf-8") if isinstance(value, bytes) else str(value)


_DECODERS = {
    record: {name: _decoder(hint) for name, hint in hints.items()}
    for record, hints in _HINTS.items()
}


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

    def __iter__(self) -> Iterator[Record]:
        read = getattr(
            self._source, "__getitems__", lambda rows: map(self._source.__getitem__, rows)
        )
        for first in range(0, len(self), _CHUNK):
            rows = range(first, min(first + _CHUNK, len(self)))
            yield from map(self._decode, read(rows))

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
    if builder.is_prepared():
        return read_prepared(builder)
    with contextlib.ExitStack() as quiet:
        if name == "world_facts" or builder_kwargs.get("sentences"):
            # TFDS says that it downloads even where there is nothing to download.
            print(f"preparing {name} in {os.fspath(data_dir)}", flush=True)
            quiet.enter_context(contextlib.redirect_stdout(None))
        builder.download_and_prepare()
    return read_prepared(builder)


def read_prepared(
    builder: tfds.core.DatasetBuilder,
) -> tuple[RecordSequence[Sentence], list[Fact]]:
    """Opens the two splits of a prepared builder, as `load_tfds` returns them."""

    def source(split: str, fields: Mapping[str, Any], from_example: Callable) -> RecordSequence:
        # Read raw and parsed here, without the arrays that TFDS makes of each field and without the
        # blank fields of the other record: several times faster.
        raw = builder.as_data_source(
            split=split, deserialize_method=tfds.decode.DeserializeMethod.RAW_BYTES
        )
        return RecordSequence(raw, lambda row: from_example(_parse(row, fields)))

    sentences = source("sentences", _SENTENCE, decode_sentence)
    return sentences, list(source("facts", _FACT, decode_fact))


def _parse(row: bytes, fields: Mapping[str, Any]) -> dict[str, Any]:
    """Returns some fields of a serialised example, as TFDS lays them out."""
    features = tf_example_pb2.Example.FromString(row).features.feature

    def values(name: str):
        feature = features[name]
        return feature.bytes_list.value or feature.int64_list.value

    def field(name: str, feature: Any) -> Any:
        if not isinstance(feature, tfds.features.Sequence):
            return values(name)[0]
        inner = feature.feature
        if not isinstance(inner, tfds.features.FeaturesDict):
            return values(name)
        return {key: values(f"{name}/{key}") for key in inner}

    return {name: field(name, feature) for name, feature in fields.items()}


def _blank(fields: Mapping[str, Any]) -> dict[str, Any]:
    def blank(feature: Any) -> Any:
        if isinstance(feature, tfds.features.Sequence):
            return []
        return "" if isinstance(feature, tfds.features.Text) else _NONE

    return {name: blank(feature) for name, feature in fields.items()}
