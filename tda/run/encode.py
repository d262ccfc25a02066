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
from tda.run.run import NO_STORE, Run
from tda.runtime import processes
from tda.runtime.progress import Progress

# Rows in float32 that one pass for several kinds of gradients may hold of all of them.
_PASS_BYTES = 4 << 30


def encode(run: Run, kind: GradientKind) -> tuple[Source, np.ndarray]:
    """Encodes what the stores of a kind lack.

    Returns:
        The corpus's gradients, a store unless the config wants none, and the queries' gradients,
        float32 [Q, E].
    """
    if run.config.store.dtype == NO_STORE:
        encoder = _encoder_without_store(run, kind)
        source = OnTheFly(encoder, run.corpus.passages, run.layout)
        return source, _query_gradients(run, encoder)
    queries, passages = _stores(run, kind, "queries", "corpus")
    stores.check_same_kind(passages, queries)
    return passages, _finite_queries(run, queries.read(slice(0, queries.rows)))


def encode_passages(run: Run, kind: GradientKind) -> Source:
    """Returns the corpus's gradients alone, as `encode` has them."""
    if run.config.store.dtype == NO_STORE:
        return OnTheFly(_encoder_without_store(run, kind), run.corpus.passages, run.layout)
    return _stores(run, kind, "corpus")[0]


def encode_queries(run: Run, kind: GradientKind) -> np.ndarray:
    """Returns the queries' gradients alone, float32 [Q, E]."""
    if run.config.store.dtype == NO_STORE:
        return _query_gradients(run, _encoder_without_store(run, kind))
    (store,) = _stores(run, kind, "queries")
    return _finite_queries(run, store.read(slice(0, store.rows)))


def _encoder_without_store(run: Run, kind: GradientKind):
    if jax.process_count() > 1:
        raise ValueError("store.dtype=none works in one process; give store.dtype to use several")
    return make_encoder(run, kind)


def _query_gradients(run: Run, encoder) -> np.ndarray:
    prompts = run.corpus.prompts
    encoded = encoding.encode_rows(encoder, prompts, np.arange(len(prompts)), run.layout)
    return _finite_queries(run, encoded)


def print_coverage(run: Run, kinds: Iterable[GradientKind]) -> None:
    """Prints what share of the parameters the gradients cover: a line for all kinds alike."""
    lines = (sites.coverage(run.trained.model, run.sites(kind)) for kind in kinds)
    for line in dict.fromkeys(lines):
        print(line)


def encode_together(run: Run, kinds: Iterable[GradientKind]) -> None:
    """Encodes the corpus for several kinds of gradients in fewer passes than one for each.

    Kinds of the same function share a pass where their shards have the same rows. Finished stores
    are left alone, and so is a kind that shares its pass with no other (such as Adam's steps):
    `encode` makes it.
    """
    if run.config.store.dtype == NO_STORE:
        return
    groups: dict[tuple, list] = {}
    for kind in dict.fromkeys(k for k in kinds if not k.adam_step):
        store = _store(run, kind, "corpus")
        if processes.on_first_process("look for shards", store.missing):
            output, rows = kind.output or run.config.gradients.output, store.shards()[0].stop
            groups.setdefault((output, rows), []).append((kind, store))
    for (output, rows), lacking in groups.items():
        most = max(1, _PASS_BYTES // (rows * max(s.width for _, s in lacking) * 4))
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
    parts += [f"as {kind.curvature} has them"] * (kind.curvature != "none")
    return f"the run has no store of {', '.join(parts)}"


def ranking_provenance(run: Run, kind: GradientKind, step: int | None = None) -> list:
    """What of a kind's gradients decides a ranking, as JSON values."""
    path = run.store_path("corpus", kind, step)

    def read_withdrawn():
        exists = (path / "manifest.json").exists()
        return stores.open_store(path).withdrawn.tolist() if exists else []

    withdrawn = processes.on_first_process("look for withdrawn passages", read_withdrawn)
    return [run.provenance(kind, step), run.config.store.dtype, withdrawn]


def make_encoder(run: Run, kind: GradientKind, on_progress: Progress | None = None):
    """Makes the encoder of a kind of gradients of the run's model.

    Args:
        run: the run.
        kind: the gradients.
        on_progress: told of second moments that have to be estimated.
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


def _stores(run: Run, kind: GradientKind, *names: str) -> list[stores.GradientStore]:
    """The finished stores of a kind, by name."""
    paths = [run.store_path(name, kind) for name in names]
    if run.live:
        return [stores.open_store(path) for path in paths]
    encoder = None
    # Second moments may have to be estimated: not for stores that lack nothing.
    finished = processes.on_first_process(
        "look for stores", lambda: all(map(stores.finished, paths))
    )
    if not finished:
        encoder = make_encoder(run, kind)
    filled = []
    for name in names:
        store = _store(run, kind, name)
        description = f"encode {name} ({describe_kind(run, kind)}, step {run.trained.step})"
        encoding.fill_store(store, encoder, run.table(name), run.layout, description)
        filled.append(store)
    return filled


def _store(run: Run, kind: GradientKind, name: str) -> stores.GradientStore:
    """The store of the "corpus" or of the "queries", created where there is none."""
    table = run.table(name)
    return stores.create(
        run.store_path(name, kind),
        table.ids,
        dict.fromkeys(run.blocks(kind), run.projection(kind).side ** 2),
        run.provenance(kind),
        run.config.store.dtype,
        run.config.store.shard_bytes,
        documents=table.documents,
        texts=PassageTexts(table, run.corpus.tokenizer),
        corpus=run.corpus.fingerprint[name],
    )


def describe_kind(run: Run, kind: GradientKind) -> str:
    """Describes a kind of gradients in a word or two, such as "factored, margin"."""
    provenance = run.provenance(kind)
    label = kind.curvature if kind.curvature != "none" else provenance["correction"]
    return label if provenance["output"] == "loss" else f"{label}, {provenance['output']}"


def _finite_queries(run: Run, gradients_QxE: np.ndarray) -> np.ndarray:
    bad = np.flatnonzero(~np.isfinite(gradients_QxE).all(axis=1))
    if len(bad):
        raise ValueError(
            f"the gradients of {len(bad)} queries are not finite, such as "
            f"{run.corpus.prompts.ids[bad[0]]!r}; look at the model's logits for its prompt"
        )
    return gradients_QxE
