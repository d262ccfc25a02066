"""Reads optimizer states from Orbax checkpoints of any program and any layout.

A checkpoint is one tree (`StandardCheckpointer`), a directory of several trees, called items
(`CheckpointManager` with `Composite`, MaxText's `items/`), or a directory of either by step. Every
layout is read leaf by leaf, by path name, into this machine's devices.
"""

import dataclasses
import functools
import json
import os
import re
import warnings
from collections.abc import Collection
from typing import Any

import jax
import orbax.checkpoint as ocp
from etils import epath

from tda.model.functional import flat_parameters
from tda.runtime import sharding
from tda.training.checkpoint import CheckpointError, absolute

# Orbax writes this file into the directory of every tree.
_TREE = "_METADATA"
# A step's directory: 3, 00003, or with the prefix of `CheckpointManagerOptions`, ckpt_3.
_STEP = re.compile(r"(?:.*_)?(\d+)")


@dataclasses.dataclass(frozen=True)
class SavedState:
    """The leaves of all trees of a checkpoint, read on demand.

    Attributes:
        path: the checkpoint.
        trees: the shapes and dtypes of each tree, by the name of its directory.
        description: JSON values that were saved with the checkpoint.
    """

    path: epath.Path
    trees: dict[str, Any]
    description: dict

    @property
    def names(self) -> list[str]:
        """The path name of every leaf, with the tree's name in front if there are several trees."""
        return list(self._named)

    def load(self, names: Collection[str]) -> dict[str, jax.Array]:
        """Reads some leaves.

        Args:
            names: some of `names`.

        Returns:
            Arrays by name, on the devices that they were saved from or, where those are absent, on
            the first device, or over the devices of all processes.
        """
        arrays: dict[str, jax.Array] = {}
        for tree_name in self.trees:
            chosen = {n for n, (tree, _) in self._named.items() if tree == tree_name} & {*names}
            if chosen:
                arrays |= self._load_tree(tree_name, chosen)
        return arrays

    @functools.cached_property
    def _named(self) -> dict[str, tuple[str, Any]]:
        return {
            f"{tree_name}/{leaf_name}" if len(self.trees) > 1 else leaf_name: (tree_name, leaf)
            for tree_name, tree in self.trees.items()
            for leaf_name, leaf in flat_parameters(tree).items()
        }

    def _load_tree(self, tree_name: str, chosen: set[str]) -> dict[str, jax.Array]:
        tree = self.trees[tree_name]
        leaves, structure = jax.tree.flatten(tree)
        names = [n for n, (name, _) in self._named.items() if name == tree_name]
        abstract = [
            jax.ShapeDtypeStruct(x.shape, x.dtype) if n in chosen else ocp.PLACEHOLDER
            for n, x in zip(names, leaves, strict=True)
        ]

        def restore(choose_sharding):
            restore_args = [ocp.ArrayRestoreArgs(sharding=choose_sharding(x)) for x in leaves]
            arguments = ocp.args.PyTreeRestore(
                item=jax.tree.unflatten(structure, abstract),
                restore_args=jax.tree.unflatten(structure, restore_args),
            )
            with ocp.PyTreeCheckpointer() as reader, warnings.catch_warnings():
                # If no sharding is given, the file's own is intended.
                warnings.filterwarnings("ignore", message="Sharding info not provided")
                return reader.restore(self.path / tree_name, args=arguments)

        try:
            # Otherwise a process without a part would fail alone, and the others would wait for it.
            is_shared = all(map(_is_everywhere, leaves))
            restored = restore((lambda leaf: None) if is_shared else _layout_here)
        except ValueError as error:
            if "sharding" not in str(error).lower():
                raise
            restored = restore(_layout_here)  # saved on devices that are not here
        return {n: x for n, x in zip(names, jax.tree.leaves(restored), strict=True) if n in chosen}


def _is_everywhere(leaf) -> bool:
    """Returns whether every process has some of the devices that a leaf was saved from."""
    saved = getattr(leaf, "sharding", None)
    if saved is None or jax.process_count() == 1:
        return True
    try:
        holders = {device.process_index for device in saved.to_jax_sharding().device_set}
    except ValueError:  # saved by one device, which is another process's now
        return False
    return len(holders) == jax.process_count()


def _layout_here(leaf) -> jax.sharding.Sharding:
    """Returns where to put a leaf whose devices are absent: one device, or those of all processes.

    Several processes each read their part, so that no host must hold the states of a large model.
    """
    if jax.process_count() == 1:
        return jax.sharding.SingleDeviceSharding(jax.local_devices()[0])
    mesh = sharding.make_mesh()
    divisible = [i for i, size in enumerate(leaf.shape) if size % mesh.size == 0]
    axes = ["batch" if i in divisible[:1] else None for i in range(len(leaf.shape))]
    return sharding.named(mesh, axes, leaf.shape)


def open_checkpoint(path: str | os.PathLike, step: int | None = None) -> SavedState:
    """Opens a checkpoint of any Orbax layout.

    Args:
        path: the directory of checkpoints by step, of one checkpoint, or of one tree in it.
        step: which checkpoint of a directory by step; None for the last.

    Raises:
        CheckpointError: there is no checkpoint, or not of that step.
    """
    root = absolute(path)
    if not root.exists():
        raise CheckpointError(f"no checkpoint {root}; available steps: none")
    if not root.is_dir():
        raise CheckpointError(f"{root} is a file; give the directory of an Orbax checkpoint")
    directory = root
    names = _tree_names(root)
    if not names:
        directory = _step_directory(root, step)
        names = _tree_names(directory)
    elif step is not None and step != _step_of(root):
        raise CheckpointError(f"{root} is one checkpoint; leave step={step} out")
    # Not a checkpointer's `metadata`, which warns if a tree has no description of its own.
    handler = ocp.PyTreeCheckpointHandler()
    trees = {name: handler.metadata(directory / name).tree for name in names}
    is_tree = names == ["."]
    return SavedState(directory, trees, _description([directory] + [directory.parent] * is_tree))


def _tree_names(directory: epath.Path) -> list[str]:
    if (directory / _TREE).exists():
        return ["."]
    return sorted(p.name for p in directory.iterdir() if (p / _TREE).exists())


def _step_of(directory: epath.Path) -> int | None:
    match = _STEP.fullmatch(directory.name)
    return int(match[1]) if match else None


def _step_directory(root: epath.Path, step: int | None) -> epath.Path:
    by_step: dict[int, list[epath.Path]] = {}
    for path in root.iterdir():
        number = _step_of(path)
        # A directory without a tree is half written, half deleted, or something else.
        if number is not None and path.is_dir() and _tree_names(path):
            by_step.setdefault(number, []).append(path)
    number = max(by_step, default=-1) if step is None else step
    if len(by_step.get(number, ())) > 1:
        listed = ", ".join(sorted(p.name for p in by_step[number]))
        raise CheckpointError(f"{root} has step {number} more than once: {listed}; give one's path")
    if number not in by_step:
        raise CheckpointError(
            f"no checkpoint {'' if step is None else f'{step} '}under {root}; available steps: "
            f"{', '.join(map(str, sorted(by_step))) or 'none'}"
        )
    return by_step[number][0]


def _description(directories: list[epath.Path]) -> dict:
    for directory in directories:
        file = directory / "_CHECKPOINT_METADATA"
        if file.exists():
            return dict(json.loads(file.read_text()).get("custom_metadata") or {})
    return {}
