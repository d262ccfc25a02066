"""Each family's configuration as the decoder's settings.

Each family has a function from a `Config` to keyword arguments of `DecoderSettings`. The defaults
for keys that a file lacks are those of transformers.
"""

from tda.model.pretrained.configurations import Config, common, rope, windows
from tda.model.pretrained.tensors import PretrainedError


def llama(c: Config, has_fraction: bool = False) -> dict:
    """Llama 2 and 3, and SmolLM2; `has_fraction` as in `rope`, for others like them."""
    bias = bool(c.get("attention_bias", False))
    return (
        common(c, tied=False)
        | rope(c, has_fraction=has_fraction)
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
    return llama(c) | windows(c)


def qwen2(c: Config) -> dict:
    """Qwen 2."""
    first = c.get("max_window_layers", 28)
    in_use = c.get("use_sliding_window", False)
    window = windows(c, lambda i: i >= first) if in_use else {}
    return llama(c) | window | dict(attention_bias=True, out_bias=False)


def qwen3(c: Config) -> dict:
    """Qwen 3."""
    bias = bool(c.get("attention_bias", False))
    return qwen2(c) | dict(
        query_key_norm="head", attention_bias=bias, out_bias=bias, head_width=c.get("head_dim", 128)
    )


def phi3(c: Config) -> dict:
    """Phi-3, Phi-3.5 and Phi-4."""
    c = c.with_defaults(rms_norm_eps=1e-5, original_max_position_embeddings=4096)
    arguments = llama(c, has_fraction=True) | windows(c)
    if (arguments["rope_scaling"] or {}).get("kind") == "yarn":
        raise PretrainedError(f"{c.path}: rotary scaling of type 'yarn' is not supported for Phi-3")
    return arguments | dict(attention_bias=False, out_bias=False, mlp_bias=False)


def smollm3(c: Config) -> dict:
    """SmolLM3."""
    c = c.with_defaults(rope_theta=2_000_000.0, num_key_value_heads=4)
    interval = c.get("no_rope_layer_interval", 4)
    layers = range(c.count("num_hidden_layers"))
    rotated = c.get("no_rope_layers", [(i + 1) % interval != 0 for i in layers])
    rotated = [bool(rotated[i]) for i in layers]
    in_use = c.get("use_sliding_window", False)
    window = windows(c, lambda i: not rotated[i]) if in_use else {}
    bias = bool(c.get("attention_bias", False))
    return (
        llama(c)
        | window
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
    return llama(c, has_fraction=True) | dict(
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
    window_base = _window_rope_base(c, base)
    c = c.with_defaults(sliding_window=4096)
    window = windows(c, lambda i: (i + 1) % 4 != 0)
    window |= dict(window_rope_base=window_base) if window else {}
    return olmo2(c) | rope(c, "full_attention", base) | window


def _window_rope_base(c: Config, base: float) -> float:
    """Returns the base of the rotary periods in layers with a window, which must be unscaled.

    Args:
        c: the configuration, whose `rope_theta` and `rope_scaling` are those of full attention.
        base: the base where there is none in `rope_parameters`.

    Raises:
        PretrainedError: these layers have a scaling of their own.
    """
    stated = c.get("rope_parameters", {}).get("sliding_attention")
    of_full = {"rope_theta": None, "rope_scaling": None}
    window = rope(Config(c.values | of_full | {"rope_parameters": stated}, c.path), base=base)
    if window["rope_scaling"] is not None:
        kind = window["rope_scaling"]["kind"]
        raise PretrainedError(
            f"{c.path}: rope_parameters['sliding_attention'] has a rotary scaling of type "
            f"{kind!r}, which is supported for full attention alone; use a model whose layers "
            "with a window have rope_type 'default'"
        )
    return window["rope_base"]


def olmo2(c: Config) -> dict:
    """OLMo 2."""
    return llama(c) | dict(
        norm_place="after", query_key_norm="all", norm_eps=c.get("rms_norm_eps", 1e-5)
    )


def _gemma(c: Config, activation: str) -> dict:
    """Returns the settings that all Gemma models share, given their activation."""
    c.refuse("use_bidirectional_attention")
    bias = bool(c.get("attention_bias", False))
    return common(c, tied=True) | dict(
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
    return _gemma(c, activation) | rope(c)


def gemma2(c: Config) -> dict:
    """Gemma 2."""
    c = c.with_defaults(
        head_dim=256,
        num_key_value_heads=4,
        sliding_window=4096,
        attn_logit_softcapping=50.0,
        final_logit_softcapping=30.0,
    )
    return _gemma_with_norms(c) | rope(c) | windows(c, lambda i: i % 2 == 0)


def _gemma_with_norms(c: Config) -> dict:
    """Returns the settings that Gemma 2 and 3 share."""
    return _gemma(c, c.activation("hidden_activation", "gelu_pytorch_tanh")) | dict(
        norm_place="both",
        attention_scale=float(c.get("query_pre_attn_scalar", 256)) ** -0.5,
        attention_soft_cap=c.get("attn_logit_softcapping"),
        logit_soft_cap=c.get("final_logit_softcapping"),
    )


def gemma3_of_pictures(c: Config) -> dict:
    """The text model of a Gemma 3 with vision."""
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
    window_rope_base = _window_rope_base(c, c.get("rope_local_base_freq", 10_000.0))
    arguments = (
        _gemma_with_norms(c)
        | rope(c, "full_attention")
        | windows(c, lambda i: bool((i + 1) % pattern))
        | dict(query_key_norm="head")
    )
    if "window" in arguments:
        arguments["window_rope_base"] = window_rope_base
    return arguments


def _layer_normed(activation: str, eps: float, bias: bool = True, mlp_bias: bool = True) -> dict:
    """Returns the settings of a LayerNorm and a plain MLP, which models after GPT-2 share."""
    return dict(
        gated=False,
        activation=activation,
        norm="layer",
        norm_eps=eps,
        attention_bias=bias,
        out_bias=bias,
        mlp_bias=mlp_bias,
    )


def _of_gpt2(c: Config) -> dict:
    """Returns `_layer_normed` by GPT-2's keys."""
    activation = c.activation("activation_function", "gelu_new")
    return _layer_normed(activation, c.get("layer_norm_epsilon", 1e-5))


def gpt2(c: Config) -> dict:
    """GPT-2, whose sizes may have their usual names too."""
    for key in ("scale_attn_by_inverse_layer_idx", "add_cross_attention", "quantization_config"):
        c.refuse(key)
    c.refuse("scale_attn_weights", (None, True))
    c.refuse("reorder_and_upcast_attn", (None, False, True))  # scores are float32 in any case
    c = c.with_defaults(
        n_embd=c.get("hidden_size"),
        n_layer=c.get("num_hidden_layers"),
        n_head=c.get("num_attention_heads"),
        n_positions=c.get("max_position_embeddings"),
    )
    width, heads = c.count("n_embd", 768), c.count("n_head", 12)
    return dict(
        vocab_size=c.count("vocab_size", 50257),
        width=width,
        layers=c.count("n_layer", 12),
        heads=heads,
        kv_heads=heads,
        head_width=width // heads,
        ff_width=c.count("n_inner", 4 * width),
        max_positions=c.count("n_positions", 1024),
        tied=bool(c.get("tie_word_embeddings", True)),
        **_of_gpt2(c),
    )


def neox(c: Config) -> dict:
    """GPT-NeoX: Pythia."""
    bias = bool(c.get("attention_bias", True))
    return (
        common(c, tied=False)
        | rope(c.with_defaults(rotary_pct=0.25), has_fraction=True)
        | _layer_normed(c.activation(default="gelu"), c.get("layer_norm_eps", 1e-5), bias)
        | dict(parallel=bool(c.get("use_parallel_residual", True)))
    )


def starcoder2(c: Config) -> dict:
    """StarCoder 2."""
    bias = bool(c.get("use_bias", True))
    activation, eps = c.activation(default="gelu_pytorch_tanh"), c.get("norm_epsilon", 1e-5)
    layers = _layer_normed(activation, eps, bias, bias)
    return common(c, tied=True) | rope(c) | windows(c) | layers


def opt(c: Config) -> dict:
    """OPT."""
    c.refuse("do_layer_norm_before", (None, True))
    c.refuse("layer_norm_elementwise_affine", (None, True))
    c.refuse("_remove_final_layer_norm")
    c.refuse("word_embed_proj_dim", (None, c["hidden_size"]))
    bias = bool(c.get("enable_bias", True))
    c = c.with_defaults(intermediate_size=c["ffn_dim"])
    activation, eps = c.activation("activation_function", "relu"), 1e-5  # PyTorch's own
    return common(c, tied=True) | dict(
        kv_heads=c["num_attention_heads"],
        max_positions=c["max_position_embeddings"],
        **_layer_normed(activation, eps, bias, bias),
    )


def gpt_neo(c: Config) -> dict:
    """GPT-Neo."""
    layers = c["num_layers"]
    kinds = [
        kind for pattern, count in c["attention_types"] for _ in range(count) for kind in pattern
    ]
    if len(kinds) != layers or set(kinds) - {"global", "local"}:
        raise PretrainedError(f"{c.path}: attention_types names {kinds} for {layers} layers")
    c = c.with_defaults(num_hidden_layers=layers, num_attention_heads=c["num_heads"])
    c = c.with_defaults(sliding_window=c.get("window_size", 256))
    inner = c.get("intermediate_size", 4 * c["hidden_size"])  # null in the published files
    c = Config(c.values | {"intermediate_size": inner}, c.path)
    return (
        common(c, tied=True)
        | windows(c, lambda i: kinds[i] == "local")
        | _of_gpt2(c)
        | dict(
            max_positions=c["max_position_embeddings"], attention_scale=1.0, attention_bias=False
        )
    )
