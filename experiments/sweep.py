"""Runs a grid of traces, and gathers their metrics into a table and plots.

    python -m experiments.sweep --config=configs/world_facts.py \\
        --sweep=configs/sweeps/lambda.py --workdir=DIR

Points share a training or gradient stores: whatever the swept keys do not affect is computed once.
A killed sweep continues where it stopped. A finished point is run again only if a file that its
config names (corpus, queries, a pretrained model, a sentence encoder, a judge's model) has other
contents now; if the text to train on has changed, the sweep needs another workdir. `--parallel=N`
runs N points at a time, each in a process of its own; `--list` prints a command for each point
instead, for a cluster's scheduler (a point waits for what another is computing; the same command
without `--list` gathers the results). Points that run together on one accelerator share its memory:
XLA_PYTHON_CLIENT_MEM_FRACTION limits what each takes.

    DIR/NAME/                the results of configs/sweeps/NAME.py (with --board: DIR/NAME_board/):
        sweep.csv            a row for each point, method and metric
        differences.csv      paired differences between a point's methods, with intervals
        seeds.md             if the seed is swept: mean and spread over its values,
                             of all figures in seeds.csv and seeds_differences.csv
        PLOT.png, PLOT.svg   the sweep file's plots
    DIR/points/POINT/        metrics.json, results/METHOD.jsonl and the log of a point
    DIR/runs/                the trainings and their stores

Several sweeps may use one DIR, and share trainings and stores.
"""

import pathlib
import shlex
import sys

import jax
from absl import flags

from tda import methods
from tda.reports import plots
from tda.run.workdir import Workdir
from tda.sweep import grid, points, report
from tda.sweep.grid import Point

from .command_line import find_packaged
from .launch import launch

SWEEP = flags.DEFINE_string("sweep", None, "File of the sweep, or a packaged one's name: lambda.")
PARALLEL = flags.DEFINE_integer("parallel", 1, "Points to run at a time.", lower_bound=1)
LIST = flags.DEFINE_bool("list", False, "Print a command for each point, and run none.")
POINT = flags.DEFINE_string("point", None, "Run this point alone, in this process.")
BOARD = flags.DEFINE_bool("board", False, "Hold each point against retraining, too: LDS.")
PLOTS = flags.DEFINE_bool("plots", True, "Draw the sweep's plots; needs matplotlib.")

# Flags that do not belong to a point's command.
_SWEEP_FLAGS = ("parallel", "list", "nolist", "point", "plots", "noplots")


def main(config, workdir):
    """Runs the sweep, or a point of it, or lists its points."""
    # --list writes nothing, not even the directory.
    directory = pathlib.Path(workdir) if LIST.value else Workdir(workdir).path
    sweep = grid.load(find_packaged(SWEEP.value, "sweeps"), config, BOARD.value)
    name = pathlib.Path(SWEEP.value).stem
    if name in ("points", "runs"):
        raise ValueError(f"--sweep={SWEEP.value}: {name}/ holds the work of all sweeps; rename it")
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
    if PLOTS.value and sweep.plots and not plots.is_installed():  # before hours of work
        raise ValueError("plots need matplotlib: pip install 'tda-jax[plots]', or give --noplots")
    errors = points.run_all(sweep.points, directory, PARALLEL.value, command)
    # The finished points are gathered even if others failed.
    finished = [p for p in sweep.points if points.is_finished(p, directory)]
    stale = [p.name for p in sweep.points if p not in finished and p.name not in errors]
    errors |= dict.fromkeys(stale, "a file that it was run from has changed since")
    points.check_alike(finished, directory)
    if finished:
        out = directory / (f"{name}_board" if BOARD.value else name)
        files = report.write(sweep, points.read(finished, directory), out, PLOTS.value)
        print(f"{len(finished)} of {len(sweep.points)} points: {', '.join(map(str, files))}")
    if errors:
        lines = "\n  ".join(f"{name}: {error}" for name, error in errors.items())
        raise ValueError(f"{len(errors)} points failed; the same command tries again\n  {lines}")


def command(point: Point) -> list[str]:
    """Returns the command line that runs a point alone: this one, without the sweep's own flags."""
    arguments, is_value = [], False
    for argument in sys.argv[1:]:
        name, equals, _ = argument.lstrip("-").partition("=")
        is_flag = argument.startswith("-") and name in _SWEEP_FLAGS
        if not is_flag and not is_value:
            arguments.append(argument)
        is_value = is_flag and not equals and name in ("parallel", "point")
    # tda.experiments.sweep in an installed copy.
    return [sys.executable, "-m", f"{__package__}.sweep", *arguments, f"--point={point.name}"]


def _leave_devices_to_points(arguments: list[str]) -> None:
    """Keeps a process that only starts others from taking the accelerator's memory."""
    if not any(a.startswith("-") and a.lstrip("-").split("=")[0] == "point" for a in arguments):
        jax.config.update("jax_platforms", "cpu")


if __name__ == "__main__":
    flags.mark_flag_as_required("sweep")
    _leave_devices_to_points(sys.argv[1:])
    launch(main)
