"""Configurations of published models (Hugging Face's `config.json`) as the decoder's settings.

Each family has a function from a `Config` to keyword arguments of `DecoderSettings`: JSON values,
which runs keep beside the model. A setting that the decoder lacks is an error that names it.
"""

import math

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
    """A configuration: reads keys with defaults, and names its file in errors.

    Attributes:
        values: the JSON object.
        path: its file.
    """

    def __init__(self, values: dict, path: str):
        self.values, self.path = values, path

    def with_defaults(self, **defaults) -> "Config":
        """Returns the configuration with values for the keys that it lacks; null stays null."""
        return Config(defaults | self.values, self.path)

    def __getitem__(self, key: str):
        if self.values.get(key) is None:
            raise PretrainedError(f"{self.path} lacks {key!r}")
        return self.values[key]

    def get(self, key: str, default=None):
        """Returns the value of a key, or `default` where it is absent or null."""
        value = self.values.get(key)
        return default if value is None else value

    def refuse(self, key: str, allowed=(None, False)) -> None:
        """Raises a PretrainedError unless the key has one of the allowed values or is absent."""
        if self.values.get(key) not in allowed:
            raise PretrainedError(f"{self.path}: {key}={self.values[key]!r} is not supported")

    def activation(self, key: str = "hidden_act", default: str | None = None) -> str:
        """Returns the decoder's name of the activation."""
        name = self.get(key, default) if default else self[key]
        if name not in _ACTIVATIONS:
            raise PretrainedError(
                f"{self.path}: {key}={name!r} is not supported; known are {', '.join(_ACTIVATIONS)}"
            )
        return _ACTIVATIONS[name]


def _rope(c: Config, kind: str | None = None, base: float = 10_000.0) -> dict:
    """Returns the settings of the rotary encoding, of one `kind` of layers where these differ."""
    # Newer versions of transformers write rope_parameters, older ones rope_theta and rope_scaling.
    parameters = c.get("rope_parameters", {})
    if kind is not None and kind in parameters:
        parameters = parameters[kind] or {}
    scaling = dict(parameters or c.get("rope_scaling", {}))
    name = scaling.pop("rope_type", scaling.pop("type", "default"))
    scaling.pop("type", None)
    base = scaling.pop("rope_theta", c.get("rope_theta", c.get("rotary_emb_base", base)))
    fraction = scaling.pop(
        "partial_rotary_factor", c.get("partial_rotary_factor", c.get("rotary_pct", 1.0))
    )
    scaling = {k: v for k, v in scaling.items() if v is not None}
    return dict(
        rope_base=float(base),
        rope_scaling=_scaling(c, _SCALING_NAMES.get(name, name), scaling),
        rope_fraction=float(fraction),
    )


_SCALING_NAMES = {"su": "longrope"}  # as the first Phi-3 models call it


def _scaling(c: Config, name: str, stated: dict) -> dict | None:
    """Returns how the rotary periods are stretched, in the keys of `tda.model.positions`."""
    if name == "default":
        return None
    if name in ("linear", "llama3"):
        return stated | {"kind": name}
    if name == "dynamic":
        length = c["max_position_embeddings"]
        return stated | {"kind": name, "max_position_embeddings": length}
    if name not in ("yarn", "longrope"):
        raise PretrainedError(
            f"{c.path}: rotary scaling of type {name!r} is not supported; known are default, "
            "linear, llama3, yarn, longrope and dynamic"
        )
    # Phi-3 keeps the length of the first training outside of the scaling, where it counts first.
    key = "original_max_position_embeddings"
    length = c.get(key) or stated.get(key) or c["max_position_embeddings"]
    factor = stated.get("factor", c.get("max_position_embeddings", length) / length)
    attention, logarithm = stated.get("attention_factor"), math.log(max(factor, 1.0))
    scales = [stated.pop(key, None) for key in ("mscale", "mscale_all_dim")]
    if attention is None and name == "longrope":
        attention = math.sqrt(1 + logarithm / math.log(length))
    elif attention is None and all(scales):  # DeepSeek's form of yarn
        numerator, denominator = (0.1 * scale * logarithm + 1 for scale in scales)
        attention = numerator / denominator
    stated |= {"kind": name, "original_max_position_embeddings": length}
    stated |= {} if attention is None else {"attention_factor": attention}
    if name == "longrope":
        stated.pop("factor", None)
        return stated
    return stated | {"factor": factor}


def _windows(c: Config, has_window=None) -> dict:
    """Returns the settings of the sliding window.

    Args:
        c: the configuration, whose `layer_types` tell which layers have the window.
        has_window: tells it by a layer's number where there are no `layer_types`; None for all.
    """
    window, layers, types = c.get("sliding_window"), c["num_hidden_layers"], c.get("layer_types")
    if window is None:
        return {}
    if types is not None:
        unknown = sorted(set(types) - {"full_attention", "sliding_attention"})
        if unknown or len(types) != layers:
            raise PretrainedError(
                f"{c.path}: layer_types names {len(types)} layers"
                + (f" and {', '.join(unknown)}, which is not supported" if unknown else "")
            )
        windowed = [kind == "sliding_attention" for kind in types]
    else:
        windowed = [has_window is None or has_window(i) for i in range(layers)]
    if not any(windowed):
        return {}
    return dict(window=window, window_layers=None if all(windowed) else windowed)


def _common(c: Config, *, tied: bool) -> dict:
    """Returns the settings whose keys nearly all families share.

    Args:
        c: the configuration.
        tied: transformers' default of `tie_word_embeddings` for the family.
    """
    c.refuse("quantization_config")
    width, heads = c["hidden_size"], c["num_attention_heads"]
    return dict(
        vocab_size=c["vocab_size"],
        width=width,
        layers=c["num_hidden_layers"],
        heads=heads,
        kv_heads=c.get("num_key_value_heads", heads),
        head_width=c.get("head_dim", width // heads),
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
    # transformers has a window where the key is absent, and none where it is null.
    c = c.with_defaults(sliding_window=4096)
    return llama(c) | _windows(c)


def qwen2(c: Config) -> dict:
    """Qwen 2."""
    first = c.get("max_window_layers", 28)
    windows = _windows(c, lambda i: i >= first) if c.get("use_sliding_window", False) else {}
    return llama(c) | windows | dict(attention_bias=True, out_bias=False)


def qwen3(c: Config) -> dict:
    """Qwen 3."""
    bias = bool(c.get("attention_bias", False))
    return qwen2(c) | dict(
        query_key_norm="head",
        attention_bias=bias,
        out_bias=bias,
        head_width=c.get("head_dim", 128),
    )


def phi3(c: Config) -> dict:
    """Phi-3, Phi-3.5 and Phi-4."""
    c = c.with_defaults(rms_norm_eps=1e-5, original_max_position_embeddings=4096)
    arguments = llama(c) | _windows(c)
    if (arguments["rope_scaling"] or {}).get("kind") == "yarn":
        raise PretrainedError(f"{c.path}: rotary scaling of type 'yarn' is not supported for Phi-3")
    return arguments | dict(attention_bias=False, out_bias=False, mlp_bias=False)


def smollm3(c: Config) -> dict:
    """SmolLM3."""
    c = c.with_defaults(rope_theta=2_000_000.0, num_key_value_heads=4)
    interval = c.get("no_rope_layer_interval", 4)
    layers = range(c["num_hidden_layers"])
    rotated = c.get("no_rope_layers", [(i + 1) % interval != 0 for i in layers])
    rotated = [bool(rotated[i]) for i in layers]
    windows = _windows(c, lambda i: not rotated[i]) if c.get("use_sliding_window", False) else {}
    bias = bool(c.get("attention_bias", False))
    return (
        llama(c)
        | windows
        | dict(
            tied=bool(c.get("tie_word_embeddings", True)),
            rope_layers=None if all(rotated) else rotated,
            attention_bias=bias,
            out_bias=bias,
        )
    )


def stablelm(c: Config) -> dict:
    """StableLM."""
    c.refuse("use_parallel_residual")
    c.refuse("qk_layernorm")
    c = c.with_defaults(partial_rotary_factor=0.25)
    return llama(c) | dict(
        norm="layer",
        norm_eps=c.get("layer_norm_eps", 1e-5),
        attention_bias=bool(c.get("use_qkv_bias", False)),
        out_bias=False,
        mlp_bias=False,
    )


def olmo(c: Config) -> dict:
    """OLMo 1."""
    return llama(c) | dict(
        norm="layer_plain",
        norm_eps=1e-5,  # a constant of the model
        mlp_bias=False,
        projection_clip=c.get("clip_qkv"),
    )


def olmo3(c: Config) -> dict:
    """OLMo 3."""
    base = 500_000.0
    window_base = _rope(Config({}, c.path), base=base)["rope_base"]
    if "sliding_attention" in c.get("rope_parameters", {}):
        window_base = _rope(c, "sliding_attention", base)["rope_base"]
    c = c.with_defaults(sliding_window=4096)
    windows = _windows(c, lambda i: (i + 1) % 4 != 0)
    windows |= dict(window_rope_base=window_base) if windows else {}
    return olmo2(c) | _rope(c, "full_attention", base) | windows


def olmo2(c: Config) -> dict:
    """OLMo 2."""
    return llama(c) | dict(
        norm_place="after", query_key_norm="all", norm_eps=c.get("rms_norm_eps", 1e-5)
    )


def _gemma(c: Config, activation: str) -> dict:
    """What all of Gemma's models share, given the name of their activation."""
    c.refuse("use_bidirectional_attention")
    bias = bool(c.get("attention_bias", False))
    return _common(c, tied=True) | dict(
        activation=activation,
        norm_eps=c.get("rms_norm_eps", 1e-6),
        norm_offset=1.0,
        attention_bias=bias,
        out_bias=bias,
        embedding_scale=float(c["hidden_size"]) ** 0.5,
    )


def gemma(c: Config) -> dict:
    """Gemma 1."""
    c = c.with_defaults(head_dim=256)
    activation = c.activation(default="gelu_pytorch_tanh")
    # The first releases say "gelu", by which the approximation is meant.
    activation = "gelu" if activation == "gelu_exact" else activation
    return _gemma(c, activation) | _rope(c)


def gemma2(c: Config) -> dict:
    """Gemma 2."""
    c = c.with_defaults(
        head_dim=256,
        num_key_value_heads=4,
        sliding_window=4096,
        attn_logit_softcapping=50.0,
        final_logit_softcapping=30.0,
    )
    return (
        _gemma(c, c.activation("hidden_activation", "gelu_pytorch_tanh"))
        | _rope(c)
        | _windows(c, lambda i: i % 2 == 0)
        | dict(
            norm_place="both",
            attention_scale=float(c.get("query_pre_attn_scalar", 256)) ** -0.5,
            attention_soft_cap=c.get("attn_logit_softcapping"),
            logit_soft_cap=c.get("final_logit_softcapping"),
        )
    )


def gemma3_of_pictures(c: Config) -> dict:
    """The text model of a Gemma 3 that sees pictures too."""
    text = dict(c["text_config"])
    text.setdefault("tie_word_embeddings", c.get("tie_word_embeddings", True))
    return gemma3(Config(text, f"{c.path}: text_config"))


def gemma3(c: Config) -> dict:
    """Gemma 3, the text model."""
    # transformers takes the 4B model's values for the keys that older configurations lack.
    c = c.with_defaults(
        rope_theta=1_000_000.0,
        head_dim=256,
        num_key_value_heads=4,
        num_attention_heads=8,
        vocab_size=262_208,
        sliding_window=4096,
    )
    pattern = c.get("sliding_window_pattern", 6)
    window_rope_base = _rope(c, "sliding_attention")["rope_base"]
    if "rope_parameters" not in c.values:
        window_rope_base = c.get("rope_local_base_freq", 10_000.0)
    arguments = (
        _gemma(c, c.activation("hidden_activation", "gelu_pytorch_tanh"))
        | _rope(c, "full_attention")
        | _windows(c, lambda i: bool((i + 1) % pattern))
        | dict(
            norm_place="both",
            query_key_norm="head",
            attention_scale=float(c.get("query_pre_attn_scalar", 256)) ** -0.5,
            attention_soft_cap=c.get("attn_logit_softcapping"),
            logit_soft_cap=c.get("final_logit_softcapping"),
        )
    )
    if "window" in arguments:
        arguments["window_rope_base"] = float(window_rope_base)
    return arguments


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
            rope_fraction=_rope(c.with_defaults(rotary_pct=0.25))["rope_fraction"],
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
