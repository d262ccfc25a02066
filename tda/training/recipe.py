"""How a model is trained on passages, each of them an example: optimizer, schedule and batches."""

import dataclasses

import optax

from tda.training import optimizer


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
        positive = ("learning_rate", "epochs", "tokens_per_batch", "eps")
        for name in (*positive, "warmup", "final", "clip", "weight_decay", "b1", "b2", "eps_root"):
            value = getattr(self, name)
            if not value >= 0 or (name in positive and not value):
                lowest = "above 0" if name in positive else "0 or more"
                raise ValueError(f"{name}={value!r} of the recipe; give a number {lowest}")
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
