"""1/√V on disk, so that an estimate from many gradients is made only once."""

import json
import os

import jax.numpy as jnp
import numpy as np
from safetensors import SafetensorError, safe_open
from safetensors.numpy import save_file

from tda.gradients.moments.scales import Scale
from tda.runtime import atomic_file


def save(path, scales: dict[str, Scale], made_from: dict) -> None:
    """Writes scales to `path` as safetensors; the file appears whole or not at all.

    Args:
        path: the file.
        scales: by path of parameter.
        made_from: the provenance of the scales, JSON values.
    """
    arrays = {
        f"{name}:{part}": np.asarray(x)
        for name, scale in scales.items()
        for part, x in vars(scale).items()
        if x is not None
    }
    with atomic_file.replacing(path) as part:
        save_file(arrays, part, metadata={"made_from": json.dumps(made_from, sort_keys=True)})


def load(path, made_from: dict) -> dict[str, Scale] | None:
    """Loads what `save` wrote; None if there is no file or its provenance differs."""
    if not os.path.exists(path):
        return None
    parts_by_name: dict[str, dict] = {}
    with (
        atomic_file.naming_damaged(path, SafetensorError),
        safe_open(os.fspath(path), framework="numpy") as opened,
    ):
        if (opened.metadata() or {}).get("made_from") != json.dumps(made_from, sort_keys=True):
            return None
        for key in opened.keys():
            name, _, part = key.rpartition(":")
            parts_by_name.setdefault(name, {})[part] = jnp.asarray(opened.get_tensor(key))
    return {name: Scale(**parts) for name, parts in parts_by_name.items()}
