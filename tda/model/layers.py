"""The decoder's layers: attention, MLP, and the block that adds them to the residual stream.

Every matrix is an `nnx.Linear` whose parameters carry their logical axes in the metadata key
`axes`.
"""

import dataclasses
import functools

import jax
import jax.numpy as jnp
from flax import nnx

from tda.model.attention import causal_attention, fused_attention, plain_attention
from tda.model.norms import make_norm, recomputed
from tda.model.positions import Rotation, rotary
from tda.model.settings import DecoderSettings
from tda.runtime import sharding

ACTIVATIONS = {
    "silu": jax.nn.silu,
    "gelu": jax.nn.gelu,  # the approximation by tanh
    "gelu_exact": functools.partial(jax.nn.gelu, approximate=False),
    "relu": jax.nn.relu,
}


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Sight:
    """How a layer's attention uses positions. Axes may be stacked over layers."""

    rotation: Rotation | None
    """Of queries and keys; None where positions are added to the embeddings."""
    window: jax.Array | None
    """Number of positions that each attends to, counting its own, int32; None for all."""


def _rows_dot_general(x, kernel, dimension_numbers, **kwargs):
    """Computes `dot_general` with the leading axes of `x` merged into one.

    The weight gradient then contracts one axis instead of two, so that XLA's CPU backend makes no
    transposed copy of both operands (a factor of two to three in a training step).
    """
    rows = x.reshape(-1, x.shape[-1])
    y = jax.lax.dot_general(rows, kernel, (((1,), (0,)), ((), ())), **kwargs)
    return y.reshape(*x.shape[:-1], kernel.shape[-1])


def linear(
    settings: DecoderSettings,
    shape: tuple[int, int],
    axes: tuple[str, str],
    rngs: nnx.Rngs,
    *,
    bias: bool = False,
    init_scale: float = 1.0,
) -> nnx.Linear:
    """Returns a linear layer in the settings' dtypes, from M to N features.

    `axes` are the logical axes of the two; `init_scale` is the initial weights' variance × M.
    """
    return nnx.Linear(
        *shape,
        use_bias=bias,
        kernel_init=nnx.initializers.variance_scaling(init_scale, "fan_in", "normal"),
        kernel_metadata={"axes": axes},
        bias_metadata={"axes": axes[1:]},
        dot_general=_rows_dot_general,
        # float32 means float32 on accelerators too; bfloat16 is multiplied as it is.
        precision="highest",
        dtype=jnp.dtype(settings.dtype),
        param_dtype=jnp.dtype(settings.param_dtype),
        rngs=rngs,
    )


def _branch_scale(settings: DecoderSettings) -> float:
    """Returns the initial scale of a residual branch: the stream's must not grow with depth."""
    return 1.0 / (2 * settings.layers)


_ATTENTION = {"blocked": causal_attention, "plain": plain_attention, "fused": fused_attention}


class Attention(nnx.Module):
    """Causal self-attention with H query heads over `kv_heads` key and value heads of width K."""

    def __init__(self, settings: DecoderSettings, rngs: nnx.Rngs):
        self.settings = s = settings
        D, HK, GK = s.width, s.heads * s.head_width, s.kv_heads * s.head_width
        axes, bias = ("embed", "heads"), s.attention_bias
        self.query = linear(s, (D, HK), axes, rngs, bias=bias)
        self.key = linear(s, (D, GK), axes, rngs, bias=bias)
        self.value = linear(s, (D, GK), axes, rngs, bias=bias)
        self.out = linear(
            s, (HK, D), ("heads", "embed"), rngs, bias=s.out_bias, init_scale=_branch_scale(s)
        )
        if s.query_key_norm is not None:
            per_head = s.query_key_norm == "head"
            self.query_norm = make_norm(s, s.head_width if per_head else HK, rngs)
            self.key_norm = make_norm(s, s.head_width if per_head else GK, rngs)

    def __call__(self, x_BxTxD, sight: Sight):
        """Mixes positions: [B, T, D] to [B, T, D]."""
        s = self.settings
        B, T, _ = x_BxTxD.shape
        q, k, v = self.query(x_BxTxD), self.key(x_BxTxD), self.value(x_BxTxD)
        if s.projection_clip is not None:
            q, k, v = (jnp.clip(x, -s.projection_clip, s.projection_clip) for x in (q, k, v))
        # Over all heads before they are split (OLMo 2), or over each one after (Qwen 3).
        if s.query_key_norm == "all":
            q, k = self.query_norm(q), self.key_norm(k)
        q = q.reshape(B, T, s.heads, s.head_width)
        k = k.reshape(B, T, s.kv_heads, s.head_width)
        v = v.reshape(B, T, s.kv_heads, s.head_width)
        if s.query_key_norm == "head":
            q, k = self.query_norm(q), self.key_norm(k)
        if sight.rotation is not None:
            q, k = (rotary(x, sight.rotation, s.rope_layout) for x in (q, k))
        attend = _ATTENTION[s.attention]
        y_BxTxHxK = attend(q, k, v, s.attention_scale, sight.window, s.attention_soft_cap)
        return self.out(y_BxTxHxK.reshape(B, T, s.heads * s.head_width))


class MLP(nnx.Module):
    """The feed-forward layer, gated (Shazeer 2020) or plain."""

    def __init__(self, settings: DecoderSettings, rngs: nnx.Rngs):
        self.activation = settings.activation
        D, F, bias = settings.width, settings.ff_width, settings.mlp_bias
        self.up = linear(settings, (D, F), ("embed", "mlp"), rngs, bias=bias)
        gated = settings.gated
        self.gate = linear(settings, (D, F), ("embed", "mlp"), rngs, bias=bias) if gated else None
        scale = _branch_scale(settings)
        self.down = linear(settings, (F, D), ("mlp", "embed"), rngs, bias=bias, init_scale=scale)

    def __call__(self, x_BxTxD):
        """Transforms every position by itself: [B, T, D] to [B, T, D]."""
        h_BxTxF, f = self.up(x_BxTxD), ACTIVATIONS[self.activation]
        if self.gate is None:
            return self.down(recomputed(f)(h_BxTxF))
        gated = recomputed(lambda gate, h: f(gate) * h)
        return self.down(gated(self.gate(x_BxTxD), h_BxTxF))


def _unchanged(x):
    return x


class Block(nnx.Module):
    """One layer: attention and MLP with their norms, each added to the residual stream."""

    def __init__(self, settings: DecoderSettings, rngs: nnx.Rngs):
        before, after = settings.norm_place != "after", settings.norm_place != "before"
        self.parallel = settings.parallel

        def norm(is_there: bool):
            return make_norm(settings, settings.width, rngs) if is_there else None

        # Random keys are drawn in this order; another order would change the initial weights.
        self.attention_norm = norm(before)
        self.attention = Attention(settings, rngs)
        self.attention_after_norm = norm(after)
        self.mlp_norm = norm(before)
        self.mlp = MLP(settings, rngs)
        self.mlp_after_norm = norm(after)

    def __call__(self, x_BxTxD, sight: Sight):
        """Runs the layer: [B, T, D] to [B, T, D]."""
        before, after = self.attention_norm or _unchanged, self.attention_after_norm or _unchanged
        mixed_BxTxD = after(self.attention(before(x_BxTxD), sight))
        read_BxTxD = x_BxTxD
        x_BxTxD = sharding.constrain(x_BxTxD + mixed_BxTxD, "batch", None, None)
        if not self.parallel:
            read_BxTxD = x_BxTxD
        before, after = self.mlp_norm or _unchanged, self.mlp_after_norm or _unchanged
        x_BxTxD = x_BxTxD + after(self.mlp(before(read_BxTxD)))
        return sharding.constrain(x_BxTxD, "batch", None, None)
