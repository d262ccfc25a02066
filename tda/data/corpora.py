"""Reads corpora of many forms as a stream of documents, only a few of them in memory at a time.

The forms are JSON lines, Parquet files, a Hugging Face `datasets` directory on disk, a folder of
text files, and a TFDS dataset by its name.
"""

import dataclasses
import glob
import heapq
import json
import math
import numbers
import os
import pathlib
import re
from collections.abc import Iterable, Iterator, Mapping, Sequence

from tda.data import jsonl
from tda.data.jsonl import half_character
from tda.runtime.fingerprint import hash_64_bits

KINDS = ("jsonl", "parquet", "datasets", "texts", "tfds")
# Fields that hold a document's id, in order of preference.
_IDS = ("id", "sentence_id", "doc_id", "docid", "_id")
_SUFFIXES = {
    ".jsonl": "jsonl",
    ".jsonl.gz": "jsonl",
    ".json.gz": "jsonl",
    ".ndjson": "jsonl",
    ".parquet": "parquet",
    ".txt": "texts",
}
# The names that `tfds.builder` takes: DATASET[/CONFIG][:VERSION].
_TFDS = re.compile(r"([a-zA-Z]\w*)(/[\w+.-]+)?(:(\d+|\*)(\.(\d+|\*)){2})?")


class CorpusError(ValueError):
    """A corpus cannot be read; the message names the file, the record or the field."""


@dataclasses.dataclass(frozen=True, slots=True)
class Document:
    """A document of a corpus.

    Attributes:
        id: the document's name in the corpus.
        text: the document's text, which may be blank.
    """

    id: str
    text: str


def documents(
    source: str | os.PathLike | Sequence[str | os.PathLike],
    *,
    kind: str | None = None,
    text_field: str = "text",
    id_field: str | None = None,
    split: str = "train",
    data_dir=None,
) -> Iterator[Document]:
    """Streams the documents of a corpus, in its own order.

    Args:
        source: a file, a glob pattern, a list of files, a directory, or the name of a TFDS dataset
            such as "c4/en" or "c4/en:3.0.1".
        kind: "jsonl" (plain or gzipped), "parquet", "datasets" (the output of
            `Dataset.save_to_disk`), "texts" (every .txt file of a directory is a document) or
            "tfds"; by default the names of the files decide.
        text_field: the field or column of the text.
        id_field: the field or column of the id; by default "id", "sentence_id", "doc_id", "docid"
            or "_id" if there is one, else documents are named by file and number, from 0.
        split: the split of a TFDS dataset, or of a `datasets` directory with several.
        data_dir: the directory of TFDS datasets; TFDS's default if None.

    Raises:
        FileNotFoundError: no file or directory has that name.
        CorpusError: the kind is unknown, a field is missing or not Unicode, or a package is not
            installed.
        tda.data.jsonl.RecordError: a line is not JSON.
    """
    if kind is None:
        kind = _guess_kind(source)
    if kind not in KINDS:
        raise CorpusError(f"unknown kind of corpus {kind!r}; use {', '.join(KINDS)}")
    fields = text_field, id_field
    if kind == "jsonl":
        return _from_jsonl(source, *fields)
    if kind == "parquet":
        return _from_parquet(source, *fields)
    if kind == "datasets":
        return _from_datasets(pathlib.Path(os.path.expanduser(source)), *fields, split)
    if kind == "texts":
        return _from_texts(source)
    return _from_tfds(os.fspath(source), *fields, split, data_dir)


def sample(
    documents: Iterable[Document], count: int, keep: str | None = None, seed: int = 0
) -> list[Document]:
    """Draws documents from the whole of a corpus; returns them in its order.

    Args:
        documents: the documents, read once.
        count: the number of documents to draw (all if there are fewer).
        keep: a regular expression; every document whose text matches it is in the sample, even if
            these are more than `count`.
        seed: the seed of the draw, which depends on the documents' ids and nothing else.
    """
    pattern = re.compile(keep) if keep else None
    matching, drawn = [], []
    for i, document in enumerate(documents):
        if pattern is not None and pattern.search(document.text):
            matching.append((i, document))
            continue
        # The documents with the smallest hashes stay. Python's heap has its smallest item on top,
        # so hashes are negated to find the largest of those that stay.
        item = (-hash_64_bits(f"{seed} {document.id}", "big"), i, document)
        if len(drawn) < count:
            heapq.heappush(drawn, item)
        elif drawn and item > drawn[0]:
            heapq.heapreplace(drawn, item)
    rest = sorted(drawn, reverse=True)[: max(0, count - len(matching))]
    return [d for _, d in sorted([*matching, *((i, d) for _, i, d in rest)], key=lambda x: x[0])]


def describe_files(source: str | os.PathLike) -> list:
    """Returns names, sizes and times of change of a corpus's files; its name if it has no files."""
    name = os.path.expanduser(os.fspath(source))
    if os.path.isdir(name):
        files = sorted(str(p) for p in pathlib.Path(name).rglob("*") if p.is_file())
    else:
        files = sorted(glob.glob(name)) or [name]
    states = [(f, os.stat(f)) for f in files if os.path.exists(f)]
    return [[os.path.basename(f), s.st_size, s.st_mtime_ns] for f, s in states] or [name]


def _guess_kind(source) -> str:
    if not isinstance(source, str | os.PathLike):
        return "jsonl" if len(source) == 0 else _guess_kind(source[0])
    name = os.path.expanduser(os.fspath(source))
    path = pathlib.Path(name)
    if path.is_dir():
        if (path / "state.json").exists() or (path / "dataset_dict.json").exists():
            return "datasets"
        for pattern, kind in (("*.parquet", "parquet"), ("*.txt", "texts")):
            if next(path.rglob(pattern), None) is not None:
                return kind
        raise CorpusError(
            f"{source} holds no .parquet file, no .txt file and no `datasets` dataset; "
            "name files of JSON lines by a pattern such as 'DIR/*.jsonl.gz'"
        )
    for suffix, kind in _SUFFIXES.items():
        if path.name.endswith(suffix):
            return kind
    if path.exists() or glob.glob(name):
        raise CorpusError(f"{source}: unknown kind of corpus; give kind={' or '.join(KINDS)}")
    if path.is_absolute() or name.startswith(".") or (path.suffix and not _names_tfds(name)):
        raise FileNotFoundError(f"{source}: no such corpus")
    return "tfds"


def _names_tfds(name: str) -> bool:
    """Returns whether a name with a dot names a TFDS dataset rather than a missing file."""
    match = _TFDS.fullmatch(name)
    if match is None:
        return False
    dataset, config, version = match[1], match[2], match[3]
    # A config may have a dot ("wikipedia/20220301.en"); so may a file in a directory.
    return version is not None or (config is not None and not os.path.isdir(dataset))


def document_of(record, place: str, text_field: str, id_field: str | None) -> Document:
    """Returns a record's document; its id is `place` if the record has none.

    A text that is null (None, or NaN of pandas) is blank.
    """
    if not isinstance(record, Mapping):
        raise CorpusError(f"{place}: a document must be an object, not {type(record).__name__}")
    for field in (text_field, id_field):
        if field is not None and field not in record:
            raise CorpusError(
                f"{place}: there is no field {field!r}; the fields are "
                f"{', '.join(map(str, record)) or 'none'}; name it by text_field or id_field"
            )
    text = "" if _is_null(record[text_field]) else record[text_field]
    text = text.decode("utf-8") if isinstance(text, bytes) else text
    if not isinstance(text, str):
        raise CorpusError(f"{place}: {text_field!r} is {type(text).__name__}, not a text")
    id_field = id_field or next((f for f in _IDS if not _is_null(record.get(f))), None)
    name = place if id_field is None else record[id_field]
    if isinstance(name, bool) or not isinstance(name, str | bytes | numbers.Real) or _is_null(name):
        raise CorpusError(
            f"{place}: the id in {id_field!r} is {name!r}, not a string or a number; name another "
            "field by id_field"
        )
    name = name.decode("utf-8") if isinstance(name, bytes) else str(name)
    for field, value in ((text_field, text), (id_field, name)):
        if field is not None and (half := half_character(value)):
            raise CorpusError(f"{place}: field {field!r} has {half}")
    return Document(name, text)


def _is_null(value) -> bool:
    return value is None or (isinstance(value, float) and math.isnan(value))


def _from_jsonl(source, text_field, id_field) -> Iterator[Document]:
    for file in jsonl.expand(source):
        name = os.path.basename(file)
        for i, (place, record) in enumerate(jsonl.iter_records(file)):
            document = document_of(record, place, text_field, id_field)
            # Errors name a line, counted from 1 with blank lines; ids name a record, from 0.
            yield Document(f"{name}:{i}", document.text) if document.id == place else document


def _arrow():
    try:
        import pyarrow
        import pyarrow.parquet
    except ImportError as error:
        raise CorpusError(
            "reading Parquet and `datasets` needs the package pyarrow: pip install 'tda[parquet]'"
        ) from error
    return pyarrow


def _from_parquet(source, text_field, id_field) -> Iterator[Document]:
    arrow = _arrow()
    path = pathlib.Path(os.path.expanduser(os.fspath(source)))
    files = sorted(path.rglob("*.parquet")) if path.is_dir() else jsonl.expand(source)
    for file in files:
        try:
            opened = arrow.parquet.ParquetFile(file)
        except (arrow.ArrowInvalid, OSError) as error:
            raise CorpusError(f"{file} is not a Parquet file ({error})") from error
        columns = _columns(opened.schema_arrow.names, file, text_field, id_field)
        batches = opened.iter_batches(batch_size=1024, columns=columns)
        yield from _rows(batches, os.path.basename(file), text_field, id_field)


def _columns(names: list[str], file, text_field, id_field) -> list[str]:
    """Returns the columns that a document needs: the others are not read."""
    for field in (text_field, id_field):
        if field is not None and field not in names:
            raise CorpusError(
                f"{file}: there is no column {field!r}; the columns are {', '.join(names)}; "
                "name it by text_field or id_field"
            )
    needed = {text_field, id_field} | ({*_IDS} if id_field is None else set())
    return [n for n in names if n in needed]


def _rows(batches, file: str, text_field, id_field) -> Iterator[Document]:
    i = 0
    for batch in batches:
        for record in batch.to_pylist():
            yield document_of(record, f"{file}:{i}", text_field, id_field)
            i += 1


def _from_datasets(path: pathlib.Path, text_field, id_field, split: str) -> Iterator[Document]:
    arrow = _arrow()
    splits = path / "dataset_dict.json"
    if splits.exists():
        names = json.loads(splits.read_text(encoding="utf-8"))["splits"]
        if split not in names:
            raise CorpusError(f"{path} has no split {split!r}; there are {', '.join(names)}")
        path = path / split
    state = json.loads((path / "state.json").read_text(encoding="utf-8"))
    if state.get("_indices_files"):
        raise CorpusError(
            f"{path} is a selection of another dataset's rows; write the rows themselves: "
            "dataset.flatten_indices().save_to_disk(…)"
        )
    for file in state["_data_files"]:
        name = path / os.path.basename(file["filename"])
        with arrow.memory_map(os.fspath(name)) as mapped:
            opened = arrow.ipc.open_stream(mapped)
            columns = _columns(opened.schema.names, name, text_field, id_field)
            batches = (b.select(columns) for b in opened)
            yield from _rows(batches, name.name, text_field, id_field)


def _from_texts(source) -> Iterator[Document]:
    path = pathlib.Path(os.path.expanduser(os.fspath(source)))
    files = sorted(path.rglob("*.txt")) if path.is_dir() else jsonl.expand(source)
    for file in map(pathlib.Path, files):
        name = file.relative_to(path).as_posix() if path.is_dir() else file.name
        try:
            yield Document(name, file.read_text(encoding="utf-8"))
        except UnicodeDecodeError as error:
            raise CorpusError(
                f"{file}: not UTF-8 ({error.reason} at byte {error.start}); convert the file"
            ) from error


def _from_tfds(name: str, text_field, id_field, split, data_dir) -> Iterator[Document]:
    import tensorflow_datasets as tfds

    try:
        source = tfds.data_source(name, split=split, data_dir=data_dir)
    except Exception as error:  # TFDS raises errors of many classes, some of its own
        first = str(error).strip().splitlines()[0]
        raise CorpusError(
            f"{name} is no file, no directory and no TFDS dataset that can be opened ({first}); "
            f"prepare a TFDS dataset by tfds.builder({name!r}, file_format='array_record')"
            ".download_and_prepare()"
        ) from error
    for i in range(len(source)):
        yield document_of(source[i], f"{name}/{split}:{i}", text_field, id_field)
