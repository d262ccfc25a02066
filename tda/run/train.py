"""The stage that trains the model, or finds and restores the trained one."""

import dataclasses

import jax
import jax.numpy as jnp
import optax
from flax import nnx

from tda.data.batches import BatchLayout
from tda.model import functional, pretrained, sizes
from tda.model.decoder import Decoder
from tda.model.settings import DecoderSettings
from tda.run.run import Corpus, Trained
from tda.run.workdir import Workdir
from tda.runtime import processes, sharding
from tda.runtime.atomic_file import write_json
from tda.training import checkpoint, loop, optimizer

# Keys of `train` that do not affect the trained model.
_NOT_OF_TRAINING = ("save_every", "keep", "traced")


def build_model(config, vocab_size: int) -> Decoder:
    """Returns the decoder that training starts from: freshly initialised, or pretrained."""
    arguments = model_arguments(config, vocab_size)
    if config.model.pretrained:
        description = pretrained.inspect(config.model.pretrained)
        description = dataclasses.replace(description, arguments=arguments)
        return pretrained.place(description, make_mesh(config))
    return Decoder(DecoderSettings(**arguments), rngs=nnx.Rngs(config.seed))


def model_arguments(config, vocab_size: int) -> dict:
    """Returns the fields of the decoder's settings, as plain values."""
    m = config.model
    computing = dict(dtype=m.dtype, remat=m.remat)
    if not m.pretrained:
        return sizes.size(m.size) | dict(vocab_size=vocab_size) | computing
    arguments = pretrained.inspect(m.pretrained).arguments | computing
    if vocab_size > arguments["vocab_size"]:
        raise ValueError(
            f"the tokenizer of {m.pretrained} has {vocab_size} tokens, the model "
            f"{arguments['vocab_size']}: they do not belong together"
        )
    return arguments


def total_steps(config, corpus: Corpus) -> tuple[int, BatchLayout]:
    """Returns the number of steps of the whole training, and the layout of its batches."""
    layout = corpus.layout(config.train.tokens_per_batch, make_mesh(config))
    per_epoch = len(loop.epoch_batches(corpus.training, 0, layout, config.seed))
    if config.model.pretrained and not config.train.epochs:
        return 0, layout
    return max(1, round(config.train.epochs * per_epoch)), layout


def make_mesh(config) -> jax.sharding.Mesh:
    """Returns the mesh of the config, which the model is trained on."""
    return sharding.make_mesh(config.mesh.data, config.mesh.fsdp, config.mesh.tensor)


def working_mesh(config) -> jax.sharding.Mesh:
    """Returns the mesh that the trained model works on.

    If one copy of the model fits the devices of a process, each process has a copy: processes then
    encode independently, and nothing travels between hosts. Otherwise it is the mesh of training.
    """
    m = config.mesh
    if jax.process_count() == 1 or jax.local_device_count() % (m.fsdp * m.tensor):
        return make_mesh(config)
    return sharding.make_mesh(-1, m.fsdp, m.tensor, jax.local_devices())


def make_optimizer(config, steps: int, learning_rate: float = 0.0):
    """Returns the config's optimizer; a `learning_rate` above 0 replaces its schedule."""
    t = config.train
    rate = optimizer.schedule(t.schedule, t.learning_rate, steps, t.warmup, t.final)
    if learning_rate:
        rate = optax.constant_schedule(learning_rate)
    constants = {k: t[k] for k in optimizer.constants_of(t.optimizer)}
    return optimizer.make_optimizer(t.optimizer, rate, clip=t.clip, **constants)


def check(config) -> None:
    """Checks that every option of `train` that differs from its default has an effect.

    Raises:
        ValueError: the optimizer ignores some; the message names the keys.
    """
    t = config.train
    unused = [
        key
        for key, (default, optimizers) in optimizer.CONSTANTS.items()
        if t[key] != default and t.optimizer not in optimizers
    ]
    if unused:
        named = ", ".join(f"train.{key}={t[key]}" for key in unused)
        optimizers = " or ".join(optimizer.CONSTANTS[unused[0]][1])
        raise ValueError(
            f"{named} would have no effect with train.optimizer={t.optimizer}: leave it out, or "
            f"train by {optimizers}"
        )


def train(config, corpus: Corpus, workdir: Workdir) -> Trained:
    """Trains the config's model on the corpus, or finds it trained.

    Raises:
        ValueError: the config asks for something impossible, or as `traced_step` says.
        tda.run.workdir.WorkdirError: another training was begun in the workdir.
    """
    steps, layout = total_steps(config, corpus)
    arguments = model_arguments(config, corpus.tokenizer.vocab_size)
    made_from = {
        "text": corpus.fingerprint["training"],
        "tokenizer": corpus.fingerprint["tokenizer"],
        "model": arguments,
        "train": {k: v for k, v in config.train.items() if k not in _NOT_OF_TRAINING},
        "steps": steps,
        "seed": config.seed,
    }
    if config.model.pretrained:
        made_from["pretrained"] = pretrained.state_of(config.model.pretrained)
    root = str(workdir / "model" / "checkpoints")
    tx = make_optimizer(config, steps or config.train.warmup)
    model = build_model(config, corpus.tokenizer.vocab_size)
    if not workdir.finished("train", made_from):
        if steps:
            check(config)
        workdir.claim("train", made_from)
        # Process 0 alone writes; live questions build the model from this file.
        if processes.is_first():
            (workdir / "model").mkdir(exist_ok=True)
            write_json(workdir / "model" / "config.json", arguments)
        _train(config, corpus, model, tx, steps, layout, arguments, root, workdir)
        workdir.finish("train", made_from)
    mesh = working_mesh(config)
    model_fn, params = functional.split(model)
    abstract = functional.abstract(params, model_fn.axes, mesh)
    traced = traced_step(config, root, steps)
    params = checkpoint.restore_parameters(root, abstract, traced)
    return Trained(model_fn.merge(params), root, traced, tx, mesh, made_from)


def traced_step(config, root: str, steps: int) -> int:
    """Returns the step of the traced checkpoint: the kept one nearest to `train.traced`."""
    share = config.train.traced
    if not 0 < share <= 1:
        raise ValueError(f"train.traced={share} must be above 0, and 1 at most")
    if share == 1:
        return steps
    target = share * steps
    kept_steps = processes.on_first_process("list checkpoints", lambda: checkpoint.steps(root))
    nearest = min(kept_steps, key=lambda s: abs(s - target))
    # A checkpoint more than 5% of the training away is another model than the one asked for.
    if abs(nearest - target) > steps / 20:
        raise ValueError(
            f"train.traced={share} asks for a checkpoint near step {round(target)}, but those kept "
            f"are of steps {', '.join(map(str, kept_steps))}; train anew with train.keep=0 and a "
            "smaller train.save_every"
        )
    return nearest


def _train(
    config,
    corpus: Corpus,
    model,
    tx,
    steps: int,
    layout: BatchLayout,
    arguments: dict,
    root,
    workdir,
) -> None:
    """Trains; without steps, saves the pretrained model as checkpoint 0 without an optimizer."""
    description = {"tokenizer": corpus.tokenizer.fingerprint(), "model": arguments}
    if not steps:
        _, params = functional.split(model)
        checkpoint.save(root, 0, {"params": params, "step": jnp.int32(0)}, description)
        return
    loop.fit(
        model,
        tx,
        corpus.training,
        loop.TrainingSettings(
            steps=steps,
            layout=layout,
            seed=config.seed,
            save_every=config.train.save_every,
            keep=config.train.keep,
        ),
        root,
        description={
            "optimizer": {
                "name": config.train.optimizer,
                "b1": config.train.b1,
                "b2": config.train.b2,
                "eps": config.train.eps,
                "eps_root": 0.0,
            },
            **description,
        },
        log_path=workdir / "train.jsonl",
    )


def restore_state(trained: Trained) -> tuple[functional.Functional, dict]:
    """Restores the full state of the checkpoint, optimizer included, with the model's structure.

    Raises:
        ValueError: the checkpoint is that of a pretrained model, without an optimizer's state.
    """
    if not checkpoint.has_optimizer(trained.root, trained.step):
        raise ValueError(
            f"{trained.root} has no optimizer's state, which tail-patches take their step with: "
            "give train.epochs, or eval.tail_patch_queries=0"
        )
    model_fn, params = functional.split(trained.model)
    state = {"params": params, "opt_state": trained.tx.init(params), "step": jnp.int32(0)}
    abstract = loop.abstract_state(state, model_fn, trained.mesh)
    return model_fn, checkpoint.restore(trained.root, abstract, trained.step)
