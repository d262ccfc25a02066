"""One job at a time in a directory, whichever way the one before ended."""

import errno
import fcntl
import json
import os
import signal
import socket
import subprocess
import sys
import threading
import time

import pytest

from tda.runtime import directory_lock
from tda.runtime.directory_lock import DirectoryLock, HeldError

HOLD = """
import sys, time
from tda.runtime.directory_lock import DirectoryLock
DirectoryLock(sys.argv[1]).acquire()
print("held", flush=True)
time.sleep(600)
"""


def test_a_second_job_is_told_who_has_the_directory_until_that_is_killed(tmp_path):
    env = os.environ | {"PYTHONPATH": os.getcwd()}
    command = [sys.executable, "-c", HOLD, tmp_path]
    with subprocess.Popen(command, stdout=subprocess.PIPE, env=env, text=True) as holder:
        try:
            assert holder.stdout.readline() == "held\n"
            lock = DirectoryLock(tmp_path, "--workdir=w")
            place = f"process {holder.pid} on {socket.gethostname()} since"
            with pytest.raises(HeldError, match=f"--workdir=w is in use by {place}"):
                lock.acquire()
        finally:
            holder.send_signal(signal.SIGKILL)
    lock.acquire()
    with pytest.raises(HeldError, match=f"process {os.getpid()} on"):
        DirectoryLock(tmp_path).acquire()
    lock.release()
    lock.release()
    DirectoryLock(tmp_path).acquire()


def test_waiting_says_what_for_and_ends_with_the_other_job(tmp_path, capfd):
    first, second = DirectoryLock(tmp_path), DirectoryLock(tmp_path)
    first.acquire()
    waiting = threading.Thread(target=second.wait)
    waiting.start()
    time.sleep(0.3)
    assert waiting.is_alive()
    first.release()
    waiting.join(30)
    assert not waiting.is_alive()
    assert capfd.readouterr().err.count(f"waiting: {tmp_path} is in use by process") == 1
    with pytest.raises(HeldError):
        first.acquire()
    second.release()


@pytest.fixture
def no_locks(monkeypatch):
    def refuse(*arguments):
        raise OSError(errno.ENOLCK, "No locks available")

    monkeypatch.setattr(fcntl, "flock", refuse)


def leave(path, **changed):
    record = {"host": "elsewhere", "pid": 12, "since": "today", "command": "trace"} | changed
    (path / ".held").write_text(json.dumps(record))


@pytest.mark.parametrize("has_locks", [True, False])
def test_a_job_of_another_host_is_known_by_its_signs_of_life(
    tmp_path, monkeypatch, request, has_locks
):
    """Some file systems have locks of one host alone, others none."""
    monkeypatch.setattr(directory_lock, "_BEAT", 0.1)
    monkeypatch.setattr(directory_lock, "_SILENCE", 1.0)
    if not has_locks:
        request.getfixturevalue("no_locks")
    leave(tmp_path)
    alive = threading.Timer(0.5, os.utime, [tmp_path / ".held"])
    alive.start()
    with pytest.raises(HeldError, match=r"process 12 on elsewhere since today \(trace\)"):
        DirectoryLock(tmp_path).acquire()
    alive.join()
    lock = DirectoryLock(tmp_path)
    lock.acquire()  # silent by now
    before = os.stat(tmp_path / ".held").st_mtime_ns
    time.sleep(0.3)
    assert os.stat(tmp_path / ".held").st_mtime_ns > before
    lock.release()


def test_without_locks_a_job_of_this_host_is_known_by_its_process(tmp_path, no_locks):
    leave(tmp_path, host=socket.gethostname(), pid=os.getppid())
    with pytest.raises(HeldError, match=f"process {os.getppid()} on"):
        DirectoryLock(tmp_path).acquire()
    dead = subprocess.Popen([sys.executable, "-c", ""])
    dead.wait()
    leave(tmp_path, host=socket.gethostname(), pid=dead.pid)
    DirectoryLock(tmp_path).acquire()
