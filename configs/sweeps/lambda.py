"""λ of TrackStar's mixture, from R_train alone (0) to R_eval alone (1), and the rule's own choice.

    python -m experiments.sweep --config=configs/world_facts.py:pooled \\
        --sweep=configs/sweeps/lambda.py --workdir=DIR

Cost: one training and two stores, then two searches a point. The rule's λ is a dashed line.
"""


def get_sweep():
    """Returns the grid of λ."""
    return {
        "fixed": {"methods": "trackstar,trackstar_raw"},
        # −1 is the rule: λ σ_eval[k] = (1 − λ) σ_train[k].
        "axes": {"hessian.weight": (-1.0, 0.0, 0.2, 0.4, 0.6, 0.8, 0.9, 0.95, 0.99, 1.0)},
        "plots": [
            {
                "name": "lambda",
                "x": "lambda",
                "y": ("mrr", "recall_at_10", "tail_patch"),
                "mark": {"hessian.weight": -1.0},
                "mark_label": "the rule's λ",
            }
        ],
    }
