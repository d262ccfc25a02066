"""Tensors of files, read by name a slice at a time, and the slice that holds each parameter."""

import collections
import dataclasses
import json
import os
import pathlib
from typing import Protocol

import ml_dtypes  # noqa: F401  (registers bfloat16 with numpy)
import numpy as np
from safetensors import SafetensorError, safe_open


class PretrainedError(ValueError):
    """A model's files cannot be used; the message names the file, tensor or setting."""


@dataclasses.dataclass(frozen=True)
class Part:
    """The place of one layer's matrix or vector in a file.

    Attributes:
        tensor: name of the tensor.
        transpose: whether rows and columns are swapped (PyTorch keeps a linear layer as [N, M]).
        axis: axis of the tensor that `take` indexes.
        take: this parameter's indices, where several parameters share a tensor or the file has
            another order; None for all.
        plus: number added to all of the parameter's numbers.
    """

    tensor: str
    transpose: bool = False
    axis: int = 0
    take: np.ndarray | None = None
    plus: float = 0.0

    def shape(self, tensor_shape: tuple[int, ...]) -> tuple[int, ...]:
        """Returns the parameter's shape, given its tensor's."""
        shape = list(tensor_shape)
        if self.take is not None:
            shape[self.axis] = len(self.take)
        return tuple(reversed(shape)) if self.transpose else tuple(shape)

    def read(self, source: "Source", index: tuple[slice, ...]) -> np.ndarray:
        """Reads the parameter's numbers at `index`, and no more of the tensor than they span."""
        index = list(reversed(index)) if self.transpose else list(index)
        picked = None
        if self.take is not None:
            picked = self.take[index[self.axis]]
            first = int(picked.min(initial=0 if not len(picked) else picked[0]))
            index[self.axis] = slice(first, int(picked.max(initial=first)) + 1)
            picked = picked - first
        numbers = source.read(self.tensor, tuple(index))
        if picked is not None:
            numbers = np.take(numbers, picked, axis=self.axis)
        if self.plus:
            numbers = numbers.astype(np.float32) + np.float32(self.plus)
        return numbers.T if self.transpose else numbers


class Source(Protocol):
    """The tensors of a model's files."""

    def shapes(self) -> dict[str, tuple[int, ...]]:
        """Returns the shape of every tensor by its name."""

    def read(self, tensor: str, index: tuple[slice, ...]) -> np.ndarray:
        """Reads a tensor's numbers at `index`."""


class Safetensors:
    """The tensors of safetensors files, each mapped into memory.

    Raises:
        PretrainedError: a file is damaged, or two files have a tensor of the same name.
    """

    def __init__(self, files: list[pathlib.Path]):
        self._file_of_tensor, self._shapes = {}, {}
        for file in files:
            try:
                opened = safe_open(os.fspath(file), framework="numpy")
            except (SafetensorError, OSError) as error:
                raise PretrainedError(f"{file} cannot be read ({error}); fetch it again") from error
            for name in opened.keys():
                if name in self._file_of_tensor:
                    raise PretrainedError(f"{file}: another file has a tensor {name!r} too")
                self._file_of_tensor[name] = opened
                self._shapes[name] = tuple(opened.get_slice(name).get_shape())

    def shapes(self) -> dict[str, tuple[int, ...]]:
        """Returns the shape of every tensor by its name."""
        return self._shapes

    def read(self, tensor: str, index: tuple[slice, ...]) -> np.ndarray:
        """Reads a tensor's numbers at `index`."""
        return self._file_of_tensor[tensor].get_slice(tensor)[index]


def open_directory(directory: pathlib.Path) -> Safetensors:
    """Opens the safetensors of a Hugging Face directory, sharded or not.

    Raises:
        PretrainedError: there are none, or a shard that the index names is missing or lacks a
            tensor.
    """
    index = directory / "model.safetensors.index.json"
    if not index.exists():
        files = sorted(directory.glob("*.safetensors"))
        if not files:
            contents = ", ".join(sorted(p.name for p in directory.iterdir())) or "nothing"
            raise PretrainedError(
                f"{directory} has no .safetensors file (it has {contents}); save the model with "
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
    tensors = Safetensors([directory / f for f in sorted(by_file)])
    lost = sorted(set(listed) - set(tensors.shapes()))
    if lost:
        raise PretrainedError(f"{index} names {', '.join(lost[:4])}, which no shard holds")
    return tensors
