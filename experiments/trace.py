"""Trains a model, encodes its corpus, and traces queries back to passages.

    python -m experiments.trace --config=configs/world_facts.py --workdir=DIR

A killed run continues where it stopped; a stage whose output is there and matches is skipped.
"""

from tda.run import stages
from tda.run.workdir import Workdir

from .launch import launch


def main(config, workdir):
    """Runs all stages and prints the table."""
    stages.trace(config, Workdir(workdir))


if __name__ == "__main__":
    launch(main, tells_idle_keys=True)
