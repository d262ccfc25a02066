"""Long work for a page: one job after the other, with progress that can be asked for."""

import dataclasses
import itertools
import threading
import time
import traceback
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor

# A finished job's result is kept for the page to fetch, not for ever.
_KEPT = 32


class Cancelled(Exception):
    """Raised inside a job that is not wanted any more."""


@dataclasses.dataclass
class Job:
    """A piece of work.

    Attributes:
        number: of the job.
        state: "waiting", "running", "done", "failed" or "cancelled".
        what: what it is doing.
        done, total: how far it is; total 0: not known.
        result: a JSON value, when done.
        error: why it failed.
        seconds: how long it ran.
    """

    number: int
    state: str = "waiting"
    what: str = ""
    done: int = 0
    total: int = 0
    result: object = None
    error: str = ""
    seconds: float = 0.0
    unwanted: bool = dataclasses.field(default=False, repr=False)

    def progress(self, what: str, done: int, total: int) -> None:
        """Tells how far the job is; it ends here if nobody wants it any more.

        Raises:
            Cancelled: it is not wanted.
        """
        self.what, self.done, self.total = what, done, total
        if self.unwanted:
            raise Cancelled

    def describe(self) -> dict:
        """The job as JSON values."""
        names = ("number", "state", "what", "done", "total", "result", "error", "seconds")
        return {n: getattr(self, n) for n in names}


class Jobs:
    """Runs jobs one at a time in a thread of its own."""

    def __init__(self):
        self._pool = ThreadPoolExecutor(1, "job")
        self._numbers, self._jobs = itertools.count(1), {}
        self._lock = threading.Lock()

    def start(self, work: Callable[[Callable], object]) -> Job:
        """Begins a job: `work` is called with its `progress` when those before it are done."""
        with self._lock:
            job = Job(next(self._numbers))
            self._jobs[job.number] = job
            ended = [n for n, j in self._jobs.items() if j.state not in ("waiting", "running")]
            for number in ended[:-_KEPT]:
                del self._jobs[number]
        self._pool.submit(self._run, job, work)
        return job

    @staticmethod
    def _run(job: Job, work) -> None:
        if job.unwanted:
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
        """A job.

        Raises:
            KeyError: there is none of that number, or it ended long ago.
        """
        return self._jobs[number]

    def cancel(self, number: int) -> Job:
        """Ends a job at its next step.

        Raises:
            KeyError: there is none of that number.
        """
        job = self._jobs[number]
        job.unwanted = True
        return job

    def close(self) -> None:
        """Cancels everything and waits for the job that runs."""
        for job in list(self._jobs.values()):
            job.unwanted = True
        self._pool.shutdown(wait=True, cancel_futures=True)


def _message(error: Exception) -> str:
    # The text of a KeyError is its key's repr.
    return str(error.args[0]) if isinstance(error, KeyError) and error.args else str(error)
