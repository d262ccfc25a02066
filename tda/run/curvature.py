"""Kronecker factors of a run's model, for EK-FAC and LoGra: fitted once, and kept."""

import pathlib

from tda.gradients import kronecker, sites, taps
from tda.methods import GradientKind
from tda.run.run import CURVATURE_LABELS, Run, draw
from tda.runtime import atomic_file, processes, progress
from tda.runtime.fingerprint import fingerprint


def make_taps(run: Run, kind: GradientKind) -> dict[sites.Site, taps.Tap]:
    """Returns the taps of the gradients that EK-FAC or LoGra compares, by site."""
    chosen, projection = run.sites(kind), run.projection(kind)
    file = file_of(run, kind)
    with run.engine.alone():
        if processes.on_first_process("look for curvature", file.exists):
            factors = _load(file)
        else:
            factors = _fit(run, kind)
            processes.on_first_process("keep curvature", lambda: _save(file, factors))
    if kind.curvature == "logra":
        return kronecker.logra_taps(chosen, projection.side, factors)
    return kronecker.ekfac_taps(chosen, projection, factors, run.config.curvature.damping)


def file_of(run: Run, kind: GradientKind) -> pathlib.Path:
    """Returns the file that keeps a run's factors."""
    provenance = run.curvature_provenance(kind.curvature)
    provenance.pop("damping", None)  # it changes the taps, not the factors
    provenance |= {
        "checkpoint": fingerprint(run.trained.fingerprint),
        "step": run.trained.step,
        "sites": [s.path for s in run.sites(kind)],
    }
    rank = _rank(run, kind)
    return run.workdir / "curvature" / f"{kind.curvature}-{fingerprint([provenance, rank])}.npz"


def _rank(run: Run, kind: GradientKind) -> int | None:
    # LoGra projects on the first eigenvectors of a factor; EK-FAC needs all of them.
    return run.projection(kind).side if kind.curvature == "logra" else None


def _fit(run: Run, kind: GradientKind) -> dict:
    """Returns the factors by path, from a sample of the corpus."""
    settings, labels = run.config.curvature, CURVATURE_LABELS[kind.curvature]
    corpus, model, chosen = run.corpus, run.trained.model, run.sites(kind)
    rows = draw(len(corpus.passages), settings.sample, settings.seed)

    def batches(stage):
        sampled = kronecker.batches(
            corpus.passages, rows, labels=labels, layout=run.layout, seed=settings.seed
        )
        with progress.bar(len(rows), f"{kind.curvature}: {stage}", "passage") as bar:
            for batch in sampled:
                yield batch
                # Rows that only fill a batch up have no weights.
                bar.update(int((batch["weights"] > 0).any(axis=1).sum()))

    covariances = kronecker.covariances(model, chosen, batches("covariances"), labels)
    factors = kronecker.eigenvectors(covariances, _rank(run, kind))
    if kind.curvature == "ekfac":
        factors = kronecker.corrected(model, chosen, batches("eigenvalues"), labels, factors)
    return factors


def _save(file: pathlib.Path, factors: dict) -> None:
    file.parent.mkdir(exist_ok=True)
    arrays = {
        f"{path}|{name}": x
        for path, c in factors.items()
        for name, x in (("left", c.left), ("right", c.right), ("values", c.values))
        if x is not None
    }
    atomic_file.write_arrays(file, arrays)


def _load(file: pathlib.Path) -> dict:
    arrays = atomic_file.read_arrays(file)
    paths = {name.rpartition("|")[0] for name in arrays}
    return {
        p: kronecker.Curvature(arrays[f"{p}|left"], arrays[f"{p}|right"], arrays.get(f"{p}|values"))
        for p in paths
    }
