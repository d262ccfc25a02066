"""Optimizers and learning-rate schedules by name."""

import optax

_SCHEDULES = ("constant", "cosine", "linear")


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
    name: str,
    learning_rate,
    b1: float = 0.9,
    b2: float = 0.99,
    eps: float = 1e-8,
    weight_decay: float = 0.0,
    clip: float | None = 1.0,
) -> optax.GradientTransformation:
    """Returns Adam, AdamW or Adafactor, after clipping by global norm.

    Args:
        name: "adam", "adamw" or "adafactor".
        learning_rate: a number or a schedule.
        b1, b2, eps: Adam's constants; unused by Adafactor, whose decay rate rises with the step.
        weight_decay: decoupled weight decay, used by "adamw" alone.
        clip: largest global norm of the gradient; None or 0 for no clipping.

    Raises:
        ValueError: the name is unknown.
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
