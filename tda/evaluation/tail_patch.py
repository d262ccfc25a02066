"""Tail-patch: does one training step on a passage raise the probability of the query's target?

One step of the training optimizer, with its restored state, is taken from the final checkpoint on
one passage alone; the score is the change of the target sequence's probability (Chang et al. 2024,
section 5). Every step starts from the same checkpoint, and is shared by all queries that retrieved
its passage. Changes of log p are measured too: from 0.1% to 0.2% is as large as from 40% to 80%.
"""

from collections.abc import Callable, Iterator, Sequence

import jax
import numpy as np
import optax

from tda import loss as losses
from tda.data import batches as batching
from tda.data.batches import BatchLayout
from tda.data.tokens import TokenTable
from tda.model.functional import Functional
from tda.runtime import sharding
from tda.training.loop import train_step

# Pairs in a compiled call.
_PAIRS_PER_CALL = 8


def change(log_p: np.ndarray) -> np.ndarray:
    """Returns p after − p before, float64 [...], of log p before and after, [..., 2]."""
    before, after = np.moveaxis(np.asarray(log_p, np.float64), -1, 0)
    # expm1, since the difference of two exponentials would cancel.
    return np.exp(before) * np.expm1(after - before)


def log_change(log_p: np.ndarray) -> np.ndarray:
    """Returns log p after − log p before in nats, float64 [...]; argument as for `change`."""
    before, after = np.moveaxis(np.asarray(log_p, np.float64), -1, 0)
    return after - before


class TailPatch:
    """Takes training steps from one checkpoint, each on one passage alone.

    Args:
        model_fn: the model's structure.
        state: the checkpoint {"params", "opt_state", "step"}.
        tx: the training optimizer, at the restored step's learning rate.
        layout: the lengths that sequences are padded to, and the padding.
    """

    def __init__(
        self,
        model_fn: Functional,
        state: dict,
        tx: optax.GradientTransformation,
        layout: BatchLayout,
    ):
        self._state, self._layout = state, layout
        merge = model_fn.merge

        def log_p(params, query):
            query = jax.tree.map(lambda x: x[None], query)
            logits_1xTxV = merge(params)(query["tokens"])
            return -losses.cross_entropy(logits_1xTxV, query["targets"], query["weights"])[0]

        @jax.jit
        def log_p_before(state, queries):
            return jax.lax.map(lambda q: log_p(state["params"], q), queries, batch_size=1)

        @jax.jit
        def log_p_after(state, batch):
            def step(patched, pair):
                passage = jax.tree.map(lambda x: x[None], pair["passage"])
                # `cond` in a scan runs one branch only, so a passage's further queries cost no
                # step. One program serves any number of queries, so that the bits do not depend on
                # which pairs a resumed run still has to do.
                patched = jax.lax.cond(
                    pair["is_new"],
                    lambda: train_step(merge, tx, state, passage)[0]["params"],
                    lambda: patched,
                )
                return patched, log_p(patched, pair["query"])

            return jax.lax.scan(step, state["params"], batch)[1]

        self._log_p_before, self._log_p_after = log_p_before, log_p_after

    def __call__(
        self,
        passages: TokenTable,
        queries: TokenTable,
        pairs: Sequence[tuple[int, int]],
        on_done: Callable[[np.ndarray, np.ndarray], None] = lambda which, log_p: None,
    ) -> np.ndarray:
        """Returns the target's log-probability before and after one step on each passage.

        Args:
            passages, queries: the sequences.
            pairs: (query row, passage row); a passage row of −1 is a step with a zero gradient,
                which shows the effect of the optimizer's momentum alone.
            on_done: called with the numbers of finished pairs and their rows of the result.

        Returns:
            float64 [pairs, 2]: log p(target | prompt) in nats before the step, and after it.
        """
        pairs = np.asarray(list(pairs), np.int64).reshape(-1, 2)
        lengths, out = self._layout.bucket_lengths, np.zeros((len(pairs), 2))
        query_length = lengths[np.searchsorted(lengths, queries.lengths.max() - 1)]
        # A step with a zero gradient is the same at any length. The median is most likely compiled
        # for anyway, and does not depend on the pairs.
        usual = int(np.median(passages.lengths)) - 1
        positions = np.where(
            pairs[:, 1] < 0, usual, passages.lengths_of(np.maximum(pairs[:, 1], 0)) - 1
        )
        bucket = np.searchsorted(lengths, positions)
        unique, query_of_pair = np.unique(pairs[:, 0], return_inverse=True)
        before = [
            sharding.to_host(
                self._log_p_before(self._state, self._rows(queries, filled, query_length))
            )[: len(which)]
            for which, filled in _calls(unique)
        ]
        out[:, 0] = np.concatenate(before)[query_of_pair] if before else 0
        for b in np.unique(bucket):
            in_bucket = np.flatnonzero(bucket == b)
            # The queries of a passage follow each other, so that they share its step.
            by_passage = in_bucket[np.argsort(pairs[in_bucket, 1], kind="stable")]
            for which, filled in _calls(by_passage):
                rows = pairs[filled, 1]
                batch = {
                    "passage": self._rows(passages, rows, lengths[b]),
                    "query": self._rows(queries, pairs[filled, 0], query_length),
                    "is_new": np.diff(rows, prepend=-2) != 0,
                }
                log_p = sharding.to_host(self._log_p_after(self._state, batch))
                out[which, 1] = log_p[: len(which)]
                on_done(which, out[which])
        return out

    def _rows(self, table: TokenTable, rows: np.ndarray, length: int) -> dict:
        """Returns some rows as a batch; a row of −1, whose gradient is zero, is all padding."""
        # `materialise` puts padding last: move it to the rows of −1.
        order = np.argsort(np.argsort(rows < 0, kind="stable"))
        batch = batching.materialise(table, rows[rows >= 0], length, len(rows), self._layout.pad)
        return {name: x[order] for name, x in batch.arrays().items()}


def _calls(numbers: np.ndarray) -> Iterator[tuple[np.ndarray, np.ndarray]]:
    """Yields the numbers of each compiled call, and the same padded to the call's shape."""
    for start in range(0, len(numbers), _PAIRS_PER_CALL):
        which = numbers[start : start + _PAIRS_PER_CALL]
        # The last call repeats its last number, to keep the shape.
        yield which, np.pad(which, (0, _PAIRS_PER_CALL - len(which)), mode="edge")
