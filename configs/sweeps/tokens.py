"""Influence and attribution by training tokens: each number of epochs is a training of its own.

    python -m experiments.sweep --config=configs/world_facts.py:pooled \\
        --sweep=configs/sweeps/tokens.py --workdir=DIR

Cost: a training (31 epochs in all) and a pass over the corpus a point.
"""


def get_sweep():
    """Returns the grid of epochs."""
    return {
        "fixed": {"methods": "trackstar,trackstar_raw,grad_cos,bm25"},
        "axes": {"train.epochs": (1.0, 2.0, 4.0, 8.0, 16.0)},
        "plots": [
            {
                "name": "tokens",
                "x": "training_tokens",
                "y": ("mrr", "recall_at_10", "tail_patch_net", "tail_patch_log_net"),
                # BM25 knows no model, and is far above the others: its figures are in the table.
                "omit": {"mrr": ("bm25",), "recall_at_10": ("bm25",)},
                "log_x": True,
            }
        ],
    }
