"""Kills a whole run with SIGKILL at random moments, and continues it until it is finished.

    python -m benchmarks.kills --kills=100 -- --config=configs/world_facts.py \\
        --config.train.save_every=20

The flags of `experiments.trace` follow `--`. A program lives up to --longest seconds, and training
resumes from its last checkpoint: one every 20 steps is there before the kill, one every 500 never.
The same run without a kill comes first; then every file that a run leaves for its user is compared
byte for byte.
"""

import collections
import json
import pathlib
import random
import shutil
import subprocess
import sys
import tempfile
import time

from absl import app, flags

from benchmarks import record
from tda.runtime import atomic_file

_WORKDIR = flags.DEFINE_string("workdir", None, "where the runs are made; temporary if unset")
_KILLS = flags.DEFINE_integer("kills", 100, "kills, at least")
_LONGEST = flags.DEFINE_float("longest", 30.0, "seconds that a program lives, at most")
_SEED = flags.DEFINE_integer("seed", 0, "seed of the moments")

# The files that a run leaves for its user and for other programs.
_KEPT = ("results", "retrieval", "stores", "metrics.json", "table.md")


def start(workdir: pathlib.Path, arguments: list[str]) -> subprocess.Popen:
    """Starts a run, or continues one."""
    command = [sys.executable, "-m", "experiments.trace", f"--workdir={workdir}", *arguments]
    with open(f"{workdir}.log", "ab") as log:
        return subprocess.Popen(command, stdout=log, stderr=subprocess.STDOUT)


def contents(workdir: pathlib.Path) -> dict[str, bytes]:
    """Returns the files of a run by their names."""
    paths = [p for name in _KEPT for p in [workdir / name, *(workdir / name).rglob("*")]]
    return {str(p.relative_to(workdir)): p.read_bytes() for p in paths if p.is_file()}


def last_line(workdir: pathlib.Path) -> str:
    """Returns the name of the last work in a run's log."""
    text = pathlib.Path(f"{workdir}.log").read_bytes().decode(errors="replace")
    lines = [line for line in text.splitlines() if line.strip()]
    return lines[-1].split(":")[0].strip()[:40] if lines else "start"


def run_with_kills(root: pathlib.Path, arguments: list[str]) -> dict:
    """Kills runs until there were enough kills and the last run is finished.

    The figures so far are in `kills.json`, from which a later call continues.
    """
    reference, file = root / "alone", root / "kills.json"
    figures = {"kills": 0, "runs": 0, "files": 0, "differing": [], "killed_at": {}}
    if file.exists():
        figures = json.loads(file.read_text())
    elif start(reference, arguments).wait():
        raise RuntimeError(f"the run failed; see {reference}.log")
    expected = contents(reference)
    figures["files"] = len(expected)
    while figures["kills"] < _KILLS.value:
        workdir = root / f"killed-{figures['runs']}"
        child = start(workdir, arguments)
        rng = random.Random(f"{_SEED.value} {figures['kills']}")
        try:
            status = child.wait(rng.uniform(0, _LONGEST.value))
        except subprocess.TimeoutExpired:
            child.kill()
            child.wait()
            moments = collections.Counter(figures["killed_at"])
            moments[last_line(workdir)] += 1
            figures |= {"kills": figures["kills"] + 1, "killed_at": dict(moments.most_common())}
            # After the last kill the run is continued to its end.
            if figures["kills"] < _KILLS.value:
                atomic_file.write_json(file, figures)
                continue
            status = start(workdir, arguments).wait()
        if status:
            raise RuntimeError(f"a run ended with {status}: {workdir}.log; {figures}")
        found = contents(workdir)
        differing = {n for n in expected | found if expected.get(n) != found.get(n)}
        figures["differing"] = sorted(differing.union(figures["differing"]))
        figures["runs"] += 1
        if not differing:  # as large as the reference
            shutil.rmtree(workdir)
        atomic_file.write_json(file, figures)
        print(f"{time.strftime('%X')} {figures}", flush=True)
    return figures


def main(argv):
    """Prints whether the files are equal."""
    with tempfile.TemporaryDirectory() as temporary:
        root = pathlib.Path(_WORKDIR.value or temporary)
        root.mkdir(parents=True, exist_ok=True)
        figures = run_with_kills(root, argv[1:])
    print(
        f"{figures['kills']} kills in {figures['runs']} runs: of {figures['files']} files "
        f"{len(figures['differing'])} differ {figures['differing'][:5]}; killed at "
        f"{figures['killed_at']}"
    )
    record.write("kills", figures)


if __name__ == "__main__":
    app.run(main)
