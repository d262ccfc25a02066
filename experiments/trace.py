"""Trains a model, encodes its corpus, and traces queries back to passages.

    python -m experiments.trace --config=configs/world_facts.py --workdir=DIR

A killed run continues where it stopped; a stage whose output is there and matches is skipped. Many
machines share the work as one run (--distributed), as tasks of an array (--groups=I/N), or as
workers of Ray (--engine=ray): docs/pods.md.
"""

from tda.run import stages
from tda.run.workdir import Workdir

from . import engine_flags
from .launch import launch


def main(config, workdir):
    """Runs all stages and prints the table."""
    directory = Workdir(workdir)
    stages.trace(config, directory, engine_flags.choose(config, directory))


if __name__ == "__main__":
    launch(main, tells_idle_keys=True, read_engine=engine_flags.read)
