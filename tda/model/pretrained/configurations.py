"""A published model's configuration (Hugging Face's `config.json`), and settings of all families.

The settings are keyword arguments of `DecoderSettings`: JSON values, which runs store beside the
model. A setting that the decoder lacks is an error that names it.
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

    def count(self, key: str, default: int | None = None) -> int:
        """Returns a whole number from 1 on, or `default` where it is absent or null."""
        value = self[key] if default is None else self.get(key, default)
        if isinstance(value, bool) or not isinstance(value, int) or value < 1:
            raise PretrainedError(f"{self.path}: {key}={value!r}; it must be a number from 1 on")
        return value

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


def rope(
    c: Config, kind: str | None = None, base: float = 10_000.0, has_fraction: bool = False
) -> dict:
    """Returns the settings of the rotary encoding.

    Args:
        c: the configuration.
        kind: the kind of layers, where these differ.
        base: transformers' default of `rope_theta` for the family.
        has_fraction: whether transformers lets the family rotate a part of each head alone.
    """
    # Newer versions of transformers write rope_parameters, older ones rope_theta and rope_scaling,
    # which counts where a file has both.
    parameters = c.get("rope_parameters", {})
    if kind is not None and kind in parameters:
        scaling = dict(parameters[kind] or c.get("rope_scaling", {}))
    else:
        scaling = dict(c.get("rope_scaling", {}) or parameters)
    name = scaling.pop("rope_type", scaling.pop("type", "default"))
    scaling.pop("type", None)
    base = scaling.pop("rope_theta", c.get("rope_theta", c.get("rotary_emb_base", base)))
    fraction = scaling.pop(
        "partial_rotary_factor", c.get("partial_rotary_factor", c.get("rotary_pct", 1.0))
    )
    if float(fraction) != 1.0 and not has_fraction:
        raise PretrainedError(
            f"{c.path}: partial_rotary_factor={fraction} is not supported: transformers rotates "
            "whole heads in a model of this kind"
        )
    scaling = {k: v for k, v in scaling.items() if v is not None}
    return dict(
        rope_base=float(base),
        rope_scaling=_scaling(c, _SCALING_NAMES.get(name, name), scaling),
        rope_fraction=float(fraction),
    )


_SCALING_NAMES = {"su": "longrope"}  # its name in the first Phi-3 models


def _scaling(c: Config, name: str, stated: dict) -> dict | None:
    """Returns the stretching of the rotary periods, in the keys of `tda.model.positions`."""
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


def windows(c: Config, has_window=None) -> dict:
    """Returns the settings of the sliding window.

    Args:
        c: the configuration, whose `layer_types` name the layers with the window.
        has_window: whether a layer has it, by its number, if there are no `layer_types`; None for
            all layers.
    """
    window, layers, types = (
        c.get("sliding_window"),
        c.count("num_hidden_layers"),
        c.get("layer_types"),
    )
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


def common(c: Config, *, tied: bool) -> dict:
    """Returns the settings whose keys nearly all families share.

    Args:
        c: the configuration.
        tied: transformers' default of `tie_word_embeddings` for the family.
    """
    c.refuse("quantization_config")
    width, heads = c.count("hidden_size"), c.count("num_attention_heads")
    return dict(
        vocab_size=c.count("vocab_size"),
        width=width,
        layers=c.count("num_hidden_layers"),
        heads=heads,
        kv_heads=c.count("num_key_value_heads", heads),
        head_width=c.count("head_dim", width // heads),
        ff_width=c.count("intermediate_size"),
        tied=bool(c.get("tie_word_embeddings", tied)),
    )
