"""Results of long computations, saved line by line, so that none is computed twice.

A file of JSON lines {"key", "value"} that only grows. Several runs may share it at the same time: a
lock is held while it is read or written.
"""

import json
import os
import pathlib
from collections.abc import Iterable
from typing import Any

import filelock

from tda.runtime import processes


class ResultLog:
    """The values that were computed so far, by key.

    Only process 0 reads and writes the file; it sends what it read to the others.

    Args:
        path: the file; it need not exist.
    """

    def __init__(self, path):
        self.path = pathlib.Path(path)
        self._lock = filelock.FileLock(self.path.with_name(f".{self.path.name}.lock"))

    def read(self) -> dict[str, Any]:
        """Returns the values by key, after cutting off a line that a kill left unfinished.

        Raises:
            ValueError: a line is not such a record; the message names file and line.
        """
        return processes.on_first_process(f"read {self.path.name}", self._read)

    def _read(self) -> dict[str, Any]:
        values: dict[str, Any] = {}
        if not self.path.exists():
            return values
        complete = 0  # bytes of the lines that were written to their end
        with self._lock, open(self.path, "r+b") as lines:
            for number, line in enumerate(lines, 1):
                if not line.endswith(b"\n"):
                    break
                try:
                    item = json.loads(line)
                    values[item["key"]] = item["value"]
                except (ValueError, TypeError, KeyError) as error:
                    raise ValueError(
                        f"{self.path}, line {number}: not a saved result ({error}); "
                        "remove the line, or the file to compute everything again"
                    ) from error
                complete += len(line)
            if complete < os.fstat(lines.fileno()).st_size:
                lines.truncate(complete)
        return values

    def add(self, items: Iterable[tuple[str, Any]]) -> None:
        """Appends values, in process 0 only."""
        if not processes.is_first():
            return
        text = "".join(
            json.dumps({"key": key, "value": value}, ensure_ascii=False) + "\n"
            for key, value in items
        )
        with self._lock, open(self.path, "a", encoding="utf-8") as out:
            out.write(text)
