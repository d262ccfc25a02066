"""Tail-patch: does one training step on a passage raise the probability of the query's target?

From the final checkpoint, one step of the training optimizer, its state restored, on one passage
alone; the score is the change of the target sequence's probability (Chang et al. 2024, section 5).
Every passage starts from the same checkpoint. Scored in log-probability too: a change from 0.1% to
0.2% is as large there as one from 40% to 80%.
"""

from collections.abc import Callable, Sequence

import jax
import jax.numpy as jnp
import numpy as np
import optax

from tda import loss as losses
from tda.data import batches as batching
from tda.data.tokens import TokenTable
from tda.model.functional import Functional
from tda.runtime import progress, sharding
from tda.training.loop import train_step


def target_log_probability(merge, params: dict, query: dict) -> jax.Array:
    """log p(target | prompt) of one query {"tokens", "targets", "weights"}, each [T]: a scalar."""
    query = jax.tree.map(lambda x: x[None], query)
    logits_1xTxV = merge(params)(query["tokens"])
    return -losses.cross_entropy(logits_1xTxV, query["targets"], query["weights"])[0]


def change(log_p: np.ndarray) -> np.ndarray:
    """p after − p before, float64 [...], of log-probabilities before and after, [..., 2]."""
    before, after = np.moveaxis(np.asarray(log_p, np.float64), -1, 0)
    # Not a difference of two exponentials, which would cancel.
    return np.exp(before) * np.expm1(after - before)


def log_change(log_p: np.ndarray) -> np.ndarray:
    """log p after − log p before in nats, float64 [...], of what `change` takes."""
    before, after = np.moveaxis(np.asarray(log_p, np.float64), -1, 0)
    return after - before


def tail_patch(
    model_fn: Functional,
    state: dict,
    tx: optax.GradientTransformation,
    passages: TokenTable,
    queries: TokenTable,
    pairs: Sequence[tuple[int, int]],
    *,
    bucket_lengths: tuple[int, ...],
    pad: int,
    pairs_per_call: int = 8,
    together: int = 1,
    on_done: Callable[[np.ndarray, np.ndarray], None] = lambda which, log_p: None,
) -> np.ndarray:
    """The target's log-probability before and after one step on each passage.

    Args:
        model_fn: the model's structure.
        state: the checkpoint {"params", "opt_state", "step"}.
        tx: the training optimizer; its learning rate is that of the restored step.
        passages, queries: the sequences.
        pairs: (query row, passage row); a passage row of −1 is a step with a zero gradient, which
            shows what the optimizer's momentum does on its own.
        bucket_lengths, pad: see `tda.data.batches`.
        pairs_per_call: pairs that one compiled call works through; the last of each length is
            padded to so many.
        together: of these, how many at once; each needs a copy of parameters and optimizer state.
        on_done: told, as the work goes on, which pairs are done (their numbers), and their rows of
            the result.

    Returns:
        float64 [pairs, 2]: log p(target | prompt) in nats before the step, and after it.
    """
    merge = model_fn.merge

    def one(state, pair):
        before = target_log_probability(merge, state["params"], pair["query"])
        passage = jax.tree.map(lambda x: x[None], pair["passage"])
        patched, _ = train_step(merge, tx, state, passage)
        after = target_log_probability(merge, patched["params"], pair["query"])
        return jnp.stack([before, after])

    call = jax.jit(
        lambda state, batch: jax.lax.map(lambda p: one(state, p), batch, batch_size=together)
    )
    pairs = np.asarray(list(pairs), np.int64).reshape(-1, 2)
    out = np.zeros((len(pairs), 2))
    longest = int(queries.lengths.max()) - 1
    query_length = next(b for b in bucket_lengths if b >= longest)
    # A step with a zero gradient is the same at any length: one that is compiled for anyway, and
    # the same one whatever the pairs are.
    usual = int(np.median(passages.lengths)) - 1
    positions = np.where(pairs[:, 1] < 0, usual, passages.lengths[pairs[:, 1]] - 1)
    bucket = np.searchsorted(bucket_lengths, positions)
    with progress.bar(len(pairs), "tail-patch", "pair") as bar:
        for b in np.unique(bucket):
            in_bucket = np.flatnonzero(bucket == b)
            for start in range(0, len(in_bucket), pairs_per_call):
                call_pairs = in_bucket[start : start + pairs_per_call]
                # The last call of a length repeats its last pair, to keep the shape.
                filled = np.pad(call_pairs, (0, pairs_per_call - len(call_pairs)), mode="edge")
                batch = {
                    "passage": _passages(passages, pairs[filled, 1], bucket_lengths[b], pad),
                    "query": _rows(queries, pairs[filled, 0], query_length, pad),
                }
                out[call_pairs] = sharding.to_host(call(state, batch))[: len(call_pairs)]
                on_done(call_pairs, out[call_pairs])
                bar.update(len(call_pairs))
    return out


def _rows(table: TokenTable, rows: np.ndarray, length: int, pad: int) -> dict:
    return batching.materialise(table, rows, length, len(rows), pad).arrays()


def _passages(table: TokenTable, rows: np.ndarray, length: int, pad: int) -> dict:
    # A row of -1, whose gradient is zero, is an empty one: padding, which stands behind all others.
    order = np.argsort(rows < 0, kind="stable")
    batch = batching.materialise(table, rows[rows >= 0], length, len(rows), pad)
    return {name: x[np.argsort(order)] for name, x in batch.arrays().items()}
