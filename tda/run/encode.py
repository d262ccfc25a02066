"""The stage that encodes corpus and queries into stores."""

from collections.abc import Iterable

import jax
import numpy as np

from tda import store as stores
from tda.data.tokens import PassageTexts
from tda.encoding import table as encoding
from tda.encoding.table import OnTheFly
from tda.gradients import adam_steps, sites
from tda.gradients import encoder as encoders
from tda.gradients.projection import Projection
from tda.gradients.sites import Site
from tda.gradients.taps import Tap
from tda.methods import GradientKind
from tda.retrieval.sources import Source
from tda.run import curvature, moments
from tda.run.run import NO_STORE, Run, stored_as
from tda.runtime import processes
from tda.runtime.progress import Progress

# Bytes of rows of all kinds of gradients that one pass may hold: a shard of each.
_PASS_BYTES = 4 << 30


def encode(run: Run, kind: GradientKind) -> tuple[Source, np.ndarray]:
    """Encodes the rows that are missing from a kind's stores.

    Returns:
        The corpus's gradients, a store unless the config has none, and the queries' gradients,
        float32 [Q, E].
    """
    # Queries first: a query without a finite gradient is refused before the corpus is encoded.
    queries, passages = _encode(run, kind, "queries", "corpus")
    return passages, queries


def encode_passages(run: Run, kind: GradientKind) -> Source:
    """Returns the corpus's gradients alone, as `encode` does."""
    return _encode(run, kind, "corpus")[0]


def encode_queries(run: Run, kind: GradientKind) -> np.ndarray:
    """Returns the queries' gradients alone, float32 [Q, E]."""
    return _encode(run, kind, "queries")[0]


def _encode(run: Run, kind: GradientKind, *names: str) -> list:
    encoder, encoded = None, []
    if run.config.store.dtype == NO_STORE:
        if jax.process_count() > 1:
            raise ValueError(
                "store.dtype=none works in one process; give store.dtype to use several"
            )
        encoder = make_encoder(run, kind)
    elif not run.live:
        # An encoder may have to estimate second moments: only if a store is unfinished.
        paths = [run.store_path(name, kind) for name in names]
        finished = processes.on_first_process(
            "look for stores", lambda: all(map(stores.finished, paths))
        )
        encoder = None if finished else make_encoder(run, kind)
        if encoder is not None:
            # Before a row is written: the same code must encode the corpus and the queries.
            _check_stored_rows(run, kind, names, encoder)
    for name in names:
        rows = _rows(run, kind, name, encoder)
        if name == "queries":
            rows = (
                rows.read(slice(0, rows.rows)) if isinstance(rows, stores.GradientStore) else rows
            )
            bad = np.flatnonzero(~np.isfinite(rows).all(axis=1))
            if len(bad):
                raise ValueError(
                    f"the gradients of {len(bad)} queries are not finite, such as "
                    f"{run.corpus.prompts.ids[bad[0]]!r}; look at the model's logits for its prompt"
                )
        encoded.append(rows)
    return encoded


def _check_stored_rows(run: Run, kind: GradientKind, names, encoder) -> None:
    def find_begun():
        return [n for n in names if stores.exists(run.store_path(n, kind))]

    for name in processes.on_first_process("look for begun stores", find_begun):
        store = stores.open_store(run.store_path(name, kind))
        encoding.check_stored_rows(store, encoder, run.table(name), run.layout)


def _rows(run: Run, kind: GradientKind, name: str, encoder):
    """Returns a store, a source that encodes while it is read, or an array of queries."""
    if run.live:
        return stores.open_store(run.store_path(name, kind))
    table = run.table(name)
    if run.config.store.dtype != NO_STORE:
        store = _store(run, kind, name)
        description = f"encode {name} ({describe_kind(run, kind)}, step {run.trained.step})"
        encoding.fill_stores([store], encoder, table, run.layout, description, engine=run.engine)
        return store
    if name == "corpus":
        return OnTheFly(encoder, table, run.layout)
    return encoding.encode_rows(encoder, table, np.arange(len(table)), run.layout)


def print_coverage(run: Run, kinds: Iterable[GradientKind]) -> None:
    """Prints what share of the parameters the gradients cover: kinds that agree share a line."""
    lines = (sites.coverage(run.trained.model, run.sites(kind)) for kind in kinds)
    for line in dict.fromkeys(lines):
        print(line)


def encode_together(run: Run, kinds: Iterable[GradientKind]) -> None:
    """Encodes the corpus for several kinds of gradients in fewer passes than one for each.

    Kinds with the same output and the same rows in a shard share a pass, which runs the model
    once. `encode` does finished stores, and kinds that share a pass with no other, such as Adam's
    steps.
    """
    if run.config.store.dtype == NO_STORE:
        return
    groups: dict[tuple, list] = {}
    for kind in dict.fromkeys(k for k in kinds if not k.adam_step):
        store = _store(run, kind, "corpus")
        name = store.path.rpartition("/")[2]
        if processes.on_first_process("look for shards", store.missing) or run.engine.asks_for(
            name
        ):
            output, rows = kind.output or run.config.gradients.output, store.shards()[0].stop
            groups.setdefault((output, rows), []).append((kind, store))
    for (output, rows), lacking in groups.items():
        most = max(1, _PASS_BYTES // (rows * max(s.form.row_bytes for _, s in lacking)))
        for first in range(0, len(lacking), most):
            shared = lacking[first : first + most]
            if len(shared) == 1:
                continue
            kinds = [_projection_and_taps(run, kind) for kind, _ in shared]
            described = " and ".join(describe_kind(run, kind) for kind, _ in shared)
            encoding.fill_stores(
                [store for _, store in shared],
                encoders.build_encoder(run.trained.model, kinds, output, run.trained.mesh),
                run.corpus.passages,
                run.layout,
                f"encode corpus ({described}, step {run.trained.step})",
                engine=run.engine,
            )


def _projection_and_taps(
    run: Run, kind: GradientKind, on_progress: Progress | None = None
) -> tuple[Projection, dict[Site, Tap]]:
    projection = run.projection(kind)
    if kind.curvature != "none":
        return projection, curvature.make_taps(run, kind)
    scales = moments.inverse_root_moments(run, kind, on_progress)
    return projection, encoders.make_taps(run.sites(kind), projection, scales)


def missing_stores(run: Run, kind: GradientKind, name: str, step: int | None = None) -> str | None:
    """Describes the store of the "corpus" or of the "queries" if it is not finished, else None."""
    if run.config.store.dtype != NO_STORE and stores.finished(run.store_path(name, kind, step)):
        return None
    if kind.adam_step:
        parts = ["the step that Adam would make on each passage alone"]
    else:
        parts = [f"gradients {'with' if kind.corrected else 'without'} optimizer correction"]
    parts += [f"of the {kind.output}"] * bool(kind.output)
    parts += [f"transformed by {kind.curvature}"] * (kind.curvature != "none")
    return f"the run has no store of {', '.join(parts)}"


def ranking_provenance(run: Run, kind: GradientKind, step: int | None = None) -> list:
    """Returns the values of a kind's gradients that a ranking depends on, as JSON values."""
    path = run.store_path("corpus", kind, step)
    withdrawn = processes.on_first_process(
        "look for withdrawn passages", lambda: stores.withdrawn(path).tolist()
    )
    return [run.provenance(kind, step), stored_as(run.config), withdrawn]


def make_encoder(run: Run, kind: GradientKind, on_progress: Progress | None = None):
    """Returns the encoder of a kind of gradients of the run's model.

    Args:
        run: the run.
        kind: the gradients.
        on_progress: called while second moments are estimated.
    """
    model, mesh = run.trained.model, run.trained.mesh
    output = kind.output or run.config.gradients.output
    if kind.adam_step:
        states = moments.adam_states(run, kind)
        return adam_steps.make_encoder(
            model, run.sites(kind), run.projection(kind), states, output, mesh
        )
    pair = _projection_and_taps(run, kind, on_progress)
    return encoders.build_encoder(model, [pair], output, mesh)


def _store(run: Run, kind: GradientKind, name: str) -> stores.GradientStore:
    """Returns the store of the "corpus" or of the "queries", and creates it if there is none."""
    table = run.table(name)
    with run.engine.alone():
        return stores.create(
            run.store_path(name, kind),
            table.ids,
            dict.fromkeys(run.blocks(kind), run.projection(kind).side ** 2),
            run.provenance(kind),
            # Queries are few: stored as they are.
            run.config.store.dtype if name == "corpus" else "float32",
            run.config.store.shard_bytes,
            rank=run.config.store.rank if name == "corpus" else 0,
            documents=table.documents,
            texts=PassageTexts(table, run.corpus.tokenizer),
            corpus=run.corpus.fingerprint[name],
        )


def describe_kind(run: Run, kind: GradientKind) -> str:
    """Describes a kind of gradients in a word or two, such as "factored, margin"."""
    provenance = run.provenance(kind)
    label = kind.curvature if kind.curvature != "none" else provenance["correction"]
    return label if provenance["output"] == "loss" else f"{label}, {provenance['output']}"
