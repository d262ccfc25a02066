"""Records of JSON lines or of a JSON array, plain or compressed, in one file or in many shards."""

import codecs
import collections
import glob
import gzip
import io
import json
import os
import re
import warnings
import zlib
from collections.abc import Callable, Iterator, Sequence
from typing import Any, BinaryIO, cast

from tda.data.folders import check_link

Path = str | os.PathLike[str]
Paths = Path | Sequence[Path]

OnUndecodable = Callable[[str], None] | None

_GZIP_MAGIC = b"\x1f\x8b"
# Also of a file that begins with a skippable frame, as pzstd writes them (RFC 8878, 3.1.2).
_ZSTD_MAGIC = re.compile(rb"\x28\xb5\x2f\xfd|[\x50-\x5f]\x2a\x4d\x18")


class RecordError(ValueError):
    """A record that cannot be used; the message names its place, the field and the requirement."""


def iter_records(path: Paths, on_undecodable: OnUndecodable = None) -> Iterator[tuple[str, Any]]:
    """Streams the decoded JSON values of some files; blank lines are skipped.

    A file is JSON lines, or one JSON array (which is read as a whole). A byte-order mark is
    dropped.

    Args:
        path: A file, a glob pattern, or a list of files. Gzip and Zstandard are recognised by
            their first bytes, since a downloaded file may have lost its suffix.
        on_undecodable: Called with the place of a record that is not UTF-8, which is then left
            out; if None, such a record is an error.

    Yields:
        The place of each record, such as "facts.jsonl.gz, line 17", and its value.

    Raises:
        FileNotFoundError: No such file.
        RecordError: A line is no JSON or no UTF-8, a compressed file is damaged, or a file is
            empty.
    """
    for file in expand(path):
        n_records = 0
        # A record of an array may have several lines: it is left out as a whole.
        lines = decoded_lines(file, is_escaped=on_undecodable is not None)
        for number, line in lines:
            where = f"{os.path.basename(file)}, line {number}"
            text = line.strip()
            if not text:
                continue
            if not n_records and text.startswith("["):
                values = _array(file, "".join([line, *(more for _, more in lines)]))
                for i, value in enumerate(values):
                    n_records += 1
                    where = f"{os.path.basename(file)}, item {i}"
                    # Only what is not UTF-8 needs a look, and a name may be that too.
                    if on_undecodable and half_character(json.dumps(value, ensure_ascii=False)):
                        on_undecodable(where)
                    else:
                        yield where, value
                continue
            n_records += 1
            if on_undecodable and half_character(text):
                on_undecodable(where)
                continue
            try:
                value = json.loads(text)
            except (ValueError, RecursionError) as error:
                remedy = "every line must be one JSON object"
                if text == "{":
                    remedy += ", and here one has several lines; write it in one line, or an array"
                raise RecordError(f"{where}: not JSON ({_reason(error)}); {remedy}") from None
            yield where, value
        if not n_records:
            raise RecordError(f"{file}: no records; give a file with one JSON object on each line")


def _array(file: str, text: str) -> list:
    try:
        return json.loads(text)
    except (ValueError, RecursionError) as error:
        raise RecordError(
            f"{os.path.basename(file)}: begins as a JSON array, but is none ({_reason(error)})"
        ) from None


def _reason(error: Exception) -> str:
    """Returns what JSON's reader says: also of numbers and of nesting that Python refuses."""
    if not isinstance(error, json.JSONDecodeError):
        return str(error)
    line = f"line {error.lineno}, " if error.lineno > 1 else ""
    return f"{error.msg} at {line}column {error.colno}"


def decoded_lines(file: str, is_escaped: bool) -> Iterator[tuple[int, str]]:
    """Yields the number, from 1, and the text of every line of a file; see `iter_records`.

    If `is_escaped`, bytes that are not UTF-8 are lone surrogates in the text, and no error.
    """
    errors = "surrogateescape" if is_escaped else "strict"
    for number, line in _lines(file):
        if number == 1:
            line = line.removeprefix(codecs.BOM_UTF8)
        try:
            yield number, line.decode("utf-8", errors)
        except UnicodeDecodeError as error:
            raise RecordError(
                f"{os.path.basename(file)}, line {number}: not UTF-8 ({error.reason} at byte "
                f"{error.start}); convert the file to UTF-8"
            ) from None


def expand(path: Paths) -> list[str]:
    """Returns the files that a path, a glob pattern or a list of them names.

    Raises:
        FileNotFoundError: A file does not exist, a pattern has no match, or the list is empty.
        CorpusError: A link leads nowhere.
    """
    if not isinstance(path, str | os.PathLike):
        files = [file for item in path for file in expand(item)]
        twice = next((f for f, n in collections.Counter(files).items() if n > 1), None)
        if twice is not None:
            raise RecordError(f"{twice} is listed twice; name each file once")
        if not files:
            raise FileNotFoundError("an empty list of files; name at least one .jsonl file")
        return files
    name = os.path.expanduser(os.fspath(path))
    if os.path.isfile(name):
        return [name]
    check_link(name)
    if os.path.isdir(name):
        raise FileNotFoundError(
            f"{name} is a folder, not a file; name its files by a pattern such as '{name}/*.jsonl'"
        )
    matches = sorted(glob.glob(name, recursive=True))
    for match in matches:
        check_link(match)
    files = [match for match in matches if os.path.isfile(match)]
    if not files:
        raise FileNotFoundError(f"{name}: no such file; check the path (.jsonl, .jsonl.gz, a glob)")
    if "**" not in name and len(files) < len(matches):
        folder = next(match for match in matches if os.path.isdir(match))
        warnings.warn(
            f"{name}: {len(matches) - len(files)} folders, such as {folder}, are left out; '**' "
            "in a pattern stands for all folders",
            stacklevel=2,
        )
    return files


def _lines(file: str) -> Iterator[tuple[int, bytes]]:
    number = 0
    try:
        with open(file, "rb") as raw, _decompressed(raw) as stream:
            for number, line in enumerate(stream, 1):
                yield number, line
    except (EOFError, gzip.BadGzipFile, zlib.error, _DamagedError) as error:
        raise RecordError(
            f"{os.path.basename(file)}, after line {number}: the compressed data is truncated or"
            f" damaged ({error}); fetch the file again"
        ) from None


class _DamagedError(Exception):
    """A damaged Zstandard file, whatever its library's own error is."""


def _decompressed(raw: BinaryIO) -> BinaryIO:
    magic = raw.read(4)
    raw.seek(0)
    if magic[:2] == _GZIP_MAGIC:
        return cast(BinaryIO, gzip.GzipFile(fileobj=raw))
    if _ZSTD_MAGIC.match(magic):
        return cast(BinaryIO, io.BufferedReader(_Zstd(raw), 1 << 20))
    return raw


class _Zstd(io.RawIOBase):
    """The contents of a Zstandard file, of one frame or of many."""

    def __init__(self, raw: BinaryIO):
        try:
            import zstandard
        except ImportError as error:
            raise RecordError(
                "reading .zst files needs the package zstandard: pip install 'tda-jax[zstd]'"
            ) from error
        self._error, self._raw = zstandard.ZstdError, raw
        # Frames with a window of up to 2 GiB (`zstd --long=31`), as web crawls are compressed.
        self._new_frame = zstandard.ZstdDecompressor(max_window_size=1 << 31).decompressobj
        self._frame: Any = None
        self._compressed = self._decompressed = b""

    def readable(self) -> bool:
        return True

    def readinto(self, buffer) -> int:
        while not self._decompressed:
            self._compressed = self._compressed or self._raw.read(1 << 17)
            if not self._compressed:
                # zstandard's own stream reader reports no error for a truncated file.
                if self._frame is not None:
                    raise _DamagedError("it ends within a frame")
                return 0
            self._frame = self._frame or self._new_frame()
            try:
                self._decompressed = self._frame.decompress(self._compressed)
            except self._error as error:
                raise _DamagedError(str(error)) from error
            self._compressed = b""
            if self._frame.eof:
                self._frame, self._compressed = None, self._frame.unused_data
        count = min(len(buffer), len(self._decompressed))
        buffer[:count] = self._decompressed[:count]
        self._decompressed = self._decompressed[count:]
        return count


def half_character(text: str) -> str | None:
    """Describes the lone surrogate that a text has, with a remedy; None if it has none.

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
