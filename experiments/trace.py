"""Trains a model, encodes its corpus, and traces queries back to passages.

    python -m experiments.trace --config=configs/world_facts.py --workdir=DIR

A killed run continues where it stopped; a stage whose output is there and matches is skipped. Many
machines share the work as one run (--distributed), as tasks of an array (--groups=I/N), or as
workers of Ray (--engine=ray): docs/pods.md.
"""

from absl import flags

from tda.run import engines, stages
from tda.run.workdir import Workdir

from .launch import launch

_GROUPS = flags.DEFINE_string(
    "groups", None, "I/N: task I of an array of N; none: train and prepare for an array."
)
_PATIENCE = flags.DEFINE_float(
    "patience", 600.0, "Seconds that a task waits for the next result of the others; then it ends."
)


def main(config, workdir):
    """Runs all stages and prints the table."""
    directory = Workdir(workdir)
    engine = engines.choose_engine(config, directory, _GROUPS.value, _PATIENCE.value)
    stages.trace(config, directory, engine)


if __name__ == "__main__":
    launch(main, tells_idle_keys=True, is_task=lambda: _GROUPS.value is not None)
