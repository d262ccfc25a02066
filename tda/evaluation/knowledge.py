"""Does the model state the fact? Probability and rank of each query's target."""

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from tda.data import batches as batching
from tda.data.tokens import TokenTable
from tda.runtime import sharding


def target_statistics(
    model: nnx.Module,
    queries: TokenTable,
    *,
    bucket_lengths: tuple[int, ...],
    tokens_per_batch: int,
    pad: int,
) -> dict[str, np.ndarray]:
    """What the model thinks of each query's target under its prompt.

    Returns:
        "nats": float64 [Q], −log p(target | prompt), summed over the target's tokens;
        "rank": int64 [Q], the worst rank (from 1) of any token of the target among all tokens, each
        given the prompt and the target's tokens before it. Rank 1: greedy decoding states the
        target.
    """
    graphdef, state = nnx.split(model)

    @jax.jit
    def one_batch(state, batch):
        logits_BxTxV = nnx.merge(graphdef, state)(batch["tokens"])
        picked = jnp.take_along_axis(logits_BxTxV, batch["targets"][..., None], axis=-1)
        nats = (jax.nn.logsumexp(logits_BxTxV, axis=-1) - picked[..., 0]) * batch["weights"]
        ranks = 1 + jnp.sum(logits_BxTxV > picked, axis=-1)
        worst = jnp.max(jnp.where(batch["weights"] > 0, ranks, 0), axis=-1)
        return jnp.sum(nats, axis=-1), worst

    planned = batching.plan(queries.lengths - 1, bucket_lengths, tokens_per_batch)
    nats, ranks = np.zeros(len(queries)), np.zeros(len(queries), np.int64)
    for batch in batching.batches(queries, planned, pad):
        n, r = one_batch(state, batch.arrays())
        nats[batch.rows] = sharding.to_host(n)[: len(batch.rows)]
        ranks[batch.rows] = sharding.to_host(r)[: len(batch.rows)]
    return {"nats": nats, "rank": ranks}
