"""Files that appear whole or not at all, whenever the process is killed.

A file is written under a unique name beside its own (with HOST and a random number, `.part`): two
writers of one path both write whole files, and the later one stays. A writer holds a lock on its
part, which ends with the process; parts that a kill left behind are removed when a process first
writes into their directory.
"""

import contextlib
import fcntl
import functools
import json
import os
import pathlib
import re
import shutil
import socket
import time
import uuid
import zipfile
from collections.abc import Iterator, Mapping
from typing import IO, Any

import numpy as np

_PART = re.compile(r".*\.(?P<host>[\w-]+)\.[0-9a-f]{12}\.part", re.DOTALL)
# Seconds. Locks of other hosts are not seen on every file system (NFS mounted with `nolock`), so a
# part of another host counts as left behind only if it has not been written to for a day.
_LONG_UNTOUCHED = 86_400.0


class DamagedError(ValueError):
    """A file of this package was cut off or changed after it was written."""


@contextlib.contextmanager
def open_atomic(path: str | os.PathLike, mode: str = "w") -> Iterator[IO]:
    """Opens a file beside `path` for writing, which replaces `path` at the end.

    Until then, and after an error or a kill, whatever was at `path` stays unchanged.

    Args:
        path: the file, which need not exist.
        mode: "w" for text in UTF-8, "wb" for bytes.
    """
    with (
        replacing(path) as part,
        open(part, mode, encoding=None if "b" in mode else "utf-8") as out,
    ):
        yield out


@contextlib.contextmanager
def replacing(path: str | os.PathLike, is_directory: bool = False) -> Iterator[pathlib.Path]:
    """Makes an empty file beside `path`, which replaces `path` at the end of the block.

    For libraries that write to a path. After an error, whatever was at `path` stays unchanged.

    Args:
        path: the file, which need not exist.
        is_directory: whether to make an empty directory instead. A directory is never replaced: one
            that another writer made meanwhile stays.
    """
    path = pathlib.Path(path)
    _remove_leftovers(path.parent)
    part, handle = _make_part(path, is_directory)
    try:
        yield part
        try:
            os.replace(part, path)
        except OSError:
            if not (is_directory and path.is_dir()):
                raise
            shutil.rmtree(part)
    except BaseException:
        with contextlib.suppress(OSError):
            _remove(part)
        raise
    finally:
        os.close(handle)


def write_json(path: str | os.PathLike, value: Any) -> None:
    """Writes JSON to `path`; the file appears whole or not at all."""
    with open_atomic(path) as out:
        json.dump(value, out, indent=1, ensure_ascii=False)
        out.write("\n")


def read_json(path: str | os.PathLike) -> Any:
    """Reads the JSON that `write_json` wrote.

    Raises:
        DamagedError: the file is no JSON.
        FileNotFoundError: there is no such file.
    """
    with naming_damaged(path):
        return json.loads(pathlib.Path(path).read_text(encoding="utf-8"))


def write_arrays(path: str | os.PathLike, arrays: Mapping[str, Any]) -> None:
    """Writes arrays by name to `path` (.npz); the file appears whole or not at all."""
    with open_atomic(path, "wb") as out:
        np.savez(out, **arrays)


def read_arrays(path: str | os.PathLike) -> dict[str, np.ndarray]:
    """Reads the arrays that `write_arrays` wrote, by name.

    Raises:
        DamagedError: the file holds no arrays.
        FileNotFoundError: there is no such file.
    """
    with naming_damaged(path), np.load(path, allow_pickle=False) as arrays:
        return dict(arrays)


@contextlib.contextmanager
def naming_damaged(path: str | os.PathLike, *errors: type[Exception]) -> Iterator[None]:
    """Names a file in the error of a library that cannot read it, and says what to do.

    Args:
        path: a file that the same command makes again where it is missing.
        errors: the library's errors beside `ValueError`, `EOFError` and those of zip files.

    Raises:
        DamagedError: the file cannot be read.
    """
    try:
        yield
    except (ValueError, EOFError, zipfile.BadZipFile, *errors) as error:
        raise DamagedError(
            f"{path} is damaged ({error}); remove it, and the same command makes it again"
        ) from error


def _host() -> str:
    return re.sub(r"[^\w-]", "-", socket.gethostname())[:40] or "host"


def _make_part(path: pathlib.Path, is_directory: bool) -> tuple[pathlib.Path, int]:
    """Returns a new part of `path` and an open handle that holds its lock."""
    while True:
        # In the same directory, since renaming is atomic only within one file system.
        part = path.with_name(f"{path.name}.{_host()}.{uuid.uuid4().hex[:12]}.part")
        if is_directory:
            part.mkdir()
            handle = os.open(part, os.O_RDONLY)
        else:
            handle = os.open(part, os.O_RDWR | os.O_CREAT | os.O_EXCL, 0o666)
        try:
            fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
            # Another process may have taken the part for a leftover just before it was locked.
            if part.exists():
                return part, handle
        except BlockingIOError:
            pass
        except OSError:
            return part, handle  # the file system has no locks
        os.close(handle)


# Once for each directory: listing one of 100,000 shards takes a while.
@functools.lru_cache(maxsize=4096)
def _remove_leftovers(directory: pathlib.Path) -> None:
    """Removes parts in a directory whose writers were killed."""
    try:
        names = [n for n in os.listdir(directory) if n.endswith(".part")]
    except OSError:
        return  # opening the file will raise the error
    for name in names:
        match = _PART.fullmatch(name)
        # The part may be removed or renamed by its writer at any moment.
        with contextlib.suppress(OSError):
            if match and _is_left_behind(directory / name, match["host"]):
                _remove(directory / name)


def _is_left_behind(part: pathlib.Path, host: str) -> bool:
    is_old = time.time() - part.stat().st_mtime > _LONG_UNTOUCHED
    # NFS gives an exclusive lock only on a file that is open for writing.
    handle = os.open(part, os.O_RDONLY if part.is_dir() else os.O_RDWR)
    try:
        fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    except OSError:
        return is_old  # the file system has no locks
    finally:
        os.close(handle)
    return is_old or host == _host()


def _remove(part: pathlib.Path) -> None:
    if part.is_dir():
        shutil.rmtree(part)
    else:
        part.unlink()
