"""What the projection and the damping of R cost against retraining, over three seeds.

    python -m experiments.sweep --config=configs/counterfactual_world.py --board \\
        --sweep=configs/sweeps/projection.py --workdir=DIR

Whole gradients are scored too, which no projection touches.
Cost: for each of three seeds a training and 101 retrainings, then a minute a point: 20 minutes on
2 CPU cores with --parallel=2, and 0.3 GB of disk.
Expected LDS of TrackStar with a Kronecker R: 0.545 at side 16, 0.604 at 32, 0.636 at 64; with a
dense one 0.498 at 16, 0.483 at 32.
"""

# Relative to the mean eigenvalue of a block; −1 is the default, which goes by the data.
_BY_DATA = -1.0


def get_sweep():
    """Returns the grid of sides, structures and dampings, by seed."""
    sides = [(side, "dense", _BY_DATA) for side in (4, 8, 16, 32)]
    sides += [(side, "kronecker", _BY_DATA) for side in (16, 32, 48, 64)]
    dampings = (1e-4, 1e-3, 1e-2, 1e-1, 1.0, 10.0)
    return {
        "fixed": {
            "methods": "grad_dot,exp3,exp5,trackstar,ekfac",
            "counterfactual.methods": "dot_whole,adam_dot_whole,adam_cosine_whole,ekfac_whole",
            "counterfactual.fractions": "0.05",
            "counterfactual.orders": 1,
            "counterfactual.own_top": 0,
            "eval.tail_patch_queries": 0,
        },
        "axes": {
            "seed": (0, 1, 2),
            "projection.side, hessian.structure, hessian.damping": (
                *sides,
                *((16, "dense", damping) for damping in dampings),
            ),
        },
        "plots": [
            {
                "name": "sides",
                "x": "projection.side",
                "y": ("mrr",),
                "lines": ["method", "hessian.structure"],
                "where": {"hessian.damping": _BY_DATA},
                "log_x": True,
            },
            {
                "name": "dampings",
                "x": "hessian.damping",
                "y": ("mrr",),
                "where": {"hessian.damping": dampings},
                "log_x": True,
            },
        ],
    }
