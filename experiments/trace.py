"""Trains a model, encodes its corpus, and traces queries back to passages.

    python -m experiments.trace --config=configs/world_facts.py --workdir=DIR

Every stage is resumed where it was killed, and skipped when its output is there and matches.
"""

from experiments.launch import launch
from tda.run import stages
from tda.run.workdir import Workdir


def main(config, workdir):
    """Runs all stages and prints the table."""
    stages.trace(config, Workdir(workdir))


if __name__ == "__main__":
    launch(main)
