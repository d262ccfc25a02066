"""Runs a grid of traces, and gathers what they measured into a table and plots.

    python -m experiments.sweep --config=configs/world_facts.py \\
        --sweep=configs/sweeps/lambda.py --workdir=DIR

Points that share a training or gradient stores share them: what a swept key leaves as it is, is
made once. Killed at any moment, the same command goes on; a point that is finished is not run
again, unless what its config names (data.sentences, data.facts, model.pretrained, dense.model) has
other contents now (other text to train on is refused: give another workdir). `--parallel=N` runs N
points at a time, each in a process of its own; `--list` prints a command for each point instead,
for a cluster's scheduler (points that need what another is making wait for it; the same command
without `--list` gathers what they left). Points that run together on one accelerator share its
memory: XLA_PYTHON_CLIENT_MEM_FRACTION says how much each may take.

    DIR/NAME/                what the sweep of configs/sweeps/NAME.py found:
        sweep.csv            a row for each point, method and metric
        differences.csv      paired differences between a point's methods, with intervals
        seeds.md             where the seed is swept: mean and spread over its values,
                             of all figures in seeds.csv and seeds_differences.csv
        PLOT.png, PLOT.svg   the sweep file's plots
    DIR/points/POINT/        metrics.json, results/METHOD.jsonl and the log of a point
    DIR/runs/                the trainings and their stores

Sweeps may share a DIR, and with it trainings and stores.
"""

import pathlib
import shlex
import sys

import jax
from absl import flags

from experiments.launch import launch
from tda import methods
from tda.run.workdir import Workdir
from tda.sweep import grid, points, report
from tda.sweep.grid import Point

SWEEP = flags.DEFINE_string("sweep", None, "File of the sweep, such as configs/sweeps/lambda.py.")
PARALLEL = flags.DEFINE_integer("parallel", 1, "How many points run at a time.", lower_bound=1)
LIST = flags.DEFINE_bool("list", False, "Print a command for each point, and run none.")
POINT = flags.DEFINE_string("point", None, "Run this point alone, in this process.")
PLOTS = flags.DEFINE_bool("plots", True, "Draw the sweep's plots; needs matplotlib.")

_OWN_FLAGS = ("parallel", "list", "nolist", "point", "plots", "noplots")


def main(config, workdir):
    """Runs the sweep, a point of it, or lists its points."""
    directory = pathlib.Path(workdir) if LIST.value else Workdir(workdir).path
    sweep = grid.load(SWEEP.value, config)
    name = pathlib.Path(SWEEP.value).stem
    if name in ("points", "runs"):
        raise ValueError(f"--sweep={SWEEP.value}: {name}/ holds all sweeps' work; rename it")
    if jax.process_count() > 1:
        raise ValueError("a sweep's points are processes of their own; leave out --distributed")
    for point in sweep.points:
        methods.parse(point.config.methods)
    if POINT.value is not None:
        by_name = {p.name: p for p in sweep.points}
        if POINT.value not in by_name:
            raise ValueError(f"--point={POINT.value}: there are {', '.join(by_name)}")
        points.run_point(by_name[POINT.value], directory)
        return
    for point in sweep.points:
        if not points.is_finished(point, directory):
            points.check(point)
    if LIST.value:
        for point in sweep.points:
            print(shlex.join(command(point)))
        return
    if PLOTS.value and sweep.plots:
        points.check_plots()
    failed = points.run_all(sweep.points, directory, PARALLEL.value, command)
    there = [p for p in sweep.points if points.is_finished(p, directory)]
    why = "what it was made from has changed since"
    failed |= {p.name: why for p in sweep.points if p not in there and p.name not in failed}
    points.check_alike(there, directory)
    if there:
        files = report.write(sweep, points.read(there, directory), directory / name, PLOTS.value)
        print(f"{len(there)} of {len(sweep.points)} points: {', '.join(map(str, files))}")
    if failed:
        told = "\n  ".join(f"{name}: {why}" for name, why in failed.items())
        raise ValueError(f"{len(failed)} points failed; the same command tries again\n  {told}")


def command(point: Point) -> list[str]:
    """The command line that runs a point alone."""
    kept, skip = [], False
    for argument in sys.argv[1:]:
        name, equals, _ = argument.lstrip("-").partition("=")
        own = argument.startswith("-") and name in _OWN_FLAGS
        if not own and not skip:
            kept.append(argument)
        skip = own and not equals and name in ("parallel", "point")
    return [sys.executable, "-m", "experiments.sweep", *kept, f"--point={point.name}"]


def _leave_devices_to_points(arguments: list[str]) -> None:
    """A process that only starts others must not take the accelerator's memory from them."""
    if not any(a.startswith("-") and a.lstrip("-").split("=")[0] == "point" for a in arguments):
        jax.config.update("jax_platforms", "cpu")


if __name__ == "__main__":
    flags.mark_flag_as_required("sweep")
    _leave_devices_to_points(sys.argv[1:])
    launch(main)
