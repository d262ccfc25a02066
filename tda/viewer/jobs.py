"""Long work for a page, one job at a time; the page polls its progress."""

import dataclasses
import itertools
import threading
import time
import traceback
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor

# Finished jobs that stay in memory, so that a page can fetch their results.
_MOST_FINISHED = 32


class Cancelled(Exception):
    """Raised inside a job that was cancelled."""


@dataclasses.dataclass
class Job:
    """A running, waiting or finished job."""

    number: int
    state: str = "waiting"
    """Or "running", "done", "failed", "cancelled"."""
    what: str = ""
    """Its current activity."""
    done: int = 0
    total: int = 0
    """The final value of `done`; 0 if unknown."""
    result: object = None
    """A JSON value, once done."""
    error: str = ""
    seconds: float = 0.0
    is_cancelled: bool = False
    """Whether it will end at its next report of progress."""

    def progress(self, what: str, done: int, total: int) -> None:
        """Records the job's progress; ends the job here if it was cancelled.

        Raises:
            Cancelled: the job was cancelled.
        """
        self.what, self.done, self.total = what, done, total
        if self.is_cancelled:
            raise Cancelled

    def describe(self) -> dict:
        """Returns the job as JSON values."""
        return {name: x for name, x in vars(self).items() if name != "is_cancelled"}


class Jobs:
    """Runs jobs one at a time in a thread of its own, since all of them use the same model."""

    def __init__(self):
        self._pool = ThreadPoolExecutor(1, "job")
        self._numbers, self._jobs = itertools.count(1), {}
        self._lock = threading.Lock()

    def start(self, work: Callable[[Callable], object]) -> Job:
        """Queues a job: `work` is called with its `progress` once the jobs before it are done."""
        with self._lock:
            job = Job(next(self._numbers))
            self._jobs[job.number] = job
            ended = [n for n, j in self._jobs.items() if j.state not in ("waiting", "running")]
            for number in ended[:-_MOST_FINISHED]:
                del self._jobs[number]
        self._pool.submit(self._run, job, work)
        return job

    @staticmethod
    def _run(job: Job, work) -> None:
        if job.is_cancelled:
            job.state = "cancelled"
            return
        job.state, begun = "running", time.monotonic()
        try:
            job.result = work(job.progress)
            job.state = "done"
        except Cancelled:
            job.state = "cancelled"
        except (ValueError, OSError, KeyError, FloatingPointError) as error:
            job.state, job.error = "failed", _message(error)
        except Exception as error:
            traceback.print_exc()
            job.state, job.error = "failed", f"{type(error).__name__}: {error}"
        job.seconds = time.monotonic() - begun

    def get(self, number: int) -> Job:
        """Returns a job.

        Raises:
            KeyError: no job has this number, or it ended long ago.
        """
        return self._jobs[number]

    def cancel(self, number: int) -> Job:
        """Makes a job end at its next report of progress.

        Raises:
            KeyError: no job has this number.
        """
        job = self._jobs[number]
        job.is_cancelled = True
        return job

    def close(self) -> None:
        """Cancels all jobs and waits for the running one."""
        for job in list(self._jobs.values()):
            job.is_cancelled = True
        self._pool.shutdown(wait=True, cancel_futures=True)


def _message(error: Exception) -> str:
    # The text of a KeyError is its key's repr.
    return str(error.args[0]) if isinstance(error, KeyError) and error.args else str(error)
