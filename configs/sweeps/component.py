"""k of the mixing rule: the component at which the spectra of R_train and R_eval are made equal.

    python -m experiments.sweep --config=configs/world_facts.py:pooled \\
        --sweep=configs/sweeps/component.py --workdir=DIR

Cost: one training and two stores, then two searches a point. The usual k (1000 of 65,536, in
proportion to the dimensions) is a dashed line. The config needs at least 1,024 dimensions.
"""


def get_sweep():
    """Returns the grid of k."""
    return {
        "fixed": {"methods": "trackstar,trackstar_raw"},
        # 0 is the usual k.
        "axes": {"hessian.component": (0, 1, 4, 16, 64, 256, 1024)},
        "plots": [
            {
                "name": "component",
                "x": "component",
                "y": ("mrr", "recall_at_10", "tail_patch"),
                "log_x": True,
                "mark": {"hessian.component": 0},
                "mark_label": "the usual k",
            }
        ],
    }
