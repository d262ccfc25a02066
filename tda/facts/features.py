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
from typing import Any, NamedTuple, TypeVar

import numpy as np
import tensorflow_datasets as tfds
from tensorflow_datasets.proto import tf_example_pb2

from tda.facts.records import HINTS, Fact, Sentence, Triple

Record = TypeVar("Record", Sentence, Fact, Triple)

_NONE = -1
# Records read at a time, several times faster than one by one.
_CHUNK = 4096


def _text(value: bytes | str) -> str:
    return value.decode("utf-8") if isinstance(value, bytes) else str(value)


def _encode_number(value: int | None) -> int:
    return _NONE if value is None else int(value)


def _encode_triples(triples: tuple[Triple, ...] | None) -> list[dict[str, Any]]:
    return [_encode_fields(triple, Triple) for triple in triples or ()]


def _decode_triples(columns: Mapping[str, Any]) -> tuple[Triple, ...]:
    # TFDS keeps a sequence of objects as a column for each of their fields.
    rows = zip(*(columns[name] for name in HINTS[Triple]), strict=True)
    return tuple(decode(Triple, dict(zip(HINTS[Triple], row, strict=True))) for row in rows)


class _Codec(NamedTuple):
    """A field type in TFDS: its feature, and functions from a value to an example and back."""

    feature: Any
    encode: Callable[[Any], Any]
    decode: Callable[[Any], Any]


_TEXT = tfds.features.Text()
_CODECS: dict[Any, _Codec] = {
    str: _Codec(_TEXT, lambda value: value or "", _text),
    str | None: _Codec(_TEXT, lambda value: value or "", lambda value: _text(value) or None),
    int | None: _Codec(np.int64, _encode_number, lambda n: None if n == _NONE else int(n)),
    bool | None: _Codec(np.int64, _encode_number, lambda n: None if n == _NONE else bool(n)),
    tuple[str, ...]: _Codec(
        tfds.features.Sequence(_TEXT),
        lambda texts: list(texts or ()),
        lambda texts: tuple(map(_text, texts)),
    ),
}
_CODECS[tuple[Triple, ...]] = _Codec(
    tfds.features.Sequence({name: _CODECS[hint].feature for name, hint in HINTS[Triple].items()}),
    _encode_triples,
    _decode_triples,
)
_SPECS = {r: {name: _CODECS[h].feature for name, h in hints.items()} for r, hints in HINTS.items()}


def record_features() -> tfds.features.FeaturesDict:
    """Returns the feature spec that the splits `sentences` and `facts` of every builder share."""
    return tfds.features.FeaturesDict(_SPECS[Sentence] | _SPECS[Fact])


def encode(record: Sentence | Fact) -> dict[str, Any]:
    """Returns the TFDS example of a record, which leaves the fields of the other record blank."""
    return _encode_fields(record, Sentence) | _encode_fields(record, Fact)


def _encode_fields(record: Sentence | Fact | Triple, kind: type) -> dict[str, Any]:
    hints = HINTS[kind].items()
    return {name: _CODECS[hint].encode(getattr(record, name, None)) for name, hint in hints}


def decode(record: type[Record], example: Mapping[str, Any]) -> Record:
    """Returns the record of a TFDS example; the inverse of `encode`."""
    hints = HINTS[record].items()
    return record(**{name: _CODECS[hint].decode(example[name]) for name, hint in hints})


def load_tfds(
    name: str, data_dir: str | os.PathLike[str], **builder_kwargs: Any
) -> tuple[list[Sentence], list[Fact]]:
    """Returns the sentences and facts of a TFDS dataset of this package, in the order of its files.

    It is prepared first if it does not exist yet. TensorFlow is neither needed nor imported.

    Args:
        name: "world_facts" or "trex".
        data_dir: Directory that TFDS keeps its datasets in.
        **builder_kwargs: Arguments of the builder, such as `config="sample"` of trex.

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
                # TFDS prints that it downloads even if there is nothing to download.
                print(f"preparing {name} in {os.fspath(data_dir)}", flush=True)
                quiet.enter_context(contextlib.redirect_stdout(None))
            builder.download_and_prepare()
    return read_prepared(builder)


def read_prepared(builder: tfds.core.DatasetBuilder) -> tuple[list[Sentence], list[Fact]]:
    """Reads the two splits of a prepared builder, as `load_tfds` returns them."""

    def read(split: str, record: type[Record]) -> list[Record]:
        # Read raw and parsed here, which is several times faster than TFDS's own decoding of every
        # field, including the blank fields of the other record.
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
