"""Influence and attribution by the model's size, with a block of dimensions for each matrix.

    python -m experiments.sweep --config=configs/trex_sweeps.py \\
        --sweep=configs/sweeps/sizes_matrix.py --workdir=DIR

Cost: a training and a pass over the corpus a point. Larger models have more matrices: blocks
are the smaller, so that all have about 58,500 dimensions. `sizes.py` has few, in few blocks.
"""


def get_sweep():
    """Returns the grid of sizes, each with a suitable learning rate and side of the blocks."""
    return {
        "fixed": {
            "methods": "trackstar,trackstar_raw,grad_cos,bm25",
            "gradients.include": ".",
            "projection.pooling": "matrix",
        },
        "axes": {
            "model.size, train.learning_rate, projection.side": (
                ("tiny", 3e-3, 45),
                ("mini", 1.5e-3, 37),
                ("small", 1.5e-3, 32),
            )
        },
        "plots": [
            {
                "name": "sizes_matrix",
                "x": "parameters",
                "y": ("mrr", "recall_at_10", "tail_patch_net", "tail_patch_log_net"),
                # BM25 knows no model, and is far above the others: its figures are in the table.
                "omit": {"mrr": ("bm25",), "recall_at_10": ("bm25",)},
                "log_x": True,
            }
        ],
    }
