"""One train step, and the loop around it that can be killed at any moment."""

import json
import os
from collections.abc import Callable

import jax
import jax.numpy as jnp
import optax
from flax import nnx

from tda import loss as losses
from tda.data import batches as batching
from tda.data.tokens import TokenTable
from tda.model import functional
from tda.runtime import atomic_file, processes, progress, sharding
from tda.training import checkpoint


def batch_loss(merge: Callable, params: dict, batch: dict) -> jax.Array:
    """Mean next-token cross-entropy in nats over the batch's scored tokens, a scalar."""
    nats = losses.total(merge(params), batch, losses.cross_entropy)
    return nats / jnp.maximum(jnp.sum(batch["weights"]), 1.0)


def train_step(merge: Callable, tx: optax.GradientTransformation, state: dict, batch: dict):
    """One optimizer step: the new state {"params", "opt_state", "step"} and the loss before it."""
    loss, gradient = jax.value_and_grad(lambda p: batch_loss(merge, p, batch))(state["params"])
    updates, opt_state = tx.update(gradient, state["opt_state"], state["params"])
    params = optax.apply_updates(state["params"], updates)
    return {"params": params, "opt_state": opt_state, "step": state["step"] + 1}, loss


def initial_state(model: nnx.Module, tx: optax.GradientTransformation, mesh):
    """The model's structure and a fresh state laid out on `mesh`."""
    model_fn, params = functional.split(model)
    # A copy: the train step gives its state's memory away, the model must keep its own.
    params = functional.place(jax.tree.map(jnp.copy, params), model_fn.axes, mesh)
    state = {"params": params, "opt_state": tx.init(params), "step": jnp.int32(0)}
    return model_fn, jax.tree.map(jax.device_put, state, state_shardings(state, model_fn, mesh))


def state_shardings(state: dict, model_fn: functional.Functional, mesh) -> dict:
    """Shardings of a state: parameters by the axis rules, the optimizer's copies like them.

    A leaf of the optimizer's state is a copy if its path ends in a parameter's path and its shape
    is the parameter's; every other leaf is replicated.
    """
    abstract = functional.abstract(state["params"], model_fn.axes, mesh)
    by_path = functional.flat_parameters(abstract)

    def choose(path, x):
        parts = functional.path_name(path).split("/")
        for i in range(len(parts)):
            like = by_path.get("/".join(parts[i:]))
            if like is not None and like.shape == x.shape:
                return like.sharding
        return sharding.named(mesh, (None,) * x.ndim)

    return jax.tree_util.tree_map_with_path(choose, state)


def abstract_state(state: dict, model_fn: functional.Functional, mesh) -> dict:
    """Shapes, dtypes and shardings of a state, as `tda.training.checkpoint.restore` takes them."""
    return jax.tree.map(
        lambda x, s: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=s),
        state,
        state_shardings(state, model_fn, mesh),
    )


def epoch_plan(table: TokenTable, epoch: int, *, bucket_lengths, tokens_per_batch, multiple, seed):
    """The batches of one epoch, a function of (seed, epoch) alone."""
    return batching.plan(
        table.lengths - 1,
        bucket_lengths,
        tokens_per_batch,
        multiple=multiple,
        seed=hash_seed(seed, epoch),
    )


def hash_seed(*parts: int) -> int:
    """A seed from several numbers."""
    seed = 0
    for part in parts:
        seed = (seed * 1_000_003 + part + 1) % (2**63)
    return seed


def fit(
    model: nnx.Module,
    tx: optax.GradientTransformation,
    table: TokenTable,
    *,
    steps: int,
    directory,
    bucket_lengths: tuple[int, ...],
    tokens_per_batch: int,
    pad: int,
    seed: int = 0,
    save_every: int = 500,
    keep: int = 2,
    description: dict | None = None,
    mesh=None,
    log_path=None,
) -> dict:
    """Trains to step `steps`, from the last checkpoint under `directory` if there is one.

    Killed at any moment and called again, it ends in the parameters of an uninterrupted run: the
    data's position is the step, and batches are a function of (seed, step).

    Args:
        model: the initialised model.
        tx: the optimizer.
        table: the training sequences; an epoch passes each once.
        steps: total steps.
        directory: where checkpoints go; one is written every `save_every` steps and at the end.
        bucket_lengths, tokens_per_batch, pad: see `tda.data.batches`.
        seed: of the order of batches.
        save_every: steps between checkpoints.
        keep: checkpoints kept, 0 for all.
        description: JSON values saved with each checkpoint.
        mesh: devices; all of them along the data axis by default.
        log_path: JSON lines {"step", "epoch", "loss", "tokens"} are appended here, by process 0.

    Returns:
        The final state {"params", "opt_state", "step"}.

    Raises:
        ValueError: the table is empty.
        tda.training.checkpoint.CheckpointError: a checkpoint under `directory` is of another model,
            or of another order of batches (corpus, seed, batch size or number of devices).
    """
    if not len(table):
        raise ValueError("the training corpus has no passages")
    mesh = sharding.make_mesh() if mesh is None else mesh
    multiple = sharding.batch_devices(mesh)
    layout = dict(
        bucket_lengths=bucket_lengths,
        tokens_per_batch=tokens_per_batch,
        multiple=multiple,
        seed=seed,
    )
    per_epoch = len(epoch_plan(table, 0, **layout))
    tokens_per_epoch = int(table.scored.sum())
    model_fn, state = initial_state(model, tx, mesh)
    batches_of = {
        "sequences": len(table),
        "tokens": int(len(table.tokens)),
        "bucket_lengths": list(bucket_lengths),
        "tokens_per_batch": tokens_per_batch,
        "multiple": multiple,
        "seed": seed,
    }
    description = dict(description or {}) | {"batches": batches_of}
    last = processes.by_first("look for checkpoints", lambda: checkpoint.latest_step(directory))
    if last is not None:
        there = checkpoint.describe(directory, last).get("batches")
        _check_same_batches(there, batches_of, directory)
        state = checkpoint.restore(directory, abstract_state(state, model_fn, mesh), last)
    step_fn = jax.jit(
        lambda state, batch: train_step(model_fn.merge, tx, state, batch), donate_argnums=0
    )
    first = int(state["step"])
    log_path = log_path if processes.is_first() else None
    _trim_log(log_path, first)
    log = open(log_path, "a", encoding="utf-8") if log_path else None
    seen = round(tokens_per_epoch * first / per_epoch)
    with (
        jax.set_mesh(mesh),
        progress.bar(
            round(tokens_per_epoch * steps / per_epoch), "train", "token", seen
        ) as progress_bar,
    ):
        for step, epoch, batch in _stream(table, first, steps, per_epoch, pad, layout):
            state, loss = step_fn(state, sharding.put_batch(mesh, batch.arrays()))
            tokens = int(batch.weights.sum())
            progress_bar.update(tokens)
            if log and (step % 10 == 0 or step + 1 == steps):
                record = {"step": step, "epoch": epoch, "loss": float(loss), "tokens": tokens}
                progress_bar.set_postfix_str(f"loss {record['loss']:.3f}", refresh=False)
                log.write(json.dumps(record) + "\n")
            if (step + 1) % save_every == 0 or step + 1 == steps:
                if log:
                    log.flush()
                if not jnp.isfinite(loss):
                    raise FloatingPointError(
                        f"the loss at step {step} is {float(loss)}; lower the learning rate"
                    )
                checkpoint.save(directory, step + 1, state, description, keep)
    if log:
        log.close()
    return state


def _check_same_batches(there: dict | None, wanted: dict, directory) -> None:
    """A checkpoint of other batches cannot be gone on from: its step would mean another place."""
    differing = [
        f"{k}: {there.get(k)} there, {wanted[k]} now"
        for k in wanted
        if there and there.get(k) != wanted[k]
    ]
    if differing:
        raise checkpoint.CheckpointError(
            f"the checkpoint under {directory} was trained on other batches ("
            + "; ".join(differing)
            + "); go on as it began, or train in another directory"
        )


def _stream(table, first, steps, per_epoch, pad, layout):
    step = first
    while step < steps:
        epoch_of, offset = divmod(step, per_epoch)
        plan = epoch_plan(table, epoch_of, **layout)
        for batch in batching.batches(table, plan, pad, offset):
            if step == steps:
                return
            yield step, epoch_of, batch
            step += 1


def _trim_log(path, step: int) -> None:
    """Drops log lines past the step that a resumed run goes on from (and a torn last line)."""
    if not path or not os.path.exists(path):
        return
    kept = []
    with open(path, encoding="utf-8") as lines:
        for line in lines:
            try:
                if json.loads(line)["step"] < step:
                    kept.append(line)
            except json.JSONDecodeError:
                break  # torn by the kill; everything after it is later still
    with atomic_file.written(path) as out:
        out.writelines(kept)
