"""Reads files of one kind, or rows of a dataset, as documents."""

import collections
import contextlib
import csv
import json
import os
import pathlib
from collections.abc import Iterator
from typing import Any

from tda.data import jsonl
from tda.data.documents import Document, UndecodableError, columns_of, document_of
from tda.data.folders import CorpusError
from tda.data.jsonl import half_character


def from_jsonl(file, name, text_field, id_field, on_undecodable) -> Iterator[Document]:
    """Yields the records of a file of JSON lines, or of a JSON array.

    Args:
        file: the file.
        name: its name in ids.
        text_field, id_field: as in `tda.data.corpora.Corpus`.
        on_undecodable: called with the message of a record that is not UTF-8, which is left out;
            an error if None.
    """
    left_out = 0

    def leave_out(place: str) -> None:
        nonlocal left_out
        left_out += 1
        on_undecodable(place)

    records = jsonl.iter_records(file, on_undecodable and leave_out)
    for i, (place, record) in enumerate(records):
        # Errors name a line, counted from 1 with blank lines; ids name a record, from 0.
        yield document_of(record, place, f"{name}:{i + left_out}", text_field, id_field)


def from_csv(file, name, text_field, id_field, on_undecodable) -> Iterator[Document]:
    """Yields the rows of a CSV file; arguments as for `from_jsonl`."""
    for i, place, row in rows_of_csv(file, on_undecodable):
        yield document_of(row, place, f"{name}:{i}", text_field, id_field)


def rows_of_csv(
    file: str, on_undecodable: jsonl.OnUndecodable = None
) -> Iterator[tuple[int, str, dict[str, str]]]:
    """Yields the number, from 0, the place and the fields of every row of a .csv or .tsv file.

    Raises:
        CorpusError: a row does not fit the header, two columns have one name, it is no CSV, or
            there are no rows.
        tda.data.jsonl.RecordError: a row is not UTF-8 and `on_undecodable` is None; else that is
            called with its place, and the row is left out.
    """
    # A field may be longer than the 128 KiB that Python's reader takes by default.
    csv.field_size_limit(max(csv.field_size_limit(), 1 << 30))
    # A record may have several lines: the whole record is left out, not just its bad line.
    is_escaped = on_undecodable is not None
    lines = (line for _, line in jsonl.decoded_lines(file, is_escaped=is_escaped))
    is_tabbed = ".tsv" in os.path.basename(file).lower()
    rows = csv.DictReader(lines, delimiter="\t" if is_tabbed else ",", strict=True)
    place = os.path.basename(file)
    try:
        names = rows.fieldnames or ()
        if twice := [n for n, count in collections.Counter(names).items() if count > 1]:
            raise CorpusError(f"{place}: two columns are called {twice[0]!r}; rename one of them")
        i = -1
        for i, row in enumerate(rows):
            place = f"{os.path.basename(file)}, line {rows.line_num}"
            if is_escaped and any(half_character(x) for x in row.values() if isinstance(x, str)):
                on_undecodable(place)
                continue
            if None in row or None in row.values():
                raise CorpusError(f"{place}: the row has another number of fields than the header")
            yield i, place, row
        if i < 0:
            raise CorpusError(f"{file}: no records; give a header, and a line for each document")
    except csv.Error as error:
        raise CorpusError(f"{place}: not CSV ({error})") from error


def _arrow():
    try:
        import pyarrow
        import pyarrow.parquet
    except ImportError as error:
        raise CorpusError(
            "reading Parquet and `datasets` needs the package pyarrow: "
            "pip install 'tda-jax[parquet]'"
        ) from error
    return pyarrow


def from_parquet(file, name, text_field, id_field, on_undecodable) -> Iterator[Document]:
    """Yields the rows of a Parquet file."""
    arrow = _arrow()
    with _naming(file, "a Parquet file"):
        opened = arrow.parquet.ParquetFile(file)
        columns = columns_of(opened.schema_arrow.names, file, text_field, id_field)
        batches = opened.iter_batches(batch_size=1024, columns=columns)
        yield from _rows(batches, name, text_field, id_field, on_undecodable)


@contextlib.contextmanager
def _naming(file: str, form: str) -> Iterator[None]:
    """Names the file in pyarrow's errors, which may come with any of its rows."""
    try:
        yield
    except (_arrow().ArrowInvalid, OSError) as error:
        raise CorpusError(
            f"{file} is not {form}, or is damaged ({error}); fetch it again"
        ) from error


def _rows(batches, file: str, text_field, id_field, on_undecodable=None) -> Iterator[Document]:
    i = 0
    for batch in batches:
        try:
            records = batch.to_pylist()
        except UnicodeDecodeError:
            records = None  # row by row, to find which
        for row in range(batch.num_rows):
            place = f"{file}:{i}"
            try:
                record = records[row] if records else _decode_row(batch, row, place)
                document = document_of(record, place, place, text_field, id_field)
            except UndecodableError as error:
                if on_undecodable is None:
                    raise
                on_undecodable(str(error))
            else:
                yield document
            i += 1


def _decode_row(batch, row: int, place: str) -> dict:
    try:
        return batch.slice(row, 1).to_pylist()[0]
    except UnicodeDecodeError as error:
        raise UndecodableError.at(place, error) from error


def datasets_files(path: pathlib.Path, split: str) -> list[str]:
    """Returns the files of a split of a `datasets` directory, in order.

    Raises:
        CorpusError: there is no such split, or its rows are a selection.
    """
    splits = path / "dataset_dict.json"
    if splits.exists():
        names = _read_field(splits, "splits")
        if split not in names:
            raise CorpusError(f"{path} has no split {split!r}; there are {', '.join(names)}")
        path = path / split
    elif split != "train":
        raise CorpusError(
            f"{path} has no splits, so split={split!r} has no effect; leave it out, or give the "
            "folder of a DatasetDict"
        )
    data_files = _read_field(path / "state.json", "_data_files")
    if _read_field(path / "state.json", "_indices_files", ()):
        raise CorpusError(
            f"{path} is a selection of another dataset's rows; write the rows themselves: "
            "dataset.flatten_indices().save_to_disk(…)"
        )
    files = [path / os.path.basename(f["filename"]) for f in data_files]
    for file in files:
        if not file.exists():
            raise CorpusError(f"{file}: no such file, but state.json names it; fetch it again")
    return [os.fspath(file) for file in files]


def _read_field(file: pathlib.Path, field: str, default: Any = None) -> Any:
    """Returns a field of a file of `Dataset.save_to_disk`; required if there is no default."""
    try:
        value = json.loads(file.read_text(encoding="utf-8")).get(field, default)
    except (OSError, ValueError, AttributeError) as error:
        raise CorpusError(
            f"{file} cannot be read ({error}); give a folder that Dataset.save_to_disk wrote"
        ) from error
    if value is None and default is None:
        raise CorpusError(f"{file} lacks {field!r}; write the dataset again: Dataset.save_to_disk")
    return value


def from_arrow(file, name, text_field, id_field, on_undecodable) -> Iterator[Document]:
    """Yields the rows of a file of a `datasets` directory."""
    arrow = _arrow()
    with _naming(file, "a stream of Arrow"), arrow.memory_map(file) as mapped:
        opened = arrow.ipc.open_stream(mapped)
        columns = columns_of(opened.schema.names, file, text_field, id_field)
        batches = (b.select(columns) for b in opened)
        yield from _rows(batches, name, text_field, id_field, on_undecodable)


def from_texts(file, name, text_field, id_field, on_undecodable) -> Iterator[Document]:
    """Yields a text file as a document; arguments as for `from_jsonl`."""
    lines = jsonl.decoded_lines(file, is_escaped=on_undecodable is not None)
    text = "".join(line for _, line in lines)
    if on_undecodable is not None and half_character(text):
        on_undecodable(name)
    else:
        yield Document(name, text)


def open_tfds(name: str, split: str, data_dir) -> Any:
    """Returns a split of a TFDS dataset, a sequence of records.

    Raises:
        CorpusError: it cannot be opened.
    """
    import tensorflow_datasets as tfds

    with _advising(name):
        return tfds.data_source(name, split=split, data_dir=data_dir)


def list_tfds_files(name: str, split: str, data_dir) -> list[str]:
    """Returns the files of a split of a TFDS dataset, in order.

    Raises:
        CorpusError: it cannot be opened.
    """
    import tensorflow_datasets as tfds

    with _advising(name):
        instructions = tfds.builder(name, data_dir=data_dir).info.splits[split].file_instructions
    return list(dict.fromkeys(os.fspath(x.filename) for x in instructions))


@contextlib.contextmanager
def _advising(name: str) -> Iterator[None]:
    """Says in TFDS's errors what to do about a dataset that cannot be opened."""
    try:
        yield
    except Exception as error:  # TFDS raises errors of many classes, some of its own
        first = str(error).strip().splitlines()[0]
        raise CorpusError(
            f"{name} is no file, no directory and no TFDS dataset that can be opened ({first}); "
            f"prepare a TFDS dataset by tfds.builder({name!r}, file_format='array_record')"
            ".download_and_prepare()"
        ) from error


def from_rows(rows: Any, name: str, numbers: range, text_field, id_field) -> Iterator[Document]:
    """Yields some rows of a sequence of records."""
    for i in numbers:
        place = f"{name}:{i}"
        yield document_of(rows[i], place, place, text_field, id_field)
