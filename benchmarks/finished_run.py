"""Reads a finished run of `experiments.trace`: gradients, and TrackStar's encodings."""

import json
import os
import sys

import numpy as np

from tda import hessian
from tda.methods import GradientKind
from tda.retrieval import scorer
from tda.retrieval.scorer import Scorer
from tda.retrieval.sources import InMemory
from tda.run import encode, stages
from tda.run.run import Run
from tda.run.workdir import Workdir


def load(config, directory: str) -> Run:
    """Returns the finished run in a workdir."""
    workdir = Workdir(directory)
    stamp = workdir / "stages" / "train.json"
    if not stamp.exists() or not json.loads(stamp.read_text())["finished"]:
        sys.exit(f"error: no finished training in {directory}; run experiments.trace first")
    return stages.prepare(config, workdir)


def gradients(config, directory: str):
    """Returns the corpus, its store of corrected gradients, and the queries', float32 [Q, E]."""
    run = load(config, directory)
    store, queries_QxE = encode.encode(run, GradientKind(corrected=True))
    return run.corpus, store, queries_QxE


def scorers(store, queries_QxE: np.ndarray) -> dict[str, Scorer]:
    """Returns the scorers of TrackStar, with λ by the rule, and of the cosine."""
    slices = hessian.block_slices(store.form.widths)
    train = hessian.autocorrelation_of_source(store).blocks
    asked = hessian.autocorrelation_of_source(InMemory(queries_QxE, slices)).blocks
    k = hessian.default_component(store.form.width)
    weight = hessian.mixing_weight(hessian.spectra(train), hessian.spectra(asked), k)
    roots = hessian.inverse_root(hessian.mix(train, asked, weight))
    return {"trackstar": Scorer(roots, True), "cosine": Scorer(None, True)}


def encodings(config, directory: str, method: str, path: str) -> tuple[np.ndarray, np.ndarray]:
    """Returns the encodings of the corpus, in a memory map of `path`, and of the queries."""
    _, store, queries_QxE = gradients(config, directory)
    chosen = scorers(store, queries_QxE)[method]
    of_queries = scorer.encode(queries_QxE, chosen.whitening, chosen.unit_norm, store.form.widths)
    if not os.path.exists(path):
        shape = (store.rows, store.form.width)
        out = np.lib.format.open_memmap(f"{path}.part", "w+", np.float32, shape)
        for first in range(0, store.rows, 512):
            rows = np.arange(first, min(store.rows, first + 512))
            out[rows] = scorer.read_encodings(store, chosen, rows)
        out.flush()
        del out
        os.replace(f"{path}.part", path)
    return np.load(path, mmap_mode="r"), np.asarray(of_queries)
