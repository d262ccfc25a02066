"""How many dimensions gradients are projected to.

    python -m experiments.sweep --config=configs/world_facts.py:pooled \\
        --sweep=configs/sweeps/dims.py --workdir=DIR

Cost: one training, then a pass over the corpus a point, and two stores.
"""


def get_sweep():
    """Returns the grid of sides: a block has side × side dimensions."""
    return {
        "fixed": {"methods": "trackstar,trackstar_raw,grad_cos,exp3"},
        "axes": {"projection.side": (4, 8, 16, 32, 48)},
        "plots": [
            {
                "name": "dims",
                "x": "dimensions",
                "y": ("mrr", "recall_at_10", "tail_patch"),
                "log_x": True,
            }
        ],
    }
