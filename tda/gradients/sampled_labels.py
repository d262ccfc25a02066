"""Losses of labels that are drawn from the model's own predictions, as a Fisher matrix needs them.

With the data's labels, the mean of g gᵀ is another matrix (Kunstner et al. 2019).
"""

from collections.abc import Callable, Iterator

import jax
import jax.numpy as jnp
import numpy as np

from tda import loss as losses
from tda.data.batches import BatchLayout
from tda.data.tokens import TokenTable


def sampled_loss(logits_BxTxV, uniform_BxT, weights_BxT):
    """Returns the cross-entropy of labels drawn from the model's own predictions: float32 [B].

    Args:
        logits_BxTxV: the model's logits.
        uniform_BxT: a number in [0, 1) per position, which draws the position's label.
        weights_BxT: the weights of the positions.
    """
    p_BxTxV = jax.nn.softmax(jax.lax.stop_gradient(logits_BxTxV).astype(jnp.float32))
    below_BxT = jnp.sum(jnp.cumsum(p_BxTxV, axis=-1) <= uniform_BxT[..., None], axis=-1)
    labels_BxT = jnp.minimum(below_BxT, logits_BxTxV.shape[-1] - 1)
    return losses.cross_entropy(logits_BxTxV, labels_BxT, weights_BxT)


def batches(
    table: TokenTable,
    rows: np.ndarray,
    *,
    labels: str,
    layout: BatchLayout,
    seed: int = 0,
    on_rows: Callable[[int], None] = lambda rows: None,
) -> Iterator[dict]:
    """Yields batches {"tokens", "targets", "weights"} of a table's rows.

    Args:
        table, rows: the passages.
        labels: "sampled": the targets are uniform numbers for `sampled_loss`, which depend on the
            seed, the row and the position only; "data": the targets are the next tokens.
        layout: how the rows are batched.
        seed: the seed of the sampled labels.
        on_rows: called with the number of a batch's rows when the next one is asked for.
    """
    for batch in layout.batches(table, rows):
        arrays = batch.arrays()
        if labels == "sampled":
            arrays["targets"] = np.zeros(batch.tokens.shape, np.float32)
            for i, row in enumerate(batch.rows):
                arrays["targets"][i] = np.random.default_rng([seed, row]).random(
                    batch.tokens.shape[1]
                )
        yield arrays
        on_rows(len(batch.rows))
