"""Three trainings that differ in their seed alone: mean and spread of every figure.

    python -m experiments.sweep --config=configs/world_facts.py:pooled \\
        --sweep=configs/sweeps/seeds.py --workdir=DIR

Cost: three runs of the config. `seeds.csv` has all figures, `seeds.md` the headline.
"""


def get_sweep():
    """Returns the seeds."""
    return {
        "axes": {"seed": (0, 1, 2)},
        "plots": [
            {"name": "seeds", "x": "method", "y": ("mrr", "recall_at_10", "tail_patch")},
        ],
    }
