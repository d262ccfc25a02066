"""Where does the optimizer correction help? Correction × R × dimensions.

    python -m experiments.sweep --config=configs/world_facts.py:pooled \\
        --sweep=configs/sweeps/correction.py --workdir=DIR

Cost: one training, then three passes over the corpus for each number of dimensions. The table has
the same by groups of queries: whether the model states the fact, its frequency, its relation.
"""


def get_sweep():
    """Returns the grid: three corrections under R = I, R_train and the mixture, at three sizes."""
    corrected = "exp3,exp5,trackstar"
    return {
        "axes": {
            "gradients.correction, methods": (
                # Rows without a correction are asked once.
                ("factored", f"exp2,exp4,trackstar_raw,{corrected}"),
                ("low_rank(4)", corrected),
                ("adam", corrected),
            ),
            "projection.side": (8, 16, 32),
        },
        "plots": [
            {
                "name": "correction",
                "x": "dimensions",
                "y": ("mrr", "recall_at_10", "tail_patch"),
                "lines": ["method", "gradients.correction"],
                "log_x": True,
            }
        ],
    }
