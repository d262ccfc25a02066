"""Notices that the job is about to be ended; the program stops at a place where its work is saved.

SLURM, Kubernetes and Google's preempted machines send SIGTERM, and kill the program some 30 seconds
later. A program that calls `watch` ends by `Preempted` instead, at the next of its own stops: a
training step, a shard, a step of a scan.

In one process a signal handler takes the notice. In several, jax takes it (its preemption service)
and tells all processes a number beyond those that they have reported; each stops when it reports
that number, so a process's numbers must grow by one. Outside of training, where each process works
for itself, they count ticks of the clock; in training (`lockstep`), where all must stop at the same
step, they count steps.
"""

import contextlib
import signal
import threading
import time
from collections.abc import Callable, Iterator
from typing import TypeVar

import jax
import numpy as np
from jax.experimental import multihost_utils

# What a shell reports for a program that SIGTERM ended: 128 + 15.
EXIT_STATUS = 143
# Seconds. The number of ticks is below 2^31 until 2106.
_TICK = 2.0
# The most ticks by which the clocks of hosts may differ.
_SKEW = 300

T = TypeVar("T")


class Preempted(Exception):
    """The job was told to end, and has saved its finished work, which the message names."""


class _Watch:
    """The state of this process with regard to notices."""

    def __init__(self):
        self.is_on = False
        self.noticed = threading.Event()
        self.lock = threading.Lock()
        self.next = 0  # the number beyond the last reported one
        self.start = (0, 0)  # a number, and its tick
        self.is_in_lockstep = False

    @property
    def is_joint(self) -> bool:
        """Whether jax tells the processes of a notice."""
        return self.is_on and jax.process_count() > 1

    def report(self, number: int) -> None:
        """Reports all numbers up to this one."""
        with self.lock:
            numbers = range(self.next, number + 1)
            if any([multihost_utils.reached_preemption_sync_point(n) for n in numbers]):
                self.noticed.set()
            self.next = max(self.next, number + 1)


_watch = _Watch()


def watch() -> None:
    """Heeds notices from now on; called in the main thread, once processes are joined."""
    _watch.is_on = True
    _watch.next = _now() - _SKEW
    if jax.process_count() == 1:
        signal.signal(signal.SIGTERM, _take_notice)


def _take_notice(number, frame) -> None:
    _watch.noticed.set()
    # A second signal ends the program at once.
    signal.signal(signal.SIGTERM, signal.SIG_DFL)


def _now() -> int:
    return int(time.time() / _TICK)


@contextlib.contextmanager
def lockstep() -> Iterator[None]:
    """Makes `is_due` the same in all processes, which enter and leave the context together."""
    if _watch.is_joint:
        # Steps continue from the largest number that any process has reported.
        agreed = multihost_utils.process_allgather(np.array([_watch.next, _now()], np.int32))
        _watch.start = int(agreed[:, 0].max()), int(agreed[0, 1])
        _watch.report(_watch.start[0])
    _watch.is_in_lockstep = True
    try:
        yield
    finally:
        _watch.is_in_lockstep = False
        # Ticks continue from the last step, which is the same in all processes.
        _watch.start = max(_watch.start[0], _watch.next - 1), _watch.start[1]


def is_due(step: int) -> bool:
    """Returns whether training is to end at this step; the same in all processes.

    Args:
        step: the steps since `lockstep`, one more at each call.
    """
    if _watch.is_joint:
        _watch.report(_watch.start[0] + step)
    return _watch.noticed.is_set()


def is_noticed() -> bool:
    """Returns whether a notice has come; outside of `lockstep`, processes may differ for a time."""
    if _watch.is_joint and not _watch.is_in_lockstep:
        number, tick = _watch.start
        _watch.report(number + max(0, _now() - tick))
    return _watch.noticed.is_set()


def check(done: str = "") -> None:
    """Raises `Preempted` if a notice has come; not for use in training.

    Args:
        done: the saved work, for the message.
    """
    if is_noticed():
        raise Preempted(done)


def heed(work: Callable[[], T]) -> T:
    """Calls `work` in another thread, which is abandoned if a notice comes.

    For work inside a library, which cannot check for notices, and which a kill may end anywhere.

    Raises:
        Preempted: a notice came.
    """
    results: list[T] = []
    errors: list[BaseException] = []

    def run() -> None:
        try:
            results.append(work())
        except BaseException as error:
            errors.append(error)

    thread = threading.Thread(target=run, daemon=True)
    thread.start()
    while thread.is_alive():
        thread.join(0.2)
        if thread.is_alive():
            check()
    if errors:
        raise errors[0]
    return results[0]
