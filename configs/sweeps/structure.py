"""R dense and as a Kronecker product, by the side of a block for each matrix.

    python -m experiments.sweep --config=configs/world_facts.py:pooled \\
        --sweep=configs/sweeps/structure.py --workdir=DIR

Cost: one training, then a pass over the corpus for each side. A dense R of side 48 is left out:
28 blocks of 2,304 columns.
"""


def get_sweep():
    """Returns the grid of sides and structures, on 200 of the queries."""
    return {
        "fixed": {
            "methods": "exp3,exp5,trackstar",
            "projection.pooling": "matrix",
            "store.dtype": "bfloat16",
            "eval.queries": 200,
            "eval.tail_patch_queries": 0,
            "eval.samples": 0,
        },
        "axes": {
            "projection.side, hessian.structure": (
                *(
                    (side, structure)
                    for side in (8, 16, 24)
                    for structure in ("dense", "kronecker")
                ),
                (48, "kronecker"),
            )
        },
        "plots": [
            {
                "name": "structure",
                "x": "dimensions",
                "y": ("mrr", "recall_at_10"),
                "lines": ["method", "hessian.structure"],
                "log_x": True,
            }
        ],
    }
