"""The gradients that a finished run kept, with what makes a question's gradient like them."""

import dataclasses

import jax

from tda.gradients import encoder as encoders
from tda.gradients import kronecker, sites
from tda.gradients.moments import second_moments
from tda.gradients.projection import Projection
from tda.live import Encoded
from tda.live.opened import Opened
from tda.methods import METHODS, Gradients
from tda.run import curvature, encode, moments
from tda.run.remembered import LiveError, Reread
from tda.run.workdir import Workdir
from tda.runtime.fingerprint import plain
from tda.runtime.progress import Progress
from tda.store import GradientStore


def encoded(run: Opened, reread: Reread) -> dict[Gradients, Encoded]:
    """The gradients of all methods whose stores are finished.

    Args:
        run: the run.
        reread: its corpus, where that is needed.
    """
    found = {}
    for what in dict.fromkeys(m.gradients for m in METHODS.values()):
        if fitting := fitting_of(run.corpus, what, run.config):
            found[what] = encoded_as(fitting[0], run, reread)
    return found


def fitting_of(stores: list[GradientStore], what: Gradients, config) -> list[GradientStore]:
    """Those of some stores that have these gradients, made by the config's settings first."""
    fitting = [s for s in stores if _is_of(s, what, config)]
    return sorted(fitting, key=lambda s: not _is_configs(s, what, config))


def _is_of(store: GradientStore, what: Gradients, config) -> bool:
    made = store.manifest["fingerprint"]
    kind = made.get("curvature", {"kind": "none"})["kind"]
    output = what.output or config.gradients.output
    adam_step = made["correction"] == encode.ADAM_STEP
    corrected = made["correction"] != "none" and not adam_step
    return Gradients(corrected, made["output"], kind, adam_step) == dataclasses.replace(
        what, output=output
    )


def _is_configs(store: GradientStore, what: Gradients, config) -> bool:
    """Whether a store was made by the config's own settings, and not by an earlier run's."""
    made, g = store.manifest["fingerprint"], config.gradients
    own = made["correction"] in ("none", encode.ADAM_STEP, g.correction)
    same = all(made[k] == g[k] for k in ("include", "exclude", "untapped"))
    dtype = store.manifest["dtype"] == config.store.dtype
    projection = plain(dataclasses.asdict(encode.projection_of(config, what)))
    return own and same and dtype and made["projection"] == projection


def encoded_as(store: GradientStore, run: Opened, reread: Reread) -> Encoded:
    """A store, and all that makes a question's gradient like its rows."""
    made = store.manifest["fingerprint"]
    include, exclude = made["include"] or None, made["exclude"] or None
    chosen = sites.find(run.trained.model, include, exclude, made["untapped"])
    projection = Projection(**made["projection"])
    same = [q for q in run.queries if q.manifest["fingerprint"] == made]

    def scales(on_progress: Progress):
        return _scales(run, reread, chosen, made, on_progress)

    def encoder():
        return _by_factors(run, chosen, projection, made)

    return Encoded(
        store,
        same[0] if same else None,
        projection,
        scales,
        made["output"],
        include,
        exclude,
        made["untapped"],
        encoder if "curvature" in made else None,
    )


def _scales(run: Opened, reread: Reread, chosen, made: dict, on_progress: Progress):
    """1/√V as the run had it: read from the checkpoint, or its estimate, which it kept."""
    correction = made["correction"]
    if correction == "none":
        return None
    if made["second_moments"] == "optimizer":
        trained, device = run.trained, jax.local_devices()[0]
        found = second_moments.read(trained.root, chosen, correction, trained.step)
        # On the model's device, whichever devices they were saved from.
        return {path: s.map(lambda x: jax.device_put(x, device)) for path, s in found.items()}
    found = moments.kept(run.path, made, run.config.train.eps)
    if found is not None:
        return found
    # A run of an older version kept none.
    corpus = reread.get(on_progress, "to estimate the second moments again")
    if made["second_moments"] != plain(moments.source(run.config, corpus, run.trained)):
        raise LiveError(
            "the second moments of this store were estimated by other settings than the config's "
            "(gradients.estimate_batches, train.tokens_per_batch, seed), and are not kept; ask by "
            "a method without correction"
        )
    count = run.config.gradients.estimate_batches

    def on_batches(done: int) -> None:
        on_progress("estimating second moments", done, count)

    workdir = Workdir(run.path)
    return moments.scales(run.config, corpus, run.trained, workdir, chosen, made, on_batches)


def _by_factors(run: Opened, chosen, projection: Projection, made: dict) -> encoders.Encoder:
    """The encoder of EK-FAC's or LoGra's gradients, by the factors that the run fitted."""
    how, chosen = made["curvature"], kronecker.factored(chosen)
    file = curvature.file_of(run.path, how, run.trained, chosen, projection.side)
    if not file.exists():
        raise LiveError(
            f"{file} is missing, which has the Kronecker factors that the run's {how['kind']} "
            "gradients were made with; run experiments.trace with this workdir once more"
        )
    fitted = curvature.load(file)
    ends = curvature.ends_of(how["kind"], chosen, projection, fitted, how.get("damping", 0.0))
    trained = run.trained
    return encoders.build(trained.model, chosen, projection, ends, made["output"], trained.mesh)
