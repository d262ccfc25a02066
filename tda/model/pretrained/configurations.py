"""Configurations of published models (Hugging Face's `config.json`) as the decoder's settings.

A function a family, from a `Config` to the decoder's keyword arguments. What a configuration says
and the decoder does not do is an error that names it.
"""

from tda.model.pretrained.tensors import PretrainedError

_ACTIVATIONS = {
    "silu": "silu",
    "swish": "silu",
    "gelu": "gelu_exact",
    "gelu_new": "gelu",
    "gelu_pytorch_tanh": "gelu",
    "gelu_fast": "gelu",
    "relu": "relu",
}


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


def llama(c: Config) -> dict:
    """Llama 2 and 3, and SmolLM2."""
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


def mistral(c: Config) -> dict:
    """Mistral."""
    # Where a configuration is silent, transformers takes a window; null is none.
    c = Config({"sliding_window": 4096} | c.values, c.where)
    return llama(c) | _windows(c, c["num_hidden_layers"])


def qwen2(c: Config) -> dict:
    """Qwen 2."""
    kept = c.get("max_window_layers", 28)
    windows = _windows(
        c, c["num_hidden_layers"], bool(c.get("use_sliding_window", False)), lambda i: i >= kept
    )
    return llama(c) | windows | dict(attention_bias=True, out_bias=False)


def qwen3(c: Config) -> dict:
    """Qwen 3."""
    bias = bool(c.get("attention_bias", False))
    own = dict(query_key_norm="head", attention_bias=bias, out_bias=bias)
    own["head_width"] = c.get("head_dim", 128)
    return qwen2(c) | own


def olmo2(c: Config) -> dict:
    """OLMo 2."""
    return llama(c) | dict(
        norm_place="after", query_key_norm="all", norm_eps=c.get("rms_norm_eps", 1e-5)
    )


def gemma3(c: Config) -> dict:
    """Gemma 3, the text model."""
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


def gpt2(c: Config) -> dict:
    """GPT-2."""
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


def neox(c: Config) -> dict:
    """GPT-NeoX: Pythia."""
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
