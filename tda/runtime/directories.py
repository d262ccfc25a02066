"""Makes the directories that a user names, and says what is in the way of one."""

import os
import pathlib
from typing import TypeGuard


class DirectoryError(ValueError):
    """A directory cannot be made."""


def is_local(path: str | None) -> TypeGuard[str]:
    """Returns whether a path is given and is of a file system, not of object storage."""
    return path is not None and "://" not in path


def check_directory(path: str | os.PathLike, label: str = "") -> None:
    """Checks that a path can be a directory of this machine's file system.

    Args:
        path: the directory, which need not exist.
        label: the user's name for it in the error, such as --workdir=DIR; by default the path.

    Raises:
        DirectoryError: a file, or a link that leads nowhere, is there or above it; or the path is
            an address, or begins with ~, which would become folders of these names.
    """
    if "://" in os.fspath(path):
        raise DirectoryError(f"{label or path} is an address; give a directory that is mounted")
    if os.fspath(path).startswith("~"):
        raise DirectoryError(
            f"{label or path} begins with ~, which nothing replaces here; write the whole path"
        )
    path = pathlib.Path(path)
    for place in (path, *path.parents):
        if place.is_dir():
            return
        if os.path.lexists(place):
            kind = "a file" if place.exists() else "a link that leads nowhere"
            name = label or path
            name = name if place == path else f"{name} cannot be made: {place}"
            raise DirectoryError(f"{name} is {kind}; give a directory")


def make_directory(path: str | os.PathLike, label: str = "") -> None:
    """Makes a directory and those above it, unless it is there; arguments as above.

    Raises:
        DirectoryError: it cannot be made; the message says why.
    """
    check_directory(path, label)
    try:
        pathlib.Path(path).mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise DirectoryError(
            f"cannot write to {label or path}: {error.strerror or error}; choose another directory"
        ) from error
