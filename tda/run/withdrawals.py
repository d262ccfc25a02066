"""The stores of a run's corpus, and the passages withdrawn from them."""

import contextlib

import numpy as np

from tda import store as stores
from tda.methods import METHODS
from tda.run.run import NO_STORE, Run
from tda.runtime import processes


def corpus_stores(run: Run) -> list[str]:
    """Returns where the run's stores of the corpus are, or would be, of every kind of gradients."""
    paths = []
    for kind in dict.fromkeys(m.gradients for m in METHODS.values()):
        # Raised for a kind that the model has no parameters for, such as EK-FAC of embeddings.
        with contextlib.suppress(ValueError):
            paths.append(run.store_path("corpus", kind))
    return paths


def withdrawn_passages(run: Run) -> np.ndarray:
    """Returns the rows withdrawn from any of the run's stores, int64; all processes call it."""
    if run.config.store.dtype == NO_STORE:
        return np.zeros(0, np.int64)
    paths = corpus_stores(run)

    def read() -> list[int]:
        return sorted(set().union(*(stores.withdrawn(path).tolist() for path in paths)))

    rows = processes.on_first_process("look for withdrawn passages", read)
    return np.asarray(rows, np.int64)
