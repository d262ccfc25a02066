"""R^(−1/2) in a file, which other processes and the next start read.

A file (.npz) holds the roots' arrays by number ("0", "1", …), one for a dense block and three for a
Kronecker product; "own" (`Root.query_weights`); the spectra; and "note", JSON.
"""

import contextlib
import dataclasses
import itertools
import json
import pathlib
from collections.abc import Sequence

import jax
import numpy as np

from tda import hessian
from tda.runtime import atomic_file

_SPECTRA = ("train", "evaluation")


@dataclasses.dataclass(frozen=True)
class Root:
    """R^(−1/2) by block (`hessian.inverse_root`), or None; and `Scorer.query_weights`."""

    blocks: list[hessian.Root] | None
    query_weights: tuple[float, ...] = ()


def write(file: pathlib.Path, root: Root, note: dict, spectra: dict[str, np.ndarray]) -> None:
    """Writes a root, how it was made, and the spectra; nothing where writing is not allowed.

    A workdir that may only be read can still be asked: R is then computed again in each session.
    """
    arrays = {"own": np.asarray(root.query_weights), "note": json.dumps(note)}
    arrays |= {str(i): x for i, x in enumerate(jax.tree.leaves(root.blocks))} | spectra
    with contextlib.suppress(PermissionError):
        file.parent.mkdir(exist_ok=True)
        atomic_file.write_arrays(file, arrays)


def read(
    file: pathlib.Path, shapes: Sequence[hessian.Shape]
) -> tuple[Root, dict, dict[str, np.ndarray]]:
    """Returns a root, its note, and the spectra.

    Args:
        file: a file of `write`.
        shapes: of the blocks, as the root was made.

    Raises:
        tda.runtime.atomic_file.DamagedError: the file cannot be read.
    """
    with atomic_file.naming_damaged(file), np.load(file, allow_pickle=False) as arrays:
        numbers = itertools.count()
        blocks = [
            arrays[str(next(numbers))]
            if len(shape) == 1
            else hessian.KroneckerRoot(*(arrays[str(next(numbers))] for _ in range(3)))
            for shape in shapes
        ]
        spectra = {name: arrays[name] for name in _SPECTRA if name in arrays}
        return Root(blocks, tuple(arrays["own"].tolist())), json.loads(str(arrays["note"])), spectra
