"""Where does the optimizer correction help? Correction × R × how far the training has come.

    python -m experiments.sweep --config=configs/world_facts.py:pooled \\
        --sweep=configs/sweeps/correction_training.py --workdir=DIR

Cost: one training whose checkpoints are all kept, then a pass over the corpus a point. The
table has the same by groups of queries: whether the model states the fact, its frequency, its
relation.
"""


def get_sweep():
    """Returns the grid: R = I, R_train and the mixture, with and without, along one training."""
    return {
        "fixed": {
            "methods": "exp2,exp3,exp4,exp5,trackstar_raw,trackstar",
            "train.keep": 0,
        },
        "axes": {"train.traced": (0.1, 0.25, 0.5, 1.0)},
        "plots": [
            {
                "name": "correction_training",
                "x": "training_tokens",
                "y": ("mrr", "recall_at_10", "tail_patch"),
            }
        ],
    }
