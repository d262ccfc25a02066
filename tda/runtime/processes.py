"""Several processes of one run (`jax.distributed`): work of process 0 alone, and agreement.

Process 0 writes the small files and takes every decision that depends on the files on disk. If each
process looked for itself, one might see a file that another does not see yet, and would enter a
collective alone, which hangs or fails. The others open a file only after process 0 has written it:
some shared file systems remember for a while that a file was missing.

Work that process 0 does for all may itself call these functions. The others then wait in the outer
call and would take an inner message for its result, so inside such work process 0 acts as if it
were the only process.
"""

import contextlib
import json
import socket
import threading
import time
import zlib
from collections.abc import Callable, Sequence
from typing import Any, TypeVar

import jax
import numpy as np
from jax.experimental import multihost_utils

from tda.runtime import code_version, preemption
from tda.runtime.fingerprint import fingerprint

# Seconds. A collective between CPUs fails if one process enters it half an hour after another, so
# process 0 enters one this often while it is at work.
_SIGN_OF_LIFE = 300.0
_BUSY, _FAILED, _PREEMPTED = -1, -2, -3

T = TypeVar("T")

# Whether this thread does the work of `on_first_process`.
_working = threading.local()


class ProcessError(RuntimeError):
    """Another process failed or differs, and this one cannot go on without it."""


def is_first() -> bool:
    """Returns whether this is process 0; true if there is only one process."""
    return jax.process_index() == 0


def _is_alone() -> bool:
    return jax.process_count() == 1 or getattr(_working, "for_all", False)


def share(items: Sequence[Any]) -> list:
    """Returns the items that this process takes when all processes split them."""
    return list(items if _is_alone() else items[jax.process_index() :: jax.process_count()])


def wait_until(is_done: Callable[[], bool], longest_pause: float) -> None:
    """Returns once other processes' work is done, however long they take.

    A barrier would not do: between CPUs a collective fails if a process waits in it for half an
    hour.

    Args:
        is_done: checks whether it is done.
        longest_pause: the most seconds between two checks.

    Raises:
        Preempted: a notice came meanwhile.
    """
    seconds = 0.05
    while not is_done():
        preemption.check()
        time.sleep(seconds)
        seconds = min(2 * seconds, longest_pause)


def check_preemption(is_joint: bool = False) -> None:
    """Raises `Preempted` if a notice has come; not for use in training.

    Args:
        is_joint: whether the processes work together, so that all must end at the same place.
    """
    if not is_joint:
        preemption.check()
    elif where(preemption.is_noticed()):
        raise preemption.Preempted


def check_preemption_alone() -> None:
    """Raises `Preempted` if a notice has come, and no other process takes part in the work."""
    if _is_alone():
        preemption.check()


def together(work: Callable[[], T]) -> T:
    """Calls `work` in every process and returns its result once all processes have finished it.

    Raises:
        Preempted: in all processes, if `work` ends so in one, which may be too early for another.
    """
    result: list[T] = []
    with contextlib.suppress(preemption.Preempted):
        result.append(work())
    if where(not result or preemption.is_noticed()):
        raise preemption.Preempted
    return result[0]


def wait_for_all(barrier: str) -> None:
    """Returns when every process has reached this barrier."""
    if not _is_alone():
        multihost_utils.sync_global_devices(barrier)


def on_first_process(task: str, work: Callable[[], Any]) -> Any:
    """Calls `work` in process 0 and returns its result in every process.

    The other processes wait, however long it takes, and never call it. Process 0 calls it in
    another thread, where no mesh is set.

    Args:
        task: the work as an infinitive ("open the store"), for the error.
        work: returns a JSON value.

    Raises:
        ProcessError: in the other processes, if `work` fails; process 0 raises the error itself.
        Preempted: in all processes, if `work` ends so.
    """
    if _is_alone():
        return work()
    text, error, length = b"", None, _BUSY

    def run():
        nonlocal text, error
        _working.for_all = True
        try:
            text = json.dumps(work()).encode()
        except Exception as e:  # of any kind, or the other processes would wait for ever
            error = e

    thread = threading.Thread(target=run, daemon=True)
    if is_first():
        thread.start()
    while length == _BUSY:
        if is_first():
            thread.join(_SIGN_OF_LIFE)
            if not thread.is_alive():
                length = _FAILED if error else len(text)
                length = _PREEMPTED if isinstance(error, preemption.Preempted) else length
        length = int(multihost_utils.broadcast_one_to_all(np.int32(length)))
    if error:
        raise error
    if length == _PREEMPTED:
        raise preemption.Preempted
    if length == _FAILED:
        raise ProcessError(f"process 0 failed to {task}; its own message says why")
    # A power of two, since each length of the buffer costs a compilation.
    buffer = np.zeros(1 << max(6, (length - 1).bit_length()), np.uint8)
    buffer[: len(text)] = np.frombuffer(text, np.uint8)
    return json.loads(multihost_utils.broadcast_one_to_all(buffer)[:length].tobytes())


def where(flag: bool) -> list[int]:
    """Returns the numbers of the processes whose flag is true; the same list in every process."""
    if _is_alone():
        return [jax.process_index()] if flag else []
    return np.flatnonzero(multihost_utils.process_allgather(np.bool_(flag))).tolist()


def check_same_code() -> None:
    """Checks that every process runs the same code by the same version of jax.

    Raises:
        ProcessError: in all processes, if one runs other code; the message names that process.
    """
    advice = "update its checkout and its packages to those of process 0"
    check_alike("version of the code, or of jax,", code_version.describe(), advice)


def check_alike(
    name: str, value: Any, advice: str = "start all with the same command, on the same files"
) -> None:
    """Checks that every process has the same JSON value, so that no two runs are mixed.

    Raises:
        ProcessError: in all processes, if one has another value; the message names that process.
    """
    if _is_alone():
        return
    local = np.frombuffer(fingerprint(value).encode(), np.uint8)
    differing = where((multihost_utils.broadcast_one_to_all(local) != local).any())
    if differing:
        raise ProcessError(f"process {differing[0]} has another {name} than process 0; {advice}")


def count_on_this_host() -> int:
    """Returns how many of the run's processes share this one's host."""
    if _is_alone():
        return 1
    host = np.uint32(zlib.crc32(socket.gethostname().encode()))
    return int((multihost_utils.process_allgather(host) == host).sum())
