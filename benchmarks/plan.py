"""The plan against the run: predicted and real seconds of every stage, in one process.

    python -m benchmarks.plan --config=configs/world_facts.py --workdir=demo --json=plan.json

The workdir is that of a finished run of `experiments.trace`; give its config and its config flags.
The plan is that of `experiments.plan` on this machine, by a short calibration; then corpus and
queries are encoded into new stores, R is computed, and the store is searched by TrackStar and the
cosine. A plan leaves compilation out, so a first round, which compiles, does not count.
"""

import dataclasses
import shutil
import statistics
import tempfile
import time

import jax
from absl import flags

from benchmarks import finished_run, record
from experiments import launch
from tda.methods import GradientKind
from tda.plan import planner
from tda.retrieval import exact
from tda.run import encode
from tda.run.run import Run
from tda.run.workdir import Workdir

_ROUNDS = flags.DEFINE_integer("rounds", 3, "plans and runs, in turns")

METHODS = "trackstar,exp3"
NAMES = {"encode corpus": "encode", "encode queries": "encode", "R": "R", "exact search": "search"}


def run(config, directory: str) -> dict:
    """Returns seconds predicted and real, by stage: medians over rounds."""
    config.methods = METHODS
    finished = finished_run.load(config, directory)
    corpus = finished.corpus
    rounds: list = []
    for turn in range(_ROUNDS.value + 1):
        predicted: dict[str, float] = {}
        for stage in planner.run(config, directory)["stages"]:
            name = NAMES[stage["stage"].split(",")[0]]
            predicted[name] = predicted.get(name, 0) + stage["seconds"]
        real = _really(finished, directory)
        if turn:  # the first compiles
            rounds.append((predicted, real))
            print(
                {k: f"{predicted[k]:.2f} s predicted, {real[k]:.2f} s real" for k in real},
                flush=True,
            )
    figures = {}
    for stage in rounds[0][1]:
        ratios = [p[stage] / r[stage] for p, r in rounds]
        figures[stage] = {
            "predicted, s": statistics.median(p[stage] for p, _ in rounds),
            "real, s": statistics.median(r[stage] for _, r in rounds),
            "predicted over real": statistics.median(ratios),
        }
    sums = [sum(p[k] for k in r) / sum(r.values()) for p, r in rounds]
    figures["all stages: predicted over real"] = statistics.median(sums)
    return figures | {"passages": len(corpus.passages), "queries": len(corpus.queries)}


def _really(run: Run, directory: str) -> dict[str, float]:
    seconds = {}
    path = tempfile.mkdtemp(prefix="plan_", dir=directory)
    try:
        clock, kind = time.perf_counter(), GradientKind(corrected=True)
        there = dataclasses.replace(run, workdir=Workdir(path))
        store, queries_QxE = encode.encode(there, kind)
        seconds["encode"] = time.perf_counter() - clock
        clock = time.perf_counter()
        scorers = finished_run.scorers(store, queries_QxE)
        seconds["R"] = time.perf_counter() - clock
        clock = time.perf_counter()
        k, correct = run.config.eval.top_k, run.corpus.correct
        exact.search(queries_QxE, store, scorers, k, correct)
        seconds["search"] = time.perf_counter() - clock
    finally:
        shutil.rmtree(path)
    return seconds


def main(config, workdir):
    """Measures, prints, and writes the figures."""
    with tempfile.TemporaryDirectory() as cache:
        # Every round makes a new encoder, and loads the programs that an earlier one compiled.
        jax.config.update("jax_compilation_cache_dir", cache)
        jax.config.update("jax_persistent_cache_min_compile_time_secs", 0)
        figures = run(config, workdir)
    print(figures)
    record.write("plan", figures)


if __name__ == "__main__":
    launch.launch(main)
