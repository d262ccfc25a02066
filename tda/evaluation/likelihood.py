"""How likely the model finds whole sequences."""

import jax
import numpy as np
from flax import nnx

from tda import loss as losses
from tda.data import batches as batching
from tda.data.tokens import TokenTable


class Likelihood:
    """−log p of sequences under one model.

    Args:
        model: maps tokens [B, T] to logits [B, T, V].
        pad: the token that fills sequences up.
    """

    def __init__(self, model: nnx.Module, pad: int):
        self._pad = pad
        graphdef, self._state = nnx.split(model)

        @jax.jit
        def nats(state, batch):
            logits_BxTxV = nnx.merge(graphdef, state)(batch["tokens"])
            return losses.cross_entropy(logits_BxTxV, batch["targets"], batch["weights"])

        self._nats = nats

    def rows(
        self,
        table: TokenTable,
        rows: np.ndarray,
        bucket_lengths: tuple[int, ...],
        tokens_per_batch: int,
    ) -> np.ndarray:
        """−log p in nats, summed over scored tokens, of some rows of a table: float32 [R]."""
        rows = np.asarray(rows, np.int64)
        planned = batching.plan(table.lengths[rows] - 1, bucket_lengths, tokens_per_batch)
        out = np.empty(len(rows), np.float32)
        for i in range(len(planned)):
            local = planned.order[planned.starts[i] : planned.starts[i + 1]]
            batch = batching.materialise(
                table, rows[local], int(planned.lengths[i]), int(planned.sizes[i]), self._pad
            )
            out[local] = np.asarray(self._nats(self._state, batch.arrays()))[: len(local)]
        return out
