"""GGUF files: the Llama family and Gemma, dequantised tensor by tensor by the `gguf` package.

llama.cpp rotates pairs of adjacent features where Hugging Face's models rotate features half a head
apart, so files of the architecture "llama" have the rows of queries and keys in another order,
which is undone here. Gemma's norm scales are stored with the 1 that its model adds.
"""

import dataclasses
import math
import pathlib
import re
from typing import Any

import numpy as np

from tda.model.pretrained.description import Pretrained
from tda.model.pretrained.layouts import llama_layer, llama_outside
from tda.model.pretrained.tensors import Part, PretrainedError
from tda.model.settings import DecoderSettings
from tda.runtime.differences import shorten

_ARCHITECTURES = ("llama", "smollm3", "qwen2", "qwen3", "olmo2", "gemma", "gemma2", "gemma3")
# Architectures whose rotary pairs are adjacent features.
_ADJACENT_PAIRS = ("llama", "smollm3")
# The period of layers; the last layer of each has no window. It is in llama.cpp, not in the file.
_WINDOW_PERIODS = {"olmo2": 4, "gemma2": 2, "gemma3": 6}
# Gemma 2's window, also in llama.cpp, for files without it.
_DEFAULT_WINDOWS = {"gemma2": 4096}
# Settings of llama.cpp that change a model's output, with the value that has no effect.
_WITHOUT_EFFECT = {
    "expert_count": 0,
    "attention.clamp_kqv": 0.0,
    "attention.scale": 0.0,
    "attention.causal": True,
    "embedding_scale": 0.0,
    "residual_scale": 0.0,
    "logit_scale": 0.0,
}
# The number of layers of the model in each family that scales scores by D / H, not by K.
_LAYERS_OF_LARGEST = {"gemma2": 46, "gemma3": 62}


def _import_gguf():
    try:
        import gguf
    except ImportError as error:
        raise PretrainedError(
            "reading a .gguf file takes the package gguf: pip install 'tda-jax[gguf]'"
        ) from error
    return gguf


# llama.cpp's names for the files of a split model.
_PART = re.compile(r"(.+)-(\d{5})-of-(\d{5})\.gguf")


def part_files(path: pathlib.Path) -> list[pathlib.Path]:
    """Returns the files of a model, given its file or one part of a split one.

    Raises:
        PretrainedError: a part is missing.
    """
    match = _PART.fullmatch(path.name)
    if match is None:
        return [path]
    stem, _, count = match.groups()
    files = [path.with_name(f"{stem}-{i:05}-of-{count}.gguf") for i in range(1, int(count) + 1)]
    absent = [file.name for file in files if not file.exists()]
    if absent:
        raise PretrainedError(
            f"{path} is a part of a split model, which lacks {shorten(absent)}; put all parts into "
            "one directory"
        )
    return files


class Gguf:
    """The tensors and the metadata of a GGUF file, or of all parts of one, mapped into memory.

    Raises:
        PretrainedError: a file is damaged, is missing, or is of the other order of bytes.
    """

    def __init__(self, path: pathlib.Path):
        self.path, self._gguf = path, _import_gguf()
        files = part_files(path)
        self._readers = [self._open(file) for file in files]
        self._tensors = {t.name: t for reader in self._readers for t in reader.tensors}
        count = self.metadata("split.count", 1)
        if count > 1 and count != len(files):
            raise PretrainedError(
                f"{path} is a part of {count}; name them NAME-00001-of-{count:05}.gguf and so on, "
                "as llama.cpp does, and give the first"
            )

    def _open(self, path: pathlib.Path):
        base: Any = self._gguf.GGUFReader

        class Reader(base):
            """A reader of a plain array, whose slices are several times as fast as a `memmap`'s.

            It takes two slices for each of a vocabulary's hundred thousand strings.
            """

            @property
            def data(self):
                return self._data

            @data.setter
            def data(self, mapped):
                self._data = mapped.view(np.ndarray)

        try:
            reader = Reader(path)
        except (ValueError, OSError, IndexError, KeyError) as error:
            raise PretrainedError(f"{path} cannot be read as GGUF ({error})") from error
        if reader.byte_order == "S":
            # Blocks of quantised numbers would be read with their bytes in the wrong order.
            raise PretrainedError(
                f"{path} has its bytes in the other order than this machine; convert it by: "
                f"gguf-convert-endian {path} native"
            )
        return reader

    def metadata(self, key: str, default=None):
        """Returns a value of the metadata, which a split model keeps in its first part."""
        field = self._readers[0].get_field(key)
        return default if field is None else field.contents()

    def shapes(self) -> dict[str, tuple[int, ...]]:
        """Returns the shape of every tensor by its name, in PyTorch's order of axes."""
        return {n: tuple(map(int, reversed(t.shape))) for n, t in self._tensors.items()}

    def read(self, tensor: str, index: tuple[slice, ...]) -> np.ndarray:
        """Reads a tensor's numbers at `index` as float32, dequantising only the rows needed."""
        stored = self._tensors[tensor]
        # A vector's blocks are one row of bytes, where a slice of bytes is no slice of numbers.
        is_vector = len(stored.shape) == 1
        rows = np.ascontiguousarray(stored.data if is_vector else stored.data[index[0]])
        try:
            rows = self._gguf.quants.dequantize(rows, stored.tensor_type)
        except NotImplementedError as error:
            raise PretrainedError(
                f"{self.path}: {tensor} is quantised as {stored.tensor_type.name}, which the "
                "package gguf cannot read; give a file of another quantisation"
            ) from error
        return rows[index] if is_vector else rows[(slice(None), *index[1:])]


def inspect(path: pathlib.Path) -> Pretrained:
    """Describes the model of a GGUF file.

    Raises:
        PretrainedError: an architecture or a setting that is not known, or left-over tensors.
    """
    source = Gguf(path)
    architecture = source.metadata("general.architecture")
    if architecture not in _ARCHITECTURES:
        raise PretrainedError(
            f"{path}: the architecture {architecture!r} is not known here; known are "
            f"{', '.join(_ARCHITECTURES)}"
        )
    arguments = _read_arguments(source, architecture)
    parts = _find_parts(architecture, DecoderSettings(**arguments))
    used = {p.tensor for p in parts.values()} | {"rope_freqs.weight"}
    left_over = [n for n in source.shapes() if n not in used]
    if left_over:
        raise PretrainedError(
            f"{path}: {len(left_over)} tensors have no place in the model that the metadata "
            f"describes: {shorten(left_over)}"
        )
    config = {"general.architecture": architecture}
    return Pretrained(arguments, parts, source, str(path), config)


def _read_arguments(source: Gguf, architecture: str) -> dict:
    """Returns keyword arguments of `DecoderSettings`, from the metadata and existing tensors."""

    def value(key, default=None):
        stored = source.metadata(f"{architecture}.{key}", default)
        if stored is None:
            raise PretrainedError(f"{source.path} lacks {architecture}.{key} in its metadata")
        return stored

    for key, plain in _WITHOUT_EFFECT.items():
        setting = source.metadata(f"{architecture}.{key}", plain)
        if setting != plain:
            raise PretrainedError(
                f"{source.path}: {architecture}.{key}={setting} is not supported; convert the "
                "model's Hugging Face directory, or load that"
            )
    shapes = source.shapes()
    heads, width = value("attention.head_count"), value("embedding_length")
    head_width = value("attention.key_length", width // heads)
    arguments = dict(
        vocab_size=shapes.get("token_embd.weight", (0,))[0],
        width=width,
        layers=value("block_count"),
        heads=heads,
        kv_heads=value("attention.head_count_kv", heads),
        head_width=head_width,
        ff_width=value("feed_forward_length"),
        tied="output.weight" not in shapes,
        norm_eps=float(value("attention.layer_norm_rms_epsilon")),
        rope_base=float(value("rope.freq_base", 1e6 if architecture == "gemma3" else 10_000.0)),
        rope_scaling=_read_scaling(source, architecture),
        rope_fraction=value("rope.dimension_count", head_width) / head_width,
        attention_bias="blk.0.attn_q.bias" in shapes,
        out_bias="blk.0.attn_output.bias" in shapes,
        mlp_bias="blk.0.ffn_up.bias" in shapes,
    )
    if architecture == "qwen3":
        arguments |= dict(query_key_norm="head")
    if architecture == "olmo2":
        arguments |= dict(query_key_norm="all", norm_place="after")
    layers = arguments["layers"]
    if architecture == "smollm3":
        arguments |= dict(rope_layers=[(i + 1) % 4 != 0 for i in range(layers)])
    if architecture.startswith("gemma"):
        is_largest = layers == _LAYERS_OF_LARGEST.get(architecture)
        arguments |= dict(
            activation="gelu",
            norm_offset=1.0,
            embedding_scale=float(width) ** 0.5,
            attention_scale=float(width / heads if is_largest else head_width) ** -0.5,
        )
    if architecture in ("gemma2", "gemma3"):
        arguments |= dict(norm_place="both")
    if architecture == "gemma3":
        arguments |= dict(query_key_norm="head")
    # llama.cpp's caps of Gemma 2's scores and logits, for files without them.
    caps = (50.0, 30.0) if architecture == "gemma2" else (0.0, 0.0)
    for name, key, cap in zip(
        ("attention_soft_cap", "logit_soft_cap"),
        ("attn_logit_softcapping", "final_logit_softcapping"),
        caps,
        strict=True,
    ):
        cap = float(value(key, cap))
        arguments |= {name: cap} if cap else {}
    return arguments | _read_windows(source, architecture, arguments)


def _read_windows(source: Gguf, architecture: str, arguments: dict) -> dict:
    default = _DEFAULT_WINDOWS.get(architecture)
    window = source.metadata(f"{architecture}.attention.sliding_window", default)
    if not window:
        return {}
    layers = range(arguments["layers"])
    period = _WINDOW_PERIODS.get(architecture)
    period = source.metadata(f"{architecture}.attention.sliding_window_pattern", period)
    if isinstance(period, list):
        windowed = [bool(period[i]) for i in layers]
    else:
        windowed = [period is None or (i + 1) % period != 0 for i in layers]
    windows = dict(window=window, window_layers=None if all(windowed) else windowed)
    base = source.metadata(f"{architecture}.rope.freq_base_swa")
    if architecture == "gemma3" and base is None:
        base = 10_000.0
    if architecture == "olmo2" and base is None:  # OLMo 3, whose windows are never stretched
        base = arguments["rope_base"]
    return windows if base is None else windows | dict(window_rope_base=float(base))


def _read_scaling(source: Gguf, architecture: str) -> dict | None:
    if "rope_freqs.weight" in source.shapes():
        factors = source.read("rope_freqs.weight", (slice(None),))
        return {"kind": "factors", "factors": [float(x) for x in factors]}

    def value(key, default=None):
        return source.metadata(f"{architecture}.rope.scaling.{key}", default)

    # As in llama.cpp, a factor without a type is a linear one; older files call it scale_linear.
    factor = value("factor") or source.metadata(f"{architecture}.rope.scale_linear")
    name = value("type", "linear")
    if name == "none" or (name == "linear" and factor in (None, 0.0, 1.0)):
        return None
    if name not in ("linear", "yarn") or not factor:
        raise PretrainedError(
            f"{source.path}: rope.scaling.type {name!r} (factor {factor}) is not supported; known "
            "are none, linear and yarn, with a factor"
        )
    if name == "linear":
        return {"kind": "linear", "factor": float(factor)}
    for key, plain in (("yarn_ext_factor", 1), ("yarn_attn_factor", 1), ("yarn_log_multiplier", 0)):
        if value(key, plain) != plain:
            raise PretrainedError(
                f"{source.path}: rope.scaling.{key}={value(key)} is not supported"
            )
    context = source.metadata(f"{architecture}.context_length")
    length = value("original_context_length", context)
    if not length:
        raise PretrainedError(f"{source.path} lacks rope.scaling.original_context_length")
    return {
        "kind": "yarn",
        "factor": float(factor),
        "original_max_position_embeddings": int(length),
        "beta_fast": float(value("yarn_beta_fast", 32.0)),
        "beta_slow": float(value("yarn_beta_slow", 1.0)),
        # llama.cpp multiplies yarn's own factor.
        "attention_factor": float(value("attn_factor", 1.0)) * (0.1 * math.log(factor) + 1.0),
    }


def _rows_of_adjacent_pairs(heads: int, head_width: int) -> np.ndarray:
    """Returns the file's row for each row of the model, whose pairs are half a head apart."""
    rows_HxKx2 = np.arange(heads * head_width).reshape(heads, head_width // 2, 2)
    return rows_HxKx2.swapaxes(1, 2).reshape(-1)


# The names of tensors, by those of transformers' Llama, within a layer and outside.
_NAMES = {
    "input_layernorm": "attn_norm",
    "self_attn.q_proj": "attn_q",
    "self_attn.k_proj": "attn_k",
    "self_attn.v_proj": "attn_v",
    "self_attn.o_proj": "attn_output",
    "self_attn.q_norm": "attn_q_norm",
    "self_attn.k_norm": "attn_k_norm",
    "mlp.gate_proj": "ffn_gate",
    "mlp.up_proj": "ffn_up",
    "mlp.down_proj": "ffn_down",
    "pre_feedforward_layernorm": "ffn_norm",
    "post_feedforward_layernorm": "post_ffw_norm",
    "embed_tokens": "token_embd",
    "norm": "output_norm",
    "lm_head": "output",
}
# Norms before the MLP and after attention have one name in transformers and two here.
_NORM_OF_PLACE = {
    "before": "ffn_norm",
    "after": "post_attention_norm",
    "both": "post_attention_norm",
}


def _find_parts(architecture: str, settings: DecoderSettings) -> dict[str, Part]:
    names = _NAMES | {"post_attention_layernorm": _NORM_OF_PLACE[settings.norm_place]}
    heads = {"attention/query": settings.heads, "attention/key": settings.kv_heads}

    def renamed(path: str, part: Part, prefix: str = "") -> Part:
        module, _, end = part.tensor.rpartition(".")
        changes: dict = {"tensor": f"{prefix}{names[module]}.{end}"}
        layer, _, parameter = path.rpartition("/")
        if architecture in _ADJACENT_PAIRS and layer in heads:
            changes["take"] = _rows_of_adjacent_pairs(heads[layer], settings.head_width)
        if settings.norm_offset and parameter == "scale":
            changes["plus"] = -settings.norm_offset
        return dataclasses.replace(part, **changes)

    parts = {path: renamed(path, part) for path, part in llama_outside(settings, "").items()}
    layer = llama_layer(settings, "")
    for i in range(settings.layers):
        for path, part in layer.items():
            parts[f"layers/{i}/{path}"] = renamed(path, part, f"blk.{i}.")
    return parts
