"""Notices that the job is about to be ended, heeded where its work is saved.

SLURM, Kubernetes and Google's preempted machines send SIGTERM, and kill the program some 30 seconds
later. A program that calls `watch` ends by `Preempted` instead, at the next of its own stops: a
training step, a shard, a step of a scan.

In one process a handler takes the notice. In several, jax takes it (its preemption service) and
tells all processes a number beyond those that they have reported; each stops when it reports that
number. In training, where all must stop at the same step, they report steps. After it, where each
works for itself, they report the time, in ticks, which passes for all alike.
"""

import signal
import threading
import time

import jax
from jax.experimental import multihost_utils

# What a shell reports for a program that SIGTERM ended: 128 + 15.
EXIT_STATUS = 143
# Seconds. Numbers of ticks are far beyond those of steps, and below 2^31 until 2106.
_TICK = 2.0
# Clocks may differ between hosts by up to so many ticks.
_SKEW = 300


class Preempted(Exception):
    """The job was told to end, and has saved what it finished."""

    def __init__(self, done: str = ""):
        super().__init__(done)


class _Watch:
    """What this process knows of notices."""

    def __init__(self):
        self.is_on = False
        self.noticed = threading.Event()
        self.lock = threading.Lock()
        self.next_step = 0  # the number beyond the last reported step
        self.next_tick = 0


_watch = _Watch()


def watch() -> None:
    """Has notices heeded from now on; called in the main thread, once processes are joined."""
    _watch.is_on = True
    _watch.next_tick = _now() - _SKEW
    if jax.process_count() == 1:
        signal.signal(signal.SIGTERM, _take_notice)


def _take_notice(number, frame) -> None:
    _watch.noticed.set()
    # A second signal ends the program at once.
    signal.signal(signal.SIGTERM, signal.SIG_DFL)


def _now() -> int:
    return int(time.time() / _TICK)


def is_due(step: int) -> bool:
    """Returns whether training is to end at this step; the same in all processes.

    Args:
        step: the steps of this call of the program so far, rising by one from call to call.
    """
    if _watch.is_on and jax.process_count() > 1:
        _watch.next_step = step + 1
        if multihost_utils.reached_preemption_sync_point(step):
            _watch.noticed.set()
    return _watch.noticed.is_set()


def is_noticed() -> bool:
    """Returns whether a notice has come; in one process sooner than in another.

    Only after training: see the module.
    """
    if _watch.is_on and jax.process_count() > 1:
        with _watch.lock:
            # Processes that had all reported their last step agree on a number beyond it.
            numbers = [*range(_watch.next_step, _watch.next_step + 3)]
            numbers += range(_watch.next_tick, _now() + 1)
            if any([multihost_utils.reached_preemption_sync_point(n) for n in numbers]):
                _watch.noticed.set()
            _watch.next_tick = max(_watch.next_tick, _now())
    return _watch.noticed.is_set()


def check(done: str = "") -> None:
    """Raises `Preempted` if a notice has come; only after training.

    Args:
        done: what is saved, for the message.
    """
    if is_noticed():
        raise Preempted(done)


def check_alone() -> None:
    """Raises `Preempted` if there is one process and a notice has come to it."""
    if _watch.noticed.is_set() and jax.process_count() == 1:
        raise Preempted
