"""The settings of the decoder: its sizes, and the choices that make it one family or another."""

import dataclasses
from collections.abc import Sequence
from typing import Literal, get_args

import jax.numpy as jnp

from tda.model import positions

# Without vocab_size, which is 0 until the tokenizer is known.
_SIZES = ("width", "layers", "heads", "kv_heads", "head_width", "ff_width")


@dataclasses.dataclass(frozen=True, kw_only=True)
class DecoderSettings:
    """The sizes and choices of a `tda.model.decoder.Decoder`.

    The defaults are those of the Llama family. Runs store the fields by name, as JSON.

    Raises:
        ValueError: a field is unknown or does not fit the others; the message names it.
    """

    vocab_size: int
    """V, the number of tokens."""
    width: int
    """D, the features of the residual stream."""
    layers: int
    """L."""
    heads: int
    """H, the heads of queries."""
    kv_heads: int
    """The heads of keys and values, each shared by H / kv_heads heads of queries."""
    head_width: int
    """K, the features of a head."""
    ff_width: int
    """F, the features inside the MLP."""
    gated: bool = True
    """Whether the MLP is gated (Shazeer 2020)."""
    activation: Literal["silu", "gelu", "gelu_exact", "relu"] = "silu"
    """The MLP's activation; "gelu" is the approximation by tanh."""
    tied: bool = True
    """Whether the output matrix is the embedding's transpose."""
    norm: Literal["rms", "layer", "layer_plain"] = "rms"
    """RMSNorm, LayerNorm with a bias, or LayerNorm without parameters (OLMo 1)."""
    norm_place: Literal["before", "after", "both"] = "before"
    """The place of norms: before attention and MLP, after them, or both."""
    norm_eps: float = 1e-6
    """Epsilon of the norms."""
    norm_offset: float = 0.0
    """Added to the scales of RMSNorm: 1 where they are stored as the distance from 1 (Gemma)."""
    parallel: bool = False
    """Whether attention and MLP both read the stream that enters the layer (GPT-NeoX)."""
    attention: Literal["blocked", "plain", "fused"] = "blocked"
    """"plain" has no backward pass of its own, which saves memory but which `jax.jvp` refuses;
    "fused" is cuDNN's kernel where there is one (`tda.model.attention`)."""
    attention_bias: bool = False
    """Whether queries, keys and values have biases."""
    out_bias: bool = False
    """Whether attention's output has a bias."""
    mlp_bias: bool = False
    """Whether the MLP's matrices have biases."""
    projection_clip: float | None = None
    """Largest absolute value of queries, keys and values before rotation; None for no limit."""
    query_key_norm: Literal["head", "all", None] = None
    """Norms of queries and keys: of each head, of all heads together, or none."""
    attention_scale: float | None = None
    """Factor of the attention scores; None for 1/√K."""
    attention_soft_cap: float | None = None
    """c of c·tanh(s / c), applied to attention scores s; None for no cap."""
    logit_soft_cap: float | None = None
    """The same for logits."""
    max_positions: int = 0
    """Rows of a learned position embedding (GPT-2); 0 for rotary positions."""
    rope_base: float = 10_000.0
    """Base of the rotary periods."""
    rope_scaling: dict | None = dataclasses.field(default=None, hash=False)
    """How the rotary periods are stretched (`tda.model.positions.rotation`); None: not at all."""
    rope_fraction: float = 1.0
    """Share of a head's features that is rotated."""
    rope_layers: Sequence[bool] | None = None
    """For each layer, whether queries and keys are rotated (SmolLM3); None where all are."""
    rope_layout: Literal["half", "interleaved"] = "half"
    """Which features form a pair: i and i + K/2, or 2i and 2i + 1."""
    window: int | None = None
    """Positions that a layer attends to, counting its own; None for all."""
    window_layers: Sequence[bool] | None = None
    """For each layer, whether it has the window; None where all have it."""
    window_rope_base: float | None = None
    """Base of the rotary periods in layers with the window, unscaled; None for the same."""
    embedding_scale: float = 1.0
    """Factor of the token embeddings on their way into the first layer."""
    scan: bool = True
    """Whether layers are stacked and scanned, so that compile time does not grow with L."""
    remat: bool = False
    """Whether the backward pass recomputes a layer's activations instead of storing them."""
    dtype: str = "float32"
    """Dtype of the computation, "float32" or "bfloat16"; logits are always float32.

    "float32" holds on accelerators too, which by default round such products to TF32 or bfloat16.
    """
    param_dtype: str = "float32"
    """Dtype of the parameters."""

    def __post_init__(self):
        self._check_numbers()
        for name in ("window_layers", "rope_layers"):
            by_layer = getattr(self, name)
            if by_layer is None:
                continue
            if len(by_layer) != self.layers:
                raise ValueError(
                    f"{name} has {len(by_layer)} entries for {self.layers} layers; give one for "
                    "each"
                )
            # A tuple, because the settings are part of a module's hashable structure.
            object.__setattr__(self, name, tuple(map(bool, by_layer)))
        for field in dataclasses.fields(self):
            choices, value = get_args(field.type), getattr(self, field.name)
            if choices and isinstance(choices[0], str) and value not in choices:
                raise ValueError(
                    f"unknown {field.name} {value!r}; use {', '.join(map(str, choices))}"
                )
        self._check_dtypes()
        self._check_heads()
        self._check_window()
        if self.norm_offset and self.norm != "rms":
            raise ValueError(f"norm_offset={self.norm_offset} is for norm='rms', not {self.norm!r}")

    def _check_numbers(self) -> None:
        for name in _SIZES:
            if getattr(self, name) < 1:
                raise ValueError(f"{name}={getattr(self, name)} must be 1 or more")
        if not 0 <= self.rope_fraction <= 1:
            raise ValueError(f"rope_fraction={self.rope_fraction} must be from 0 to 1")
        for name in ("rope_base", "window_rope_base"):
            base = getattr(self, name)
            if base is not None and not base > 0:
                raise ValueError(f"{name}={base} must be above 0")

    def _check_dtypes(self) -> None:
        for name in ("dtype", "param_dtype"):
            value = getattr(self, name)
            try:
                is_floating = jnp.issubdtype(jnp.dtype(value), jnp.floating)
            except TypeError:
                is_floating = False
            if not is_floating:
                raise ValueError(
                    f"{name}={value!r} is no type of floating-point numbers; use 'float32' or "
                    "'bfloat16'"
                )

    def _check_heads(self) -> None:
        if self.heads % self.kv_heads:
            raise ValueError(
                f"heads={self.heads} is not a multiple of kv_heads={self.kv_heads}; give a divisor"
            )
        if self.max_positions:
            return
        if self.head_width % 2:
            raise ValueError(f"head_width={self.head_width} is odd; rotary encoding needs pairs")
        positions.check(self.rotated_features, self.rope_scaling)

    def _check_window(self) -> None:
        if self.window is None:
            if self.window_layers is not None or self.window_rope_base is not None:
                raise ValueError("window_layers and window_rope_base need a window; give it too")
            return
        if self.window < 1:
            raise ValueError(f"window={self.window} must be positive")

    @property
    def rotated_features(self) -> int:
        """How many features of a head are rotated."""
        return int(self.head_width * self.rope_fraction)
