"""Files that appear whole or not at all, whenever the process is killed."""

import contextlib
import json
import os
from collections.abc import Iterator
from typing import IO, Any


@contextlib.contextmanager
def open_atomic(path: str | os.PathLike, mode: str = "w") -> Iterator[IO]:
    """Opens a file beside `path` for writing, which replaces `path` at the end.

    Until then, and after an error or a kill, whatever was at `path` stays unchanged.

    Args:
        path: the file, which need not exist.
        mode: "w" for text in UTF-8, "wb" for bytes.
    """
    # In the same directory, since renaming is atomic only within one file system.
    part = f"{os.fspath(path)}.part"
    try:
        with open(part, mode, encoding=None if "b" in mode else "utf-8") as out:
            yield out
        os.replace(part, path)
    except BaseException:
        with contextlib.suppress(FileNotFoundError):
            os.remove(part)
        raise


def write_json(path: str | os.PathLike, value: Any) -> None:
    """Writes JSON to `path`; the file appears whole or not at all."""
    with open_atomic(path) as out:
        json.dump(value, out, indent=1, ensure_ascii=False)
        out.write("\n")
