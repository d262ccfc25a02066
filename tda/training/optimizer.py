"""Optimizers by name, and a record of the constants that attribution needs to know afterwards."""

import optax

_SCHEDULES = ("constant", "cosine", "linear")


def schedule(name: str, peak: float, steps: int, warmup: int, final: float):
    """Learning rate by step: `warmup` steps from 0 to `peak`, then `name` down to `final` × peak.

    Raises:
        ValueError: unknown name, or more warm-up than steps.
    """
    if name not in _SCHEDULES:
        raise ValueError(f"unknown schedule {name!r}; use {', '.join(_SCHEDULES)}")
    if warmup > steps:
        raise ValueError(f"warmup={warmup} exceeds steps={steps}")
    rest = max(1, steps - warmup)
    after = {
        "constant": lambda: optax.constant_schedule(peak),
        "cosine": lambda: optax.cosine_decay_schedule(peak, rest, alpha=final),
        "linear": lambda: optax.linear_schedule(peak, final * peak, rest),
    }[name]()
    return optax.join_schedules([optax.linear_schedule(0.0, peak, max(1, warmup)), after], [warmup])


def make_optimizer(
    name: str,
    learning_rate,
    b1: float = 0.9,
    b2: float = 0.99,
    eps: float = 1e-8,
    weight_decay: float = 0.0,
    clip: float | None = 1.0,
) -> optax.GradientTransformation:
    """Adam(W) or Adafactor behind clipping by global norm.

    Args:
        name: "adam", "adamw" or "adafactor".
        learning_rate: a number or a schedule.
        b1, b2, eps: Adam's constants; Adafactor has none of them (its decay rises with the step).
        weight_decay: decoupled, of "adamw" alone.
        clip: global norm that gradients are clipped to; None or 0 for none.

    Raises:
        ValueError: unknown name.
    """
    if name == "adam":
        core = optax.adam(learning_rate, b1=b1, b2=b2, eps=eps)
    elif name == "adamw":
        core = optax.adamw(learning_rate, b1=b1, b2=b2, eps=eps, weight_decay=weight_decay)
    elif name == "adafactor":
        core = optax.adafactor(
            learning_rate, min_dim_size_to_factor=32, multiply_by_parameter_scale=False
        )
    else:
        raise ValueError(f"unknown optimizer {name!r}; use adam, adamw or adafactor")
    return optax.chain(optax.clip_by_global_norm(clip), core) if clip else core
