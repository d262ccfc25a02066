"""A directory of small files and arrays, local or in object storage, through TensorStore."""

import json
import os
import pathlib
import urllib.parse
from collections.abc import Callable
from typing import Any

import tensorstore as ts


class StoreError(ValueError):
    """A store is absent, unfinished, damaged, or not of what it is used with."""


class Location:
    """A directory: a local path, or a `gs://` or `s3://` address.

    Every write is atomic: a file appears whole or not at all. `AWS_ENDPOINT_URL` names another
    server that speaks S3.

    Attributes:
        name: what the user calls it.
        path: where it is on this machine; None of an address.
    """

    def __init__(self, path):
        self.name = os.fspath(path).rstrip("/")
        scheme = urllib.parse.urlsplit(self.name).scheme if "://" in self.name else ""
        if scheme not in ("", "file", "gs", "s3"):
            raise StoreError(f"{self.name}: use a local path, gs://BUCKET/PATH or s3://BUCKET/PATH")
        local = self.name.removeprefix("file://")
        self.path = pathlib.Path(os.path.abspath(local)) if scheme in ("", "file") else None
        self._files = None

    def __truediv__(self, name: str) -> "Location":
        return Location(f"{self.name}/{name}")

    def spec(self) -> dict:
        """TensorStore's specification of the directory, as a key-value store."""
        if self.path is not None:
            return {"driver": "file", "path": f"{self.path}/"}
        address = urllib.parse.urlsplit(self.name)
        driver = {"gs": "gcs"}.get(address.scheme, address.scheme)
        spec = {"driver": driver, "bucket": address.netloc, "path": f"{address.path.strip('/')}/"}
        endpoint = os.environ.get("AWS_ENDPOINT_URL")
        if driver == "s3" and endpoint:
            spec |= {"endpoint": endpoint, "aws_region": _region()}
        return spec

    def _open(self) -> ts.KvStore:
        if self._files is None:
            self._files = ts.KvStore.open(self.spec()).result()
        return self._files

    def read(self, name: str) -> bytes | None:
        """A file's contents, or None where there is no such file."""
        return _contents(self._read(name))

    def write(self, name: str, contents: bytes) -> None:
        """Writes a file."""
        self._write(name, contents)

    def remove(self, name: str) -> None:
        """Removes a file, if it is there."""
        self._call(f"remove {name}", lambda files: files.write(name, None))

    def names(self, folder: str = "") -> list[str]:
        """The files below a folder, each with the folder before its name."""
        prefix = f"{folder}/" if folder else ""
        within = ts.KvStore.KeyRange(prefix, prefix[:-1] + "0" if prefix else "")
        found = self._call("list files", lambda files: files.list(within))
        # An object whose name ends in "/" stands for an empty folder.
        found = [k for k in found if k.rpartition(b"/")[2]]
        return sorted(k.decode(errors="backslashreplace") for k in found)

    def read_json(self, name: str):
        """A JSON file's value, or None where there is no such file.

        Raises:
            StoreError: it is not JSON.
        """
        return self._value(name, self.read(name))

    def write_json(self, name: str, value) -> None:
        """Writes a value as JSON."""
        self.write(name, _as_json(value))

    def update_json(self, name: str, change: Callable[[Any], Any]) -> None:
        """Writes a JSON file that follows from what it was; of two processes none is overwritten.

        Args:
            name: of the file.
            change: from its value, or None where there is no such file, to the new one; called
                again where another process wrote the file meanwhile.

        Raises:
            StoreError: it is not JSON.
        """
        written = False
        while not written:
            found = self._read(name)
            value = change(self._value(name, _contents(found)))
            # Without a generation it was not written: the file is no longer what was read.
            written = bool(self._write(name, _as_json(value), found.stamp.generation).generation)

    def _value(self, name: str, contents: bytes | None):
        try:
            return None if contents is None else json.loads(contents)
        except ValueError as error:
            raise StoreError(f"{self.name}/{name} is not JSON: {error}") from error

    def _read(self, name: str) -> ts.KvStore.ReadResult:
        return self._call(f"read {name}", lambda files: files.read(name))

    def _write(self, name: str, contents: bytes, only_over: bytes | None = None):
        """Writes a file, `only_over` the one of that generation if it is given."""
        return self._call(
            f"write {name}", lambda files: files.write(name, contents, if_equal=only_over)
        )

    def _call(self, what: str, call):
        try:
            return call(self._open()).result()
        except (ValueError, OSError) as error:
            raise StoreError(f"{self.name}: cannot {what}: {error}") from error


def _contents(found: ts.KvStore.ReadResult) -> bytes | None:
    return found.value if found.state == "value" else None


def _as_json(value) -> bytes:
    return (json.dumps(value, indent=1, ensure_ascii=False) + "\n").encode()


def _region() -> str:
    return os.environ.get("AWS_REGION") or os.environ.get("AWS_DEFAULT_REGION") or "us-east-1"
