"""Makes the store of a training's own gradients, and the recorder that fills it."""

import dataclasses

from flax import nnx
from ml_collections import ConfigDict

from tda import methods as method_lib
from tda import store as stores
from tda.encoding.captured import Recorder, TrainingRows
from tda.gradients.capture import Capture
from tda.run import first_stage
from tda.run.run import NO_STORE, Corpus, projection_of, stored_as
from tda.run.workdir import Workdir
from tda.runtime.differences import as_text
from tda.runtime.fingerprint import fingerprint, plain


def check(config) -> None:
    """Checks, before the training, that it keeps the gradients that the methods rank by.

    Raises:
        ValueError: it does not keep them.
    """
    chosen = method_lib.parse(config.methods)
    for method in first_stage.with_first(config, chosen).values():
        if method.retriever == "captured" and not config.train.capture:
            raise ValueError(
                f"{method.title} needs a training that keeps its examples' gradients; give "
                "train.capture=True, in a new workdir"
            )


def settings(config) -> dict:
    """Returns the values that decide what a training captures, by key of the config."""
    g, s = config.gradients, config.store
    projection = dataclasses.asdict(projection_of(config))
    return {
        **{f"projection.{name}": value for name, value in projection.items()},
        "gradients.include": g.include,
        "gradients.exclude": g.exclude,
        "store.dtype": s.dtype,
        "store.rank": 0 if s.dtype == NO_STORE else s.rank,
    }


def claim(config, workdir: Workdir) -> None:
    """Records what a training captures before its first step.

    Raises:
        tda.run.workdir.WorkdirError: it was begun with other gradients; the message names the keys.
    """
    # Without a config: the keys of `settings` themselves tell what differs.
    workdir.claim("capture", settings(config), ConfigDict())


def lacks(config, workdir: Workdir, made_from: dict) -> str | None:
    """Returns why a training has no captured gradients of a config; None if it has."""
    if stores.finished(path_of(config, workdir, made_from)):
        return None
    if lines := workdir.changes("capture", settings(config)):
        return (
            f"the training kept the gradients of other settings:{as_text(lines)}\n"
            "use those, or train in a new workdir"
        )
    return "the training did not keep its examples' gradients (train.capture)"


def path_of(config, workdir: Workdir, made_from: dict) -> str:
    """Returns the directory of a training's captured gradients."""
    g, projection = config.gradients, dataclasses.asdict(projection_of(config))
    parts = [made_from, projection, g.include, g.exclude, stored_as(config)]
    root = config.store.root or str(workdir / "stores")
    return f"{root}/captured-{fingerprint(plain(parts))}"


def make_recorder(
    config, corpus: Corpus, workdir: Workdir, model: nnx.Module, made_from: dict, rows: TrainingRows
) -> Recorder:
    """Returns the recorder of a training's gradients, after creating their store.

    Args:
        config, corpus, workdir: the run's.
        model: the model that is trained.
        made_from: JSON values that identify the training.
        rows: the examples of its steps.
    """
    g, table = config.gradients, corpus.training
    projection = projection_of(config)
    capture = Capture(model, projection, g.include or None, g.exclude or None)
    store = stores.create(
        path_of(config, workdir, made_from),
        rows.names(table.ids),
        dict.fromkeys(capture.layout.blocks, projection.side**2),
        plain({"training": made_from, "projection": dataclasses.asdict(projection)}),
        "float32" if config.store.dtype == NO_STORE else config.store.dtype,
        config.store.shard_bytes,
        rank=0 if config.store.dtype == NO_STORE else config.store.rank,
        documents=[table.documents[i] for i in rows.sequences],
    )
    return Recorder(capture, store, rows, workdir / "model" / "captured")
