"""Damping of R, in mean eigenvalues of a block.

    python -m experiments.sweep --config=configs/world_facts.py:pooled \\
        --sweep=configs/sweeps/damping.py --workdir=DIR

Cost: one training and two stores, then three searches a point.
"""


def get_sweep():
    """Returns the grid of dampings."""
    return {
        "fixed": {"methods": "trackstar,trackstar_raw,exp4"},
        "axes": {"hessian.damping": (1e-6, 1e-5, 1e-4, 1e-3, 1e-2, 1e-1, 1.0)},
        "plots": [
            {
                "name": "damping",
                "x": "hessian.damping",
                "y": ("mrr", "recall_at_10", "tail_patch"),
                "log_x": True,
            }
        ],
    }
