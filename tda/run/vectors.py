"""Stored rows other than gradients: vectors of texts, and probabilities of passages.

Each array has its own store under `stores/`, and is computed if that store is unfinished.
"""

import dataclasses
from collections.abc import Callable, Sequence

import numpy as np

from tda import store as stores
from tda.evaluation.likelihood import Likelihood
from tda.retrieval import dense, hidden
from tda.run.run import Run
from tda.runtime import preemption, processes, progress, sharding
from tda.runtime.engine import Work
from tda.runtime.fingerprint import fingerprint, plain

# Rows that are computed and written together: a killed run loses at most these.
_SHARD_ROWS = 2048


def ignore_rows(rows: int) -> None:
    """Reports no progress."""


@dataclasses.dataclass(frozen=True)
class _Array:
    """A kind of rows, and how to compute them."""

    name: str  # of its store, such as "hidden-last-corpus"
    table: str  # the sequences that have a row each: "corpus" or "queries"
    width: Callable[[], int]  # returns D, the numbers in a row; called only if rows are missing
    provenance: dict  # what decides the rows, apart from the text
    compute: Callable[[np.ndarray], np.ndarray]  # from R row numbers to float32 [R, D]


def probabilities(run: Run) -> np.ndarray:
    """Returns the geometric mean probability of each passage's tokens, float64 [C]."""
    _check_local(run, "probabilities of passages")
    likelihood = Likelihood(run.trained.model, run.unsharded_layout)

    def compute(rows):
        return likelihood(run.corpus.passages, rows).nats[:, None]

    nats_Cx1 = _load(run, _Array("nats", "corpus", lambda: 1, _provenance(run, "nats"), compute))
    # A passage without a scored token has probability 1.
    lengths_C = np.maximum(run.corpus.lengths, 1)
    return np.exp(-nats_Cx1[:, 0].astype(np.float64) / lengths_C)


def hidden_states(
    run: Run,
    pooler: hidden.Pooler,
    layer: str,
    name: str,
    on_rows: Callable[[int], None] = ignore_rows,
) -> np.ndarray:
    """Returns the mean hidden states of prompts with targets, or of passages, float32 [N, D].

    Args:
        run: the run.
        pooler: from `make_pooler`.
        layer: one of `hidden.LAYERS`.
        name: the sequences: "queries" or "corpus".
        on_rows: called with the number of rows computed so far.
    """
    _check_local(run, "hidden states")
    array = _Array(
        f"hidden-{layer}-{name}",
        name,
        lambda: pooler.width,
        _provenance(run, f"hidden states, {layer}"),
        lambda rows: pooler.rows(run.table(name), rows, run.unsharded_layout),
    )
    return _load(run, array, on_rows)


def make_pooler(run: Run, layer: str) -> hidden.Pooler:
    """Returns a pooler of the traced model's hidden states, which ignores special tokens."""
    t = run.corpus.tokenizer
    # They are the same in every text, and would make all texts similar.
    special = {*t.begin, *t.end, t.eos, t.pad} - {None}
    return hidden.Pooler(run.trained.model, layer, tuple(sorted(special)))


def sentence_vectors(
    run: Run,
    encoder: Callable[[], dense.SentenceEncoder],
    name: str,
    on_rows: Callable[[int], None] = ignore_rows,
) -> np.ndarray:
    """Returns a sentence encoder's vectors of prompts with targets or of passages, float32 [N, D].

    Args:
        run: the run.
        encoder: returns the encoder of `config.dense.model`; called only if vectors are missing.
        name: the texts: "queries" or "corpus".
        on_rows: called with the number of rows computed so far.
    """

    def compute(rows):
        if name == "queries":
            texts = run.query_texts
            return encoder().encode([texts[i] for i in rows])
        return encoder().encode([run.corpus.text_of(int(i)) for i in rows])

    provenance = {"what": "sentence encoder", "model": dense.identity(run.config.dense.model)}
    array = _Array(f"dense-{name}", name, lambda: encoder().width, provenance, compute)
    return _load(run, array, on_rows)


def _provenance(run: Run, description: str) -> dict:
    """Returns what decides the rows that the traced model computes."""
    identity = fingerprint(run.trained.fingerprint)
    return {"what": description, "checkpoint": identity, "step": run.trained.step}


def _check_local(run: Run, description: str) -> None:
    if not sharding.is_local(run.trained.mesh):
        raise ValueError(
            f"{description} are computed by one process, and this model is spread over several; "
            "leave out the methods that need them"
        )


def _load(run: Run, array: _Array, on_rows: Callable[[int], None] = ignore_rows) -> np.ndarray:
    """Computes the rows that an array's store lacks, and returns all."""
    corpus = run.corpus.fingerprint[array.table]
    path = f"{run.store_root}/{array.name}-{fingerprint(plain([array.provenance, corpus]))}"

    # Before the table is used, which a live session would have to read from its files.
    if not processes.on_first_process(f"look for {array.name}", lambda: stores.finished(path)):
        _fill(run, array, path, on_rows)
    store = stores.open_store(path)
    return store.read(slice(0, store.rows))


def _fill(run: Run, array: _Array, path: str, on_rows: Callable[[int], None]) -> None:
    """Computes the shards that an array's store lacks."""
    ids, width = run.table(array.table).ids, array.width()
    with run.engine.alone():
        store = stores.create(
            path,
            ids,
            {"vector": width},
            array.provenance,
            "float32",
            _SHARD_ROWS * width * 4,
            corpus=run.corpus.fingerprint[array.table],
        )
    shards = [range(s.start, s.stop) for s in store.shards()]

    def compute(numbers: Sequence[int]) -> None:
        total = sum(len(shards[i]) for i in numbers)
        with progress.bar(len(ids), array.name, "passage", len(ids) - total) as bar:
            for i in numbers:
                store.write(i, array.compute(np.array(shards[i])))
                bar.update(len(shards[i]))
                on_rows(bar.n)
                preemption.check()

    name = f"{array.name} {path.rpartition('/')[2]}"
    run.engine.compute(Work(name, compute, store.missing, store.missing))
