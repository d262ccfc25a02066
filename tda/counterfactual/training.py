"""A training as a pure function of the weights of its data.

L_t(θ, w) = Σ_i w_i nats_i / tokens_t, over the scored tokens i of batch t. The denominator is the
number of the batch's scored tokens, independent of their weights: a passage is dropped by w = 0,
which changes neither order, batches, schedule nor the other passages' gradients.
"""

import dataclasses
import functools
from collections.abc import Callable, Iterable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax

from tda import loss as losses
from tda.counterfactual.example_gradients import ExampleGradients
from tda.data.batches import Batch, BatchLayout
from tda.data.tokens import TokenTable
from tda.model import functional
from tda.model.decoder import Decoder, abstract_decoder
from tda.runtime import preemption, sharding
from tda.training import loop

State = dict[str, Any]


@dataclasses.dataclass(frozen=True)
class WeightedBatch:
    """A batch of passages, with the place of each token in the table."""

    arrays: dict[str, np.ndarray]
    """{"tokens", "targets", "weights"}, each [B, T]; weights are 1 where a token is scored."""
    places_BxT: np.ndarray
    """int64: the place of each target in the table; 0 where the target is not scored."""
    rows: np.ndarray
    """int64 [R ≤ B]: the table's rows of the first R sequences."""

    def spread(self, token_weights: np.ndarray) -> np.ndarray:
        """Returns the weights of the batch's targets, float32 [B, T], given those by token, [C]."""
        return np.asarray(token_weights, np.float32)[self.places_BxT]

    def add_to(self, sums_QxC: np.ndarray, values_QxBxT: np.ndarray) -> None:
        """Adds values of the batch's targets to sums by token, in place."""
        scored_BxT = self.arrays["weights"] > 0
        # A batch has each token once, so no place occurs twice in this index.
        sums_QxC[:, self.places_BxT[scored_BxT]] += np.asarray(values_QxBxT)[:, scored_BxT]


def place_tokens(table: TokenTable, batch: Batch) -> WeightedBatch:
    """Returns a batch of a table's rows with the place of every target."""
    places_BxT = np.zeros(batch.tokens.shape, np.int64)
    first_R = table.starts[batch.rows] + 1
    places_BxT[: len(batch.rows)] = first_R[:, None] + np.arange(batch.tokens.shape[1])
    return WeightedBatch(
        batch.arrays(), np.where(batch.weights > 0, places_BxT, 0), np.asarray(batch.rows)
    )


def plan_batches(table: TokenTable, layout: BatchLayout, epochs: float, seed: int) -> list[Batch]:
    """Returns the batches of a training in order, as `tda.training.loop.fit` takes them."""
    batches: list[Batch] = []
    per_epoch = len(loop.epoch_batches(table, 0, layout, seed))
    steps = max(1, round(epochs * per_epoch))
    for epoch in range(-(-steps // per_epoch)):
        batches += loop.epoch_batches(table, epoch, layout, seed)
    return batches[:steps]


class Training:
    """A training whose data have weights; its steps are compiled once for each shape of batch.

    Args:
        model_fn: the model's structure.
        params: the parameters that the training starts from.
        tx: the optimizer.
        table: the passages.
        batches: the batches of all steps, in order.

    Raises:
        ValueError: there is no batch, or the parameters are not float32: in a lower precision the
            effect of one passage is lost in rounding.
    """

    def __init__(
        self,
        model_fn: functional.Functional,
        params: dict,
        tx: optax.GradientTransformation,
        table: TokenTable,
        batches: Sequence[Batch],
    ):
        dtypes = {str(x.dtype) for x in jax.tree.leaves(params)}
        if dtypes != {"float32"}:
            raise ValueError(
                f"the parameters are {', '.join(sorted(dtypes))}; retrainings that differ in a few "
                "passages need float32"
            )
        if not batches:
            raise ValueError("a training needs a batch; there is none")
        self.model_fn, self.params, self.tx = model_fn, params, tx
        self.table, self.batches = table, [place_tokens(table, b) for b in batches]
        self._advance = jax.jit(self.step, donate_argnums=0)
        self._advance_together = jax.jit(
            jax.vmap(self.step, in_axes=(0, None, 0)), donate_argnums=0
        )

    @property
    def steps(self) -> int:
        """The number of steps."""
        return len(self.batches)

    @functools.cached_property
    def example_gradients(self) -> ExampleGradients:
        """Computes the whole gradient of every passage of a batch."""
        return ExampleGradients(self.model_fn)

    @functools.cached_property
    def even_weights(self) -> np.ndarray:
        """A weight of 1 for every token of the table: the unchanged training."""
        return np.ones(len(self.table.tokens), np.float32)

    @functools.cached_property
    def gradient_norm(self) -> Callable[[dict, dict], jax.Array]:
        """Computes the global norm of a batch's gradient, from the parameters and its arrays."""

        def norm(params, batch):
            weights_BxT = jnp.ones_like(batch["weights"])
            return optax.global_norm(_gradient(self.model_fn, params, batch, weights_BxT))

        return jax.jit(norm)

    def start(self) -> State:
        """Returns the state before the first step: {"params", "opt_state", "step"}."""
        # A copy: a compiled step reuses the buffers of its state.
        params = jax.tree.map(lambda x: jnp.array(x, copy=True), self.params)
        return {"params": params, "opt_state": self.tx.init(params), "step": jnp.int32(0)}

    def step(self, state: State, batch: dict, weights_BxT, model_fn=None) -> State:
        """Takes one step, a pure function.

        Args:
            state: the state.
            batch: arrays of a `WeightedBatch`.
            weights_BxT: the weight of each target.
            model_fn: the model's structure; the training's own by default.
        """
        gradient = _gradient(model_fn or self.model_fn, state["params"], batch, weights_BxT)
        updates, opt_state = self.tx.update(gradient, state["opt_state"], state["params"])
        params = optax.apply_updates(state["params"], updates)
        return {"params": params, "opt_state": opt_state, "step": state["step"] + 1}

    def run(
        self,
        token_weights: np.ndarray | None = None,
        state: State | None = None,
        first: int = 0,
        stop: int | None = None,
        on_step: Callable[[int, State], None] = lambda step, state: None,
    ) -> State:
        """Trains from step `first` to step `stop`, and returns the state then.

        Args:
            token_weights: the weight of every token of the table, [C]; 1 by default.
            state: the state before step `first`, whose buffers are reused; by default the start's.
            first, stop: steps; by default the whole training.
            on_step: called with the number of steps done and the state, before each step.
        """
        token_weights = self.even_weights if token_weights is None else token_weights
        state = self.start() if state is None else state
        for i in range(first, self.steps if stop is None else stop):
            on_step(i, state)
            preemption.check()
            batch = self.batches[i]
            state = self._advance(state, batch.arrays, batch.spread(token_weights))
        return state

    def run_together(self, token_weights_MxC: np.ndarray) -> State:
        """Returns the final states of M trainings that differ in weights, stacked: leaves [M, …].

        Several run as one program over an axis of trainings; a single one, as `run`.
        """
        if len(token_weights_MxC) == 1:
            return jax.tree.map(lambda x: x[None], self.run(token_weights_MxC[0]))
        M = len(token_weights_MxC)
        state = jax.tree.map(lambda x: jnp.repeat(x[None], M, axis=0), self.start())
        for batch in self.batches:
            preemption.check()
            weights_MxBxT = np.stack([batch.spread(w) for w in token_weights_MxC])
            state = self._advance_together(state, batch.arrays, weights_MxBxT)
        return state


def _gradient(model_fn: functional.Functional, params: dict, batch: dict, weights_BxT) -> dict:
    """Returns the gradient of a batch's loss."""

    def loss(params):
        logits_BxTxV = model_fn.merge(params)(batch["tokens"])
        return batch_nats(logits_BxTxV, batch, weights_BxT)

    return jax.grad(loss)(params)


def batch_nats(logits_BxTxV, batch: dict, weights_BxT):
    """Returns Σ w nats / tokens of a batch; every scored token counts, whatever its weight w."""
    nats_B = losses.cross_entropy(logits_BxTxV, batch["targets"], batch["weights"] * weights_BxT)
    tokens = jnp.maximum(jnp.sum(batch["weights"]), jnp.finfo(jnp.float32).tiny)
    return jnp.sum(nats_B) / tokens


class QueryLosses:
    """The losses of queries under a model: −log p of each target, nats summed over its tokens.

    Args:
        model_fn: the model's structure.
        table: the queries.
        layout: how they are batched.
    """

    def __init__(self, model_fn: functional.Functional, table: TokenTable, layout: BatchLayout):
        self.model_fn, self.table = model_fn, table
        self.batches = list(layout.batches(table))
        self._gradients = ExampleGradients(model_fn)
        self._losses = jax.jit(self.of_batch)
        self._losses_together = jax.jit(jax.vmap(self.of_batch, in_axes=(0, None)))

    def __len__(self) -> int:
        return len(self.table)

    def of_batch(self, params: dict, batch: dict, model_fn=None):
        """Returns the losses of a batch's queries, float32 [B]; a pure function."""
        logits_BxTxV = (model_fn or self.model_fn).merge(params)(batch["tokens"])
        return losses.cross_entropy(logits_BxTxV, batch["targets"], batch["weights"])

    def __call__(self, params: dict) -> np.ndarray:
        """Returns the losses of all queries, float32 [Q]."""
        return self._gather(lambda arrays: self._losses(params, arrays), ())

    def together(self, params: dict, count: int) -> np.ndarray:
        """Returns the losses under `count` models whose parameters are stacked: float32 [M, Q]."""
        return self._gather(lambda arrays: self._losses_together(params, arrays), (count,))

    def all_gradients(self, params: dict) -> dict[str, jax.Array]:
        """Returns the whole gradients of all queries by path, float32 [Q, …]."""
        parts = [self._gradients(params, batch.arrays()) for batch in self.batches]
        counts = [len(batch.places) for batch in self.batches]
        order = np.argsort(np.concatenate([batch.places for batch in self.batches]))
        return {
            p: jnp.concatenate([x[p][:n] for x, n in zip(parts, counts, strict=True)])[order]
            for p in parts[0]
        }

    def _gather(self, compute: Callable[[dict], jax.Array], leading: tuple[int, ...]) -> np.ndarray:
        out = np.zeros((*leading, len(self)), np.float32)
        for batch in self.batches:
            nats = sharding.to_host(compute(batch.arrays()))
            out[..., batch.places] = nats[..., : len(batch.places)]
        return out


def with_plain_attention(model_fn: functional.Functional, params: dict) -> functional.Functional:
    """Returns the structure of a `Decoder` with attention that `jax.jvp` can pass.

    Raises:
        TypeError: the model is not a `Decoder`.
    """
    model = model_fn.merge(params)
    if not isinstance(model, Decoder):
        raise TypeError(
            f"the model is a {type(model).__name__}, and only a Decoder's attention can be "
            "replaced by one that jax.jvp passes; give a Decoder"
        )
    settings = dataclasses.replace(model.settings, attention="plain")
    return functional.split(abstract_decoder(settings))[0]


def sum_by_unit(values_QxC: np.ndarray, unit_C: np.ndarray, units: int) -> np.ndarray:
    """Returns sums of values by token over each unit, [Q, U]; a unit of −1 does not count."""
    counted = unit_C >= 0
    out = np.zeros((len(values_QxC), units), np.float64)
    for row, values_C in zip(out, values_QxC, strict=True):
        row += np.bincount(unit_C[counted], values_C[counted], minlength=units)
    return out


def units_of_tokens(table: TokenTable, names: Iterable[Any]) -> tuple[np.ndarray, list]:
    """Returns the unit of each token of a table, int64 [C], and the units' names.

    Args:
        table: the passages.
        names: the name of each passage's unit, such as its document, relation or row; None for a
            passage of no unit, which is never dropped (its tokens have the unit −1).
    """
    numbers: dict = {}
    of_row = [-1 if n is None else numbers.setdefault(n, len(numbers)) for n in names]
    return np.repeat(np.asarray(of_row, np.int64), table.lengths), list(numbers)


def tokens_as_units(table: TokenTable) -> tuple[np.ndarray, list[str]]:
    """Returns the unit of each token of a table, int64 [C], and the units' names.

    Every scored token is a unit, and any other is of none (−1). A name is the passage's id and the
    token's place in it, from 0: "p3:7".
    """
    scored_C = np.asarray(table.scored)
    unit_C = np.where(scored_C, np.cumsum(scored_C) - 1, -1)
    place_C = np.arange(len(scored_C)) - np.repeat(table.starts[:-1], table.lengths)
    passage_C = np.repeat(np.arange(len(table)), table.lengths)
    places = zip(passage_C[scored_C].tolist(), place_C[scored_C].tolist(), strict=True)
    return unit_C, [f"{table.ids[row]}:{place}" for row, place in places]
