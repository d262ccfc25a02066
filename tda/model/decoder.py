"""A decoder-only transformer in Flax NNX: pre-norm RMSNorm, RoPE, causal grouped-query attention.

Layers are stacked and scanned (`scan=True`) or a list. Every matrix is an `nnx.Linear` or an
`nnx.Embed` whose parameters carry their logical axes in the metadata key `axes`.
"""

import jax
import jax.numpy as jnp
from flax import nnx

from tda import sharding
from tda.model.attention import causal_attention

_ACTIVATIONS = {"silu": jax.nn.silu, "gelu": jax.nn.gelu, "relu": jax.nn.relu}


def rotary(x_BxTxHxK, base: float = 10_000.0):
    """Rotary position encoding (Su et al. 2021, eq. 34) of heads of width K, half-split layout.

    Angles are taken in float32 whatever the dtype of `x`; positions count from 0.
    """
    half = x_BxTxHxK.shape[-1] // 2
    inverse_period = base ** (-jnp.arange(half, dtype=jnp.float32) / half)
    angle_TxK = jnp.arange(x_BxTxHxK.shape[1], dtype=jnp.float32)[:, None] * inverse_period
    sin, cos = jnp.sin(angle_TxK)[None, :, None], jnp.cos(angle_TxK)[None, :, None]
    a, b = jnp.split(x_BxTxHxK.astype(jnp.float32), 2, axis=-1)
    return jnp.concatenate([a * cos - b * sin, b * cos + a * sin], axis=-1).astype(x_BxTxHxK.dtype)


def _rows_dot_general(x, kernel, dimension_numbers, **kwargs):
    """`dot_general` with the leading axes of `x` merged into one.

    The weight gradient then contracts one axis instead of two, which spares XLA's CPU backend a
    transposed copy of both operands (a factor of two to three in a training step).
    """
    rows = x.reshape(-1, x.shape[-1])
    y = jax.lax.dot_general(rows, kernel, (((1,), (0,)), ((), ())), **kwargs)
    return y.reshape(*x.shape[:-1], kernel.shape[-1])


def _linear(inputs, outputs, axes, init_scale, *, dtype, param_dtype, rngs):
    return nnx.Linear(
        inputs,
        outputs,
        use_bias=False,
        kernel_init=nnx.initializers.variance_scaling(init_scale, "fan_in", "normal"),
        kernel_metadata={"axes": axes},
        dot_general=_rows_dot_general,
        dtype=dtype,
        param_dtype=param_dtype,
        rngs=rngs,
    )


def _recomputed(f):
    """`f`, of whose results the backward pass keeps none: it runs `f` again on the arguments.

    For what is cheap: writing and reading its results would take longer.
    """
    return jax.checkpoint(f, prevent_cse=False)


class Norm(nnx.RMSNorm):
    """RMSNorm (Zhang & Sennrich 2019, eq. 4), its statistics in float32."""

    def __call__(self, x_BxTxD):
        """Divides each position's features by their root mean square: [B, T, D] to the same."""

        @_recomputed
        def normalised(x_BxTxD, scale_D):
            x_BxTxD = x_BxTxD.astype(jnp.float32)
            mean_BxTx1 = jnp.mean(jnp.square(x_BxTxD), axis=-1, keepdims=True)
            y_BxTxD = x_BxTxD * jax.lax.rsqrt(mean_BxTx1 + self.epsilon) * scale_D
            return y_BxTxD.astype(self.dtype)

        return normalised(x_BxTxD, self.scale[...])


def _norm(width, *, eps, dtype, param_dtype, rngs):
    return Norm(width, epsilon=eps, dtype=dtype, param_dtype=param_dtype, rngs=rngs)


class Attention(nnx.Module):
    """Causal self-attention with H query heads over `kv_heads` key and value heads of width K."""

    def __init__(self, width, heads, kv_heads, head_width, rope_base, out_scale, **kinds):
        self.heads, self.kv_heads, self.head_width = heads, kv_heads, head_width
        self.rope_base = rope_base
        self.query = _linear(width, heads * head_width, ("embed", "heads"), 1.0, **kinds)
        self.key = _linear(width, kv_heads * head_width, ("embed", "heads"), 1.0, **kinds)
        self.value = _linear(width, kv_heads * head_width, ("embed", "heads"), 1.0, **kinds)
        self.out = _linear(heads * head_width, width, ("heads", "embed"), out_scale, **kinds)

    def __call__(self, x_BxTxD):
        """Mixes positions: [B, T, D] to [B, T, D]."""
        B, T, _ = x_BxTxD.shape
        q = self.query(x_BxTxD).reshape(B, T, self.heads, self.head_width)
        k = self.key(x_BxTxD).reshape(B, T, self.kv_heads, self.head_width)
        v = self.value(x_BxTxD).reshape(B, T, self.kv_heads, self.head_width)
        q, k = rotary(q, self.rope_base), rotary(k, self.rope_base)
        y_BxTxHxK = causal_attention(q, k, v)
        return self.out(y_BxTxHxK.reshape(B, T, self.heads * self.head_width))


class MLP(nnx.Module):
    """The feed-forward layer, gated (Shazeer 2020) or plain."""

    def __init__(self, width, ff_width, gated, activation, out_scale, **kinds):
        self.activation = activation
        self.up = _linear(width, ff_width, ("embed", "mlp"), 1.0, **kinds)
        self.gate = _linear(width, ff_width, ("embed", "mlp"), 1.0, **kinds) if gated else None
        self.down = _linear(ff_width, width, ("mlp", "embed"), out_scale, **kinds)

    def __call__(self, x_BxTxD):
        """Transforms every position alone: [B, T, D] to [B, T, D]."""
        h_BxTxF, f = self.up(x_BxTxD), _ACTIVATIONS[self.activation]
        if self.gate is None:
            return self.down(_recomputed(f)(h_BxTxF))
        gated = _recomputed(lambda gate, h: f(gate) * h)
        return self.down(gated(self.gate(x_BxTxD), h_BxTxF))


class Block(nnx.Module):
    """One layer: attention and MLP, each behind a norm and added to the residual stream."""

    def __init__(self, attention: dict, mlp: dict, width, eps, **kinds):
        self.attention_norm = _norm(width, eps=eps, **kinds)
        self.attention = Attention(width, **attention, **kinds)
        self.mlp_norm = _norm(width, eps=eps, **kinds)
        self.mlp = MLP(width, **mlp, **kinds)

    def __call__(self, x_BxTxD):
        """Runs the layer: [B, T, D] to [B, T, D]."""
        x_BxTxD = x_BxTxD + self.attention(self.attention_norm(x_BxTxD))
        x_BxTxD = sharding.constrain(x_BxTxD, "batch", None, None)
        x_BxTxD = x_BxTxD + self.mlp(self.mlp_norm(x_BxTxD))
        return sharding.constrain(x_BxTxD, "batch", None, None)


class Decoder(nnx.Module):
    """A decoder-only language model.

    Args:
        vocab_size: V.
        width, layers, heads, kv_heads, head_width, ff_width: D, L, H, grouped heads, K, F.
        gated: a gated MLP, else a plain one.
        activation: "silu", "gelu" or "relu".
        tied: the output matrix is the embedding's transpose.
        rope_base: base of the rotary periods.
        norm_eps: epsilon of RMSNorm.
        scan: stack the layers and scan over them, so that compile time does not grow with L.
        remat: recompute a layer's activations in the backward pass instead of keeping them.
        dtype: of computation ("float32" or "bfloat16"); logits are always float32.
        param_dtype: of the parameters.
        rngs: the initialiser's keys.

    Raises:
        ValueError: `heads` is not a multiple of `kv_heads`, `head_width` is odd, or the activation
            is unknown.
    """

    def __init__(
        self,
        *,
        vocab_size: int,
        width: int,
        layers: int,
        heads: int,
        kv_heads: int,
        head_width: int,
        ff_width: int,
        gated: bool = True,
        activation: str = "silu",
        tied: bool = True,
        rope_base: float = 10_000.0,
        norm_eps: float = 1e-6,
        scan: bool = True,
        remat: bool = False,
        dtype: str = "float32",
        param_dtype: str = "float32",
        rngs: nnx.Rngs,
    ):
        if heads % kv_heads:
            raise ValueError(f"heads={heads} is not a multiple of kv_heads={kv_heads}")
        if head_width % 2:
            raise ValueError(f"head_width={head_width} is odd; rotary encoding needs pairs")
        if activation not in _ACTIVATIONS:
            raise ValueError(f"unknown activation {activation!r}; use {', '.join(_ACTIVATIONS)}")
        self.vocab_size, self.layer_count = vocab_size, layers
        self.scan, self.remat, self.tied = scan, remat, tied
        kinds = dict(dtype=jnp.dtype(dtype), param_dtype=jnp.dtype(param_dtype))
        # Residual branches start small, so that the stream's scale does not grow with depth.
        out_scale = 1.0 / (2 * layers)
        attention = dict(
            heads=heads,
            kv_heads=kv_heads,
            head_width=head_width,
            rope_base=rope_base,
            out_scale=out_scale,
        )
        mlp = dict(ff_width=ff_width, gated=gated, activation=activation, out_scale=out_scale)

        def block(rngs):
            return Block(attention, mlp, width, norm_eps, **kinds, rngs=rngs)

        self.embedding = nnx.Embed(
            vocab_size,
            width,
            embedding_init=nnx.initializers.normal(width**-0.5),
            embedding_metadata={"axes": ("vocab", "embed")},
            **kinds,
            rngs=rngs,
        )
        if scan:
            self.layers = nnx.vmap(block)(rngs.fork(split=layers))
        else:
            # The same keys as the stacked layers get, so that both start from the same weights.
            keys = rngs.fork(split=layers)
            state, graph = nnx.state(keys), nnx.graphdef(keys)
            take = [jax.tree.map(lambda x, i=i: x[i], state) for i in range(layers)]
            self.layers = nnx.List([block(nnx.merge(graph, s)) for s in take])
        self.final_norm = _norm(width, eps=norm_eps, **kinds, rngs=rngs)
        if not tied:
            self.head = _linear(width, vocab_size, ("embed", "vocab"), 1.0, **kinds, rngs=rngs)

    def hidden(self, tokens_BxT):
        """The residual stream after the final norm, [B, T, D], of token ids [B, T]."""
        return self.final_norm(self._stream(tokens_BxT, self.layers))

    def residual_stream(self, tokens_BxT, layers: int):
        """The residual stream after the first so many layers, [B, T, D], of token ids [B, T].

        Raises:
            ValueError: the model has no such number of layers, or none is asked for.
        """
        if not 1 <= layers <= self.layer_count:
            raise ValueError(f"layers={layers}: the model has {self.layer_count}")
        if not self.scan:
            return self._stream(tokens_BxT, list(self.layers)[:layers])
        graphdef, state = nnx.split(self.layers)
        first = nnx.merge(graphdef, jax.tree.map(lambda x: x[:layers], state))
        return self._stream(tokens_BxT, first)

    def _stream(self, tokens_BxT, layers):
        x_BxTxD = self.embedding(tokens_BxT)
        x_BxTxD = sharding.constrain(x_BxTxD, "batch", None, None)

        def layer(x_BxTxD, block):
            return block(x_BxTxD)

        if self.remat:
            layer = nnx.remat(layer)
        if self.scan:
            return nnx.scan(layer, in_axes=(nnx.Carry, 0), out_axes=nnx.Carry)(x_BxTxD, layers)
        for block in layers:
            x_BxTxD = layer(x_BxTxD, block)
        return x_BxTxD

    def logits(self, hidden_BxTxD):
        """The output matrix applied to hidden states: float32 [B, T, V]."""
        if self.tied:
            y_BxTxV = self.embedding.attend(hidden_BxTxD)
        else:
            y_BxTxV = self.head(hidden_BxTxD)
        return y_BxTxV.astype(jnp.float32)

    def __call__(self, tokens_BxT):
        """Logits of the next token at every position: int32 [B, T] to float32 [B, T, V]."""
        return self.logits(self.hidden(tokens_BxT))


def parameter_count(**shape) -> int:
    """How many parameters a `Decoder(**shape)` has, found by shape alone (nothing is allocated)."""
    model = nnx.eval_shape(lambda: Decoder(**shape, rngs=nnx.Rngs(0)))
    return sum(p.size for p in jax.tree.leaves(nnx.state(model, nnx.Param)))
