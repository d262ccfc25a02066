"""The model's own hidden states of a text, averaged over its tokens.

Retrieving passages whose representation is similar to the query's is a baseline of attribution
papers (Pezeshkpour et al. 2021; Akyürek et al. 2022).
"""

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from tda.data import batches as batching
from tda.data.batches import BatchLayout
from tda.data.tokens import TokenTable

LAYERS = ("middle", "last")


class Pooler:
    """Mean hidden states of sequences.

    Args:
        model: a decoder, with `residual_stream`.
        layer: "last": the state that logits are made of, after the last layer and the final norm;
            "middle": the residual stream after half of the layers.
        without: ids of tokens that the mean leaves out: beginning, end, padding.

    Raises:
        ValueError: no such layer, or the model has no access to its hidden states.
    """

    def __init__(self, model: nnx.Module, layer: str, without: tuple[int, ...]):
        if layer not in LAYERS:
            raise ValueError(f"unknown layer {layer!r}; use {' or '.join(LAYERS)}")
        if not hasattr(model, "residual_stream"):
            raise ValueError(
                f"{type(model).__name__} has no method residual_stream(tokens, layers), which "
                "returns the hidden states; add it, or leave out methods of hidden states"
            )
        self._most = getattr(model, "max_positions", 0) or np.iinfo(np.int64).max
        graphdef, self._state = nnx.split(model)

        @jax.jit
        def pooled(state, tokens_BxT):
            model = nnx.merge(graphdef, state)
            if layer == "last":
                h_BxTxD = model.hidden(tokens_BxT)
            else:
                h_BxTxD = model.residual_stream(tokens_BxT, max(1, model.layer_count // 2))
            counted_BxT = jnp.all(tokens_BxT[..., None] != jnp.asarray(without), axis=-1)
            total_BxD = jnp.einsum(
                "btd,bt->bd",
                h_BxTxD.astype(jnp.float32),
                counted_BxT.astype(jnp.float32),
                precision="highest",
            )
            return total_BxD / jnp.maximum(counted_BxT.sum(axis=1), 1)[:, None]

        self._pooled = pooled
        probe = jax.ShapeDtypeStruct((1, 8), jnp.int32)
        self.width = jax.eval_shape(self._pooled, self._state, probe).shape[-1]

    def rows(self, table: TokenTable, rows: np.ndarray, layout: BatchLayout) -> np.ndarray:
        """Returns the mean hidden states of some rows of a table, float32 [R, D], in their order.

        The model reads every token that it has a position for, even the last one, which in training
        it only predicts.
        """
        rows = np.asarray(rows, np.int64)
        # One position more than in training: the last token.
        lengths = tuple(
            min(n, self._most) for n in (*layout.bucket_lengths, layout.bucket_lengths[-1] + 1)
        )
        read = np.minimum(table.lengths_of(rows), self._most)
        planned = batching.plan(read, tuple(dict.fromkeys(lengths)), layout.tokens_per_batch)
        out = np.empty((len(rows), self.width), np.float32)
        for batch in batching.Batches(table, rows, planned, layout.pad):
            pooled_BxD = self._pooled(self._state, batch.tokens)
            out[batch.places] = np.asarray(pooled_BxD)[: len(batch.places)]
        return out
