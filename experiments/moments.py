"""1/√V of a run's corrected gradients: read from the checkpoint, or estimated once and kept."""

import dataclasses
import itertools
import os
import pathlib
from collections.abc import Callable

import jax
import numpy as np

from experiments.corpus import Corpus
from experiments.training import Trained
from experiments.workdir import Workdir, fingerprint
from tda import checkpoint, processes, sharding, train
from tda import loss as losses
from tda.data import batches
from tda.gradients import estimate, second_moments, sites
from tda.gradients.second_moments import Scale


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
        return {path: _within_reach(s, trained.mesh) for path, s in found.items()}
    file = kept_at(workdir.path, made, config.train.eps)
    if processes.by_first("look for second moments", file.exists):
        return load(file)
    found = _estimated(config, corpus, trained, chosen, made, on_batches)
    arrays = _arrays(found)  # of arrays on several hosts all have to give their part
    processes.by_first("keep second moments", lambda: _save(file, arrays))
    return found


def kept_at(path, made: dict, eps: float) -> pathlib.Path:
    """Where a workdir keeps the estimate that gradients made as `made` says were divided by."""
    keys = ("checkpoint", "step", "correction", "second_moments", "parameters")
    which = {k: made[k] for k in keys} | {"eps": eps}
    return pathlib.Path(path) / "moments" / f"{fingerprint(which)}.npz"


def load(file) -> dict[str, Scale]:
    """An estimate that was kept, by path."""
    with np.load(file, allow_pickle=False) as kept:
        arrays = dict(kept)
    found: dict[str, dict] = {}
    for name, x in arrays.items():
        path, _, part = name.rpartition("|")
        found.setdefault(path, {})[part] = jax.numpy.asarray(x)
    return {path: Scale(**parts) for path, parts in found.items()}


def _arrays(found: dict[str, Scale]) -> dict[str, np.ndarray]:
    return {
        f"{path}|{f.name}": sharding.to_host(x)
        for path, scale in found.items()
        for f in dataclasses.fields(scale)
        if (x := getattr(scale, f.name)) is not None
    }


def _save(file: pathlib.Path, arrays: dict[str, np.ndarray]) -> None:
    file.parent.mkdir(exist_ok=True)
    part = f"{file}.part"
    with open(part, "wb") as out:
        np.savez(out, **arrays)
    os.replace(part, file)


def _estimated(
    config, corpus: Corpus, trained: Trained, chosen, made: dict, on_batches
) -> dict[str, Scale]:
    count, training = config.gradients.estimate_batches, corpus.training
    print(f"second moments: estimated from {count} batches of the training text")
    # A shuffled epoch's first batches are a sample of the text.
    planned = train.epoch_plan(
        training,
        0,
        bucket_lengths=corpus.buckets,
        tokens_per_batch=config.train.tokens_per_batch,
        multiple=1,
        seed=config.seed,
    )
    found = batches.batches(training, planned, corpus.tokenizer.pad)

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


def _within_reach(scale: Scale, mesh) -> Scale:
    """A scale that was read onto the devices of all processes, for a model on this one's."""
    parts = {f.name: getattr(scale, f.name) for f in dataclasses.fields(scale)}
    far = {n: x for n, x in parts.items() if x is not None and not x.is_fully_addressable}
    if not far or not sharding.is_local(mesh):
        return scale
    return dataclasses.replace(scale, **{n: sharding.to_host(x) for n, x in far.items()})
