"""Groups by workers of a local Ray cluster."""

import os
import pathlib
import signal
import sys
import time
from collections import deque

import pytest

from tda.runtime import ray_engine
from tda.runtime.engine import Work
from tda.runtime.ray_engine import Cluster, RayEngine, RayError


class Worker:
    """Writes a file for each group; dies once at group 2, and fails at group 7."""

    def __init__(self, folder):
        self._folder = pathlib.Path(folder)

    def open(self):
        (self._folder / f"opened-{os.getpid()}").touch()

    def compute(self, work, number):
        if number == 7:
            raise FloatingPointError("group 7 has no result")
        died = self._folder / "died"
        if number == 2 and not died.exists():
            died.touch()
            os.kill(os.getpid(), signal.SIGKILL)
        if number == 0:
            time.sleep(0.5)
        (self._folder / f"{work}-{number}").touch()


@pytest.fixture
def engine(tmp_path):
    pytest.importorskip("ray")
    engine = RayEngine(Cluster(workers=2, resources=(("CPU", 0.5),)), Worker, str(tmp_path))
    yield engine
    engine.close()


def make_work(folder, name, count):
    def list_missing():
        return [i for i in range(count) if not (folder / f"{name}-{i}").exists()]

    def compute(numbers):
        assert not numbers, "computed by the driver"

    return Work(name, compute, list_missing, list_missing)


@pytest.mark.slow
def test_workers_compute_what_is_missing_though_one_is_killed(engine, tmp_path):
    (tmp_path / "first-3").touch()
    engine.compute(make_work(tmp_path, "first", 6))
    assert (tmp_path / "died").exists()
    assert {p.name for p in tmp_path.glob("first-*")} == {f"first-{i}" for i in range(6)}
    engine.compute(make_work(tmp_path, "second", 3))
    assert len([*tmp_path.glob("second-*")]) == 3
    # Workers are opened once, and serve every work.
    assert len([*tmp_path.glob("opened-*")]) == 2
    with pytest.raises(FloatingPointError, match="group 7 has no result"):
        engine.compute(make_work(tmp_path, "third", 8))


@pytest.mark.slow
def test_a_cluster_without_room_is_told(tmp_path):
    pytest.importorskip("ray")
    engine = RayEngine(Cluster(resources=(("CPU", 1.0), ("TPU", 4.0))), Worker, str(tmp_path))
    try:
        with pytest.raises(RayError, match=r"CPU=1, TPU=4 does not fit .*has CPU="):
            engine.compute(make_work(tmp_path, "first", 1))
    finally:
        engine.close()


def test_ray_that_is_not_installed_is_told(monkeypatch):
    monkeypatch.setitem(sys.modules, "ray", None)
    with pytest.raises(RayError, match=r"--engine=ray needs Ray.*pip install 'tda-jax\[ray\]'"):
        ray_engine.import_ray()


def test_a_group_that_is_late_is_given_to_a_second_worker_once():
    engine = RayEngine(Cluster(), Worker)
    call = ray_engine._Call
    now = time.monotonic()
    engine._calls = {1: call("a", "w", 4, now - 30), 2: call("b", "w", 5, now - 5)}
    empty = deque()
    assert engine._next("w", empty, set(), longest=20.0) == 4
    engine._calls[3] = call("c", "w", 4, now)
    assert engine._next("w", empty, set(), longest=20.0) is None
    assert engine._next("w", deque([9]), set(), longest=20.0) == 9
    assert engine._next("other", empty, set(), longest=1.0) is None
