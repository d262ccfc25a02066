"""A run's directory. A stage leaves a stamp of its inputs, and is skipped when the stamp matches.

Process 0 reads and writes the stamps and tells the others, which might not see its latest files yet
on a shared file system, and would then disagree with it.
"""

import contextlib
import os
import pathlib
import time
from collections.abc import Callable, Iterator

from ml_collections import ConfigDict

from tda.run.defaults import flat
from tda.runtime import directory_lock, processes
from tda.runtime.atomic_file import read_json, write_json
from tda.runtime.differences import as_text, differences
from tda.runtime.directories import make_directory
from tda.runtime.directory_lock import DirectoryLock
from tda.runtime.fingerprint import plain

# Inputs that are hashes of what files hold, and the keys of the config that name the files.
_FILES = {
    **dict.fromkeys(("text", "texts", "tokenizer"), "data.sentences, data.facts or data.corpus"),
    "pretrained": "model.pretrained",
}


class WorkdirError(ValueError):
    """A workdir cannot be written, or holds another run."""


class Workdir:
    """The directory of one run.

    Raises:
        tda.runtime.directories.DirectoryError: it cannot be made.
        WorkdirError: it cannot be written, processes on several hosts do not share it, or it is an
            address of object storage.
    """

    def __init__(self, path):
        if "://" in os.fspath(path):
            raise WorkdirError(
                f"--workdir={path} is no directory of a file system; give one that all hosts "
                f"mount, and put its stores, which take most of the room, into object storage by "
                f"--config.store.root={path}"
            )
        self.path = pathlib.Path(path)
        token = processes.on_first_process(f"write to --workdir={path}", self._make)
        unreachable = processes.where(not self._reaches(token))
        if unreachable:
            raise WorkdirError(
                f"--workdir={path} of process {unreachable[0]} is not that of process 0, or cannot "
                "be written there; give a directory on a file system that all hosts share"
            )
        if processes.is_first():
            self._probe(token).unlink()

    def _probe(self, token: str) -> pathlib.Path:
        # A unique name, because runs at the same time may share a workdir.
        return self.path / f".writable-{token}"

    def _make(self) -> str:
        token = f"{time.time_ns()}-{os.getpid()}"
        make_directory(self.path, f"--workdir={self.path}")
        try:
            self._probe(token).write_text(token)
        except OSError as error:
            raise WorkdirError(
                f"cannot write to --workdir={self.path}: {error.strerror or error}; "
                "choose another directory"
            ) from error
        return token

    def _reaches(self, token: str) -> bool:
        """Whether this process can write to the directory where process 0 left `token`."""
        try:
            with open(self._probe(token), "r+", encoding="utf-8") as probe:
                return probe.read() == token
        except OSError:
            return False

    def __truediv__(self, name: str) -> pathlib.Path:
        return self.path / name

    @contextlib.contextmanager
    def hold(self, party: str = "", on_last: Callable[[], None] = lambda: None) -> Iterator[None]:
        """Locks the directory against other jobs; those that only read may still do so.

        Args:
            party: identity of jobs that may work here together; empty for one alone.
            on_last: called at the end without an error, if no other of the party works here.

        Raises:
            HeldError: another job works here; the message says which.
        """
        lock = DirectoryLock(self.path, f"--workdir={self.path}", party)
        processes.on_first_process("hold the workdir", lock.acquire)
        # By the clock of the file system, which is that of the files.
        os.utime(self.path / directory_lock.FILE)
        self._held_since = (self.path / directory_lock.FILE).stat().st_mtime_ns
        try:
            yield
            lock.release(on_last)
        finally:
            lock.release()

    def has_new(self, name: str) -> bool:
        """Returns whether a file was written since this job holds the directory."""
        path = self.path / name
        return path.exists() and path.stat().st_mtime_ns >= self._held_since

    def _stamp(self, stage: str) -> pathlib.Path:
        return self.path / "stages" / f"{stage}.json"

    def is_finished(self, stage: str, made_from: dict | None = None) -> bool:
        """Whether `stage` is finished, and from exactly these inputs if any are given."""

        def look():
            stamp = self._stamp(stage)
            if not stamp.exists():
                return False
            record = read_json(stamp)
            is_same = made_from is None or record["made_from"] == plain(made_from)
            return record["finished"] and is_same

        return processes.on_first_process(f"look for the stage {stage}", look)

    def changes(self, stage: str, made_from: dict) -> list[str]:
        """Returns, on one process, how inputs differ from those that `stage` was begun with."""
        stamp = self._stamp(stage)
        if not stamp.exists():
            return []
        return list(differences(read_json(stamp)["made_from"], plain(made_from)))

    def claim(self, stage: str, made_from: dict, config: ConfigDict) -> None:
        """Records the inputs of `stage` before the work: a killed stage resumes only from the same.

        Args:
            stage: the stage.
            made_from: its inputs, as JSON values.
            config: the run's config, for the error if the stage was begun by another config.

        Raises:
            WorkdirError: the stage was begun from other inputs; the message says what differs.
        """
        # Keys of other sections do not decide what is trained.
        keys = ("seed", "data", "tokenizer", "model", "train")
        settings = {k: v for k, v in flat(config).items() if k.split(".")[0] in keys}
        record = {"finished": False, "made_from": made_from, "config": settings}
        processes.on_first_process(
            f"begin the stage {stage}", lambda: self._claim(stage, plain(record))
        )

    def _claim(self, stage: str, record: dict) -> None:
        stamp = self._stamp(stage)
        if stamp.exists():
            before = read_json(stamp)
            if lines := list(differences(before["made_from"], record["made_from"])):
                # A key of the config says more than the many values that follow from it.
                keys = list(differences(before["config"], record["config"]))
                names = (line.partition(":")[0] for line in lines)
                contents = {f"the contents of {_FILES[n]}": n for n in names if n in _FILES}
                raise WorkdirError(
                    f"{self.path} holds another run; its {stage} differs in"
                    f"{as_text(keys or contents or lines)}\n"
                    "use another --workdir for this config, or remove that directory to start anew"
                )
        stamp.parent.mkdir(exist_ok=True)
        write_json(stamp, record)

    def finish(self, stage: str) -> None:
        """Records that a stage is finished."""

        def write():
            stamp = self._stamp(stage)
            record = read_json(stamp)
            write_json(stamp, record | {"finished": True})

        processes.on_first_process(f"end the stage {stage}", write)
