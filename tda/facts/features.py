"""The TFDS features of the records, shared by every builder, and reading without TensorFlow.

A TFDS dataset has one feature spec for all its splits, so the spec is the union of both records'
fields (they share no name): a sentence leaves the fields of a fact blank, and the other way round.
TFDS features have no null either. An optional string is stored as "" for None (validation reads an
empty string as None, so nothing else is), an optional number or truth value as -1.
"""

import contextlib
import importlib
import os
from collections.abc import Callable, Mapping
from typing import Any, TypeVar

import numpy as np
import tensorflow_datasets as tfds
from tensorflow_datasets.proto import tf_example_pb2

from tda.facts.records import HINTS, Fact, Sentence, Triple

Record = TypeVar("Record", Sentence, Fact, Triple)

_NONE = -1
# Records that are read together: several times faster than one by one.
_CHUNK = 4096


def _feature(hint: Any) -> Any:
    """Returns the TFDS feature of a field with this type."""
    if hint == tuple[Triple, ...]:
        return tfds.features.Sequence(_spec(Triple))
    if hint == tuple[str, ...]:
        return tfds.features.Sequence(tfds.features.Text())
    return tfds.features.Text() if hint in (str, str | None) else np.int64


def _spec(record: type) -> dict[str, Any]:
    return {name: _feature(hint) for name, hint in HINTS[record].items()}


_SPECS = {record: _spec(record) for record in HINTS}


def record_features() -> tfds.features.FeaturesDict:
    """Returns the feature spec that the splits `sentences` and `facts` of every builder share."""
    return tfds.features.FeaturesDict(_SPECS[Sentence] | _SPECS[Fact])


def encode(record: Sentence | Fact) -> dict[str, Any]:
    """Returns the TFDS example of a record, which leaves the fields of the other record blank."""
    other = Fact if isinstance(record, Sentence) else Sentence
    blank = {name: _encode_value(None, feature) for name, feature in _SPECS[other].items()}
    return blank | _encode_fields(record)


def _encode_fields(record: Sentence | Fact | Triple) -> dict[str, Any]:
    spec = _SPECS[type(record)]
    return {n: _encode_value(getattr(record, n), feature) for n, feature in spec.items()}


def _encode_value(value: Any, feature: Any) -> Any:
    if isinstance(feature, tfds.features.Sequence):
        return [_encode_fields(x) if isinstance(x, Triple) else x for x in value or ()]
    if isinstance(feature, tfds.features.Text):
        return value or ""
    return _NONE if value is None else int(value)


def decode(record: type[Record], example: Mapping[str, Any]) -> Record:
    """Returns the record of a TFDS example; the inverse of `encode`."""
    decoders = _DECODERS[record]
    return record(**{name: decoder(example[name]) for name, decoder in decoders.items()})


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
    rows = zip(*(columns[name] for name in HINTS[Triple]), strict=True)
    return tuple(decode(Triple, dict(zip(HINTS[Triple], row, strict=True))) for row in rows)


def _text(value: bytes | str) -> str:
    return value.decode("utf-8") if isinstance(value, bytes) else str(value)


_DECODERS = {
    record: {name: _decoder(hint) for name, hint in hints.items()}
    for record, hints in HINTS.items()
}


def load_tfds(
    name: str, data_dir: str | os.PathLike[str], **builder_kwargs: Any
) -> tuple[list[Sentence], list[Fact]]:
    """Reads one of this package's TFDS datasets, preparing it first if it does not exist yet.

    TensorFlow is neither needed nor imported.

    Args:
        name: "world_facts" or "trex".
        data_dir: Directory that TFDS keeps its datasets in.
        **builder_kwargs: Arguments of the builder, such as `config="sample"` of trex.

    Returns:
        The sentences and the facts, both in the order they were generated in.

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
    if not builder.is_prepared():
        with contextlib.ExitStack() as quiet:
            if name == "world_facts" or builder_kwargs.get("sentences"):
                # TFDS says that it downloads even where there is nothing to download.
                print(f"preparing {name} in {os.fspath(data_dir)}", flush=True)
                quiet.enter_context(contextlib.redirect_stdout(None))
            builder.download_and_prepare()
    return read_prepared(builder)


def read_prepared(builder: tfds.core.DatasetBuilder) -> tuple[list[Sentence], list[Fact]]:
    """Reads the two splits of a prepared builder, as `load_tfds` returns them."""

    def read(split: str, record: type[Record]) -> list[Record]:
        # Read raw and parsed here, without the arrays that TFDS makes of each field and without the
        # blank fields of the other record: several times faster.
        source = builder.as_data_source(
            split=split, deserialize_method=tfds.decode.DeserializeMethod.RAW_BYTES
        )
        firsts = range(0, len(source), _CHUNK)
        chunks = (range(i, min(i + _CHUNK, len(source))) for i in firsts)
        rows = (row for numbers in chunks for row in source.__getitems__(numbers))
        return [decode(record, _parse(row, _SPECS[record])) for row in rows]

    return read("sentences", Sentence), read("facts", Fact)


def _parse(row: bytes, spec: Mapping[str, Any]) -> dict[str, Any]:
    """Returns the fields of a record from a serialised example, as TFDS lays them out."""
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

    return {name: field(name, feature) for name, feature in spec.items()}
