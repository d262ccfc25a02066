"""1/√V of a run's corrected gradients: read from the checkpoint, or estimated once and kept."""

import functools
import itertools
import pathlib

import jax

from tda import loss as losses
from tda.gradients import adam_steps
from tda.gradients.moments import estimate, kept_scales, second_moments
from tda.gradients.moments.second_moments import Scale
from tda.methods import GradientKind
from tda.run.run import Run
from tda.runtime import processes, sharding
from tda.runtime.fingerprint import fingerprint
from tda.runtime.progress import Progress
from tda.training import loop


def inverse_root_moments(
    run: Run, kind: GradientKind, on_progress: Progress | None = None
) -> dict[str, Scale] | None:
    """1/√V by path; None without correction.

    Args:
        run: the run.
        kind: the gradients.
        on_progress: told the batches done, where V is estimated.
    """
    provenance = run.provenance(kind)
    if provenance["correction"] == "none":
        return None
    trained, sites = run.trained, run.sites(kind)
    if provenance["second_moments"] == "optimizer":
        scales = second_moments.read(trained.root, sites, provenance["correction"], trained.step)
        within_reach = functools.partial(_within_reach, mesh=trained.mesh)
        return {path: s.map(within_reach) for path, s in scales.items()}
    identity = _identity(provenance, run.config.train.eps)
    file = _file(run.workdir.path, identity)
    if processes.on_first_process("look for second moments", file.exists):
        return kept_scales.load(file, identity)
    scales = _estimate(run, sites, provenance["correction"], on_progress)
    # Of arrays on several hosts all have to give their part.
    local = {path: scale.map(sharding.to_host) for path, scale in scales.items()}

    def save():
        file.parent.mkdir(exist_ok=True)
        kept_scales.save(file, local, identity)

    processes.on_first_process("keep second moments", save)
    return scales


def _identity(provenance: dict, eps: float) -> dict:
    """What an estimate is known by: the gradients' provenance but for the projection."""
    keys = ("checkpoint", "step", "correction", "second_moments", "parameters")
    return {k: provenance[k] for k in keys} | {"eps": eps}


def _file(path, identity: dict) -> pathlib.Path:
    return pathlib.Path(path) / "moments" / f"{fingerprint(identity)}.safetensors"


def _estimate(run: Run, sites, correction: str, on_progress) -> dict[str, Scale]:
    config, training = run.config, run.corpus.training
    count = config.gradients.estimate_batches
    print(f"second moments: estimated from {count} batches of the training text")
    # A shuffled epoch's first batches are a sample of the text.
    layout = run.corpus.layout(config.train.tokens_per_batch)
    epoch = loop.epoch_batches(training, 0, layout, config.seed)

    def sample():
        for done, batch in enumerate(itertools.islice(epoch, count)):
            if on_progress is not None:
                on_progress("estimating second moments", done, count)
            yield batch.arrays()

    def loss(model, batch):
        return losses.cross_entropy(model(batch["tokens"]), batch["targets"], batch["weights"])

    return estimate.estimate(run.trained.model, loss, sample(), sites, correction, config.train.eps)


def adam_states(run: Run, kind: GradientKind) -> dict[str, adam_steps.State]:
    """Adam's state of every site at the checkpoint, by path."""
    trained = run.trained
    states = adam_steps.read(trained.root, run.sites(kind), trained.step)
    return jax.tree.map(lambda x: _within_reach(x, trained.mesh), states)


def _within_reach(x: jax.Array, mesh):
    """An array that was read onto the devices of all processes, for a model on this one's."""
    is_here = x.sharding.device_set <= set(mesh.devices.flat)
    return x if is_here or not sharding.is_local(mesh) else sharding.to_host(x)
