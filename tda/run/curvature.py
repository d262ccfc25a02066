"""Kronecker factors of a run's model, for EK-FAC and LoGra: fitted once, and kept."""

import pathlib

import numpy as np

from tda.gradients import kronecker, sites, taps
from tda.gradients.projection import Projection
from tda.run.run import Corpus, Trained
from tda.run.workdir import Workdir
from tda.runtime import atomic_file, processes, progress
from tda.runtime.fingerprint import fingerprint

# EK-FAC's Fisher matrix is of the model's own predictions; LoGra takes the data's labels.
_LABELS = {"ekfac": "sampled", "logra": "data"}


def made_from(config, corpus: Corpus, kind: str) -> dict:
    """What decides the factors of a checkpoint, as JSON values."""
    c = config.curvature
    made = {
        "kind": kind,
        "labels": _LABELS[kind],
        "passages": c.sample,
        "seed": c.seed,
        "corpus": corpus.fingerprint["corpus"],
    }
    return made | ({"damping": c.damping} if kind == "ekfac" else {})


def ends(
    config,
    corpus: Corpus,
    trained: Trained,
    workdir: Workdir,
    kind: str,
    chosen: list[sites.Site],
    projection: Projection,
) -> dict[sites.Site, taps.End]:
    """Taps of the gradients that the method of this kind compares."""
    file = file_of(workdir.path, made_from(config, corpus, kind), trained, chosen, projection.side)
    fitted = _fitted(config, corpus, trained, kind, chosen, projection.side, file)
    return ends_of(kind, chosen, projection, fitted, config.curvature.damping)


def ends_of(kind: str, chosen, projection: Projection, fitted: dict, damping: float) -> dict:
    """Taps of the gradients that the method of this kind compares, from its factors."""
    if kind == "logra":
        return kronecker.logra_ends(chosen, projection.side, fitted)
    return kronecker.ekfac_ends(chosen, projection, fitted, damping)


def file_of(
    path, made: dict, trained: Trained, chosen: list[sites.Site], side: int
) -> pathlib.Path:
    """Where a workdir keeps the factors that were made as `made` says (`made_from`)."""
    kind = made["kind"]
    made = {k: v for k, v in made.items() if k != "damping"} | {
        "checkpoint": fingerprint(trained.fingerprint),
        "step": trained.step,
        "sites": [s.path for s in chosen],
    }
    keep = side if kind == "logra" else None
    return pathlib.Path(path) / "curvature" / f"{kind}-{fingerprint([made, keep])}.npz"


def _fitted(config, corpus, trained, kind: str, chosen, side: int, file: pathlib.Path) -> dict:
    if not processes.on_first_process("look for curvature", file.exists):
        found = _fit(config, corpus, trained, kind, chosen, side if kind == "logra" else None)
        processes.on_first_process("keep curvature", lambda: _save(file, found))
        return found
    return load(file)


def _fit(config, corpus: Corpus, trained: Trained, kind: str, chosen, keep) -> dict:
    c, labels = config.curvature, _LABELS[kind]
    count = len(corpus.passages)
    # In rising order; a draw from the whole corpus, not its first passages.
    rows = np.random.default_rng(c.seed).permutation(count)[: c.sample or count]
    rows = np.sort(rows)

    def batches(what):
        with progress.bar(len(rows), f"{kind}: {what}", "passage") as bar:
            found = kronecker.batches(
                corpus.passages,
                rows,
                labels=labels,
                layout=corpus.layout(config.gradients.tokens_per_batch, trained.mesh),
                seed=c.seed,
            )
            for batch in found:
                yield batch
                bar.update(int((batch["weights"] > 0).any(axis=1).sum()))

    of = kronecker.covariances(trained.model, chosen, batches("covariances"), labels)
    found = kronecker.eigenvectors(of, keep)
    if kind == "ekfac":
        found = kronecker.corrected(trained.model, chosen, batches("eigenvalues"), labels, found)
    return found


def _save(file, found: dict) -> None:
    file.parent.mkdir(exist_ok=True)
    arrays = {
        f"{path}|{name}": x
        for path, c in found.items()
        for name, x in (("left", c.left), ("right", c.right), ("values", c.values))
        if x is not None
    }
    with atomic_file.open_atomic(file, "wb") as out:
        np.savez(out, **arrays)


def load(file) -> dict:
    """Factors that were kept, by path."""
    with np.load(file, allow_pickle=False) as kept:
        arrays = dict(kept)
    paths = {name.rpartition("|")[0] for name in arrays}
    return {
        p: kronecker.Curvature(arrays[f"{p}|left"], arrays[f"{p}|right"], arrays.get(f"{p}|values"))
        for p in paths
    }
