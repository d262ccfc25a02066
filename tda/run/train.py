"""The stage that trains the model, or finds and restores the trained one."""

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
from flax import nnx

from tda.data.batches import BatchLayout
from tda.encoding import captured
from tda.encoding.captured import TrainingRows
from tda.model import functional, pretrained, sizes
from tda.model.decoder import Decoder, abstract_decoder
from tda.model.settings import DecoderSettings
from tda.run import capturing
from tda.run.run import Corpus, Trained
from tda.run.workdir import Workdir
from tda.runtime import processes, sharding
from tda.runtime.atomic_file import write_json
from tda.training import checkpoint, loop, optimizer

# Keys of `train` that do not affect the trained model.
_NOT_OF_TRAINING = ("save_every", "keep", "traced")


def options(config) -> dict[str, Any]:
    """Returns the section `train`, with the default of every optimizer's constant that is not set.

    Stamps of finished work hold all constants, even those that the optimizer lacks.
    """
    return {k: optimizer.CONSTANTS[k][0] if v is None else v for k, v in config.train.items()}


def settings(config) -> dict[str, Any]:
    """Returns the values of the section `train` that decide the trained model."""
    settings = {k: v for k, v in options(config).items() if k not in _NOT_OF_TRAINING}
    # Trainings that were finished before there were these keys have none.
    later = {"eps_root": 0.0, "capture": False}
    return {k: v for k, v in settings.items() if k not in later or v != later[k]}


def adam_constants(config) -> dict[str, float]:
    """Returns the constants of Adam's second moments."""
    return {k: options(config)[k] for k in ("b1", "b2", "eps", "eps_root")}


def build_model(config, vocab_size: int) -> Decoder:
    """Returns the decoder that training starts from: freshly initialised, or pretrained."""
    arguments = model_arguments(config, vocab_size)
    if config.model.pretrained:
        description = pretrained.inspect(config.model.pretrained)
        description = dataclasses.replace(description, arguments=arguments)
        return pretrained.place(description, make_mesh(config))
    return Decoder(DecoderSettings(**arguments), rngs=nnx.Rngs(config.seed))


def restore_model(arguments: dict, root: str, step: int, mesh: jax.sharding.Mesh) -> nnx.Module:
    """Returns the decoder with the parameters of a checkpoint, laid out on a mesh."""
    model_fn, params = functional.split(abstract_decoder(DecoderSettings(**arguments)))
    abstract = functional.abstract(params, model_fn.axes, mesh)
    return model_fn.merge(checkpoint.restore_parameters(root, abstract, step))


def model_arguments(config, vocab_size: int = 0) -> dict:
    """Returns the fields of the decoder's settings, as plain values.

    Raises:
        ValueError: the size is unknown, the tokenizer has more tokens than the pretrained model, or
            the context has more positions than it.
    """
    m = config.model
    computing = dict(dtype=computing_dtype(config), remat=m.remat)
    # Trainings that were finished before there was a choice have none.
    computing |= {} if m.attention == "blocked" else {"attention": m.attention}
    if not m.pretrained:
        return sizes.size(m.size) | dict(vocab_size=vocab_size) | computing
    arguments = pretrained.inspect(m.pretrained).arguments | computing
    if vocab_size > arguments["vocab_size"]:
        raise ValueError(
            f"the tokenizer of {m.pretrained} has {vocab_size} tokens, the model "
            f"{arguments['vocab_size']}: they do not belong together"
        )
    # Rotary positions have no table and no limit.
    positions = arguments.get("max_positions") or m.context
    if m.context > positions:
        raise ValueError(
            f"model.context={m.context} is more than the {positions} positions that "
            f"{m.pretrained} has; give model.context={positions} or less"
        )
    return arguments


def computing_dtype(config) -> str:
    """Returns the dtype that the model computes in: "float32" or "bfloat16"."""
    return sharding.usual_dtype() if config.model.dtype == "auto" else config.model.dtype


def total_steps(config, corpus: Corpus) -> tuple[int, BatchLayout]:
    """Returns the number of steps of the whole training, and the layout of its batches."""
    layout = corpus.layout(config.train.tokens_per_batch, make_mesh(config))
    if config.model.pretrained and not config.train.epochs:
        return 0, layout
    per_epoch = len(loop.epoch_batches(corpus.training, 0, layout, config.seed))
    return max(1, round(config.train.epochs * per_epoch)), layout


def make_mesh(config) -> jax.sharding.Mesh:
    """Returns the mesh that the model is trained on."""
    return sharding.make_mesh(config.mesh.data, config.mesh.fsdp, config.mesh.tensor)


def working_mesh(config) -> jax.sharding.Mesh:
    """Returns the mesh of the trained model.

    If a copy of the model fits the devices of a process, each process has one: processes then
    encode independently, without traffic between hosts. Otherwise it is the mesh of training.
    """
    m = config.mesh
    if jax.process_count() == 1 or jax.local_device_count() % (m.fsdp * m.tensor):
        return make_mesh(config)
    return sharding.make_mesh(-1, m.fsdp, m.tensor, jax.local_devices())


def learning_rates(config, steps: int) -> optax.Schedule:
    """Returns the learning rate by step of a training of `steps` steps."""
    t = config.train
    return optimizer.schedule(t.schedule, t.learning_rate, steps, t.warmup, t.final)


def make_optimizer(config, steps: int, learning_rate: float = 0.0):
    """Returns the config's optimizer; a `learning_rate` above 0 replaces its schedule."""
    t = config.train
    rate = learning_rates(config, steps)
    if learning_rate:
        rate = optax.constant_schedule(learning_rate)
    constants = {k: options(config)[k] for k in optimizer.constants_of(t.optimizer)}
    return optimizer.make_optimizer(t.optimizer, rate, clip=t.clip, **constants)


def check(config, steps: int | None = None) -> None:
    """Checks that a training can be run, before it starts.

    Args:
        config: the config.
        steps: steps of the training; None if not known yet.

    Raises:
        ValueError: the optimizer lacks an option that is set, the warm-up is longer than the
            training, or no checkpoint will be near `train.traced`; the message names the keys.
    """
    t = config.train
    unused = [
        key
        for key, (_, optimizers) in optimizer.CONSTANTS.items()
        if t[key] is not None and t.optimizer not in optimizers
    ]
    if unused:
        named = ", ".join(f"train.{key}={t[key]}" for key in unused)
        optimizers = " or ".join(optimizer.CONSTANTS[unused[0]][1])
        raise ValueError(
            f"{named} would have no effect with train.optimizer={t.optimizer}: leave it out, or "
            f"train by {optimizers}"
        )
    if steps is None:
        return
    if t.warmup > steps:
        raise ValueError(
            f"train.warmup={t.warmup} is longer than the training of {steps} steps; give a shorter "
            "warm-up or more train.epochs"
        )
    saved = [*range(t.save_every, steps, t.save_every), steps]
    traced_step(config, steps, saved[-t.keep :])


def train(config, corpus: Corpus, workdir: Workdir) -> Trained:
    """Trains the config's model on the corpus, or restores the trained one.

    Raises:
        ValueError: as for `check`.
        tda.run.workdir.WorkdirError: another training was begun in the workdir.
    """
    steps, layout = total_steps(config, corpus)
    arguments = model_arguments(config, corpus.tokenizer.vocab_size)
    made_from = {
        "text": corpus.fingerprint["training"],
        "tokenizer": corpus.fingerprint["tokenizer"],
        "model": arguments,
        "train": settings(config),
        "steps": steps,
        "seed": config.seed,
    }
    # A hash of the contents: another model may be put under the same path.
    if config.model.pretrained:
        made_from["pretrained"] = pretrained.state_of(config.model.pretrained)
    root = str(workdir / "model" / "checkpoints")
    if not workdir.is_finished("train", made_from):
        if steps:
            check(config, steps)
        workdir.claim("train", made_from, config)
        if steps and config.train.capture:
            capturing.claim(config, workdir)
        # Process 0 alone writes; live questions build the model from this file.
        if processes.is_first():
            (workdir / "model").mkdir(exist_ok=True)
            write_json(workdir / "model" / "config.json", arguments)
        description = {"tokenizer": corpus.tokenizer.fingerprint(), "model": arguments}
        model = build_model(config, corpus.tokenizer.vocab_size)
        if steps:
            _fit(config, corpus, model, made_from, layout, description, workdir)
        else:
            # An untrained pretrained model is checkpoint 0, without an optimizer state.
            _, params = functional.split(model)
            checkpoint.save(root, 0, {"params": params, "step": jnp.int32(0)}, description)
        workdir.finish("train")
    mesh = working_mesh(config)
    saved = processes.on_first_process("list checkpoints", lambda: checkpoint.steps(root))
    traced = traced_step(config, steps, saved)
    tx = make_optimizer(config, steps or config.train.warmup)
    return Trained(restore_model(arguments, root, traced, mesh), root, traced, tx, mesh, made_from)


def traced_step(config, steps: int, saved: list[int]) -> int:
    """Returns the step of the traced checkpoint: the saved one nearest to `train.traced`.

    Args:
        config: the config.
        steps: steps of the whole training.
        saved: steps of the checkpoints that exist, or that training will keep.

    Raises:
        ValueError: no checkpoint is near.
    """
    share = config.train.traced
    if share == 1:
        return steps
    target = share * steps
    nearest = min(saved, key=lambda s: abs(s - target))
    # A checkpoint more than 5% of the training away is another model than the one asked for.
    if abs(nearest - target) > steps / 20:
        raise ValueError(
            f"train.traced={share} asks for a checkpoint near step {round(target)}, but those kept "
            f"are of steps {', '.join(map(str, saved))}; train with train.keep=0 and a smaller "
            "train.save_every"
        )
    return nearest


def _fit(config, corpus: Corpus, model, made_from, layout, description: dict, workdir) -> None:
    t, steps, recorder = options(config), made_from["steps"], None
    if t["capture"]:
        rows = TrainingRows.of(corpus.training, layout, steps, config.seed)
        recorder = capturing.make_recorder(config, corpus, workdir, model, made_from, rows)
        rates = learning_rates(config, steps)(np.arange(steps))
        captured.keep_steps(capturing.path_of(config, workdir, made_from), rows, rates)
    loop.fit(
        model,
        make_optimizer(config, steps),
        corpus.training,
        loop.TrainingSettings(steps, layout, config.seed, t["save_every"], t["keep"]),
        str(workdir / "model" / "checkpoints"),
        description={
            "optimizer": {"name": t["optimizer"], **adam_constants(config)},
            **description,
        },
        log_path=workdir / "train.jsonl",
        # Evaluating it compiles small programs: only for writers, which show it.
        schedule=learning_rates(config, steps) if config.metrics.writers else None,
        recorder=recorder,
    )


def restore_state(trained: Trained) -> tuple[functional.Functional, dict]:
    """Restores the checkpoint's full state, with the optimizer's, and the model's structure.

    Raises:
        ValueError: the checkpoint is a pretrained model's, without an optimizer state.
    """
    if not checkpoint.has_optimizer(trained.root, trained.step):
        raise ValueError(
            f"{trained.root} has no optimizer state, which a tail-patch step needs; give "
            "train.epochs, or eval.tail_patch_queries=0"
        )
    model_fn, params = functional.split(trained.model)
    state = {"params": params, "opt_state": trained.tx.init(params), "step": jnp.int32(0)}
    abstract = loop.abstract_state(state, model_fn, trained.mesh)
    return model_fn, checkpoint.restore(trained.root, abstract, trained.step)
