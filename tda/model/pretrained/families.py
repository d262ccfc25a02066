"""Families of models: configurations as the decoder's settings, tensors as its parameters.

A family is a function from a configuration (the JSON of Hugging Face's `config.json`) to the
decoder's keyword arguments, and names of tensors. What a configuration says and the decoder does
not do is an error that names it.
"""

import dataclasses
import re
from collections.abc import Callable

import numpy as np

from tda.model.pretrained.tensors import Part, PretrainedError

_ACTIVATIONS = {
    "silu": "silu",
    "swish": "silu",
    "gelu": "gelu_exact",
    "gelu_new": "gelu",
    "gelu_pytorch_tanh": "gelu",
    "gelu_fast": "gelu",
    "relu": "relu",
}


@dataclasses.dataclass(frozen=True)
class Family:
    """One family.

    Attributes:
        arguments: of `tda.model.decoder.Decoder`, from a `Config`.
        layer: parts of one layer by path of parameter, from the arguments and the layer's prefix.
        outside: parts outside of the layers, likewise, from the arguments and the prefix.
        base: what the names of the tensors begin with, where the model was saved with its head.
        layers: what stands before a layer's number.
        ignored: a regular expression of tensors that are no parameters.
    """

    arguments: Callable
    layer: Callable
    outside: Callable
    base: str
    layers: str
    ignored: str = r"$^"


class Config:
    """A configuration whose keys are read with defaults, and refused with its file's name."""

    def __init__(self, values: dict, where: str):
        self.values, self.where = values, where

    def __getitem__(self, key: str):
        if self.values.get(key) is None:
            raise PretrainedError(f"{self.where} lacks {key!r}")
        return self.values[key]

    def get(self, key: str, default=None):
        """The value of a key; `default` where it is absent or null."""
        value = self.values.get(key)
        return default if value is None else value

    def refuse(self, key: str, allowed=(None, False)) -> None:
        """Raises a PretrainedError unless the key's value is one that changes nothing."""
        if self.values.get(key) not in allowed:
            raise PretrainedError(f"{self.where}: {key}={self.values[key]!r} is not supported")

    def activation(self, key: str = "hidden_act", default: str | None = None) -> str:
        """The decoder's name of the activation."""
        name = self.get(key, default) if default else self[key]
        if name not in _ACTIVATIONS:
            raise PretrainedError(
                f"{self.where}: {key}={name!r} is not supported; known are "
                f"{', '.join(_ACTIVATIONS)}"
            )
        return _ACTIVATIONS[name]


def _rope(c: Config, kind: str | None = None, base: float = 10_000.0) -> dict:
    """Settings of the rotary encoding; of one `kind` of layers where these differ."""
    new = c.get("rope_parameters", {})
    if kind is not None and kind in new:
        new = new[kind] or {}
    scaling = dict(new or c.get("rope_scaling", {}))
    name = scaling.pop("rope_type", scaling.pop("type", "default"))
    scaling.pop("type", None)
    base = scaling.pop("rope_theta", c.get("rope_theta", c.get("rotary_emb_base", base)))
    fraction = scaling.pop(
        "partial_rotary_factor", c.get("partial_rotary_factor", c.get("rotary_pct", 1.0))
    )
    scaling = {k: v for k, v in scaling.items() if v is not None}
    if name == "yarn":
        scaling.setdefault("original_max_position_embeddings", c["max_position_embeddings"])
    if name not in ("default", "linear", "llama3", "yarn"):
        raise PretrainedError(
            f"{c.where}: rotary scaling of type {name!r} is not supported; known are default, "
            "linear, llama3 and yarn"
        )
    return dict(
        rope_base=float(base),
        rope_scaling=None if name == "default" else scaling | {"kind": name},
        rope_fraction=float(fraction),
    )


def _windows(c: Config, layers: int, used: bool = True, otherwise=None) -> dict:
    """Settings of the sliding window: which layers have it, by `layer_types` or by `otherwise`."""
    window = c.get("sliding_window")
    kinds = c.get("layer_types")
    if window is None or not used:
        return {}
    if kinds is not None:
        strange = sorted(set(kinds) - {"full_attention", "sliding_attention"})
        if strange or len(kinds) != layers:
            raise PretrainedError(
                f"{c.where}: layer_types names {len(kinds)} layers"
                + (f" and {', '.join(strange)}, which is not supported" if strange else "")
            )
        windowed = [kind == "sliding_attention" for kind in kinds]
    else:
        windowed = [otherwise is None or otherwise(i) for i in range(layers)]
    if not any(windowed):
        return {}
    return dict(window=window, window_layers=None if all(windowed) else windowed)


def _common(c: Config, *, tied: bool, width="hidden_size", heads="num_attention_heads") -> dict:
    """What nearly every configuration says in the same words."""
    c.refuse("quantization_config")
    head_width = c.get("head_dim", c[width] // c[heads])
    return dict(
        vocab_size=c["vocab_size"],
        width=c[width],
        layers=c["num_hidden_layers"],
        heads=c[heads],
        kv_heads=c.get("num_key_value_heads", c[heads]),
        head_width=head_width,
        ff_width=c["intermediate_size"],
        tied=bool(c.get("tie_word_embeddings", tied)),
    )


def _llama(c: Config) -> dict:
    bias = bool(c.get("attention_bias", False))
    return (
        _common(c, tied=False)
        | _rope(c)
        | dict(
            activation=c.activation(default="silu"),
            norm_eps=c.get("rms_norm_eps", 1e-6),
            attention_bias=bias,
            out_bias=bias,
            mlp_bias=bool(c.get("mlp_bias", False)),
        )
    )


def _mistral(c: Config) -> dict:
    # Where a configuration is silent, transformers takes a window; null is none.
    c = Config({"sliding_window": 4096} | c.values, c.where)
    return _llama(c) | _windows(c, c["num_hidden_layers"])


def _qwen2(c: Config) -> dict:
    kept = c.get("max_window_layers", 28)
    windows = _windows(
        c, c["num_hidden_layers"], bool(c.get("use_sliding_window", False)), lambda i: i >= kept
    )
    return _llama(c) | windows | dict(attention_bias=True, out_bias=False)


def _qwen3(c: Config) -> dict:
    bias = bool(c.get("attention_bias", False))
    own = dict(query_key_norm="head", attention_bias=bias, out_bias=bias)
    own["head_width"] = c.get("head_dim", 128)
    return _qwen2(c) | own


def _olmo2(c: Config) -> dict:
    return _llama(c) | dict(
        norm_place="after", query_key_norm="all", norm_eps=c.get("rms_norm_eps", 1e-5)
    )


def _gemma3(c: Config) -> dict:
    layers, pattern = c["num_hidden_layers"], c.get("sliding_window_pattern", 6)
    c.refuse("use_bidirectional_attention")
    # What older configurations leave out, transformers takes from the 4B model.
    values = {"rope_theta": 1_000_000.0, "head_dim": 256, "num_key_value_heads": 4} | c.values
    values = {"num_attention_heads": 8, "vocab_size": 262_208, "sliding_window": 4096} | values
    c = Config(values, c.where)
    bias = bool(c.get("attention_bias", False))
    near = _rope(c, "sliding_attention")["rope_base"]
    if "rope_parameters" not in c.values:
        near = c.get("rope_local_base_freq", 10_000.0)
    out = (
        _common(c, tied=True)
        | _rope(c, "full_attention")
        | _windows(c, layers, otherwise=lambda i: bool((i + 1) % pattern))
        | dict(
            activation=c.activation("hidden_activation", "gelu_pytorch_tanh"),
            norm_eps=c.get("rms_norm_eps", 1e-6),
            norm_place="both",
            norm_offset=1.0,
            query_key_norm="head",
            attention_bias=bias,
            out_bias=bias,
            attention_scale=float(c.get("query_pre_attn_scalar", 256)) ** -0.5,
            attention_soft_cap=c.get("attn_logit_softcapping"),
            logit_soft_cap=c.get("final_logit_softcapping"),
            embedding_scale=float(c["hidden_size"]) ** 0.5,
        )
    )
    return out | (dict(window_rope_base=float(near)) if "window" in out else {})


def _gpt2(c: Config) -> dict:
    for key in ("scale_attn_by_inverse_layer_idx", "add_cross_attention", "quantization_config"):
        c.refuse(key)
    c.refuse("scale_attn_weights", (None, True))
    c.refuse("reorder_and_upcast_attn", (None, False, True))  # scores are float32 in any case
    width, heads = c.get("n_embd", 768), c.get("n_head", 12)
    return dict(
        vocab_size=c.get("vocab_size", 50257),
        width=width,
        layers=c.get("n_layer", 12),
        heads=heads,
        kv_heads=heads,
        head_width=width // heads,
        ff_width=c.get("n_inner", 4 * width),
        max_positions=c.get("n_positions", 1024),
        gated=False,
        activation=c.activation("activation_function", "gelu_new"),
        tied=bool(c.get("tie_word_embeddings", True)),
        norm="layer",
        norm_eps=c.get("layer_norm_epsilon", 1e-5),
        attention_bias=True,
        out_bias=True,
        mlp_bias=True,
    )


def _neox(c: Config) -> dict:
    bias = bool(c.get("attention_bias", True))
    return (
        _common(c, tied=False)
        | _rope(c)
        | dict(
            rope_fraction=_rope(Config({"rotary_pct": 0.25} | c.values, c.where))["rope_fraction"],
            gated=False,
            activation=c.activation(default="gelu"),
            norm="layer",
            norm_eps=c.get("layer_norm_eps", 1e-5),
            parallel=bool(c.get("use_parallel_residual", True)),
            attention_bias=bias,
            out_bias=bias,
            mlp_bias=True,
        )
    )


def linear(ours: str, theirs: str, bias: bool, **how) -> dict[str, Part]:
    """The parts of a linear layer that PyTorch keeps as [N, M]."""
    out = {f"{ours}/kernel": Part(f"{theirs}.weight", transpose=True, **how)}
    return out | ({f"{ours}/bias": Part(f"{theirs}.bias", **how)} if bias else {})


_NORMS = {
    "before": ("attention_norm", "mlp_norm"),
    "after": ("attention_after_norm", "mlp_after_norm"),
    "both": ("attention_norm", "attention_after_norm", "mlp_norm", "mlp_after_norm"),
}


def _llama_layer(a: dict, at: str) -> dict[str, Part]:
    place = a.get("norm_place", "before")
    theirs = {
        "before": ("input_layernorm", "post_attention_layernorm"),
        "after": ("post_attention_layernorm", "post_feedforward_layernorm"),
        "both": (
            "input_layernorm",
            "post_attention_layernorm",
            "pre_feedforward_layernorm",
            "post_feedforward_layernorm",
        ),
    }[place]
    parts = {
        f"{ours}/scale": Part(f"{at}{name}.weight")
        for ours, name in zip(_NORMS[place], theirs, strict=True)
    }
    for ours, name in (("query", "q_proj"), ("key", "k_proj"), ("value", "v_proj")):
        bias = a.get("attention_bias", False)
        parts |= linear(f"attention/{ours}", f"{at}self_attn.{name}", bias)
    parts |= linear("attention/out", f"{at}self_attn.o_proj", a.get("out_bias", False))
    if a.get("query_key_norm"):
        parts["attention/query_norm/scale"] = Part(f"{at}self_attn.q_norm.weight")
        parts["attention/key_norm/scale"] = Part(f"{at}self_attn.k_norm.weight")
    for ours in ("gate", "up", "down"):
        parts |= linear(f"mlp/{ours}", f"{at}mlp.{ours}_proj", a.get("mlp_bias", False))
    return parts


def _head(a: dict, name: str) -> dict[str, Part]:
    return {} if a["tied"] else {"head/kernel": Part(name, transpose=True)}


def _llama_outside(a: dict, base: str) -> dict[str, Part]:
    return {
        "embedding/embedding": Part(f"{base}embed_tokens.weight"),
        "final_norm/scale": Part(f"{base}norm.weight"),
    } | _head(a, "lm_head.weight")


def _norm_with_bias(ours: str, theirs: str) -> dict[str, Part]:
    return {f"{ours}/scale": Part(f"{theirs}.weight"), f"{ours}/bias": Part(f"{theirs}.bias")}


def _gpt2_layer(a: dict, at: str) -> dict[str, Part]:
    # GPT-2 keeps its matrices as [M, N], and those of queries, keys and values side by side.
    parts = _norm_with_bias("attention_norm", f"{at}ln_1")
    parts |= _norm_with_bias("mlp_norm", f"{at}ln_2")
    D = a["width"]
    for i, ours in enumerate(("query", "key", "value")):
        take = np.arange(i * D, (i + 1) * D)
        parts[f"attention/{ours}/kernel"] = Part(f"{at}attn.c_attn.weight", axis=1, take=take)
        parts[f"attention/{ours}/bias"] = Part(f"{at}attn.c_attn.bias", take=take)
    pairs = (("attention/out", "attn.c_proj"), ("mlp/up", "mlp.c_fc"), ("mlp/down", "mlp.c_proj"))
    for ours, theirs in pairs:
        parts[f"{ours}/kernel"] = Part(f"{at}{theirs}.weight")
        parts[f"{ours}/bias"] = Part(f"{at}{theirs}.bias")
    return parts


def _gpt2_outside(a: dict, base: str) -> dict[str, Part]:
    return {
        "embedding/embedding": Part(f"{base}wte.weight"),
        "position_embedding/embedding": Part(f"{base}wpe.weight"),
    } | (_norm_with_bias("final_norm", f"{base}ln_f") | _head(a, "lm_head.weight"))


def _neox_layer(a: dict, at: str) -> dict[str, Part]:
    # Rows of queries, keys and values take turns, a head at a time.
    H, K = a["heads"], a["head_width"]
    rows_Hx3xK = np.arange(H * 3 * K).reshape(H, 3, K)
    parts = _norm_with_bias("attention_norm", f"{at}input_layernorm")
    parts |= _norm_with_bias("mlp_norm", f"{at}post_attention_layernorm")
    for i, ours in enumerate(("query", "key", "value")):
        take, bias = rows_Hx3xK[:, i].reshape(-1), a["attention_bias"]
        fused = f"{at}attention.query_key_value"
        parts |= linear(f"attention/{ours}", fused, bias, take=take)
    parts |= linear("attention/out", f"{at}attention.dense", a["out_bias"])
    parts |= linear("mlp/up", f"{at}mlp.dense_h_to_4h", True)
    return parts | linear("mlp/down", f"{at}mlp.dense_4h_to_h", True)


def _neox_outside(a: dict, base: str) -> dict[str, Part]:
    return {"embedding/embedding": Part(f"{base}embed_in.weight")} | (
        _norm_with_bias("final_norm", f"{base}final_layer_norm") | _head(a, "embed_out.weight")
    )


def _like_llama(arguments: Callable) -> Family:
    ignored = r"rotary_emb\.inv_freq$"
    return Family(arguments, _llama_layer, _llama_outside, "model.", "layers.", ignored)


FAMILIES = {
    "LlamaForCausalLM": _like_llama(_llama),
    "MistralForCausalLM": _like_llama(_mistral),
    "Qwen2ForCausalLM": _like_llama(_qwen2),
    "Qwen3ForCausalLM": _like_llama(_qwen3),
    "Olmo2ForCausalLM": _like_llama(_olmo2),
    "Gemma3ForCausalLM": _like_llama(_gemma3),
    "GPT2LMHeadModel": Family(
        _gpt2, _gpt2_layer, _gpt2_outside, "transformer.", "h.", r"attn\.(masked_)?bias$"
    ),
    "GPTNeoXForCausalLM": Family(
        _neox,
        _neox_layer,
        _neox_outside,
        "gpt_neox.",
        "layers.",
        r"attention\.(masked_)?bias$|rotary_emb\.inv_freq$",
    ),
}


def family(config: dict, where: str) -> Family:
    """The family of a configuration, by its `architectures`.

    Raises:
        PretrainedError: it names none, or one that is not known; the message lists those known.
    """
    names = config.get("architectures") or []
    for name in names:
        if name in FAMILIES:
            return FAMILIES[name]
    raise PretrainedError(
        f"{where}: the architecture {', '.join(map(str, names)) or 'is not named; it'} is not "
        f"known here; known are {', '.join(FAMILIES)}"
    )


def parts(found: Family, arguments: dict, names) -> dict[str, Part]:
    """The part of every parameter of the unstacked decoder, by its path.

    Args:
        found: the family.
        arguments: of the decoder.
        names: of the tensors; a model that was saved without its head has no `base` in them.
    """
    base = found.base if any(n.startswith(found.base) for n in names) else ""
    out = dict(found.outside(arguments, base))
    for i in range(arguments["layers"]):
        layer = found.layer(arguments, f"{base}{found.layers}{i}.")
        out |= {f"layers/{i}/{path}": part for path, part in layer.items()}
    return out


def is_ignored(found: Family, tensor: str) -> bool:
    """Whether a tensor is a buffer that holds nothing learned."""
    return re.search(found.ignored, tensor) is not None
