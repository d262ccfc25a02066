"""Compares methods with retraining: a bank of retrained models, and a board.

    python -m experiments.counterfactual --config=configs/counterfactual_world.py --workdir=DIR

Continues the trained model on the corpus, and again without each of many random sets of passages;
scores every passage by each method; and writes how well sums of scores predict the retrainings
(`board.md`, `board.json`). A killed run continues where it stopped. Many machines share the
retrainings as in `experiments.trace`: docs/pods.md.
"""

from tda.run import board
from tda.run.workdir import Workdir
from tda.runtime.command import of_main

from . import engine_flags
from .launch import launch


def main(config, workdir):
    """Trains, retrains, scores, and prints the board."""
    directory = Workdir(workdir)
    board.measure(config, directory, engine_flags.choose(config, directory, has_board=True))
    print(f"\nfiles: {workdir}/board.md, board.json, counterfactual/bank.json, bank.npz")
    print(f"to look at them: {of_main('view')} --workdir={workdir}")


if __name__ == "__main__":
    launch(main, read_engine=engine_flags.read)
