"""A directory of small files and arrays, local or in object storage, through TensorStore."""

import functools
import json
import os
import pathlib
import shutil
import urllib.parse
from collections.abc import Callable
from typing import Any

import tensorstore as ts


class StoreError(ValueError):
    """A store is absent, unfinished, damaged, or was built with other settings."""


class Location:
    """A directory: a local path, or a `gs://` or `s3://` address.

    Every write is atomic: a file appears whole or not at all. `AWS_ENDPOINT_URL` names another
    server with the S3 protocol.

    Attributes:
        name: the path or address as the user gave it.
        path: the local path; None for an address.
    """

    def __init__(self, path):
        self.name = os.fspath(path).rstrip("/")
        scheme = urllib.parse.urlsplit(self.name).scheme if "://" in self.name else ""
        if scheme not in ("", "file", "gs", "s3"):
            raise StoreError(f"{self.name}: use a local path, gs://BUCKET/PATH or s3://BUCKET/PATH")
        local = self.name.removeprefix("file://")
        if local.startswith("~"):
            raise StoreError(f"{self.name} begins with ~, which nothing replaces; write all of it")
        self.path = pathlib.Path(os.path.abspath(local)) if scheme in ("", "file") else None

    def __truediv__(self, name: str) -> "Location":
        return Location(f"{self.name}/{name}")

    def spec(self) -> dict:
        """Returns TensorStore's specification of the directory, as a key-value store."""
        if self.path is not None:
            return {"driver": "file", "path": f"{self.path}/"}
        address = urllib.parse.urlsplit(self.name)
        driver = {"gs": "gcs"}.get(address.scheme, address.scheme)
        spec = {"driver": driver, "bucket": address.netloc, "path": f"{address.path.strip('/')}/"}
        endpoint = os.environ.get("AWS_ENDPOINT_URL")
        if driver == "s3" and endpoint:
            # Another server may have no regions, but requests are signed with one.
            region = os.environ.get("AWS_REGION") or os.environ.get("AWS_DEFAULT_REGION")
            spec |= {"endpoint": endpoint, "aws_region": region or "us-east-1"}
        return spec

    @functools.cached_property
    def _files(self) -> ts.KvStore:
        return ts.KvStore.open(self.spec()).result()

    def read(self, name: str) -> bytes | None:
        """Returns a file's contents, or None if there is no such file."""
        return _contents(self._read(name))

    def write(self, name: str, contents: bytes, only_over: bytes | None = None):
        """Writes a file; with `only_over`, only if the file still has that generation."""
        return self._call(
            f"write {name}", lambda files: files.write(name, contents, if_equal=only_over)
        )

    def remove(self, name: str) -> None:
        """Removes a file, if it exists."""
        self._call(f"remove {name}", lambda files: files.write(name, None))

    def remove_all(self) -> None:
        """Removes the directory with all files below it."""
        if self.path is not None:
            shutil.rmtree(self.path, ignore_errors=True)
        else:
            self._call("remove all files", lambda files: files.delete_range(ts.KvStore.KeyRange()))

    def names(self, folder: str = "") -> list[str]:
        """Returns the files below a folder, each with the folder before its name."""
        prefix = f"{folder}/" if folder else ""
        # "0" follows "/" in ASCII, so the range ends right after the folder's last name.
        within = ts.KvStore.KeyRange(prefix, prefix[:-1] + "0" if prefix else "")
        keys = self._call("list files", lambda files: files.list(within))
        # An object whose name ends in "/" stands for an empty folder.
        keys = [k for k in keys if k.rpartition(b"/")[2]]
        return sorted(k.decode(errors="backslashreplace") for k in keys)

    def read_json(self, name: str):
        """Returns a JSON file's value, or None if there is no such file.

        Raises:
            StoreError: it is not JSON.
        """
        return self._value(name, self.read(name))

    def write_json(self, name: str, value) -> None:
        """Writes a value as JSON."""
        self.write(name, _as_json(value))

    def update_json(self, name: str, change: Callable[[Any], Any]) -> None:
        """Replaces a JSON file's value by one derived from it, without losing concurrent updates.

        `change` returns the new value, given the old one, or None if there is no such file; it is
        called again if another process wrote the file meanwhile.

        Raises:
            StoreError: it is not JSON.
        """
        written = False
        while not written:
            stored = self._read(name)
            value = change(self._value(name, _contents(stored)))
            # Without a generation nothing was written: another process changed the file.
            written = bool(self.write(name, _as_json(value), stored.stamp.generation).generation)

    def _value(self, name: str, contents: bytes | None):
        try:
            return None if contents is None else json.loads(contents)
        except ValueError as error:
            raise StoreError(f"{self.name}/{name} is not JSON: {error}") from error

    def _read(self, name: str) -> ts.KvStore.ReadResult:
        return self._call(f"read {name}", lambda files: files.read(name))

    def _call(self, action: str, call):
        try:
            return call(self._files).result()
        except (ValueError, OSError) as error:
            raise StoreError(f"{self.name}: cannot {action}: {error}") from error


def _contents(result: ts.KvStore.ReadResult) -> bytes | None:
    return result.value if result.state == "value" else None


def _as_json(value) -> bytes:
    return (json.dumps(value, indent=1, ensure_ascii=False) + "\n").encode()
