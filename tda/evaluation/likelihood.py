"""How likely a model finds targets: their −log p, and the ranks of their tokens."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from tda import loss as losses
from tda.data.batches import BatchLayout
from tda.data.tokens import TokenTable
from tda.runtime import sharding


@dataclasses.dataclass(frozen=True)
class TargetStatistics:
    """The statistics of the scored tokens of R sequences under a model."""

    nats: np.ndarray
    """float32 [R]: −log p(target | the tokens before it), summed over the target's tokens."""
    ranks: np.ndarray
    """int64 [R]: the worst rank, from 1, of a token of the target, each given the tokens before it.
    Greedy decoding states the target if and only if this is 1."""


def target_statistics(logits_BxTxV, targets_BxT, weights_BxT) -> tuple[jax.Array, jax.Array]:
    """Returns −log p in nats, float32 [B], and worst ranks, int32 [B], of the weighted targets."""
    nats_B = losses.cross_entropy(logits_BxTxV, targets_BxT, weights_BxT)
    targets_BxTx1 = targets_BxT[..., None]
    target_logits_BxTx1 = jnp.take_along_axis(logits_BxTxV, targets_BxTx1, axis=-1)
    # Of equal logits, which bfloat16 often has, greedy decoding takes the first token. Counting the
    # tokens behind the target, not those before it, keeps a NaN from making it the first.
    is_equal = logits_BxTxV == target_logits_BxTx1
    follows = jnp.arange(logits_BxTxV.shape[-1]) >= targets_BxTx1
    is_behind = (logits_BxTxV < target_logits_BxTx1) | (is_equal & follows)
    ranks_BxT = 1 + jnp.sum(~is_behind, axis=-1)
    return nats_B, jnp.max(jnp.where(weights_BxT > 0, ranks_BxT, 0), axis=-1)


class Likelihood:
    """Computes the target statistics of a table's sequences under one model.

    Args:
        model: maps tokens [B, T] to logits [B, T, V].
        layout: how sequences are batched.
    """

    def __init__(self, model: nnx.Module, layout: BatchLayout):
        self._layout = layout
        graphdef, self._state = nnx.split(model)

        @jax.jit
        def statistics(state, batch):
            logits_BxTxV = nnx.merge(graphdef, state)(batch["tokens"])
            return target_statistics(logits_BxTxV, batch["targets"], batch["weights"])

        self._statistics = statistics

    def __call__(self, table: TokenTable, rows: np.ndarray | None = None) -> TargetStatistics:
        """Returns the statistics of the table's `rows`, by default all, in their order."""
        rows = np.arange(len(table)) if rows is None else np.asarray(rows, np.int64)
        nats, ranks = np.zeros(len(rows), np.float32), np.zeros(len(rows), np.int64)
        for batch in self._layout.batches(table, rows):
            places = batch.places
            batch_nats, batch_ranks = self._statistics(self._state, batch.arrays())
            nats[places] = sharding.to_host(batch_nats)[: len(places)]
            ranks[places] = sharding.to_host(batch_ranks)[: len(places)]
        return TargetStatistics(nats, ranks)
