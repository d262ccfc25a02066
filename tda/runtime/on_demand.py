"""The worker's side of an engine that requests one group at a time, by work and number.

The worker runs the ordinary stages of the run in a thread. When they reach the requested work, they
stop there, with the model, compiled programs and queries in memory, and compute the requested
groups. On a request for another work, the stages start again from the first, and read from files
what the driver has finished.
"""

import queue
import threading
import time
from collections.abc import Callable

from tda.runtime.engine import Engine, Work

# Seconds until a result that the driver has seen must be seen here: file systems differ.
_PATIENCE = 120.0
# The number of programs that a work is cut for, since the number of workers changes.
PROGRAMS = 16


class WorkerError(ValueError):
    """A worker does not reach the requested work."""


class _Superseded(BaseException):
    """Another work is requested: leaves the stages, whatever errors they catch."""


class OnDemand(Engine):
    """The engine of a worker, and the thread in which its stages run.

    Args:
        stages: runs all stages of the run with this engine; called again and again.
    """

    party, can_train, programs = "workers", False, PROGRAMS

    def __init__(self, stages: Callable[["OnDemand"], None]):
        self._stages = stages
        self._requests: queue.Queue[tuple[str, int]] = queue.Queue()
        self._replies: queue.Queue[BaseException | None] = queue.Queue()
        self._name, self._number = "", -1
        threading.Thread(target=self._run, daemon=True).start()

    def open(self) -> None:
        """Runs the stages once while `is_opening`; raises their errors."""
        self.request("", 0)

    @property
    def is_opening(self) -> bool:
        """Whether the stages only open the run."""
        return not self._name

    def request(self, name: str, number: int) -> None:
        """Computes a group of a work; called by one thread at a time.

        Raises:
            WorkerError: the stages do not reach this work.
            Exception: the work's own error.
        """
        self._requests.put((name, number))
        error = self._replies.get()
        if error is not None:
            raise error

    def asks_for(self, name: str) -> bool:
        """See `tda.runtime.engine.Engine`."""
        return name in self._name

    def compute(self, work: Work) -> None:
        """See `tda.runtime.engine.Engine`; called by the stages."""
        if self.is_opening and work.precedes_training and work.list_missing():
            # The run cannot be opened further, since the model is not trained yet.
            self._replies.put(None)
            self._name, self._number = self._requests.get()
            raise _Superseded
        if work.name != self._name:
            # The driver has finished this work before it requested a later one.
            end = time.monotonic() + _PATIENCE
            while left := work.list_missing():
                if time.monotonic() > end:
                    raise WorkerError(
                        f"asked for {self._name}, the worker came to {work.name}, of which it "
                        f"does not see {len(left)} results; do all hosts share the workdir, and "
                        "have the same code and files?"
                    )
                time.sleep(0.2)
            return
        while self._name == work.name:
            try:
                work.compute([self._number])
            except Exception as error:
                self._replies.put(error)
            else:
                self._replies.put(None)
            self._name, self._number = self._requests.get()
        raise _Superseded

    def _run(self) -> None:
        self._name, self._number = self._requests.get()
        while True:
            error: Exception | None = None
            try:
                self._stages(self)
                if not self.is_opening:
                    error = WorkerError(
                        f"the worker's stages ended and did not come to {self._name}; have all "
                        "hosts the same code and files?"
                    )
            except _Superseded:
                continue
            except Exception as raised:
                error = raised
            self._replies.put(error)
            self._name, self._number = self._requests.get()
