"""1/√V of a run's corrected gradients: read from the checkpoint, or estimated once and saved."""

import itertools

import jax

from tda import loss as losses
from tda.gradients import adam_steps
from tda.gradients.moments import estimate, kept_scales, second_moments
from tda.gradients.moments.scales import Scale
from tda.methods import GradientKind
from tda.run import train
from tda.run.run import Run
from tda.runtime import processes, sharding
from tda.runtime.fingerprint import fingerprint
from tda.runtime.progress import Progress
from tda.training import loop


def inverse_root_moments(
    run: Run, kind: GradientKind, on_progress: Progress | None = None
) -> dict[str, Scale] | None:
    """Returns 1/√V by path; None without correction.

    Args:
        run: the run.
        kind: the gradients.
        on_progress: called with the number of batches done, if V is estimated.
    """
    provenance = run.provenance(kind)
    if provenance["correction"] == "none":
        return None
    trained, sites = run.trained, run.sites(kind)
    if provenance["second_moments"] == "optimizer":
        correction = provenance["correction"]
        # Factors are sums: over another number of devices they would have other last bits.
        on_host = sharding.is_local(trained.mesh) and correction != "adam"
        scales = second_moments.read(trained.root, sites, correction, trained.step, on_host)
        return {path: s.map(lambda x: _to_mesh(x, trained.mesh)) for path, s in scales.items()}
    # Every projection shares an estimate: its file is named by the other values.
    keys = ("checkpoint", "step", "correction", "second_moments", "parameters")
    eps = train.options(run.config)["eps"]
    identity = {k: provenance[k] for k in keys} | {"eps": eps}
    file = run.workdir / "moments" / f"{fingerprint(identity)}.safetensors"
    with run.engine.alone():
        if processes.on_first_process("look for second moments", file.exists):
            return kept_scales.load(file, identity)
        loss, batches = losses.of_examples("loss"), _sample(run, on_progress)
        correction = provenance["correction"]
        scales = estimate.estimate(trained.model, loss, batches, sites, correction, eps)
        # Every process takes part: arrays may lie on several hosts.
        local = {path: scale.map(sharding.to_host) for path, scale in scales.items()}

        def save():
            file.parent.mkdir(exist_ok=True)
            kept_scales.save(file, local, identity)

        processes.on_first_process("keep second moments", save)
    return scales


def _sample(run: Run, on_progress: Progress | None):
    """Yields batches of the training text."""
    config, training = run.config, run.corpus.training
    count = config.gradients.estimate_batches
    print(f"second moments: estimated from {count} batches of the training text")
    layout = run.corpus.layout(config.train.tokens_per_batch)
    # A shuffled epoch's first batches are a sample of the text.
    epoch = loop.epoch_batches(training, 0, layout, config.seed)
    for done, batch in enumerate(itertools.islice(epoch, count)):
        if on_progress is not None:
            on_progress("estimating second moments", done, count)
        processes.check_preemption(is_joint=True)
        yield batch.arrays()


def adam_states(run: Run, kind: GradientKind) -> dict[str, adam_steps.State]:
    """Returns Adam's state of every site at the checkpoint, by path."""
    trained = run.trained
    states = adam_steps.read(trained.root, run.sites(kind), trained.step)
    return jax.tree.map(lambda x: _to_mesh(x, trained.mesh), states)


def _to_mesh(x: jax.Array, mesh):
    """Moves an array that was read onto all processes' devices to where the model can use it."""
    is_here = x.sharding.device_set <= set(mesh.devices.flat)
    return x if is_here or not sharding.is_local(mesh) else sharding.to_host(x)
