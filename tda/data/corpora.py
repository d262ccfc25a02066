"""Corpora of many forms as a stream of documents, never more than a few of them in memory.

JSON lines, Parquet files, a Hugging Face `datasets` directory on disk, a folder of text files, or a
TFDS dataset by its name.
"""

import dataclasses
import glob
import hashlib
import heapq
import json
import os
import pathlib
import re
from collections.abc import Iterable, Iterator

from tda.data import jsonl
from tda.data.jsonl import half_character

KINDS = ("jsonl", "parquet", "datasets", "texts", "tfds")
# What a corpus may call a document's id, the most telling first.
_IDS = ("id", "sentence_id", "doc_id", "docid", "_id")
_SUFFIXES = {
    ".jsonl": "jsonl",
    ".jsonl.gz": "jsonl",
    ".json.gz": "jsonl",
    ".ndjson": "jsonl",
    ".parquet": "parquet",
    ".txt": "texts",
}
# What `tfds.builder` takes: a name, and maybe a config and a version.
_TFDS = re.compile(r"([a-zA-Z]\w*)(/[\w+.-]+)?(:(\d+|\*)(\.(\d+|\*)){2})?")


class CorpusError(ValueError):
    """A corpus cannot be read; the message names the file, the record or the field."""


@dataclasses.dataclass(frozen=True, slots=True)
class Document:
    """One document.

    Attributes:
        id: its name in the corpus.
        text: what it says; it may be blank.
    """

    id: str
    text: str


def documents(
    where,
    *,
    kind: str | None = None,
    text_field: str = "text",
    id_field: str | None = None,
    split: str = "train",
    data_dir=None,
) -> Iterator[Document]:
    """Streams the documents of a corpus, in its own order.

    Args:
        where: a file, a glob pattern, a directory, or the name of a TFDS dataset such as "c4/en" or
            "c4/en:3.0.1".
        kind: "jsonl" (plain or gzipped), "parquet", "datasets" (what `Dataset.save_to_disk` wrote),
            "texts" (every .txt file of a directory is a document) or "tfds"; by default it is
            found by the files' names.
        text_field: the field or column of the text.
        id_field: that of the id; by default "id", "sentence_id", "doc_id", "docid" or "_id" where
            there is one, else documents are named by file and number, counted from 0.
        split: of a TFDS dataset or of a `datasets` directory with several.
        data_dir: where TFDS has its datasets; its own default where None.

    Raises:
        FileNotFoundError: there is nothing of that name.
        CorpusError: an unknown kind, a field that is not there or no Unicode, or a package that
            is not there.
        tda.data.jsonl.RecordError: a line is not JSON.
    """
    if kind is None:
        kind = _kind(where)
    if kind not in KINDS:
        raise CorpusError(f"unknown kind of corpus {kind!r}; use {', '.join(KINDS)}")
    fields = text_field, id_field
    if kind == "jsonl":
        return _from_jsonl(where, *fields)
    if kind == "parquet":
        return _from_parquet(where, *fields)
    if kind == "datasets":
        return _from_datasets(pathlib.Path(os.path.expanduser(where)), *fields, split)
    if kind == "texts":
        return _from_texts(where)
    return _from_tfds(os.fspath(where), *fields, split, data_dir)


def sample(
    found: Iterable[Document], count: int, keep: str | None = None, seed: int = 0
) -> list[Document]:
    """Some of a corpus's documents, drawn from all of it, in its order.

    Args:
        found: the documents, streamed once.
        count: how many to draw (fewer where there are fewer).
        keep: a regular expression; documents whose texts match it are all kept, whatever `count`.
        seed: of the draw, which goes by the documents' ids alone.
    """
    pattern = re.compile(keep) if keep else None
    kept, drawn = [], []
    for i, document in enumerate(found):
        if pattern is not None and pattern.search(document.text):
            kept.append((i, document))
            continue
        digest = hashlib.blake2b(f"{seed} {document.id}".encode(), digest_size=8).digest()
        # The smallest numbers stay: of a heap, the largest of them is on top.
        item = (-int.from_bytes(digest, "big"), i, document)
        if len(drawn) < count:
            heapq.heappush(drawn, item)
        elif drawn and item > drawn[0]:
            heapq.heapreplace(drawn, item)
    rest = sorted(drawn, reverse=True)[: max(0, count - len(kept))]
    return [d for _, d in sorted([*kept, *((i, d) for _, i, d in rest)], key=lambda x: x[0])]


def describe_files(where) -> list:
    """Names, sizes and times of change of a corpus's files, as JSON values; its name otherwise."""
    name = os.path.expanduser(os.fspath(where))
    if os.path.isdir(name):
        files = sorted(str(p) for p in pathlib.Path(name).rglob("*") if p.is_file())
    else:
        files = sorted(glob.glob(name)) or [name]
    found = [(f, os.stat(f)) for f in files if os.path.exists(f)]
    return [[os.path.basename(f), s.st_size, s.st_mtime_ns] for f, s in found] or [name]


def _kind(where) -> str:
    if not isinstance(where, str | os.PathLike):
        return "jsonl" if len(where) == 0 else _kind(where[0])
    name = os.path.expanduser(os.fspath(where))
    path = pathlib.Path(name)
    if path.is_dir():
        if (path / "state.json").exists() or (path / "dataset_dict.json").exists():
            return "datasets"
        for pattern, kind in (("*.parquet", "parquet"), ("*.txt", "texts")):
            if next(path.rglob(pattern), None) is not None:
                return kind
        raise CorpusError(
            f"{where} holds no .parquet file, no .txt file and no `datasets` dataset; "
            "name files of JSON lines by a pattern such as 'DIR/*.jsonl.gz'"
        )
    for suffix, kind in _SUFFIXES.items():
        if path.name.endswith(suffix):
            return kind
    if path.exists() or glob.glob(name):
        raise CorpusError(f"{where}: what kind of corpus is it? give kind={' or '.join(KINDS)}")
    if path.is_absolute() or name.startswith(".") or (path.suffix and not _names_tfds(name)):
        raise FileNotFoundError(f"{where}: no such corpus")
    return "tfds"


def _names_tfds(name: str) -> bool:
    """Whether a name with a dot is that of a TFDS dataset, and not of a file that is not there."""
    found = _TFDS.fullmatch(name)
    if found is None:
        return False
    dataset, config, version = found[1], found[2], found[3]
    # A config may have a dot ("wikipedia/20220301.en"); so may a file in a directory.
    return version is not None or (config is not None and not os.path.isdir(dataset))


def _document(record, where: str, text_field: str, id_field: str | None) -> Document:
    if not isinstance(record, dict):
        raise CorpusError(f"{where}: a document must be an object, not {type(record).__name__}")
    for field in (text_field, id_field):
        if field is not None and field not in record:
            raise CorpusError(
                f"{where}: there is no field {field!r}; the fields are "
                f"{', '.join(map(str, record)) or 'none'}; name it by text_field or id_field"
            )
    text = record[text_field]
    text = text.decode("utf-8") if isinstance(text, bytes) else text
    if not isinstance(text, str):
        raise CorpusError(f"{where}: {text_field!r} is {type(text).__name__}, not a text")
    name = id_field or next((f for f in _IDS if record.get(f) is not None), None)
    found = where if name is None else record[name]
    found = found.decode("utf-8") if isinstance(found, bytes) else str(found)
    for field, value in ((text_field, text), (name, found)):
        if field is not None and (half := half_character(value)):
            raise CorpusError(f"{where}: field {field!r} has {half}")
    return Document(found, text)


def _from_jsonl(where, text_field, id_field) -> Iterator[Document]:
    for file in jsonl.expand(where):
        own = os.path.basename(file)
        for i, (place, record) in enumerate(jsonl.iter_records(file)):
            found = _document(record, place, text_field, id_field)
            yield Document(f"{own}:{i}", found.text) if found.id == place else found


def _arrow():
    try:
        import pyarrow
        import pyarrow.parquet
    except ImportError as error:
        raise CorpusError(
            "reading Parquet and `datasets` takes the package pyarrow: pip install 'tda[parquet]'"
        ) from error
    return pyarrow


def _from_parquet(where, text_field, id_field) -> Iterator[Document]:
    arrow = _arrow()
    path = pathlib.Path(os.path.expanduser(os.fspath(where)))
    files = sorted(path.rglob("*.parquet")) if path.is_dir() else jsonl.expand(where)
    for file in files:
        try:
            opened = arrow.parquet.ParquetFile(file)
        except (arrow.ArrowInvalid, OSError) as error:
            raise CorpusError(f"{file} is not a Parquet file ({error})") from error
        columns = _columns(opened.schema_arrow.names, file, text_field, id_field)
        batches = opened.iter_batches(batch_size=1024, columns=columns)
        yield from _rows(batches, os.path.basename(file), text_field, id_field)


def _columns(names: list[str], file, text_field, id_field) -> list[str]:
    """The columns that are read; all that a document needs, and no others."""
    for field in (text_field, id_field):
        if field is not None and field not in names:
            raise CorpusError(
                f"{file}: there is no column {field!r}; the columns are {', '.join(names)}; "
                "name it by text_field or id_field"
            )
    wanted = {text_field, id_field} | ({*_IDS} if id_field is None else set())
    return [n for n in names if n in wanted]


def _rows(batches, own: str, text_field, id_field) -> Iterator[Document]:
    i = 0
    for batch in batches:
        for record in batch.to_pylist():
            place = f"{own}:{i}"
            yield _document(record, place, text_field, id_field)
            i += 1


def _from_datasets(path: pathlib.Path, text_field, id_field, split: str) -> Iterator[Document]:
    arrow = _arrow()
    splits = path / "dataset_dict.json"
    if splits.exists():
        there = json.loads(splits.read_text(encoding="utf-8"))["splits"]
        if split not in there:
            raise CorpusError(f"{path} has no split {split!r}; there are {', '.join(there)}")
        path = path / split
    state = json.loads((path / "state.json").read_text(encoding="utf-8"))
    if state.get("_indices_files"):
        raise CorpusError(
            f"{path} is a selection of rows; write it whole: dataset.flatten_indices()"
            ".save_to_disk(…)"
        )
    for file in state["_data_files"]:
        name = path / os.path.basename(file["filename"])
        with arrow.memory_map(os.fspath(name)) as mapped:
            opened = arrow.ipc.open_stream(mapped)
            columns = _columns(opened.schema.names, name, text_field, id_field)
            batches = (b.select(columns) for b in opened)
            yield from _rows(batches, name.name, text_field, id_field)


def _from_texts(where) -> Iterator[Document]:
    path = pathlib.Path(os.path.expanduser(os.fspath(where)))
    files = sorted(path.rglob("*.txt")) if path.is_dir() else list(map(pathlib.Path, [path]))
    if not path.is_dir():
        files = [pathlib.Path(f) for f in jsonl.expand(where)]
    for file in files:
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
    except Exception as error:  # TFDS raises many kinds, among them its own
        first = str(error).strip().splitlines()[0]
        raise CorpusError(
            f"{name} is no file, no directory and no TFDS dataset that can be opened ({first}); a "
            f"TFDS dataset is prepared once by tfds.builder({name!r}, file_format='array_record')"
            ".download_and_prepare()"
        ) from error
    for i in range(len(source)):
        place = f"{name}/{split}:{i}"
        yield _document(source[i], place, text_field, id_field)
