"""1/√V of a run's corrected gradients: read from the checkpoint, or estimated once and kept."""

import functools
import itertools
import pathlib
from collections.abc import Callable

import jax

from tda import loss as losses
from tda.gradients import adam_steps, sites
from tda.gradients.moments import estimate, kept_scales, second_moments
from tda.gradients.moments.second_moments import Scale
from tda.run.run import Corpus, Trained
from tda.run.workdir import Workdir
from tda.runtime import processes, sharding
from tda.runtime.fingerprint import fingerprint
from tda.training import checkpoint, loop


def source(config, corpus: Corpus, trained: Trained):
    """What the second moments are estimated from, or "optimizer" where they are read.

    Raises:
        ValueError: `gradients.second_moments` is unknown.
    """
    g = config.gradients
    if g.second_moments not in ("auto", "optimizer", "estimate"):
        raise ValueError(
            f"unknown gradients.second_moments={g.second_moments!r}; "
            "use auto, optimizer or estimate"
        )
    there = checkpoint.has_optimizer(trained.root, trained.step)
    if g.second_moments == "optimizer" or (g.second_moments == "auto" and there):
        return "optimizer"
    return {
        "estimated from batches": g.estimate_batches,
        "of tokens": config.train.tokens_per_batch,
        "text": corpus.fingerprint["training"],
        "seed": config.seed,
    }


def scales(
    config,
    corpus: Corpus,
    trained: Trained,
    workdir: Workdir,
    chosen: list[sites.Site],
    made: dict,
    on_batches: Callable[[int], None] = lambda done: None,
) -> dict[str, Scale] | None:
    """1/√V by path; None without correction.

    Args:
        config, corpus, trained, workdir: of the run.
        chosen: the sites.
        made: what decides the gradients (`encoding.made_from`).
        on_batches: told how many batches were taken, where V is estimated.
    """
    if made["correction"] == "none":
        return None
    if made["second_moments"] == "optimizer":
        found = second_moments.read(trained.root, chosen, made["correction"], trained.step)
        within_reach = functools.partial(_within_reach, mesh=trained.mesh)
        return {path: s.map(within_reach) for path, s in found.items()}
    eps = config.train.eps
    which = _which(made, eps)
    if processes.on_first_process("look for second moments", _file(workdir.path, which).exists):
        return kept(workdir.path, made, eps)
    found = _estimated(config, corpus, trained, chosen, made, on_batches)
    # Of arrays on several hosts all have to give their part.
    here = {path: scale.map(sharding.to_host) for path, scale in found.items()}
    processes.on_first_process("keep second moments", lambda: _keep(workdir.path, which, here))
    return found


def kept(path, made: dict, eps: float) -> dict[str, Scale] | None:
    """The estimate that a workdir keeps for gradients made as `made` says; None where it has none.

    Args:
        path: the workdir.
        made: what decides the gradients (`encoding.made_from`).
        eps: of the optimizer.
    """
    which = _which(made, eps)
    return kept_scales.load(_file(path, which), which)


def _which(made: dict, eps: float) -> dict:
    keys = ("checkpoint", "step", "correction", "second_moments", "parameters")
    return {k: made[k] for k in keys} | {"eps": eps}


def _file(path, which: dict) -> pathlib.Path:
    return pathlib.Path(path) / "moments" / f"{fingerprint(which)}.safetensors"


def _keep(path, which: dict, found: dict[str, Scale]) -> None:
    file = _file(path, which)
    file.parent.mkdir(exist_ok=True)
    kept_scales.save(file, found, which)


def _estimated(
    config, corpus: Corpus, trained: Trained, chosen, made: dict, on_batches
) -> dict[str, Scale]:
    count, training = config.gradients.estimate_batches, corpus.training
    print(f"second moments: estimated from {count} batches of the training text")
    # A shuffled epoch's first batches are a sample of the text.
    layout = corpus.layout(config.train.tokens_per_batch)
    found = loop.epoch_batches(training, 0, layout, config.seed)

    def sampled():
        for done, batch in enumerate(itertools.islice(found, count)):
            on_batches(done)
            yield batch.arrays()

    def loss(model, batch):
        return losses.cross_entropy(model(batch["tokens"]), batch["targets"], batch["weights"])

    return estimate.estimate(
        trained.model,
        loss,
        sampled(),
        chosen,
        made["correction"],
        config.train.eps,
    )


def adam_states(trained: Trained, chosen: list[sites.Site]) -> dict[str, adam_steps.State]:
    """Adam's state of every site at the checkpoint, by path."""
    found = adam_steps.read(trained.root, chosen, trained.step)
    return jax.tree.map(lambda x: _within_reach(x, trained.mesh), found)


def _within_reach(x: jax.Array, mesh):
    """An array that was read onto the devices of all processes, for a model on this one's."""
    return sharding.to_host(x) if sharding.is_local(mesh) and not x.is_fully_addressable else x
