"""A notice to one of two real processes ends both, in training at the same step."""

import os
import re
import subprocess
import sys
import threading

import jax
import pytest

from tda.runtime import preemption, processes, progress
from tda.runtime.array_tasks import ArrayTask
from tests.runtime.test_processes import free_port

PROGRAM = """
import os, signal, sys, time
port, me, stage = int(sys.argv[1]), int(sys.argv[2]), sys.argv[3]
import jax
jax.config.update("jax_cpu_collectives_implementation", "gloo")
jax.distributed.initialize(f"localhost:{port}", num_processes=2, process_id=me)
from tda.runtime import preemption, processes

def notice_to(process):
    if me == process:
        os.kill(os.getpid(), signal.SIGTERM)

preemption.watch()
end = None

def work():
    for turn in range(600):
        if stage in ("preparation", "work") and turn == 3:
            notice_to(1)
        # The processes do not wait for each other, and differ in speed.
        time.sleep(0.05 + 0.05 * me)
        if preemption.is_noticed():
            return "noticed"

if stage == "preparation":
    end = work()
else:
    # Both have reported ticks, far beyond any number of steps.
    for turn in range(3):
        preemption.is_noticed()
        time.sleep(1)
    if stage == "before":
        notice_to(1)
    with preemption.lockstep():
        for step in range(1, 6 if stage in ("between", "work") else 200):
            if stage == "training" and step == 5:
                notice_to(1)
            time.sleep(0.05 + 0.02 * me)
            processes.wait_for_all("step")
            if preemption.is_due(step):
                end = step
                break
    if stage == "between":
        notice_to(0)
    end = end or work()
try:
    processes.on_first_process("work for all", preemption.check)
except preemption.Preempted:
    print(f"ended at: {end}", flush=True)
jax.distributed.shutdown()
"""


SLOW = ("preparation", "before", "between")


@pytest.mark.parametrize(
    "stage", ["training", "work", *(pytest.param(s, marks=pytest.mark.slow) for s in SLOW)]
)
def test_a_notice_to_one_process_ends_both(stage):
    """Before training, as it begins, in it, when it has just ended, and at work after it."""
    env = os.environ | {"XLA_FLAGS": "", "PYTHONPATH": os.getcwd()}
    words = [sys.executable, "-c", PROGRAM, str(free_port())]
    pipe = subprocess.PIPE
    both = [
        subprocess.Popen([*words, str(me), stage], env=env, text=True, stdout=pipe, stderr=pipe)
        for me in (0, 1)
    ]
    ends = []
    for process in both:
        out, errors = process.communicate(timeout=300)
        assert process.returncode == 0, errors[-3000:]
        ends += re.findall("ended at: (.*)", out)
    assert len(ends) == 2 and ends[0] == ends[1]
    if stage in ("training", "before"):
        assert (5 if stage == "training" else 1) <= int(ends[0]) < 150
    else:
        assert ends[0] == "noticed"


@pytest.fixture
def notice(monkeypatch):
    """A notice that has come to this process."""
    monkeypatch.setattr(preemption, "_watch", preemption._Watch())
    preemption._watch.noticed.set()


def test_a_wait_for_the_work_of_another_task_is_left(tmp_path, notice):
    with ArrayTask(0, 2, tmp_path, "an array").alone():  # nobody else has the lock
        waiting = ArrayTask(1, 2, tmp_path, "an array")
        with pytest.raises(preemption.Preempted), waiting.alone():
            raise AssertionError("the lock of another task was taken")


def test_a_bar_ends_the_work_that_process_0_does_for_all(notice, monkeypatch):
    monkeypatch.setattr(jax, "process_count", lambda: 2)
    bar = progress.bar(2, "work", "step")
    bar.update()  # all take part: they must end at the same place
    monkeypatch.setattr(processes._working, "for_all", True, raising=False)
    with pytest.raises(preemption.Preempted):
        bar.update()


def test_work_in_a_library_is_left():
    assert preemption.heed(lambda: 5) == 5
    with pytest.raises(KeyError, match="x"):
        preemption.heed(lambda: {}["x"])
    threading.Timer(0.3, preemption._watch.noticed.set).start()
    try:
        with pytest.raises(preemption.Preempted):
            preemption.heed(threading.Event().wait)
    finally:
        preemption._watch.noticed.clear()
