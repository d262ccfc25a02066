"""The learning rate of the tail-patch step, its optimizer's state restored or fresh.

    python -m experiments.sweep --config=configs/world_facts.py:pooled \\
        --sweep=configs/sweeps/tail_patch_rate.py --workdir=DIR

Cost: one training, two stores and one search; then a step for each pair of a point.
"""


def get_sweep():
    """Returns the grid of rates."""
    return {
        "axes": {
            "eval.tail_patch_learning_rate": (3e-5, 1e-4, 3e-4, 1e-3, 3e-3),
            "eval.tail_patch_state": ("restored", "fresh"),
        },
        "plots": [
            {
                "name": "tail_patch_rate",
                "x": "eval.tail_patch_learning_rate",
                "y": ("tail_patch_net", "tail_patch_log_net"),
                "lines": ["method", "eval.tail_patch_state"],
                "log_x": True,
            }
        ],
    }
