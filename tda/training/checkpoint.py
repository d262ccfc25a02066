"""Our own checkpoints, through Orbax: the whole state, or its parameters alone.

A checkpoint is a directory `ROOT/STEP` with one tree {"params", "opt_state", "step"} and, as custom
metadata, a JSON description of its training. Orbax writes it atomically. The optimizer's state is
read like that of other programs (`tda.training.saved_state`).
"""

import json
import os
import warnings
from typing import Any

import jax
import orbax.checkpoint.experimental.v1 as ocp
from etils import epath

from tda.model.functional import path_name
from tda.runtime import processes
from tda.runtime.differences import as_text, differences

# Orbax's file of a checkpoint's description.
_METADATA = "_CHECKPOINT_METADATA"


class CheckpointError(ValueError):
    """A checkpoint is absent, or lacks something that the caller needs."""


def absolute(root) -> epath.Path:
    """Returns `root` as Orbax requires it: an absolute path, or a URL."""
    return epath.Path(root) if "://" in os.fspath(root) else epath.Path(os.path.abspath(root))


def steps(root) -> list[int]:
    """Returns the steps of the complete checkpoints under `root`, ascending."""
    root = absolute(root)
    if not root.exists():
        return []
    numbered = [int(p.name) for p in root.iterdir() if p.name.isdigit()]
    # Orbax writes the metadata last: a directory without it is half written or half deleted.
    return sorted(s for s in numbered if (root / str(s) / _METADATA).exists())


def latest_step(root) -> int | None:
    """Returns the step of the last complete checkpoint under `root`, or None."""
    return max(steps(root), default=None)


def save(
    root, step: int, state: Any, description: dict, keep: int = 2, is_unscheduled: bool = False
) -> None:
    """Writes `state` as `ROOT/STEP` and removes all but the last `keep` checkpoints.

    With several processes, every process calls it and writes the shards on its devices.

    Args:
        root: the directory of all checkpoints.
        step: training step.
        state: a tree of arrays.
        description: JSON values saved with the checkpoint.
        keep: number of checkpoints to keep; 0 keeps all.
        is_unscheduled: whether the checkpoint only replaces the next scheduled one, which removes
            it; no scheduled one is removed meanwhile.
    """
    root = absolute(root)
    description = description | ({"unscheduled": True} if is_unscheduled else {})
    ocp.save(root / str(step), state, custom_metadata=description, overwrite=True)
    processes.on_first_process(
        "remove old checkpoints", lambda: _remove_old(root, 0 if is_unscheduled else keep)
    )


def _remove_old(root: epath.Path, keep: int) -> None:
    # Methods that sum over checkpoints must not see one that an uninterrupted training lacks. There
    # are two at most, the second if the last removal was killed.
    for step in steps(root)[-4:-1]:
        if describe(root, step).get("unscheduled"):
            (root / str(step)).rmtree()
    for old in steps(root)[:-keep] if keep else []:
        (root / str(old)).rmtree()


def _locate(root, step: int | None) -> epath.Path:
    step = latest_step(root) if step is None else step
    path = absolute(root) / str(step)
    if step is None or not path.exists():
        available = ", ".join(map(str, steps(root))) or "none"
        raise CheckpointError(
            f"no checkpoint {'' if step is None else f'{step} '}under {root}; "
            f"available steps: {available}"
        )
    return path


def describe(root, step: int | None = None) -> dict:
    """Returns the description saved with a checkpoint, by default the last."""
    # Not with Orbax's `metadata`, which all processes may have to call.
    metadata = json.loads((_locate(root, step) / _METADATA).read_text())
    return dict(metadata.get("custom_metadata") or {})


def _load(path, abstract_tree) -> Any:
    with warnings.catch_warnings():
        # If the caller gives no sharding, the file's own is intended.
        warnings.filterwarnings("ignore", message="Sharding info not provided")
        return ocp.load(path, abstract_tree)


def restore(root, abstract_state: Any, step: int | None = None) -> Any:
    """Restores the whole state, with the structure, dtypes and shardings of `abstract_state`.

    Raises:
        CheckpointError: the checkpoint does not exist, or its parameters differ in name or shape.
    """
    path = _locate(root, step)
    _check_shapes(path, ocp.metadata(path).metadata["params"], abstract_state["params"])
    return _load(path, abstract_state)


def restore_parameters(root, abstract_params: Any, step: int | None = None) -> Any:
    """Restores the parameters alone, with the shardings of `abstract_params`.

    Raises:
        CheckpointError: the checkpoint does not exist, or its parameters differ in name or shape.
    """
    path = _locate(root, step)
    saved = ocp.metadata(path).metadata
    _check_shapes(path, saved["params"], abstract_params)
    # `...` is Orbax's mark for a leaf that is not read.
    abstract_tree = jax.tree.map(lambda _: ..., saved) | {"params": abstract_params}
    return _load(path, abstract_tree)["params"]


def has_optimizer(root, step: int | None = None) -> bool:
    """Returns whether a checkpoint, by default the last, holds an optimizer's state."""
    saved = ocp.metadata(_locate(root, step)).metadata
    return bool(jax.tree.leaves(saved.get("opt_state")))


def _check_shapes(path, saved_params, model_params) -> None:
    """Checks that a checkpoint's parameters have the model's names and shapes.

    Raises:
        CheckpointError: they do not; the message names what differs.
    """
    saved, model = (
        {path_name(p): str(tuple(x.shape)) for p, x in jax.tree_util.tree_leaves_with_path(tree)}
        for tree in (saved_params, model_params)
    )
    if lines := list(differences(saved, model)):
        raise CheckpointError(
            f"{path} holds another model's parameters:{as_text(lines)}\n"
            "give the settings of that model, or another directory"
        )
