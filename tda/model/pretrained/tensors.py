"""Tensors of files, read by name a slice at a time, and the slice of each parameter."""

import collections
import dataclasses
import json
import os
import pathlib
import warnings
from collections.abc import Iterable
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
        """Reads the parameter's numbers at `index`, and only the part of the tensor they span."""
        numbers = self.pick(source, index)
        return numbers.astype(np.float32) + np.float32(self.plus) if self.plus else numbers

    def pick(self, source: "Source", index: tuple[slice, ...]) -> np.ndarray:
        """Reads the parameter's place in another source, such as its moments, without `plus`.

        Gradients and moments do not change if a parameter is stored with a number added.
        """
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

    def check_weights(self, names: Iterable[str]) -> None:
        """Checks that tensors hold floating-point numbers, and none that are quantised.

        Raises:
            PretrainedError: one does not.
        """
        for name in names:
            dtype = self._file_of_tensor[name].get_slice(name).get_dtype()
            if dtype not in _WEIGHTS:
                raise PretrainedError(
                    f"{name} has the dtype {dtype}, not one of {', '.join(_WEIGHTS)}: quantised "
                    "weights have no gradients; fetch the model in one of these"
                )

    def read(self, tensor: str, index: tuple[slice, ...]) -> np.ndarray:
        """Reads a tensor's numbers at `index`."""
        return self._file_of_tensor[tensor].get_slice(tensor)[index]


# Dtypes of weights, as safetensors names them.
_WEIGHTS = ("F32", "BF16", "F16", "F64")
_INDEX = "model.safetensors.index.json"
_CONVERSION = (
    'python -c "from transformers import AutoModelForCausalLM as M; '
    "M.from_pretrained('{0}').save_pretrained('{0}')\""
)


def weight_files(directory: pathlib.Path) -> dict[pathlib.Path, set[str]]:
    """Returns the files of a model's weights, as transformers chooses them, with listed tensors.

    `model.safetensors` comes before the files that the index names. Every other file (an adapter,
    an optimizer's state, another precision) is ignored; for an adapter there is a warning.

    Raises:
        PretrainedError: there are no such files; the index is damaged or names a missing file.
    """
    if (directory / "adapter_config.json").exists():
        warnings.warn(
            f"{directory} also holds an adapter, which is not applied; to trace the model with its "
            "adapter, merge the two first (peft's merge_and_unload)",
            stacklevel=2,
        )
    single, index = directory / "model.safetensors", directory / _INDEX
    if single.exists():
        return {single: set()}
    if index.exists():
        return _files_of_index(index)
    contents = sorted(p.name for p in directory.iterdir())
    advice = "fetch the model again"
    if any(name.startswith("pytorch_model") for name in contents):
        pickled = "its weights are pickled (pytorch_model.bin), and a pickle may run code; convert"
        advice = f"{pickled} them: {_CONVERSION.format(directory)}"
    elif any(name.endswith(".gguf") for name in contents):
        advice = "give the .gguf file itself as the model"
    elif any(name.startswith("adapter_model") for name in contents):
        advice = "an adapter alone is not a model: merge it with its base (peft's merge_and_unload)"
    elif any(name.endswith(".safetensors") for name in contents):
        advice = "rename the file with the weights, or fetch the index of the shards"
    raise PretrainedError(
        f"{directory} has neither model.safetensors nor {_INDEX} (it has "
        f"{', '.join(contents) or 'nothing'}); {advice}"
    )


def _files_of_index(index: pathlib.Path) -> dict[pathlib.Path, set[str]]:
    files = collections.defaultdict(set)
    try:
        for tensor, name in json.loads(index.read_text(encoding="utf-8"))["weight_map"].items():
            if not isinstance(name, str) or os.path.basename(name) != name:
                raise PretrainedError(f"{index}: {name!r} of {tensor!r} is not a file beside it")
            files[index.with_name(name)].add(tensor)
    except (json.JSONDecodeError, KeyError, TypeError, AttributeError) as error:
        raise PretrainedError(f"{index} is not an index of safetensors: {error!r}") from error
    absent = sorted(f.name for f in files if not f.exists())
    if absent:
        raise PretrainedError(
            f"{index} names {', '.join(absent)}, which {index.parent} lacks; fetch the model again"
        )
    return files


def open_directory(directory: pathlib.Path) -> Safetensors:
    """Opens the weights of a Hugging Face directory.

    Raises:
        PretrainedError: as `weight_files`; or a file lacks a tensor that the index says it has.
    """
    files = weight_files(directory)
    tensors = Safetensors(sorted(files))
    lost = sorted(set().union(*files.values()) - tensors.shapes().keys())
    if lost:
        raise PretrainedError(f"{directory / _INDEX} names {', '.join(lost[:4])}, in no shard")
    return tensors
