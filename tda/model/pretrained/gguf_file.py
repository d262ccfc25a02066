"""GGUF files: the Llama family and Gemma 3, dequantised tensor by tensor by the `gguf` package.

llama.cpp rotates pairs of adjacent features where Hugging Face's models rotate features half a head
apart, so files of the architecture "llama" hold the rows of queries and keys in another order; they
are put back here. Gemma's norm scales are stored with the 1 that its model adds.
"""

import pathlib

import numpy as np

from tda.model.pretrained.description import Pretrained, shorten
from tda.model.pretrained.layouts import linear
from tda.model.pretrained.tensors import Part, PretrainedError
from tda.model.settings import DecoderSettings

_ARCHITECTURES = ("llama", "qwen2", "qwen3", "olmo2", "gemma3")


def _import_gguf():
    try:
        import gguf
    except ImportError as error:
        raise PretrainedError(
            "reading a .gguf file takes the package gguf: pip install 'tda[gguf]'"
        ) from error
    return gguf


class Gguf:
    """The tensors and the metadata of a GGUF file, which is mapped into memory.

    Raises:
        PretrainedError: the file is damaged.
    """

    def __init__(self, path: pathlib.Path):
        self.path, self._gguf = path, _import_gguf()
        try:
            self._reader = self._gguf.GGUFReader(path)
        except (ValueError, OSError, IndexError, KeyError) as error:
            raise PretrainedError(f"{path} cannot be read as GGUF ({error})") from error
        self._tensors = {t.name: t for t in self._reader.tensors}

    def metadata(self, key: str, default=None):
        """Returns a value of the file's metadata."""
        field = self._reader.get_field(key)
        return default if field is None else field.contents()

    def shapes(self) -> dict[str, tuple[int, ...]]:
        """Returns the shape of every tensor by its name, in PyTorch's order of axes."""
        return {n: tuple(map(int, reversed(t.shape))) for n, t in self._tensors.items()}

    def read(self, tensor: str, index: tuple[slice, ...]) -> np.ndarray:
        """Reads a tensor's numbers at `index` as float32, dequantising only the rows needed."""
        stored = self._tensors[tensor]
        rows = np.ascontiguousarray(stored.data[index[0]])
        rows = self._gguf.quants.dequantize(rows, stored.tensor_type)
        return rows[(slice(None), *index[1:])]


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
    """Keyword arguments of `DecoderSettings`, from the metadata and the tensors that exist."""

    def value(key, default=None):
        stored = source.metadata(f"{architecture}.{key}", default)
        if stored is None:
            raise PretrainedError(f"{source.path} lacks {architecture}.{key} in its metadata")
        return stored

    for key in ("expert_count", "attention.clamp_kqv"):
        if source.metadata(f"{architecture}.{key}"):
            raise PretrainedError(f"{source.path}: {architecture}.{key} is not supported")
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
    if architecture == "gemma3":
        # llama.cpp knows these from the architecture; the file does not hold them. The largest
        # model, of 62 layers, scales its scores by another width.
        is_largest = arguments["layers"] == 62
        arguments |= dict(
            activation="gelu",
            norm_place="both",
            norm_offset=1.0,
            query_key_norm="head",
            embedding_scale=float(width) ** 0.5,
            attention_scale=float(width / heads if is_largest else head_width) ** -0.5,
            window=value("attention.sliding_window"),
            window_layers=[bool((i + 1) % 6) for i in range(arguments["layers"])],
            window_rope_base=10_000.0,
        )
        cap = source.metadata(f"{architecture}.final_logit_softcapping")
        arguments |= dict(logit_soft_cap=float(cap)) if cap else {}
    elif source.metadata(f"{architecture}.attention.sliding_window"):
        arguments |= dict(window=value("attention.sliding_window"))
    return arguments


def _read_scaling(source: Gguf, architecture: str) -> dict | None:
    if "rope_freqs.weight" in source.shapes():
        factors = source.read("rope_freqs.weight", (slice(None),))
        return {"kind": "factors", "factors": [float(x) for x in factors]}
    name = source.metadata(f"{architecture}.rope.scaling.type", "none")
    if name == "none":
        return None
    factor = source.metadata(f"{architecture}.rope.scaling.factor")
    if name != "linear" or not factor:
        raise PretrainedError(f"{source.path}: rope.scaling.type {name!r} is not supported")
    return {"kind": "linear", "factor": float(factor)}


def _rows_of_adjacent_pairs(heads: int, head_width: int) -> np.ndarray:
    """The file's row for each row of the model, whose pairs are half a head apart."""
    rows_HxKx2 = np.arange(heads * head_width).reshape(heads, head_width // 2, 2)
    return rows_HxKx2.swapaxes(1, 2).reshape(-1)


_NORMS_BEFORE = {"attention_norm": "attn_norm", "mlp_norm": "ffn_norm"}
_NORMS_AFTER = {
    "attention_after_norm": "post_attention_norm",
    "mlp_after_norm": "post_ffw_norm",
}
_NORMS = {"before": _NORMS_BEFORE, "after": _NORMS_AFTER, "both": _NORMS_BEFORE | _NORMS_AFTER}


def _find_parts(architecture: str, settings: DecoderSettings) -> dict[str, Part]:
    plus = -1.0 if architecture == "gemma3" else 0.0

    def norm(path: str, tensor: str) -> dict[str, Part]:
        return {f"{path}/scale": Part(f"{tensor}.weight", plus=plus)}

    parts = {"embedding/embedding": Part("token_embd.weight")} | norm("final_norm", "output_norm")
    if not settings.tied:
        parts |= linear("head", "output", False)
    for i in range(settings.layers):
        prefix, layer = f"blk.{i}.", {}
        for path, name in _NORMS[settings.norm_place].items():
            layer |= norm(path, f"{prefix}{name}")
        for path, name, heads in (
            ("query", "attn_q", settings.heads),
            ("key", "attn_k", settings.kv_heads),
            ("value", "attn_v", None),
        ):
            is_reordered = architecture == "llama" and heads
            take = _rows_of_adjacent_pairs(heads, settings.head_width) if is_reordered else None
            bias = settings.attention_bias
            layer |= linear(f"attention/{path}", f"{prefix}{name}", bias, take=take)
        layer |= linear("attention/out", f"{prefix}attn_output", settings.out_bias)
        if settings.query_key_norm:
            layer |= norm("attention/query_norm", f"{prefix}attn_q_norm")
            layer |= norm("attention/key_norm", f"{prefix}attn_k_norm")
        for name in ("gate", "up", "down"):
            layer |= linear(f"mlp/{name}", f"{prefix}ffn_{name}", settings.mlp_bias)
        parts |= {f"layers/{i}/{path}": part for path, part in layer.items()}
    return parts
