"""A run's directory: stages leave a stamp of what made them, and are skipped where it fits.

Of several processes the first reads and writes the stamps, and all hear what it read.
"""

import json
import os
import pathlib
import time

from tda.runtime import processes
from tda.runtime.atomic_file import write_json
from tda.runtime.fingerprint import plain


class WorkdirError(ValueError):
    """A workdir cannot be written, or holds another run."""


class Workdir:
    """The directory of one run.

    Raises:
        WorkdirError: it cannot be written, or processes on several hosts do not share it.
    """

    def __init__(self, path):
        self.path = pathlib.Path(path)
        token = processes.on_first_process(f"write to --workdir={path}", self._make)
        apart = processes.where(not self._reaches(token))
        if apart:
            raise WorkdirError(
                f"--workdir={path} of process {apart[0]} is not that of process 0, or cannot be "
                "written there; give a directory on a file system that all hosts share"
            )
        if processes.is_first():
            self._probe(token).unlink()

    def _probe(self, token: str) -> pathlib.Path:
        # A name of its own: runs at the same time may share a workdir.
        return self.path / f".writable-{token}"

    def _make(self) -> str:
        token = f"{time.time_ns()}-{os.getpid()}"
        try:
            self.path.mkdir(parents=True, exist_ok=True)
            self._probe(token).write_text(token)
        except OSError as error:
            raise WorkdirError(
                f"cannot write to --workdir={self.path}: {error.strerror or error}; "
                "choose another directory"
            ) from error
        return token

    def _reaches(self, token: str) -> bool:
        """Whether this process writes where process 0 left `token`."""
        try:
            with open(self._probe(token), "r+", encoding="utf-8") as probe:
                return probe.read() == token
        except OSError:
            return False

    def __truediv__(self, name: str) -> pathlib.Path:
        return self.path / name

    def _stamp(self, stage: str) -> pathlib.Path:
        return self.path / "stages" / f"{stage}.json"

    def finished(self, stage: str, made_from: dict) -> bool:
        """Whether `stage` was finished from just this."""

        def ask():
            stamp = self._stamp(stage)
            if not stamp.exists():
                return False
            there = json.loads(stamp.read_text(encoding="utf-8"))
            return there["finished"] and there["made_from"] == plain(made_from)

        return processes.on_first_process(f"look for the stage {stage}", ask)

    def claim(self, stage: str, made_from: dict) -> None:
        """Says that `stage` is being made from this.

        Raises:
            WorkdirError: it was begun from something else; the message says what differs.
        """
        processes.on_first_process(
            f"begin the stage {stage}", lambda: self._claim(stage, plain(made_from))
        )

    def _claim(self, stage: str, wanted: dict) -> None:
        stamp = self._stamp(stage)
        if stamp.exists():
            there = json.loads(stamp.read_text(encoding="utf-8"))["made_from"]
            differing = [
                f"{k}: {there.get(k)} there, {wanted.get(k)} asked for"
                for k in sorted(there.keys() | wanted.keys())
                if there.get(k) != wanted.get(k)
            ]
            if differing:
                raise WorkdirError(
                    f"{self.path} holds another run; its {stage} differs in\n  "
                    + "\n  ".join(differing)
                    + "\nuse another --workdir, or remove this one"
                )
        self._write(stage, wanted, finished=False)

    def finish(self, stage: str, made_from: dict) -> None:
        """Says that `stage` is done."""
        processes.on_first_process(
            f"end the stage {stage}", lambda: self._write(stage, plain(made_from), finished=True)
        )

    def _write(self, stage: str, made_from: dict, finished: bool) -> None:
        stamp = self._stamp(stage)
        stamp.parent.mkdir(exist_ok=True)
        write_json(stamp, {"finished": finished, "made_from": made_from})
