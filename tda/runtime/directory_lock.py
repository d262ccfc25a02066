"""One job at a time in a directory: a second one is refused with the holder's name, or waits.

A party of jobs, such as the tasks of a cluster's array, may hold it together (a shared lock).

The job locks the file `.held` (flock), which the kernel unlocks when the process ends in any way,
also on other hosts of a shared file system. The file names the holder. Some file systems have no
locks, or none between hosts (Lustre and NFS, by their mount options): there the file's time is a
sign of life, and a job that finds another host's file watches it before it takes over.
"""

import datetime
import fcntl
import json
import os
import pathlib
import socket
import sys
import threading
import time
import uuid
from collections.abc import Callable

from tda.runtime import command

FILE = ".held"
# Seconds between two signs of life, and seconds without one after which a job counts as dead.
_BEAT, _SILENCE = 5.0, 15.0
_LONGEST_PAUSE = 5.0
# Seconds in which a job of a party tries again: each that arrives locks the others out briefly.
_PARTY_PATIENCE = 20.0


class HeldError(ValueError):
    """Another job works in the directory."""


class DirectoryLock:
    """The right to write to a directory, for one job at a time.

    The processes of one `jax.distributed` run are one job: process 0 takes the lock for all.

    Args:
        directory: the directory; it must exist.
        name: the user's name for it, for messages.
        party: identity of the jobs that may hold the directory together; empty for a single job.
    """

    def __init__(self, directory: str | os.PathLike, name: str = "", party: str = ""):
        self._path = pathlib.Path(directory) / FILE
        self._name, self._party = name or str(directory), party
        self._handle: int | None = None
        self._is_released = threading.Event()

    def acquire(self) -> None:
        """Takes the lock.

        Raises:
            HeldError: another job has it; the message describes that job.
        """
        handle = os.open(self._path, os.O_RDWR | os.O_CREAT, 0o666)
        try:
            end = time.monotonic() + (_PARTY_PATIENCE if self._party else 0.0)
            while (holder := _find_holder(handle, self._path, self._party)) is not None:
                if time.monotonic() >= end or not self._may_be_mate(holder):
                    raise HeldError(
                        f"{self._name} is in use by {_describe(holder)}; wait until that ends, "
                        "stop it, or use another directory"
                    )
                time.sleep(0.05)
        except BaseException:
            os.close(handle)
            raise
        self._handle = handle
        self._is_released.clear()
        threading.Thread(target=self._show_life, args=(handle,), daemon=True).start()

    def wait(self) -> None:
        """Takes the lock once no other job has it; until then prints the holder to stderr."""
        seconds, last = 0.05, ""
        while self._handle is None:
            try:
                self.acquire()
            except HeldError as error:
                text = str(error).partition(";")[0]
                if text != last:
                    print(f"waiting: {text}", file=sys.stderr, flush=True)
                last = text
                time.sleep(seconds)
                seconds = min(2 * seconds, _LONGEST_PAUSE)

    def release(self, on_last: Callable[[], None] = lambda: None) -> None:
        """Releases the lock; does nothing in a process that does not have it.

        Args:
            on_last: called first, unless another job of the party still has the lock.
        """
        handle, self._handle = self._handle, None
        if handle is not None:
            self._is_released.set()
            try:
                # The rest of the party still needs the record.
                if not self._party or _lock(handle, fcntl.LOCK_EX):
                    on_last()
                    os.ftruncate(handle, 0)
            finally:
                os.close(handle)

    def _may_be_mate(self, holder: dict) -> bool:
        return bool(self._party) and holder.get("party", self._party) == self._party

    def _show_life(self, handle: int) -> None:
        while not self._is_released.wait(_BEAT):
            try:
                os.utime(handle)
            except OSError:
                return


def _lock(handle: int, kind: int) -> bool | None:
    """Locks the open file if nobody has it; returns None where the file system has no locks."""
    try:
        fcntl.flock(handle, kind | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    except OSError:
        return None
    return True


def _find_holder(handle: int, path: pathlib.Path, party: str) -> dict | None:
    """Locks the open file for this process; returns None, or the record of the holder."""
    is_locked = _lock(handle, fcntl.LOCK_EX)
    if is_locked is False:
        if not party or not _lock(handle, fcntl.LOCK_SH):
            return _read(handle) or {}
        # The jobs that share the lock are this party, or another, for which it is released again.
        record = _read(handle) or {}
        if record.get("party") == party:
            return None
        fcntl.flock(handle, fcntl.LOCK_UN)
        return record
    has_locks = bool(is_locked)
    # A job that ended has emptied the file; one that was killed has not.
    record = _read(handle)
    is_mate = record is not None and party != "" and record.get("party") == party
    if is_mate and not has_locks:
        return None
    is_local = record is not None and record.get("host") == socket.gethostname()
    if record is not None and not is_mate and not (is_local and has_locks):
        # The record of a party is that of its first job, which may have ended before the others.
        if (
            _is_running(record["pid"])
            if is_local and not record.get("party")
            else _is_alive(path, record)
        ):
            return _read(handle) or record
    token = _write(handle, party)
    if not has_locks:
        # If two jobs start at the same moment, the one whose record remains has the lock.
        time.sleep(1.0)
        record = _read(handle)
        if record is not None and record.get("token") != token:
            return None if party and record.get("party") == party else record
    elif party and not _lock(handle, fcntl.LOCK_SH):
        return _read(handle) or {}  # another job took it between the two locks
    return None


def _read(handle: int) -> dict | None:
    try:
        record = json.loads(os.pread(handle, 1 << 16, 0))
    except ValueError:
        return None
    return record if isinstance(record, dict) and {"host", "pid"} <= record.keys() else None


def _write(handle: int, party: str) -> str:
    now = datetime.datetime.now(datetime.UTC)
    record = {
        "host": socket.gethostname(),
        "pid": os.getpid(),
        "since": now.isoformat(" ", "seconds"),
        "command": command.typed(),
        "token": uuid.uuid4().hex,
    } | ({"party": party} if party else {})
    text = json.dumps(record, ensure_ascii=False).encode()
    os.ftruncate(handle, 0)
    os.pwrite(handle, text, 0)
    return record["token"]


def _is_alive(path: pathlib.Path, holder: dict) -> bool:
    """Watches the file of a job on another host until it shows life, or long enough without."""
    print(f"watching {path} of {_describe(holder)} for signs of life", file=sys.stderr, flush=True)
    before, end = _time_of(path), time.monotonic() + _SILENCE
    while time.monotonic() < end:
        time.sleep(0.2)
        if _time_of(path) != before:
            return True
    return False


def _time_of(path: pathlib.Path) -> int:
    # Opened each time, so that NFS asks its server; otherwise it caches the time for a minute.
    with open(path, "rb") as file:
        return os.fstat(file.fileno()).st_mtime_ns


def _is_running(pid: int) -> bool:
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    except PermissionError:
        return True  # another user's
    return pid != os.getpid()


def _describe(holder: dict) -> str:
    if not holder:
        return "another process"
    text = f"process {holder['pid']} on {holder['host']}"
    if "since" in holder:
        text += f" since {holder['since']}"
    if holder.get("party"):
        text = f"the tasks of an array, whose first was {text}"
    return f"{text} ({holder['command']})" if holder.get("command") else text
