"""Makes the store of a training's own gradients, and what fills it."""

import dataclasses

from flax import nnx

from tda import store as stores
from tda.data.batches import BatchLayout
from tda.encoding.captured import Recorder, TrainingRows
from tda.gradients.capture import Capture
from tda.gradients.projection import Projection
from tda.run.run import NO_STORE, Corpus
from tda.run.workdir import Workdir
from tda.runtime.fingerprint import fingerprint, plain


def path_of(config, workdir: Workdir, made_from: dict) -> str:
    """Returns the directory of a training's captured gradients."""
    g = config.gradients
    parts = [made_from, dict(config.projection), g.include, g.exclude, config.store.dtype]
    root = config.store.root or str(workdir / "stores")
    return f"{root}/captured-{fingerprint(plain(parts))}"


def make_recorder(
    config,
    corpus: Corpus,
    workdir: Workdir,
    model: nnx.Module,
    made_from: dict,
    layout: BatchLayout,
) -> Recorder:
    """Returns what keeps the gradients of a training's examples; makes their store.

    Args:
        config, corpus, workdir: the run's.
        model: the model that is trained.
        made_from: JSON values that identify the training.
        layout: the layout of its batches.
    """
    g, table = config.gradients, corpus.training
    projection = Projection(**dict(config.projection))
    capture = Capture(model, projection, g.include or None, g.exclude or None)
    rows = TrainingRows.of(table, layout, made_from["steps"], config.seed)
    store = stores.create(
        path_of(config, workdir, made_from),
        rows.names(table.ids),
        dict.fromkeys(capture.layout.blocks, projection.side**2),
        plain({"training": made_from, "projection": dataclasses.asdict(projection)}),
        "float32" if config.store.dtype == NO_STORE else config.store.dtype,
        config.store.shard_bytes,
        documents=[table.documents[i] for i in rows.sequences],
    )
    return Recorder(capture, store, rows, workdir / "model" / "captured")
