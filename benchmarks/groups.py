"""The cost of splitting R and a search over processes, and the work that a kill loses.

    python -m benchmarks.groups --json=groups.json

1. One process and several, each a task of an array, compute R and search a store in turns: CPU
   seconds a GB of the store (user and system, without starting and compiling, which do not grow
   with the store), and whether the rankings are equal to the last bit.
2. Tasks are killed with SIGKILL at random moments, and lose their work since the last finished
   group; then the work is finished, and compared as above.
"""

import json
import os
import pathlib
import random
import subprocess
import sys
import tempfile
import time

import numpy as np
from absl import app, flags

from benchmarks import record
from tda import hessian, methods
from tda import store as stores
from tda.retrieval import exact
from tda.retrieval.hessian_settings import HessianSettings
from tda.retrieval.ranked import Ranked
from tda.retrieval.sources import InMemory
from tda.retrieval.whitening import Whitening
from tda.runtime import progress
from tda.runtime.array_tasks import ArrayTask
from tda.runtime.groups import ONE_GROUP, Groups

_WORKDIR = flags.DEFINE_string("workdir", None, "where the store is made; temporary if unset")
_ROWS = flags.DEFINE_integer("rows", 131_072, "rows of 8,192 numbers")
_TASKS = flags.DEFINE_integer("tasks", 4, "processes that share the work")
_ROUNDS = flags.DEFINE_integer("rounds", 3, "rounds of the sides in turns")
_KILLS = flags.DEFINE_integer("kills", 20, "tasks killed")
_PART = flags.DEFINE_string("part", None, "for internal use: compute this part, I/N")
_OUT = flags.DEFINE_string("out", None, "for internal use: where a part's results go")

BLOCKS = {str(i): 256 for i in range(32)}
WIDTH, QUERIES = sum(BLOCKS.values()), 100


def make_store(root: pathlib.Path) -> None:
    """Writes a store of random rows."""
    store = stores.create(root / "store", [str(i) for i in range(_ROWS.value)], BLOCKS, {})
    for i, rows in enumerate(store.shards()):
        if i in store.missing():
            rng = np.random.default_rng(i)
            store.write(i, rng.standard_normal((rows.stop - rows.start, WIDTH), np.float32))


def compute_part(root: pathlib.Path, out: pathlib.Path, part: str) -> None:
    """Computes a part of R and of the search, and prints seconds of CPU; the child's work."""
    index, count = map(int, part.split("/"))
    queries_QxE = np.random.default_rng(0).standard_normal((QUERIES, WIDTH), np.float32)
    # A few steps of the same shape first, so that compiling is not counted.
    few_RxE = np.random.default_rng(1).standard_normal((8192, WIDTH), np.float32)
    store = stores.open_store(root / "store")
    rank(InMemory(few_RxE, hessian.block_slices(store.form.widths)), queries_QxE)
    engine = ArrayTask(index, count, out, party=f"{count} tasks")
    before = sum(os.times()[:2])
    ranked = rank(store, queries_QxE, out / "roots", Groups(out / "groups", 1 << 28, engine))
    spent = sum(os.times()[:2]) - before
    np.savez(out / f"ranked-{index}.npz", rows=ranked.proponents, scores=ranked.proponent_scores)
    print(json.dumps({"cpu": spent}))


def rank(source, queries_QxE, folder=None, groups=ONE_GROUP) -> Ranked:
    """Whitens by R of a source, and searches it."""
    identity, method = ["benchmark"], methods.METHODS["trackstar_train"]
    whitening = Whitening(
        HessianSettings(damping=0.1),
        source,
        queries_QxE,
        folder=folder,
        identity=identity,
        groups=groups,
    )
    with progress.hidden():
        (part,) = whitening.parts({"": method})
        scorers = part.scorers
    search = exact.ExactSearch(source, groups=groups, identity=identity)
    return search.rank(queries_QxE, scorers, 10)[""]


def start(root: pathlib.Path, out: pathlib.Path, part: str) -> subprocess.Popen:
    """Starts a child."""
    command = [sys.executable, "-m", "benchmarks.groups", f"--workdir={root}", f"--part={part}"]
    out.mkdir(parents=True, exist_ok=True)
    return subprocess.Popen([*command, f"--out={out}"], stdout=subprocess.PIPE, text=True)


def finish(child: subprocess.Popen) -> float:
    """Returns a child's seconds of CPU."""
    text, _ = child.communicate()
    if child.returncode:
        raise RuntimeError(f"a task ended with {child.returncode}")
    return json.loads(text.splitlines()[-1])["cpu"]


def is_equal(out: pathlib.Path, reference: pathlib.Path) -> bool:
    """Whether every task has the ranking of another run, bit for bit."""

    def read(path: pathlib.Path) -> list[bytes]:
        with np.load(path) as arrays:
            return [arrays[name].tobytes() for name in ("rows", "scores")]

    expected = read(reference / "ranked-0.npz")
    return all(read(path) == expected for path in out.glob("ranked-*.npz"))


def finished_groups(out: pathlib.Path) -> list[float]:
    """Returns when each group was finished, seconds since the epoch."""
    return sorted(p.stat().st_mtime for p in out.glob("groups/*/*.npz"))


def split(root: pathlib.Path) -> dict:
    """Measures part 1: CPU seconds of one process and of several, in turns."""
    gigabytes = _ROWS.value * WIDTH * 4 / 1e9
    spent: dict[int, list[float]] = {1: [], _TASKS.value: []}
    equal = True
    for turn in range(_ROUNDS.value):
        for count, seconds in spent.items():
            out = root / f"split-{turn}-{count}"
            children = [start(root, out, f"{i}/{count}") for i in range(count)]
            seconds.append(sum(map(finish, children)) / gigabytes)
            equal = equal and is_equal(out, root / "split-0-1")
    one, several = (min(seconds) for seconds in spent.values())
    print(f"CPU seconds a GB: {one:.2f} by one process, {several:.2f} by {_TASKS.value}")
    print(f"share of linear: {one / several:.2f}; equal to the last bit: {equal}")
    return {"cpu_seconds_a_gb": spent, "share": one / several, "equal": equal}


def kill(root: pathlib.Path) -> dict:
    """Measures part 2: work lost by SIGKILL at random moments."""
    rng, lost, equal = random.Random(0), [], True
    reference = root / "split-0-1"
    times = finished_groups(reference)
    longest = max(b - a for a, b in zip(times, times[1:], strict=False))
    duration, killed = times[-1] - times[0] + longest, 0
    while killed < _KILLS.value:
        out = root / f"killed-{killed}"
        while True:
            child, before = start(root, out, "0/1"), len(finished_groups(out))
            # Only after a new group: before, a child has nothing to lose.
            while len(finished_groups(out)) == before and child.poll() is None:
                time.sleep(0.01)
            time.sleep(rng.uniform(0, duration))
            child.kill()
            child.communicate()
            if child.returncode >= 0:
                break
            killed += 1
            # The killed group began when the last finished one ended.
            lost.append(time.time() - finished_groups(out)[-1])
        equal = equal and is_equal(out, reference)
    print(
        f"{killed} kills: {max(lost):.2f} s of work lost at most, the longest group {longest:.2f}"
    )
    print(f"equal to the last bit after {killed} kills: {equal}")
    return {"lost_seconds": lost, "longest_group": longest, "equal": equal}


def main(argv):
    """Runs both parts, or a child's part."""
    del argv
    with tempfile.TemporaryDirectory() as temporary:
        root = pathlib.Path(_WORKDIR.value or temporary)
        if _PART.value:
            compute_part(root, pathlib.Path(_OUT.value), _PART.value)
            return
        make_store(root)
        figures = {"split": split(root), "kill": kill(root)}
        record.write("groups", figures)


if __name__ == "__main__":
    app.run(main)
