"""GGUF files: the Llama family and Gemma 3, dequantised tensor by tensor by the `gguf` package.

llama.cpp turns pairs of features that lie side by side where Hugging Face's models have them half a
head apart, so files of the architecture "llama" hold the rows of queries and keys in another order;
they are put back here. Gemma's norms are kept with the 1 that its model adds.
"""

import pathlib

import numpy as np

from tda.model.pretrained.description import Pretrained, some
from tda.model.pretrained.layouts import linear
from tda.model.pretrained.tensors import Part, PretrainedError

_KNOWN = ("llama", "qwen2", "qwen3", "olmo2", "gemma3")


def _package():
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
        self.path, self._gguf = path, _package()
        try:
            self._reader = self._gguf.GGUFReader(path)
        except (ValueError, OSError, IndexError, KeyError) as error:
            raise PretrainedError(f"{path} cannot be read as GGUF ({error})") from error
        self._tensors = {t.name: t for t in self._reader.tensors}

    def metadata(self, key: str, default=None):
        """A value of the file's metadata."""
        field = self._reader.get_field(key)
        return default if field is None else field.contents()

    def shapes(self) -> dict[str, tuple[int, ...]]:
        """The shape of every tensor by its name, in PyTorch's order of axes."""
        return {n: tuple(map(int, reversed(t.shape))) for n, t in self._tensors.items()}

    def read(self, tensor: str, index: tuple[slice, ...]) -> np.ndarray:
        """Some of a tensor's numbers, float32; whole rows are dequantised, no others."""
        found = self._tensors[tensor]
        rows = found.data[index[0]]
        rows = self._gguf.quants.dequantize(np.ascontiguousarray(rows), found.tensor_type)
        return rows[(slice(None), *index[1:])]


def inspect(path: pathlib.Path) -> Pretrained:
    """What a GGUF file says of its model.

    Raises:
        PretrainedError: an architecture or a setting that is not known, or left-over tensors.
    """
    source = Gguf(path)
    kind = source.metadata("general.architecture")
    if kind not in _KNOWN:
        raise PretrainedError(
            f"{path}: the architecture {kind!r} is not known here; known are {', '.join(_KNOWN)}"
        )
    arguments = _arguments(source, kind)
    parts = _parts(source, kind, arguments)
    used = {p.tensor for p in parts.values()} | {"rope_freqs.weight"}
    over = [n for n in source.shapes() if n not in used]
    if over:
        raise PretrainedError(
            f"{path}: {len(over)} tensors have no place in the model that the metadata describes: "
            + some(over)
        )
    config = {"general.architecture": kind}
    return Pretrained(arguments, parts, source, str(path), config)


def _arguments(source: Gguf, kind: str) -> dict:
    def say(key, default=None):
        found = source.metadata(f"{kind}.{key}", default)
        if found is None:
            raise PretrainedError(f"{source.path} lacks {kind}.{key} in its metadata")
        return found

    for key in ("expert_count", "attention.clamp_kqv"):
        if source.metadata(f"{kind}.{key}"):
            raise PretrainedError(f"{source.path}: {kind}.{key} is not supported")
    shapes = source.shapes()
    heads, width = say("attention.head_count"), say("embedding_length")
    head_width = say("attention.key_length", width // heads)
    rotated = say("rope.dimension_count", head_width)
    out = dict(
        vocab_size=shapes.get("token_embd.weight", (0,))[0],
        width=width,
        layers=say("block_count"),
        heads=heads,
        kv_heads=say("attention.head_count_kv", heads),
        head_width=head_width,
        ff_width=say("feed_forward_length"),
        tied="output.weight" not in shapes,
        norm_eps=float(say("attention.layer_norm_rms_epsilon")),
        rope_base=float(say("rope.freq_base", 1e6 if kind == "gemma3" else 10_000.0)),
        rope_scaling=_scaling(source, kind),
        rope_fraction=rotated / head_width,
        attention_bias="blk.0.attn_q.bias" in shapes,
        out_bias="blk.0.attn_output.bias" in shapes,
        mlp_bias="blk.0.ffn_up.bias" in shapes,
    )
    if kind == "qwen3":
        out |= dict(query_key_norm="head")
    if kind == "olmo2":
        out |= dict(query_key_norm="all", norm_place="after")
    if kind == "gemma3":
        # What llama.cpp takes from the architecture and not from the file.
        largest = out["layers"] == 62
        out |= dict(
            activation="gelu",
            norm_place="both",
            norm_offset=1.0,
            query_key_norm="head",
            embedding_scale=float(width) ** 0.5,
            attention_scale=float(width / heads if largest else head_width) ** -0.5,
            window=say("attention.sliding_window"),
            window_layers=[bool((i + 1) % 6) for i in range(out["layers"])],
            window_rope_base=10_000.0,
        )
        cap = source.metadata(f"{kind}.final_logit_softcapping")
        out |= dict(logit_soft_cap=float(cap)) if cap else {}
    elif source.metadata(f"{kind}.attention.sliding_window"):
        out |= dict(window=say("attention.sliding_window"))
    return out


def _scaling(source: Gguf, kind: str) -> dict | None:
    if "rope_freqs.weight" in source.shapes():
        factors = source.read("rope_freqs.weight", (slice(None),))
        return {"kind": "factors", "factors": [float(x) for x in factors]}
    name = source.metadata(f"{kind}.rope.scaling.type", "none")
    if name == "none":
        return None
    factor = source.metadata(f"{kind}.rope.scaling.factor")
    if name != "linear" or not factor:
        raise PretrainedError(f"{source.path}: rope.scaling.type {name!r} is not supported")
    return {"kind": "linear", "factor": float(factor)}


def _side_by_side(heads: int, head_width: int) -> np.ndarray:
    """Where the file has each row whose pairs are half a head apart in the model."""
    rows_HxKx2 = np.arange(heads * head_width).reshape(heads, head_width // 2, 2)
    return rows_HxKx2.swapaxes(1, 2).reshape(-1)


def _parts(source: Gguf, kind: str, a: dict) -> dict[str, Part]:
    plus = -1.0 if kind == "gemma3" else 0.0

    def norm(ours, theirs):
        return {f"{ours}/scale": Part(f"{theirs}.weight", plus=plus)}

    norms = {
        "before": {"attention_norm": "attn_norm", "mlp_norm": "ffn_norm"},
        "after": {
            "attention_after_norm": "post_attention_norm",
            "mlp_after_norm": "post_ffw_norm",
        },
    }
    norms["both"] = norms["before"] | norms["after"]
    out = {"embedding/embedding": Part("token_embd.weight")} | norm("final_norm", "output_norm")
    if not a["tied"]:
        out |= linear("head", "output", False)
    for i in range(a["layers"]):
        at, layer = f"blk.{i}.", {}
        for ours, theirs in norms[a.get("norm_place", "before")].items():
            layer |= norm(ours, f"{at}{theirs}")
        for ours, theirs, heads in (
            ("query", "attn_q", a["heads"]),
            ("key", "attn_k", a["kv_heads"]),
            ("value", "attn_v", None),
        ):
            turned = kind == "llama" and heads
            how = dict(take=_side_by_side(heads, a["head_width"])) if turned else {}
            layer |= linear(f"attention/{ours}", f"{at}{theirs}", a["attention_bias"], **how)
        layer |= linear("attention/out", f"{at}attn_output", a["out_bias"])
        if a.get("query_key_norm"):
            layer |= norm("attention/query_norm", f"{at}attn_q_norm")
            layer |= norm("attention/key_norm", f"{at}attn_k_norm")
        for ours in ("gate", "up", "down"):
            layer |= linear(f"mlp/{ours}", f"{at}ffn_{ours}", a["mlp_bias"])
        out |= {f"layers/{i}/{path}": part for path, part in layer.items()}
    return out
