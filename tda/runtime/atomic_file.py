"""Files that appear whole or not at all."""

import contextlib
import json
import os
from collections.abc import Iterator
from typing import IO


@contextlib.contextmanager
def open_atomic(path, mode: str = "w") -> Iterator[IO]:
    """Opens a file beside `path` to write to; it takes the place of `path` at the end.

    Whatever is at `path` stays as it was until then, and after an error or a kill.

    Args:
        path: of the file, which need not exist.
        mode: "w" for text in UTF-8, "wb" for bytes.
    """
    part = f"{os.fspath(path)}.part"
    try:
        with open(part, mode, encoding=None if "b" in mode else "utf-8") as out:
            yield out
        os.replace(part, path)
    except BaseException:
        with contextlib.suppress(FileNotFoundError):
            os.remove(part)
        raise


def write_json(path, value) -> None:
    """Writes JSON to `path`; the file appears whole or not at all."""
    with open_atomic(path) as out:
        json.dump(value, out, indent=1, ensure_ascii=False)
        out.write("\n")
