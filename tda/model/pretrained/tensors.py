"""Tensors of files by name, read a slice at a time; and which slice of which is a parameter."""

import collections
import dataclasses
import json
import os
import pathlib
from typing import Protocol

import ml_dtypes  # noqa: F401  (numpy learns of bfloat16)
import numpy as np
from safetensors import SafetensorError, safe_open


class PretrainedError(ValueError):
    """A model's files cannot be used; the message names the file, tensor or setting."""


@dataclasses.dataclass(frozen=True)
class Part:
    """Where the matrix or vector of one layer is in a file.

    Attributes:
        tensor: its name.
        transpose: whether rows and columns are swapped (PyTorch keeps a linear layer as [N, M]).
        axis: of the tensor, along which `take` picks.
        take: the indices that are this parameter's, where several share a tensor or its order is
            another; None for all.
        plus: what is added to the numbers.
    """

    tensor: str
    transpose: bool = False
    axis: int = 0
    take: np.ndarray | None = None
    plus: float = 0.0

    def shape(self, whole: tuple[int, ...]) -> tuple[int, ...]:
        """Its shape as a parameter, of a tensor of shape `whole`."""
        out = list(whole)
        if self.take is not None:
            out[self.axis] = len(self.take)
        return tuple(reversed(out)) if self.transpose else tuple(out)

    def read(self, source: "Source", index: tuple[slice, ...]) -> np.ndarray:
        """The parameter's numbers at `index`; no more of the tensor is read than is needed."""
        index = list(reversed(index)) if self.transpose else list(index)
        picked = None
        if self.take is not None:
            picked = self.take[index[self.axis]]
            first = int(picked.min(initial=0 if not len(picked) else picked[0]))
            index[self.axis] = slice(first, int(picked.max(initial=first)) + 1)
            picked = picked - first
        found = source.read(self.tensor, tuple(index))
        if picked is not None:
            found = np.take(found, picked, axis=self.axis)
        if self.plus:
            found = found.astype(np.float32) + np.float32(self.plus)
        return found.T if self.transpose else found


class Source(Protocol):
    """The tensors of a model's files."""

    def shapes(self) -> dict[str, tuple[int, ...]]:
        """The shape of every tensor by its name."""

    def read(self, tensor: str, index: tuple[slice, ...]) -> np.ndarray:
        """Some of a tensor's numbers."""


class Safetensors:
    """The tensors of one or many safetensors files, each opened by memory map.

    Args:
        files: the files.

    Raises:
        PretrainedError: a file is damaged, or two files have a tensor of the same name.
    """

    def __init__(self, files: list[pathlib.Path]):
        self._holders, self._shapes = {}, {}
        for file in files:
            try:
                opened = safe_open(os.fspath(file), framework="numpy")
            except (SafetensorError, OSError) as error:
                raise PretrainedError(f"{file} cannot be read ({error}); fetch it again") from error
            for name in opened.keys():
                if name in self._holders:
                    raise PretrainedError(f"{file}: another file has a tensor {name!r} too")
                self._holders[name] = opened
                self._shapes[name] = tuple(opened.get_slice(name).get_shape())

    def shapes(self) -> dict[str, tuple[int, ...]]:
        """The shape of every tensor by its name."""
        return self._shapes

    def read(self, tensor: str, index: tuple[slice, ...]) -> np.ndarray:
        """Some of a tensor's numbers."""
        return self._holders[tensor].get_slice(tensor)[index]


def of_directory(directory: pathlib.Path) -> Safetensors:
    """The safetensors of a Hugging Face directory, sharded or not.

    Raises:
        PretrainedError: there are none, or a shard that the index names is not there or lacks a
            tensor.
    """
    index = directory / "model.safetensors.index.json"
    if not index.exists():
        files = sorted(directory.glob("*.safetensors"))
        if not files:
            there = ", ".join(sorted(p.name for p in directory.iterdir())) or "nothing"
            raise PretrainedError(
                f"{directory} has no .safetensors file (it has {there}); save the model with "
                "safe_serialization, other formats may run code"
            )
        return Safetensors(files)
    try:
        listed = json.loads(index.read_text(encoding="utf-8"))["weight_map"]
    except (json.JSONDecodeError, KeyError, TypeError) as error:
        raise PretrainedError(f"{index} is not an index of safetensors: {error!r}") from error
    by_file = collections.defaultdict(list)
    for tensor, file in listed.items():
        if not isinstance(file, str) or os.path.basename(file) != file:
            raise PretrainedError(f"{index}: {file!r} of {tensor!r} is not a file beside it")
        by_file[file].append(tensor)
    absent = [f for f in by_file if not (directory / f).exists()]
    if absent:
        raise PretrainedError(f"{index} names {', '.join(absent)}, which {directory} lacks")
    found = Safetensors([directory / f for f in sorted(by_file)])
    lost = sorted(set(listed) - set(found.shapes()))
    if lost:
        raise PretrainedError(f"{index} names {', '.join(lost[:4])}, which no shard holds")
    return found
