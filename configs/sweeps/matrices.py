"""Which of the model's matrices carry attribution: attention, MLP, the embedding, all.

    python -m experiments.sweep --config=configs/world_facts.py:pooled \\
        --sweep=configs/sweeps/matrices.py --workdir=DIR

Cost: one training, then a pass over the corpus a point.
"""


def get_sweep():
    """Returns the grid of regular expressions on parameters."""
    return {
        "fixed": {"methods": "trackstar,trackstar_raw,grad_cos"},
        "axes": {
            "gradients.include": (
                "attention/",
                "mlp/",
                "embedding",
                "attention/|mlp/",
                "attention/|mlp/|embedding",
            )
        },
        "plots": [
            {
                "name": "matrices",
                "x": "gradients.include",
                "y": ("mrr", "recall_at_10", "tail_patch"),
            }
        ],
    }
