"""Kronecker factors of a run's model, for EK-FAC, LoGra and R without projection: kept on disk."""

import pathlib

import numpy as np

from tda.data.batches import draw
from tda.gradients import fitted_curvature, kronecker, pair_products, sampled_labels, sites, taps
from tda.gradients.factors import GradientFactors
from tda.gradients.pair_metrics import Metric, Moments
from tda.methods import GradientKind, Method
from tda.run.run import CURVATURE_LABELS, Run
from tda.runtime import atomic_file, processes, progress
from tda.runtime.fingerprint import fingerprint, plain


def make_taps(run: Run, kind: GradientKind) -> dict[sites.Site, taps.Tap]:
    """Returns the taps of the gradients that EK-FAC or LoGra compares, by site."""
    chosen, projection, fitted = run.sites(kind), run.projection(kind), factors(run, kind)
    if kind.curvature == "logra":
        return kronecker.logra_taps(chosen, projection.side, fitted)
    return kronecker.ekfac_taps(chosen, projection, fitted, run.config.curvature.damping)


def factors(run: Run, kind: GradientKind) -> dict[str, kronecker.Curvature]:
    """Returns the factors of EK-FAC or LoGra by path."""
    file = file_of(run, kind)
    with run.engine.alone():
        if processes.on_first_process("look for curvature", file.exists):
            return fitted_curvature.load(file)
        fitted = _fit(run, kind)

        def save():
            file.parent.mkdir(exist_ok=True)
            fitted_curvature.save(file, fitted)

        processes.on_first_process("keep curvature", save)
    return fitted


def whole_moments(
    run: Run, method: Method, factors: GradientFactors, metric: Metric, of: str = "passages"
) -> Moments:
    """Returns E[G Gᵀ] and E[Gᵀ G] of whole gradients by path: of a sample of passages, or queries.

    Args:
        run: the run.
        method: the method whose R they are.
        factors: computes the gradients.
        metric: the correction before R.
        of: "passages" or "queries"; all queries are in R.
    """
    file = _file_of_moments(run, method, of)
    with run.engine.alone():
        if not processes.on_first_process(f"look for R of {of}", file.exists):
            is_corpus = of == "passages"
            table = run.corpus.passages if is_corpus else run.corpus.prompts
            rows = _sample(run) if is_corpus else np.arange(len(table))
            with progress.bar(len(rows), f"R of {of} without projection", "row") as bar:

                def on_rows(count: int) -> None:
                    bar.update(count)
                    processes.check_preemption(is_joint=True)

                moments = pair_products.fit_moments(
                    factors, metric, run.layout, table, rows, on_rows
                )
            arrays = {f"{p}|left": pair[0] for p, pair in moments.items()}
            arrays |= {f"{p}|right": pair[1] for p, pair in moments.items()}

            def save():
                file.parent.mkdir(exist_ok=True)
                atomic_file.write_arrays(file, arrays)

            processes.on_first_process("keep R without projection", save)
    arrays = atomic_file.read_arrays(file)
    return {s.path: (arrays[f"{s.path}|left"], arrays[f"{s.path}|right"]) for s in factors.sites}


def files_of_metric(run: Run, method: Method) -> list[pathlib.Path]:
    """Returns the files of the metric of a method without projection."""
    kind = method.gradients
    if kind.curvature != "none":
        return [file_of(run, kind)]
    sources = {"none": (), "train": ("passages",), "mixed": ("passages", "queries")}
    return [_file_of_moments(run, method, of) for of in sources[method.hessian]]


def _file_of_moments(run: Run, method: Method, of: str) -> pathlib.Path:
    kind = method.gradients
    provenance = run.provenance(kind)
    provenance.pop("projection")
    provenance |= {"R": run.curvature_provenance("whole")}
    if of == "queries":
        provenance |= {"queries": run.corpus.fingerprint["queries"]}
    return run.workdir / "curvature" / f"whole-{fingerprint(plain(provenance))}.npz"


def _sample(run: Run) -> np.ndarray:
    settings = run.config.curvature
    return draw(run.corpus.rows, settings.sample, settings.seed)


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
    rows = _sample(run)

    def batches(stage):
        with progress.bar(len(rows), f"{kind.curvature}: {stage}", "passage") as bar:

            def on_rows(count: int) -> None:
                bar.update(count)
                processes.check_preemption(is_joint=True)

            options = {"labels": labels, "layout": run.layout, "seed": settings.seed}
            yield from sampled_labels.batches(corpus.passages, rows, **options, on_rows=on_rows)

    return fitted_curvature.fit(model, chosen, batches, labels, _rank(run, kind))
