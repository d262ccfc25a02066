"""The stage that encodes corpus and queries into stores."""

import dataclasses
import pathlib
from collections.abc import Iterable, Sequence

import jax
import numpy as np

from tda import store as stores
from tda.data import tokens
from tda.data.batches import BatchLayout
from tda.encoding import table as encoding
from tda.encoding.table import OnTheFly
from tda.gradients import adam_steps, kronecker, sites, together
from tda.gradients import encoder as encoders
from tda.gradients import projection as projections
from tda.gradients.projection import Projection
from tda.methods import Gradients
from tda.retrieval.scorer import Source
from tda.run import curvature, moments
from tda.run.run import Corpus, Trained
from tda.run.workdir import Workdir
from tda.runtime import processes
from tda.runtime.fingerprint import fingerprint, plain

# The dtype of a corpus that is encoded as it is searched.
NO_STORE = "none"
# What stands for the correction in a store of Adam's steps.
ADAM_STEP = "adam_step"
# Rows in float32 that one pass for several kinds of gradients may hold of all of them.
_TOGETHER_BYTES = 4 << 30


def made_from(config, corpus: Corpus, trained: Trained, what: Gradients) -> dict:
    """What decides the gradients of a store, apart from the rows."""
    g = config.gradients
    correction = g.correction if what.corrected else "none"
    made = {
        "checkpoint": fingerprint(trained.fingerprint),
        "step": trained.step,
        "projection": dataclasses.asdict(projection_of(config, what)),
        "correction": ADAM_STEP if what.adam_step else correction,
        "output": what.output or g.output,
        "include": g.include,
        "exclude": g.exclude,
        "untapped": g.untapped,
        "parameters": {s.path: list(s.shape) for s in _chosen(config, trained, what)},
        "tokenizer": corpus.fingerprint["tokenizer"],
    }
    if what.corrected:
        made["second_moments"] = moments.source(config, corpus, trained)
    if what.curvature != "none":
        made["curvature"] = curvature.made_from(config, corpus, what.curvature)
    return plain(made)


def projection_of(config, what: Gradients) -> Projection:
    """P of some gradients."""
    projection = Projection(**dict(config.projection))
    # Components of different matrices have nothing in common that could be added up.
    return (
        dataclasses.replace(projection, pooling="matrix")
        if what.curvature == "logra"
        else projection
    )


def _chosen(config, trained: Trained, what: Gradients) -> list[sites.Site]:
    found = sites.find(trained.model, **_scope(config))
    return found if what.curvature == "none" else kronecker.factored(found)


def _scope(config) -> dict:
    g = config.gradients
    return dict(include=g.include or None, exclude=g.exclude or None, untapped=g.untapped)


def path_of(config, corpus: Corpus, workdir: Workdir, name: str, made: dict) -> pathlib.Path:
    """Where the store of the `corpus` or the `queries` is, of gradients made as `made` says."""
    whole = made | {name: corpus.fingerprint[name], "dtype": config.store.dtype}
    kind = made["curvature"]["kind"] if "curvature" in made else made["correction"]
    return workdir / "stores" / f"{name}-{kind}-{fingerprint(whole)}"


class _Texts(Sequence):
    """The texts of a table's rows, decoded when they are asked for."""

    def __init__(self, corpus: Corpus, table: tokens.TokenTable):
        self._corpus, self._table = corpus, table

    def __len__(self) -> int:
        return len(self._table)

    def __getitem__(self, row: int) -> str:
        return self._corpus.text_of(row, self._table)


def encode(
    config, corpus: Corpus, trained: Trained, workdir: Workdir, what: Gradients
) -> tuple[Source, np.ndarray]:
    """The corpus's gradients, a store unless the config wants none, and the queries' gradients.

    What the stores lack is encoded.
    """
    if config.store.dtype == NO_STORE:
        return _on_the_fly(config, corpus, trained, workdir, what)
    tables = {"queries": corpus.prompts, "corpus": corpus.passages}
    queries, passages = _stores(config, corpus, trained, workdir, what, tables)
    stores.check_same_kind(passages, queries)
    gradients_QxE = queries.read(slice(0, queries.rows))
    _check_queries(corpus, gradients_QxE)
    return passages, gradients_QxE


def encode_passages(
    config, corpus: Corpus, trained: Trained, workdir: Workdir, what: Gradients
) -> Source:
    """The corpus's gradients alone, as `encode` has them."""
    if config.store.dtype == NO_STORE:
        encoder = _encoder(config, corpus, trained, workdir, what)
        return OnTheFly(encoder, corpus.passages, _layout(config, corpus, trained))
    return _stores(config, corpus, trained, workdir, what, {"corpus": corpus.passages})[0]


def encode_queries(
    config, corpus: Corpus, trained: Trained, workdir: Workdir, what: Gradients
) -> np.ndarray:
    """The queries' gradients alone, float32 [Q, E]."""
    if config.store.dtype == NO_STORE:
        return _on_the_fly(config, corpus, trained, workdir, what)[1]
    tables = {"queries": corpus.prompts}
    (queries,) = _stores(config, corpus, trained, workdir, what, tables)
    gradients_QxE = queries.read(slice(0, queries.rows))
    _check_queries(corpus, gradients_QxE)
    return gradients_QxE


def tell_coverage(config, trained: Trained, wanted: Iterable[Gradients]) -> None:
    """Prints what parameters gradients are of, and what is left out: a line for all kinds alike."""
    lines = (sites.coverage(trained.model, _chosen(config, trained, what)) for what in wanted)
    for line in dict.fromkeys(lines):
        print(line)


def ahead(
    config, corpus: Corpus, trained: Trained, workdir: Workdir, wanted: Iterable[Gradients]
) -> None:
    """Encodes the corpus for several kinds of gradients in fewer passes than one for each.

    Kinds of the same function share a pass where their shards have the same rows. Stores that lack
    nothing are left alone, and so is a kind that has a pass to itself (as Adam's steps, which no
    other kind can share): `encode` makes it.
    """
    if config.store.dtype == NO_STORE:
        return
    alike: dict[tuple, list] = {}
    for what in dict.fromkeys(w for w in wanted if not w.adam_step):
        made = made_from(config, corpus, trained, what)
        store = _store(config, corpus, trained, workdir, what, made, "corpus", corpus.passages)
        if processes.on_first_process("look for shards", store.missing):
            rows = store.shards()[0].stop
            alike.setdefault((made["output"], rows), []).append((what, made, store))
    for (output, rows), lacking in alike.items():
        most = max(1, _TOGETHER_BYTES // (rows * max(s.width for _, _, s in lacking) * 4))
        for first in range(0, len(lacking), most):
            kinds = lacking[first : first + most]
            if len(kinds) == 1:
                continue
            parts = [_part(config, corpus, trained, workdir, what, made) for what, made, _ in kinds]
            encoder = together.build(trained.model, parts, output, trained.mesh)
            told = " and ".join(_told(made, step=False) for _, made, _ in kinds)
            encoding.fill_stores(
                [store for _, _, store in kinds],
                encoder,
                corpus.passages,
                _layout(config, corpus, trained),
                f"encode corpus ({told}, step {trained.step})",
            )


def _part(
    config, corpus: Corpus, trained: Trained, workdir: Workdir, what: Gradients, made: dict
) -> together.Part:
    projection, chosen = projection_of(config, what), _chosen(config, trained, what)
    if what.curvature == "none":
        scales = moments.scales(config, corpus, trained, workdir, chosen, made)
        ends = encoders.ends_of(chosen, projection, scales)
    else:
        ends = curvature.ends(config, corpus, trained, workdir, what.curvature, chosen, projection)
    return together.Part(chosen, projection, ends)


def _encoder(config, corpus: Corpus, trained: Trained, workdir: Workdir, what: Gradients):
    made = made_from(config, corpus, trained, what)
    if what.adam_step:
        chosen, projection = _chosen(config, trained, what), projection_of(config, what)
        states = moments.adam_states(trained, chosen)
        return adam_steps.make_encoder(
            trained.model, chosen, projection, states, made["output"], trained.mesh
        )
    part = _part(config, corpus, trained, workdir, what, made)
    return encoders.build(
        trained.model, part.chosen, part.projection, part.ends, made["output"], trained.mesh
    )


def blocks_of(config, trained: Trained, what: Gradients) -> tuple[str, ...]:
    """The names of an encoding's blocks, in order."""
    chosen = _chosen(config, trained, what)
    return projections.layout(chosen, projection_of(config, what)).blocks


def _layout(config, corpus: Corpus, trained: Trained) -> BatchLayout:
    return corpus.layout(config.gradients.tokens_per_batch, trained.mesh)


def _stores(config, corpus, trained, workdir, what: Gradients, tables: dict) -> list:
    made = made_from(config, corpus, trained, what)
    paths = {n: path_of(config, corpus, workdir, n, made) for n in tables}
    encoder = None
    # Second moments may have to be estimated: not for stores that lack nothing.
    there = processes.on_first_process(
        "look for stores", lambda: all(map(stores.finished, paths.values()))
    )
    if not there:
        encoder = _encoder(config, corpus, trained, workdir, what)
    found = []
    for name, table in tables.items():
        store = _store(config, corpus, trained, workdir, what, made, name, table)
        told = f"encode {name} ({_told(made)})"
        encoding.fill_store(store, encoder, table, _layout(config, corpus, trained), told)
        found.append(store)
    return found


def _store(
    config,
    corpus: Corpus,
    trained: Trained,
    workdir: Workdir,
    what: Gradients,
    made: dict,
    name: str,
    table: tokens.TokenTable,
) -> stores.GradientStore:
    """The store of the `corpus` or the `queries`, made where it is not there."""
    width = projection_of(config, what).side ** 2
    return stores.create(
        path_of(config, corpus, workdir, name, made),
        table.ids,
        dict.fromkeys(blocks_of(config, trained, what), width),
        made,
        config.store.dtype,
        config.store.shard_bytes,
        documents=table.documents,
        texts=_Texts(corpus, table),
        corpus=corpus.fingerprint[name],
    )


def _told(made: dict, step: bool = True) -> str:
    parts = [made["curvature"]["kind"] if "curvature" in made else made["correction"]]
    parts += [made["output"]] * (made["output"] != "loss")
    return ", ".join([*parts, *[f"step {made['step']}"] * step])


def _on_the_fly(config, corpus, trained, workdir, what) -> tuple[OnTheFly, np.ndarray]:
    """The corpus as it is encoded while it is searched."""
    if jax.process_count() > 1:
        raise ValueError("store.dtype=none works in one process; give store.dtype to use several")
    encoder = _encoder(config, corpus, trained, workdir, what)
    layout = _layout(config, corpus, trained)
    everyone = np.arange(len(corpus.prompts))
    gradients_QxE = encoding.encode_rows(encoder, corpus.prompts, everyone, layout)
    _check_queries(corpus, gradients_QxE)
    return OnTheFly(encoder, corpus.passages, layout), gradients_QxE


def _check_queries(corpus: Corpus, gradients_QxE: np.ndarray) -> None:
    bad = np.flatnonzero(~np.isfinite(gradients_QxE).all(axis=1))
    if len(bad):
        raise ValueError(
            f"the gradients of {len(bad)} queries are not finite, such as "
            f"{corpus.prompts.ids[bad[0]]!r}; look at the model's logits for its prompt"
        )
