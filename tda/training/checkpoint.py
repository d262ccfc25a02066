"""Checkpoints through Orbax: save, restore, restore the parameters or the optimizer's state alone.

A checkpoint is a directory `ROOT/STEP` with one tree {"params", "opt_state", "step"} and, as custom
metadata, a plain description of how it came about. It is written atomically by Orbax.
"""

import os
import warnings
from typing import Any

import jax
import orbax.checkpoint.experimental.v1 as ocp
from etils import epath

from tda.model.functional import path_name
from tda.runtime import processes


class CheckpointError(ValueError):
    """A checkpoint is absent or is not what was asked for."""


def _absolute(root) -> epath.Path:
    """`root` as Orbax wants it: absolute, or with its scheme."""
    return epath.Path(root) if "://" in os.fspath(root) else epath.Path(os.path.abspath(root))


def steps(root) -> list[int]:
    """Steps of the complete checkpoints under `root`, rising."""
    root = _absolute(root)
    if not root.exists():
        return []
    found = [int(p.name) for p in root.iterdir() if p.name.isdigit()]
    # The metadata comes last; a directory without it is half written or half deleted.
    return sorted(s for s in found if (root / str(s) / "_CHECKPOINT_METADATA").exists())


def latest_step(root) -> int | None:
    """The last complete checkpoint's step under `root`, or None."""
    there = steps(root)
    return there[-1] if there else None


def save(root, step: int, state: Any, description: dict, keep: int = 2) -> None:
    """Writes `state` as `ROOT/STEP` and removes all but the last `keep` checkpoints.

    Of several processes each calls it, and writes what its devices hold.

    Args:
        root: the directory of all checkpoints.
        step: training step.
        state: a tree of arrays.
        description: JSON values kept with the checkpoint.
        keep: checkpoints kept; 0 keeps all.
    """
    root = _absolute(root)
    ocp.save(root / str(step), state, custom_metadata=description, overwrite=True)
    if keep:
        processes.by_first("remove old checkpoints", lambda: _remove_all_but(root, keep))


def _remove_all_but(root: epath.Path, keep: int) -> None:
    for old in steps(root)[:-keep]:
        (root / str(old)).rmtree()


def _locate(root, step: int | None) -> epath.Path:
    step = latest_step(root) if step is None else step
    path = _absolute(root) / str(step)
    if step is None or not path.exists():
        there = ", ".join(map(str, steps(root))) or "none"
        raise CheckpointError(
            f"no checkpoint {step if step is not None else ''} under {root}; steps there: {there}"
        )
    return path


def describe(root, step: int | None = None) -> dict:
    """The description that `save` was given. The last checkpoint's where `step` is None."""
    return dict(ocp.metadata(_locate(root, step)).custom_metadata or {})


def _load(path, wanted) -> Any:
    with warnings.catch_warnings():
        # Sharding is taken from the file where the caller has stated none: that is meant.
        warnings.filterwarnings("ignore", message="Sharding info not provided")
        return ocp.load(path, wanted)


def restore(root, abstract_state: Any, step: int | None = None) -> Any:
    """The whole state, in the structure, dtypes and shardings of `abstract_state`.

    Raises:
        CheckpointError: no such checkpoint, or its parameters have other names or shapes.
    """
    path = _locate(root, step)
    _check_shapes(path, ocp.metadata(path).metadata["params"], abstract_state["params"])
    return _load(path, abstract_state)


def restore_parameters(root, abstract_params: Any, step: int | None = None) -> Any:
    """The parameters alone, in the shardings of `abstract_params`.

    Raises:
        CheckpointError: no such checkpoint, or its parameters have other names or shapes.
    """
    path = _locate(root, step)
    there = ocp.metadata(path).metadata
    _check_shapes(path, there["params"], abstract_params)
    wanted = jax.tree.map(lambda _: ..., there) | {"params": abstract_params}
    return _load(path, wanted)["params"]


def has_optimizer(root, step: int | None = None) -> bool:
    """Whether a checkpoint holds an optimizer's state. The last one where `step` is None."""
    there = ocp.metadata(_locate(root, step)).metadata
    return bool(jax.tree.leaves(there.get("opt_state")))


def restore_optimizer(root, keep, step: int | None = None) -> Any:
    """The optimizer's state as nested dicts and lists, loading only the leaves that `keep` names.

    Args:
        root: the directory of all checkpoints.
        keep: called with a leaf's path name under `opt_state` (such as `1/0/nu/head/kernel`);
            leaves it rejects are `...` in the result and are never read.
        step: None for the last.

    Leaves are on the devices that they were saved from, or, where these are not here, on one.

    Raises:
        CheckpointError: no such checkpoint, or it has no optimizer state.
    """
    path = _locate(root, step)
    there = ocp.metadata(path).metadata
    if not jax.tree.leaves(there.get("opt_state")):
        raise CheckpointError(
            f"{path} has no optimizer state (it holds {', '.join(sorted(there))}); "
            "use correction='none', or a checkpoint saved with its optimizer's state"
        )

    def load(sharding=None):
        def choose(p, x):
            chosen = jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=sharding)
            return chosen if keep(path_name(p)) else ...

        wanted = jax.tree.map(lambda _: ..., there)
        wanted["opt_state"] = jax.tree_util.tree_map_with_path(choose, there["opt_state"])
        return _load(path, wanted)["opt_state"]

    try:
        return load()
    except ValueError as error:
        if "sharding" not in str(error) or jax.process_count() > 1:
            raise
        # Saved on more devices than there are here: the first of these takes it.
        return load(jax.sharding.SingleDeviceSharding(jax.local_devices()[0]))


def _check_shapes(path, found, wanted) -> None:
    found = {path_name(p): tuple(x.shape) for p, x in jax.tree_util.tree_leaves_with_path(found)}
    wanted = {path_name(p): tuple(x.shape) for p, x in jax.tree_util.tree_leaves_with_path(wanted)}
    differing = [
        f"{n}: {found.get(n, 'absent')} in the checkpoint, {wanted.get(n, 'absent')} in the model"
        for n in sorted(found.keys() | wanted.keys())
        if found.get(n) != wanted.get(n)
    ]
    if differing:
        more = f"\n  … and {len(differing) - 8} more" if len(differing) > 8 else ""
        listed = "\n  ".join(differing[:8])
        raise CheckpointError(f"{path} is of another model:\n  {listed}{more}")
