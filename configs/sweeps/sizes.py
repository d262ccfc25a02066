"""Influence and attribution by the model's size.

    python -m experiments.sweep --config=configs/world_facts.py:pooled \\
        --sweep=configs/sweeps/sizes.py --workdir=DIR

Cost: a training and a pass over the corpus a point. A block of dimensions for each layer's
attention and MLP would give larger models more of them: the number of blocks is the same here.
"""


def get_sweep():
    """Returns the grid of sizes, each with a learning rate that suits it."""
    return {
        "fixed": {"methods": "trackstar,trackstar_raw,grad_cos,bm25", "projection.blocks": 4},
        "axes": {
            "model.size, train.learning_rate": (
                ("tiny", 3e-3),
                ("mini", 1.5e-3),
                ("small", 1.5e-3),
            )
        },
        "plots": [
            {
                "name": "sizes",
                "x": "parameters",
                "y": ("mrr", "recall_at_10", "tail_patch_net", "tail_patch_log_net"),
                # BM25 knows no model, and is far above the others: its figures are in the table.
                "omit": {"mrr": ("bm25",), "recall_at_10": ("bm25",)},
                "log_x": True,
            }
        ],
    }
