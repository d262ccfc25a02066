"""Optimizers and learning-rate schedules by name."""

import optax

_SCHEDULES = ("constant", "cosine", "linear")
OPTIMIZERS = ("adam", "adamw", "adafactor")

# The constants of optimizers: the default, and which optimizers have them.
CONSTANTS = {
    "weight_decay": (0.0, ("adamw",)),
    "b1": (0.9, ("adam", "adamw")),
    "b2": (0.99, ("adam", "adamw")),
    "eps": (1e-8, ("adam", "adamw")),
    # Inside the root: it makes a step smooth where gradients vanish, as metagradients require.
    "eps_root": (0.0, ("adam", "adamw")),
}


def constants_of(name: str) -> list[str]:
    """Returns the constants that an optimizer has."""
    return [k for k, (_, optimizers) in CONSTANTS.items() if name in optimizers]


def schedule(name: str, peak: float, steps: int, warmup: int, final: float):
    """Returns the learning rate by step: a linear warm-up to `peak`, then the named schedule.

    Args:
        name: "constant", "cosine" or "linear".
        peak: the learning rate after the warm-up.
        steps: steps of the whole training.
        warmup: steps of the warm-up, from 0.
        final: the last learning rate as a share of `peak`.

    Raises:
        ValueError: the name is unknown, or the warm-up is longer than the training.
    """
    if name not in _SCHEDULES:
        raise ValueError(f"unknown schedule {name!r}; use {', '.join(_SCHEDULES)}")
    if warmup > steps:
        raise ValueError(f"warmup={warmup} exceeds steps={steps}")
    decay_steps = max(1, steps - warmup)
    main = {
        "constant": lambda: optax.constant_schedule(peak),
        "cosine": lambda: optax.cosine_decay_schedule(peak, decay_steps, alpha=final),
        "linear": lambda: optax.linear_schedule(peak, final * peak, decay_steps),
    }[name]()
    return optax.join_schedules([optax.linear_schedule(0.0, peak, max(1, warmup)), main], [warmup])


def make_optimizer(
    name: str, learning_rate, clip: float | None = 1.0, **constants: float
) -> optax.GradientTransformation:
    """Returns Adam, AdamW or Adafactor, after clipping by global norm.

    Args:
        name: "adam", "adamw" or "adafactor".
        learning_rate: a number or a schedule.
        clip: largest global norm of the gradient; None or 0 for no clipping.
        **constants: those of `CONSTANTS` that the optimizer has; `weight_decay` is decoupled.

    Raises:
        ValueError: the name is unknown, or the optimizer would ignore a constant.
    """
    if name not in OPTIMIZERS:
        raise ValueError(f"unknown optimizer {name!r}; use {', '.join(OPTIMIZERS)}")
    defaults = {k: CONSTANTS[k][0] for k in constants_of(name)}
    ignored = [
        k for k, x in constants.items() if k not in defaults and x != CONSTANTS.get(k, (None,))[0]
    ]
    if ignored:
        listed = ", ".join(f"{k}={constants[k]}" for k in ignored)
        raise ValueError(
            f"{listed} would have no effect with the optimizer {name!r}, whose constants are: "
            f"{', '.join(defaults) or 'none'}; leave it out, or use another optimizer"
        )
    if name == "adafactor":
        # Its decay rate rises with the step (Shazeer & Stern 2018, section 7.2).
        core = optax.adafactor(
            learning_rate, min_dim_size_to_factor=32, multiply_by_parameter_scale=False
        )
    else:
        chosen = {k: constants.get(k, default) for k, default in defaults.items()}
        core = getattr(optax, name)(learning_rate, **chosen)
    return optax.chain(optax.clip_by_global_norm(clip), core) if clip else core
