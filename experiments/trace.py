"""Trains a model, encodes its corpus, and traces queries back to passages.

    python -m experiments.trace --config=configs/world_facts.py --workdir=DIR

A killed run continues where it stopped; a stage whose output is there and matches is skipped. Many
machines share the work as one run (--distributed), as tasks of an array (--groups=I/N), or as
workers of Ray (--engine=ray): docs/pods.md.
"""

import functools

from absl import flags

from tda.run import engines, stages
from tda.run.workdir import Workdir

from .launch import PLUGIN, launch

_GROUPS = flags.DEFINE_string(
    "groups", None, "I/N: task I of an array of N. none: train and prepare for other programs."
)
_PATIENCE = flags.DEFINE_float(
    "patience", 600.0, "Seconds that a task waits for the next result of the others; then it ends."
)
_ENGINE = flags.DEFINE_enum("engine", None, ["ray"], "Who computes, if not this program.")
_ADDRESS = flags.DEFINE_string("ray_address", None, "Of the Ray cluster; else RAY_ADDRESS, or new.")
_WORKERS = flags.DEFINE_integer("workers", 0, "Ray workers; 0: as many as the cluster holds.")
_RESOURCES = flags.DEFINE_list("worker_resources", ["CPU=1"], "Of each, such as CPU=4,GPU=1.")


@functools.cache
def _read_flags() -> engines.EngineFlags:
    cluster = _ADDRESS.value, _WORKERS.value, _RESOURCES.value
    return engines.read_flags(_GROUPS.value, _PATIENCE.value, _ENGINE.value, cluster, PLUGIN.value)


def main(config, workdir):
    """Runs all stages and prints the table."""
    directory = Workdir(workdir)
    stages.trace(config, directory, engines.choose_engine(config, directory, _read_flags()))


if __name__ == "__main__":
    launch(main, tells_idle_keys=True, is_alone=lambda: _read_flags().is_alone)
