"""Products of the gradients of a batch's losses with directions of the parameters.

By passage, from each passage's whole gradient; or by token, from the derivatives of every target's
loss along the directions (forward mode), which sum to the passage's.
"""

import functools

import jax
import jax.numpy as jnp
import numpy as np

from tda import loss as losses
from tda.counterfactual.example_gradients import as_rows, by_path
from tda.counterfactual.training import Training, WeightedBatch, with_plain_attention
from tda.model import functional
from tda.runtime import sharding

# Directions whose derivatives pass the model together.
_TOGETHER = 8


class LossProducts:
    """Adds up ⟨∇ℓ_i, u_q⟩ of the passages or the tokens of batches, over a training's batches.

    Args:
        training: the training, whose model and table the batches are of.
        by_token: whether i are the table's tokens; else they are its passages.

    Raises:
        TypeError: `by_token`, and the model is no `Decoder`.
    """

    def __init__(self, training: Training, by_token: bool = False):
        self._training, self.by_token = training, by_token
        if by_token:
            model_fn = with_plain_attention(training.model_fn, training.params)
            self._slopes = jax.jit(functools.partial(_slopes, model_fn))

    def zeros(self, queries: int) -> np.ndarray:
        """Returns empty sums, float32 [Q, N], or [Q, C] by token."""
        table = self._training.table
        return np.zeros((queries, len(table.tokens if self.by_token else table)), np.float32)

    def add(
        self, sums: np.ndarray, params: dict, batch: WeightedBatch, u_QxP: jax.Array, factor=1.0
    ) -> None:
        """Adds a batch's products, times a factor, to `sums` in place.

        Args:
            sums: as from `zeros`.
            params: the parameters at which the losses' gradients are taken.
            batch: the batch; each of its passages and tokens occurs in it once.
            u_QxP: the directions, in the order of `as_rows`.
            factor: what the products are multiplied by.
        """
        if self.by_token:
            batch.add_to(sums, factor * sharding.to_host(self._slopes(params, batch.arrays, u_QxP)))
            return
        gradients_BxP = as_rows(self._training.example_gradients(params, batch.arrays))
        d_QxB = sharding.to_host(_products(u_QxP, gradients_BxP))
        sums[:, batch.rows] += factor * d_QxB[:, : len(batch.rows)]


@jax.jit
def _products(u_QxP, gradients_BxP):
    return jnp.matmul(u_QxP, gradients_BxP.T, precision="highest")


def _slopes(model_fn: functional.Functional, params: dict, batch: dict, u_QxP):
    """Returns the derivative of every target's loss along each direction, float32 [Q, B, T]."""

    def nats(params):
        logits_BxTxV = model_fn.merge(params)(batch["tokens"])
        shape = batch["targets"].shape
        # Each position as an example of its own.
        logits_PxV = logits_BxTxV.reshape(-1, 1, logits_BxTxV.shape[-1])
        columns = (batch[k].reshape(-1, 1) for k in ("targets", "weights"))
        return losses.cross_entropy(logits_PxV, *columns).reshape(shape)

    _, push = jax.linearize(nats, params)
    treedef = jax.tree.structure(params)

    def along(u_P):
        rows = by_path(u_P[None], params).values()
        return push(jax.tree.unflatten(treedef, [x[0] for x in rows]))

    return jax.lax.map(along, u_QxP, batch_size=min(_TOGETHER, len(u_QxP)))
