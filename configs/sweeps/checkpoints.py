"""Influence and attribution in the course of training: checkpoints of one training.

    python -m experiments.sweep --config=configs/world_facts.py:pooled \\
        --sweep=configs/sweeps/checkpoints.py --workdir=DIR

Cost: one training whose checkpoints are all kept, then a pass over the corpus a point. The
learning rate falls along the training; `tokens.py` trains to the end of its schedule each time.
"""


def get_sweep():
    """Returns the grid of checkpoints, as shares of the training."""
    return {
        "fixed": {
            "methods": "trackstar,trackstar_raw,grad_cos,bm25",
            "train.keep": 0,
            "train.save_every": 50,
        },
        "axes": {"train.traced": (0.1, 0.2, 0.4, 0.6, 0.8, 1.0)},
        "plots": [
            {
                "name": "checkpoints",
                "x": "training_tokens",
                "y": ("mrr", "recall_at_10", "tail_patch_net", "tail_patch_log_net"),
                # BM25 knows no model, and is far above the others: its figures are in the table.
                "omit": {"mrr": ("bm25",), "recall_at_10": ("bm25",)},
            }
        ],
    }
