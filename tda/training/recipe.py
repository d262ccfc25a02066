"""How a model is trained on passages, each of them an example: optimizer, schedule and batches."""

import dataclasses
import math
from collections.abc import Callable
from typing import Any

import optax

from tda.runtime.fingerprint import python_value
from tda.training import optimizer

# What each number of a recipe may be, in words and as a test.
_ABOVE_0 = ("a number above 0", lambda x: 0 < x < math.inf)
_0_OR_MORE = ("a number 0 or more", lambda x: 0 <= x < math.inf)
_BELOW_1 = ("a number from 0 to below 1", lambda x: 0 <= x < 1)
_WHOLE = ("a whole number 0 or more", lambda x: isinstance(x, int) and x >= 0)
_ALLOWED: dict[str, tuple[str, Callable[[Any], bool]]] = {
    "learning_rate": _ABOVE_0,
    "epochs": _ABOVE_0,
    "tokens_per_batch": ("a whole number 1 or more", lambda x: isinstance(x, int) and x >= 1),
    "warmup": _WHOLE,
    "final": ("a number from 0 to 1", lambda x: 0 <= x <= 1),
    "clip": ("a number 0 or more, 0 for no clipping", lambda x: x >= 0),
    "weight_decay": _0_OR_MORE,
    "b1": _BELOW_1,
    "b2": _BELOW_1,
    "eps": _ABOVE_0,
    "eps_root": _0_OR_MORE,
    "seed": _WHOLE,
}


@dataclasses.dataclass(frozen=True)
class TrainingRecipe:
    """The training that `tda.trace_training` follows back.

    The loss of a batch is the mean of its tokens' cross-entropy.

    Attributes:
        learning_rate: the largest one.
        epochs: passes over the passages; a fraction stops within one.
        tokens_per_batch: the most positions of a batch, padding included.
        schedule: "constant", "cosine" or "linear", after the warm-up.
        warmup: steps of a linear warm-up from 0.
        final: the last learning rate, as a share of the largest.
        clip: the largest global norm of a gradient; 0 for none.
        weight_decay: decoupled, as in AdamW; 0 is Adam.
        b1, b2, eps: Adam's constants.
        eps_root: Adam's other epsilon, inside the root. Above 0, a step is smooth in its data,
            also where a gradient vanishes.
        seed: the seed of the order of the data.

    Raises:
        ValueError: a value is not possible; the message names it.
    """

    learning_rate: float = 1e-4
    epochs: float = 1.0
    tokens_per_batch: int = 4096
    schedule: str = "constant"
    warmup: int = 0
    final: float = 0.0
    clip: float = 1.0
    weight_decay: float = 0.0
    b1: float = 0.9
    b2: float = 0.99
    eps: float = 1e-8
    eps_root: float = 1e-8
    seed: int = 0

    def __post_init__(self):
        for name in _ALLOWED:
            # Numbers of numpy are no JSON, in which a finished trace keeps its recipe.
            object.__setattr__(self, name, python_value(getattr(self, name)))
        if callable(self.learning_rate):
            raise ValueError(
                "learning_rate of the recipe is a function; give the largest rate as a number, and "
                "its course by schedule=, warmup= and final="
            )
        for name, (allowed, is_allowed) in _ALLOWED.items():
            value = getattr(self, name)
            is_number = isinstance(value, int | float) and not isinstance(value, bool)
            if not is_number or not is_allowed(value):
                raise ValueError(f"{name}={value!r} of the recipe; give {allowed}")
        # Refuses an unknown schedule before any work is done.
        optimizer.schedule(self.schedule, self.learning_rate, self.warmup, self.warmup, self.final)

    def learning_rates(self, steps: int) -> optax.Schedule:
        """Returns the learning rate by step of a training of `steps` steps.

        Raises:
            ValueError: the warm-up is longer.
        """
        return optimizer.schedule(self.schedule, self.learning_rate, steps, self.warmup, self.final)

    def make_optimizer(self, steps: int) -> optax.GradientTransformation:
        """Returns the optimizer of a training of `steps` steps."""
        constants = {"weight_decay": self.weight_decay, **self.adam_constants}
        return optimizer.make_optimizer(
            "adamw", self.learning_rates(steps), clip=self.clip, **constants
        )

    @property
    def adam_constants(self) -> dict[str, float]:
        """The constants of Adam's moments, by name."""
        return {name: getattr(self, name) for name in ("b1", "b2", "eps", "eps_root")}
