"""The whole gradient of every example of a batch, without projection."""

import jax
import jax.numpy as jnp

from tda import loss as losses
from tda.model import functional


class ExampleGradients:
    """Computes the gradient of each example; compiled once for each shape of batch.

    Args:
        model_fn: the model's structure.
        output_fn: maps logits, targets and weights to a loss for each example.
    """

    def __init__(self, model_fn: functional.Functional, output_fn=losses.cross_entropy):
        def of_example(params, example):
            example = jax.tree.map(lambda x: x[None], example)
            logits_1xTxV = model_fn.merge(params)(example["tokens"])
            return output_fn(logits_1xTxV, example["targets"], example["weights"])[0]

        self._of_batch = jax.jit(jax.vmap(jax.grad(of_example), in_axes=(None, 0)))

    def __call__(self, params: dict, batch: dict) -> dict[str, jax.Array]:
        """Returns the gradients of a batch's examples by path: float32 [B, …]."""
        return functional.flat_parameters(self._of_batch(params, batch))


def as_rows(gradients: dict[str, jax.Array]) -> jax.Array:
    """Returns gradients by path, each [B, …], as rows [B, P]."""
    return jnp.concatenate([x.reshape(len(x), -1) for x in gradients.values()], axis=1)


def by_path(rows_BxP: jax.Array, params: dict) -> dict[str, jax.Array]:
    """Returns rows as arrays [B, …] by path, in the shapes of parameters: undoes `as_rows`."""
    out, first = {}, 0
    for path, x in functional.flat_parameters(params).items():
        out[path] = rows_BxP[:, first : first + x.size].reshape(len(rows_BxP), *x.shape)
        first += x.size
    return out
