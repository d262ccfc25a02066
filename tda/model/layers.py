"""The decoder's layers: attention, MLP, and the block that joins them to the residual stream.

Every matrix is an `nnx.Linear` whose parameters carry their logical axes in the metadata key
`axes`.
"""

import dataclasses
import functools

import jax
from flax import nnx

from tda.model.attention import causal_attention
from tda.model.norms import make_norm, recomputed
from tda.model.positions import Rotation, rotary
from tda.runtime import sharding

ACTIVATIONS = {
    "silu": jax.nn.silu,
    "gelu": jax.nn.gelu,  # by tanh
    "gelu_exact": functools.partial(jax.nn.gelu, approximate=False),
    "relu": jax.nn.relu,
}
NORM_PLACES = ("before", "after", "both")
QUERY_KEY_NORMS = ("head", "all")


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Sight:
    """What the attention of one layer makes of positions. Axes may be stacked over layers.

    Attributes:
        rotation: of queries and keys; None where positions are added to the embeddings.
        window: how many positions each sees, its own one counted, int32; None for all.
    """

    rotation: Rotation | None
    window: jax.Array | None


def _rows_dot_general(x, kernel, dimension_numbers, **kwargs):
    """`dot_general` with the leading axes of `x` merged into one.

    The weight gradient then contracts one axis instead of two, which spares XLA's CPU backend a
    transposed copy of both operands (a factor of two to three in a training step).
    """
    rows = x.reshape(-1, x.shape[-1])
    y = jax.lax.dot_general(rows, kernel, (((1,), (0,)), ((), ())), **kwargs)
    return y.reshape(*x.shape[:-1], kernel.shape[-1])


def linear(inputs, outputs, axes, init_scale, *, bias=False, dtype, param_dtype, rngs):
    """An `nnx.Linear` with logical axes; its weights start with variance `init_scale` / fan-in."""
    return nnx.Linear(
        inputs,
        outputs,
        use_bias=bias,
        kernel_init=nnx.initializers.variance_scaling(init_scale, "fan_in", "normal"),
        kernel_metadata={"axes": axes},
        bias_metadata={"axes": axes[1:]},
        dot_general=_rows_dot_general,
        dtype=dtype,
        param_dtype=param_dtype,
        rngs=rngs,
    )


class Attention(nnx.Module):
    """Causal self-attention with H query heads over `kv_heads` key and value heads of width K."""

    def __init__(
        self,
        width,
        heads,
        kv_heads,
        head_width,
        *,
        out_scale,
        bias,
        out_bias,
        query_key_norm,
        norm,
        scale,
        soft_cap,
        layout,
        **kinds,
    ):
        self.heads, self.kv_heads, self.head_width = heads, kv_heads, head_width
        self.scale, self.soft_cap, self.layout = scale, soft_cap, layout
        project = functools.partial(linear, width, axes=("embed", "heads"), init_scale=1.0, **kinds)
        self.query = project(heads * head_width, bias=bias)
        self.key = project(kv_heads * head_width, bias=bias)
        self.value = project(kv_heads * head_width, bias=bias)
        self.out = linear(
            heads * head_width, width, ("heads", "embed"), out_scale, bias=out_bias, **kinds
        )
        self.query_key_norm = query_key_norm
        if query_key_norm is not None:
            queries, keys = (1, 1) if query_key_norm == "head" else (heads, kv_heads)
            self.query_norm = norm(queries * head_width, **kinds)
            self.key_norm = norm(keys * head_width, **kinds)

    def __call__(self, x_BxTxD, sight: Sight):
        """Mixes positions: [B, T, D] to [B, T, D]."""
        B, T, _ = x_BxTxD.shape
        q, k, v = self.query(x_BxTxD), self.key(x_BxTxD), self.value(x_BxTxD)
        if self.query_key_norm == "all":
            q, k = self.query_norm(q), self.key_norm(k)
        q = q.reshape(B, T, self.heads, self.head_width)
        k = k.reshape(B, T, self.kv_heads, self.head_width)
        v = v.reshape(B, T, self.kv_heads, self.head_width)
        if self.query_key_norm == "head":
            q, k = self.query_norm(q), self.key_norm(k)
        if sight.rotation is not None:
            q, k = (rotary(x, sight.rotation, self.layout) for x in (q, k))
        y_BxTxHxK = causal_attention(q, k, v, self.scale, sight.window, self.soft_cap)
        return self.out(y_BxTxHxK.reshape(B, T, self.heads * self.head_width))


class MLP(nnx.Module):
    """The feed-forward layer, gated (Shazeer 2020) or plain."""

    def __init__(self, width, ff_width, *, gated, activation, bias, out_scale, **kinds):
        self.activation = activation
        expand = functools.partial(
            linear, width, ff_width, ("embed", "mlp"), 1.0, bias=bias, **kinds
        )
        self.up = expand()
        self.gate = expand() if gated else None
        self.down = linear(ff_width, width, ("mlp", "embed"), out_scale, bias=bias, **kinds)

    def __call__(self, x_BxTxD):
        """Transforms every position alone: [B, T, D] to [B, T, D]."""
        h_BxTxF, f = self.up(x_BxTxD), ACTIVATIONS[self.activation]
        if self.gate is None:
            return self.down(recomputed(f)(h_BxTxF))
        gated = recomputed(lambda gate, h: f(gate) * h)
        return self.down(gated(self.gate(x_BxTxD), h_BxTxF))


def _unchanged(x):
    return x


class Block(nnx.Module):
    """One layer: attention and MLP, each behind or before a norm, added to the residual stream.

    Args:
        width: D.
        attention, mlp: what `Attention` and `MLP` take, norms and widths apart.
        norm: {"kind", "eps", "offset"} of every norm.
        norm_place: norms of what goes into attention and MLP ("before"), of what comes out of them
            ("after"), or "both".
        parallel: both read the stream that enters the layer; else the MLP reads attention's sum.
        **kinds: dtypes and keys.
    """

    def __init__(
        self, width, attention: dict, mlp: dict, norm: dict, norm_place, parallel, **kinds
    ):
        norm = functools.partial(make_norm, **norm)
        before, after = norm_place != "after", norm_place != "before"
        self.parallel = parallel
        # Random keys are taken in this order.
        self.attention_norm = norm(width=width, **kinds) if before else None
        self.attention = Attention(
            width, **attention, norm=lambda width, **kinds: norm(width=width, **kinds), **kinds
        )
        self.attention_after_norm = norm(width=width, **kinds) if after else None
        self.mlp_norm = norm(width=width, **kinds) if before else None
        self.mlp = MLP(width, **mlp, **kinds)
        self.mlp_after_norm = norm(width=width, **kinds) if after else None

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
