"""Records of JSON lines, plain or gzipped, in one file or in many shards."""

import glob
import gzip
import json
import os
import zlib
from collections.abc import Iterator, Sequence
from typing import Any, BinaryIO

Path = str | os.PathLike[str]
Paths = Path | Sequence[Path]

_GZIP_MAGIC = b"\x1f\x8b"


class RecordError(ValueError):
    """A record that cannot be used; the message names its place, the field and what is expected."""


def iter_records(path: Paths) -> Iterator[tuple[str, Any]]:
    """Streams the decoded JSON values of some files; blank lines are skipped.

    Args:
        path: A file, a glob pattern, or a list of files. Gzip is recognised by its first bytes,
            since a downloaded file may have lost its suffix.

    Yields:
        The place of each record, such as "facts.jsonl.gz, line 17", and its value.

    Raises:
        FileNotFoundError: No such file.
        RecordError: A line is no JSON or no UTF-8, a gzip file is damaged, or a file is empty.
    """
    for file in expand(path):
        n_records = 0
        for number, line in _lines(file):
            where = f"{os.path.basename(file)}, line {number}"
            try:
                text = line.decode("utf-8").strip()
            except UnicodeDecodeError as error:
                raise RecordError(
                    f"{where}: not UTF-8 ({error.reason} at byte {error.start});"
                    " convert the file to UTF-8"
                ) from None
            if not text:
                continue
            try:
                value = json.loads(text)
            except json.JSONDecodeError as error:
                raise RecordError(
                    f"{where}: not JSON ({error.msg} at column {error.colno});"
                    " every line must be one JSON object"
                ) from None
            n_records += 1
            yield where, value
        if not n_records:
            raise RecordError(f"{file}: no records; give a file with one JSON object on each line")


def expand(path: Paths) -> list[str]:
    """Returns the files that a path, a glob pattern or a list of them names.

    Raises:
        FileNotFoundError: A file does not exist, a pattern has no match, or the list is empty.
    """
    if not isinstance(path, str | os.PathLike):
        files = [file for item in path for file in expand(item)]
        if not files:
            raise FileNotFoundError("an empty list of files; name at least one .jsonl file")
        return files
    name = os.path.expanduser(os.fspath(path))
    if os.path.isfile(name):
        return [name]
    matches = sorted(match for match in glob.glob(name) if os.path.isfile(match))
    if not matches:
        raise FileNotFoundError(f"{name}: no such file; check the path (.jsonl, .jsonl.gz, a glob)")
    return matches


def _lines(file: str) -> Iterator[tuple[int, bytes]]:
    number = 0
    try:
        with open(file, "rb") as raw:
            is_gzip = raw.read(2) == _GZIP_MAGIC
            raw.seek(0)
            stream: BinaryIO | gzip.GzipFile = gzip.GzipFile(fileobj=raw) if is_gzip else raw
            for number, line in enumerate(stream, 1):
                yield number, line
    except (EOFError, gzip.BadGzipFile, zlib.error) as error:
        raise RecordError(
            f"{os.path.basename(file)}, after line {number}: the gzip data is truncated or"
            f" damaged ({error}); fetch the file again"
        ) from None


def half_character(text: str) -> str | None:
    """Returns what is wrong with a text that has a lone surrogate, and the remedy; else None.

    JSON can hold one ("\\ud83d"), but it is not Unicode: no tokenizer and no file accepts it.
    """
    if text.isascii():
        return None
    try:
        text.encode()
    except UnicodeEncodeError as error:
        surrogate = f"\\u{ord(text[error.start]):04x} at {error.start}"
        return f"half a character, {surrogate} (a lone surrogate); replace it, by U+FFFD or a space"
    return None
