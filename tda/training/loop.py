"""A training step, and a training loop that resumes exactly after being killed at any moment."""

import dataclasses
from collections.abc import Callable
from typing import Protocol

import jax
import jax.numpy as jnp
import optax
from flax import nnx

from tda import loss as losses
from tda.data.batches import Batches, BatchLayout
from tda.data.tokens import TokenTable
from tda.model import functional
from tda.runtime import preemption, processes, progress, sharding
from tda.runtime.differences import as_text, differences
from tda.training import checkpoint
from tda.training.loss_log import LossLog


def batch_loss(merge: Callable, params: dict, batch: dict) -> jax.Array:
    """Returns the mean next-token cross-entropy in nats, a scalar: Σ w ℓ / Σ w over the tokens.

    So only the ratios of weights matter. A batch whose weights are all 0 has the loss 0.
    """
    nats = losses.total(merge(params), batch, losses.cross_entropy)
    # Only guards against 0. The reciprocal of the smallest normal float is finite, and so are
    # gradients.
    return nats / jnp.maximum(jnp.sum(batch["weights"]), jnp.finfo(jnp.float32).tiny)


def train_step(merge: Callable, tx: optax.GradientTransformation, state: dict, batch: dict):
    """Takes one optimizer step; returns the new state and the loss before the step.

    Args:
        merge: builds the model from its parameters.
        tx: the optimizer.
        state: {"params", "opt_state", "step"}.
        batch: {"tokens", "targets", "weights"}, each [B, T].
    """
    loss, gradient = jax.value_and_grad(lambda p: batch_loss(merge, p, batch))(state["params"])
    return _apply(tx, state, gradient, loss)


def _apply(tx: optax.GradientTransformation, state: dict, gradient: dict, loss: jax.Array):
    updates, opt_state = tx.update(gradient, state["opt_state"], state["params"])
    params = optax.apply_updates(state["params"], updates)
    return {"params": params, "opt_state": opt_state, "step": state["step"] + 1}, loss


class Recorder(Protocol):
    """Keeps each example's part of the gradient of its step (`tda.encoding.captured`)."""

    def differentiate(self, loss: Callable, model: nnx.Module, batch: dict) -> tuple:
        """Returns the loss, its gradient by parameter, and the examples' parts [B, E]."""

    def resume(self, step: int) -> None:
        """Resumes at a step."""

    def record(self, step: int, parts_BxE: jax.Array) -> None:
        """Takes the parts of a step's examples."""

    def keep(self, step: int) -> None:
        """Writes the parts that a checkpoint before `step` needs."""

    def forget(self, steps: list[int]) -> None:
        """Removes the parts that only checkpoints other than those of `steps` need."""


def make_step(merge: Callable, tx: optax.GradientTransformation, recorder: Recorder | None):
    """Returns the compiled step, from a state and a batch to the next state, loss and parts."""
    if recorder is None:
        return jax.jit(
            lambda state, batch: (*train_step(merge, tx, state, batch), None), donate_argnums=0
        )

    def loss_of_model(model: nnx.Module, batch: dict) -> jax.Array:
        return batch_loss(lambda model: model, model, batch)

    def step(state: dict, batch: dict):
        model = merge(state["params"])
        loss, gradient, parts = recorder.differentiate(loss_of_model, model, batch)
        return *_apply(tx, state, gradient, loss), parts

    return jax.jit(step, donate_argnums=0)


def initial_state(model: nnx.Module, tx: optax.GradientTransformation, mesh):
    """Returns the model's structure and a fresh training state laid out on `mesh`."""
    model_fn, params = functional.split(model)
    # A copy, since the compiled step donates its state's buffers, and the model keeps its arrays.
    params = functional.place(jax.tree.map(jnp.copy, params), model_fn.axes, mesh)
    state = {"params": params, "opt_state": tx.init(params), "step": jnp.int32(0)}
    return model_fn, jax.tree.map(jax.device_put, state, state_shardings(state, model_fn, mesh))


def state_shardings(state: dict, model_fn: functional.Functional, mesh) -> dict:
    """Returns the shardings of a state: parameters by the axis rules, moments like parameters.

    A leaf of the optimizer's state is sharded like a parameter if its path ends in the parameter's
    path and the shapes agree (as moments do); every other leaf is replicated.
    """
    abstract = functional.abstract(state["params"], model_fn.axes, mesh)
    by_path = functional.flat_parameters(abstract)

    def choose(path, x):
        parts = functional.path_name(path).split("/")
        for i in range(len(parts)):
            parameter = by_path.get("/".join(parts[i:]))
            if parameter is not None and parameter.shape == x.shape:
                return parameter.sharding
        return sharding.named(mesh, (None,) * x.ndim)

    return jax.tree_util.tree_map_with_path(choose, state)


def abstract_state(state: dict, model_fn: functional.Functional, mesh) -> dict:
    """Returns a state's shapes, dtypes and shardings, for `tda.training.checkpoint.restore`."""
    return jax.tree.map(
        lambda x, s: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=s),
        state,
        state_shardings(state, model_fn, mesh),
    )


def epoch_batches(table: TokenTable, epoch: int, layout: BatchLayout, seed: int) -> Batches:
    """Plans the batches of one epoch, which depend on table, layout, seed and epoch alone.

    They do not depend on the layout's devices, since a training may resume on others;
    `BatchLayout.put` pads batches to a multiple of their number.
    """
    return dataclasses.replace(layout, mesh=None).batches(table, seed=hash_seed(seed, epoch))


def hash_seed(*parts: int) -> int:
    """Combines several numbers into one seed."""
    seed = 0
    for part in parts:
        seed = (seed * 1_000_003 + part + 1) % (2**63)
    return seed


@dataclasses.dataclass(frozen=True)
class TrainingSettings:
    """The length of a training, its batches and its checkpoints."""

    steps: int
    """Optimizer steps in all."""
    layout: BatchLayout
    """How sequences are batched; without a mesh, over all devices along the data axis."""
    seed: int = 0
    """Seed of the order of batches."""
    save_every: int = 500
    """Steps between checkpoints; the last step is always saved."""
    keep: int = 2
    """Number of checkpoints to keep on disk; 0 for all."""


def fit(
    model: nnx.Module,
    tx: optax.GradientTransformation,
    table: TokenTable,
    settings: TrainingSettings,
    directory,
    *,
    description: dict | None = None,
    log_path=None,
    schedule: optax.Schedule | None = None,
    recorder: Recorder | None = None,
) -> dict:
    """Trains to step `settings.steps`, resuming from the last checkpoint under `directory`.

    If the process is killed at any moment and `fit` is called again, the final parameters are those
    of an uninterrupted run: the step says where in the data to resume, and batches depend on
    (seed, step) alone. It may resume on any number of devices and processes; sums over a batch are
    then added in another order, and parameters may differ in their last bits.

    Args:
        model: the initialised model.
        tx: the optimizer.
        table: the training sequences; each is seen once per epoch.
        settings: length, batches and checkpoints.
        directory: where checkpoints are written.
        description: JSON values saved with each checkpoint.
        log_path: a file that process 0 appends JSON lines {"step", "epoch", "loss", "tokens"} to.
        schedule: the optimizer's learning rate by step, for `tda.runtime.metrics` alone.
        recorder: what keeps the examples' parts of each step's gradient; None keeps none.

    Returns:
        The final state {"params", "opt_state", "step"}.

    Raises:
        ValueError: the table is empty.
        FloatingPointError: the loss at a checkpoint is not finite; the checkpoint is not written.
        tda.training.checkpoint.CheckpointError: a checkpoint under `directory` belongs to another
            model, or was made with other batches (corpus, seed or batch size).
        tda.runtime.preemption.Preempted: a notice came; the last step has a checkpoint, which the
            next scheduled one replaces.
    """
    if not len(table):
        raise ValueError("the training corpus has no passages")
    mesh = settings.layout.mesh or sharding.make_mesh()
    layout = dataclasses.replace(settings.layout, mesh=mesh)
    steps, seed = settings.steps, settings.seed
    per_epoch = len(epoch_batches(table, 0, layout, seed))
    tokens_per_epoch = table.count_scored()
    model_fn, state = initial_state(model, tx, mesh)
    batch_identity = {
        "sequences": len(table),
        "tokens": table.token_count,
        "bucket_lengths": list(layout.bucket_lengths),
        "tokens_per_batch": layout.tokens_per_batch,
        "seed": seed,
    }
    description = dict(description or {}) | {"batches": batch_identity}
    last = processes.on_first_process(
        "look for checkpoints", lambda: checkpoint.latest_step(directory)
    )
    if last is not None:
        _check_same_batches(checkpoint.describe(directory, last), batch_identity, directory)
        state = checkpoint.restore(directory, abstract_state(state, model_fn, mesh), last)
    step_fn = make_step(model_fn.merge, tx, recorder)
    first = int(state["step"])
    if recorder is not None:
        recorder.resume(first)
    total_tokens, seen_tokens = (round(tokens_per_epoch * n / per_epoch) for n in (steps, first))
    with (
        preemption.lockstep(),
        jax.set_mesh(mesh),
        progress.bar(total_tokens, "train", "token", seen_tokens, saves_work=True) as bar,
        LossLog(log_path if processes.is_first() else None, first, steps, schedule, bar) as log,
    ):
        for step, epoch, batch in _stream(table, first, steps, per_epoch, layout, seed):
            state, loss, parts = step_fn(state, layout.put(batch.arrays()))
            if recorder is not None:
                recorder.record(step, parts)
            tokens = int(batch.weights.sum())
            bar.update(tokens)
            log.add(step, epoch, loss, tokens)
            is_scheduled = (step + 1) % settings.save_every == 0 or step + 1 == steps
            is_preempted = preemption.is_due(step + 1 - first)
            if is_scheduled or is_preempted:
                # The log is written before the checkpoint: a resumed run drops lines beyond its
                # checkpoint, but cannot add lines that a kill lost.
                log.flush()
                if not jnp.isfinite(loss):
                    raise FloatingPointError(
                        f"the loss at step {step} is {float(loss)}; lower the learning rate"
                    )
                if recorder is not None:
                    recorder.keep(step + 1)
                checkpoint.save(
                    directory, step + 1, state, description, settings.keep, not is_scheduled
                )
                if recorder is not None:
                    recorder.forget([step + 1])
            if is_preempted and step + 1 < steps:
                raise preemption.Preempted(f"the training at step {step + 1} of {steps}")
    return state


def _check_same_batches(description: dict, current: dict, directory) -> None:
    """Checks that a checkpoint was made with the current batches, so that its step is theirs too.

    Raises:
        CheckpointError: it was not; the message names what differs.
    """
    saved = description.get("batches")
    if saved and (lines := list(differences(saved, current))):
        raise checkpoint.CheckpointError(
            f"the checkpoint under {directory} was made with other batches:{as_text(lines)}\n"
            "restore those settings, or train in another directory"
        )


def _stream(table, first, steps, per_epoch, layout, seed):
    """Yields (step, epoch, batch) from step `first` on."""
    batches = None
    for step in range(first, steps):
        epoch, number = divmod(step, per_epoch)
        if batches is None or number == 0:
            batches = epoch_batches(table, epoch, layout, seed)
        yield step, epoch, batches[number]
