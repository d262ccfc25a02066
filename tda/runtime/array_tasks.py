"""Tasks of a cluster's array (SLURM, a Kubernetes indexed job): each computes a static part.

The tasks are separate programs that share only a workdir. Group i of every work belongs to task i
mod N. A task computes its part, waits as long as the others make progress, and continues with the
next work once all results exist. Work that is not split is done by one task, behind a lock; the
others find it done.
"""

import contextlib
import dataclasses
import pathlib
import re
import time
from collections.abc import Iterator, Sequence

import filelock

from tda.runtime import command, preemption, processes
from tda.runtime.engine import PROCESSES, Engine, Work

# The exit status of a program that may be repeated to finish its work (EX_TEMPFAIL of sysexits.h).
EXIT_STATUS = 75
# The most seconds between two checks for the other tasks' results.
_LONGEST_PAUSE = 10.0
# Seconds between two looks for a notice while another task has the lock.
_LOCK_SECONDS = 2.0


class Unfinished(Exception):
    """The task has done its part, and groups of other tasks are missing.

    Attributes:
        advice: what to run next.
        command: the command for it.
        status: the exit status of the program.
    """

    def __init__(self, message: str, advice: str, status: int = EXIT_STATUS):
        super().__init__(message)
        self.advice, self.status = advice, status
        self.command = re.sub(r"(--?groups[= ])none\b", r"\1I/N", command.typed())


class Preparation(Engine):
    """The engine of a call that does the work before the first groups, training included."""

    def compute(self, work: Work) -> None:
        """See `Engine`.

        Raises:
            Unfinished: groups after the training are missing; its status is that of success.
        """
        if work.precedes_training:
            return PROCESSES.compute(work)
        missing = processes.on_first_process(f"look for groups of {work.name}", work.find_missing)
        if missing:
            raise Unfinished(
                f"all is prepared for {work.name}: {len(missing)} groups",
                "Each task I of an array of N, from 0 to N−1, takes a part of them:",
                status=0,
            )
        work.compute([])  # for its progress


@dataclasses.dataclass
class ArrayTask(Engine):
    """The engine of one task of an array.

    Attributes:
        index: the number of the task, from 0.
        count: the number of tasks.
        directory: the workdir, for a lock.
        party: identity of the array, see `tda.runtime.engine.Engine`.
        patience: seconds that the task waits for another task's next result.
    """

    index: int
    count: int
    directory: pathlib.Path
    party: str
    patience: float = 600.0
    can_train = False

    def __post_init__(self):
        self.programs = self.count
        self._lock = filelock.FileLock(self.directory / ".alone.lock")
        self._finished: list[str] = []

    @contextlib.contextmanager
    def alone(self) -> Iterator[None]:
        """See `Engine`; a notice of preemption ends the wait for another task's work."""
        while True:
            with contextlib.suppress(filelock.Timeout):
                self._lock.acquire(timeout=_LOCK_SECONDS)
                break
            preemption.check()
        try:
            yield
        finally:
            self._lock.release()

    def compute(self, work: Work) -> None:
        """See `Engine`.

        Raises:
            Unfinished: groups of other tasks are missing, and none of them appeared for
                `patience` seconds.
        """
        missing, since, pause = work.find_missing(), time.monotonic(), 0.05
        # Called without groups too, for the progress of a work that is finished.
        work.compute(self._select_own(missing))
        while left := work.list_missing():
            if numbers := self._select_own(left):  # another task has removed a damaged result
                work.compute(numbers)
            elif len(left) < len(missing):
                missing, since = left, time.monotonic()
            elif time.monotonic() - since >= self.patience:
                raise Unfinished(self._describe(work, left), "Run the array again:")
            else:
                preemption.check()
                time.sleep(pause)
                pause = min(2 * pause, _LONGEST_PAUSE)
        self._finished.append(work.name)

    def _select_own(self, numbers: Sequence[int]) -> list[int]:
        return [i for i in numbers if i % self.count == self.index]

    def _describe(self, work: Work, left: list[int]) -> str:
        tasks = sorted({i % self.count for i in left})
        names = ", ".join(map(str, tasks[:8])) + (", …" if len(tasks) > 8 else "")
        done = f"; finished before: {', '.join(self._finished)}" if self._finished else ""
        return (
            f"task {self.index} of {self.count} has computed its part of {work.name}, and "
            f"{len(left)} of its groups {'is' if len(left) == 1 else 'are'} missing, those of "
            f"task {names}{done}"
        )
