"""A decoder-only transformer in Flax NNX: one module whose settings make it one or another family.

By default it has RMSNorm before attention and MLP, rotary positions, causal grouped-query attention
and a gated MLP. Layers are stacked and scanned (`scan=True`) or a list. Every matrix is an
`nnx.Linear` or an `nnx.Embed` whose parameters carry their logical axes in the metadata key `axes`.
"""

from collections.abc import Sequence

import jax
import jax.numpy as jnp
from flax import nnx

from tda.model import layers as parts
from tda.model import norms, positions
from tda.model.layers import ACTIVATIONS, Block, Sight, linear
from tda.runtime import sharding

# A window that no sequence reaches: layers that see everything, among layers with windows.
_EVERYTHING = 2**30


class Decoder(nnx.Module):
    """A decoder-only language model.

    Args:
        vocab_size: V.
        width, layers, heads, kv_heads, head_width, ff_width: D, L, H, grouped heads, K, F.
        gated: a gated MLP, else a plain one.
        activation: "silu", "gelu" (by tanh), "gelu_exact" or "relu".
        tied: the output matrix is the embedding's transpose.
        norm: "rms" or "layer" (with bias).
        norm_place: norms before attention and MLP ("before"), "after" them, or "both".
        norm_eps: epsilon of the norms.
        norm_offset: what is added to their scales: 1 where these are kept as distances from 1.
        parallel: attention and MLP read the same stream, and their outputs are added together.
        attention_bias, out_bias, mlp_bias: biases of queries, keys and values; of attention's
            output; of the MLP.
        query_key_norm: None, "head" (a norm over each head of queries and keys) or "all" (over all
            heads together).
        attention_scale: what scores are multiplied by; None for 1/√K.
        attention_soft_cap, logit_soft_cap: c of c·tanh(x / c) of scores and of logits; None for x.
        max_positions: positions that have a learned embedding, added to the tokens'; 0 for rotary
            encoding instead.
        rope_base: base of the rotary periods.
        rope_scaling: how contexts stretch them (`tda.model.positions.rotation`); None: not at all.
        rope_fraction: share of a head's features that is rotated.
        rope_layout: which of them are pairs: "half" (i, i + K/2) or "interleaved" (2i, 2i + 1).
        window: positions that a layer sees, its own one counted; None for all.
        window_layers: for each layer, whether it has the window; None for all of them.
        window_rope_base: the rotary base of layers with the window, unscaled; None for the others'.
        embedding_scale: what embeddings are multiplied by on their way in.
        scan: stack the layers and scan over them, so that compile time does not grow with L.
        remat: recompute a layer's activations in the backward pass instead of keeping them.
        dtype: of computation ("float32" or "bfloat16"); logits are always float32.
        param_dtype: of the parameters.
        rngs: the initialiser's keys.

    Raises:
        ValueError: a setting is unknown or does not fit the others; the message names it.
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
        norm: str = "rms",
        norm_place: str = "before",
        norm_eps: float = 1e-6,
        norm_offset: float = 0.0,
        parallel: bool = False,
        attention_bias: bool = False,
        out_bias: bool = False,
        mlp_bias: bool = False,
        query_key_norm: str | None = None,
        attention_scale: float | None = None,
        attention_soft_cap: float | None = None,
        logit_soft_cap: float | None = None,
        max_positions: int = 0,
        rope_base: float = 10_000.0,
        rope_scaling: dict | None = None,
        rope_fraction: float = 1.0,
        rope_layout: str = "half",
        window: int | None = None,
        window_layers: Sequence[bool] | None = None,
        window_rope_base: float | None = None,
        embedding_scale: float = 1.0,
        scan: bool = True,
        remat: bool = False,
        dtype: str = "float32",
        param_dtype: str = "float32",
        rngs: nnx.Rngs,
    ):
        if heads % kv_heads:
            raise ValueError(f"heads={heads} is not a multiple of kv_heads={kv_heads}")
        if head_width % 2 and not max_positions:
            raise ValueError(f"head_width={head_width} is odd; rotary encoding needs pairs")
        _check("activation", activation, ACTIVATIONS)
        _check("norm", norm, norms.KINDS)
        _check("norm_place", norm_place, parts.NORM_PLACES)
        _check("rope_layout", rope_layout, positions.LAYOUTS)
        if query_key_norm is not None:
            _check("query_key_norm", query_key_norm, parts.QUERY_KEY_NORMS)
        if norm_offset and norm != "rms":
            raise ValueError(f"norm_offset={norm_offset} is for norm='rms', not {norm!r}")
        if window is not None and window < 1:
            raise ValueError(f"window={window} must be positive")
        if window is None and (window_layers is not None or window_rope_base is not None):
            raise ValueError("window_layers and window_rope_base need a window")
        if window_layers is not None and len(window_layers) != layers:
            raise ValueError(f"window_layers says of {len(window_layers)} layers, not of {layers}")
        self.vocab_size, self.layer_count, self.max_positions = vocab_size, layers, max_positions
        self.scan, self.remat, self.tied = scan, remat, tied
        self.embedding_scale, self.logit_soft_cap = embedding_scale, logit_soft_cap
        self.window = window
        self.window_layers = None if window_layers is None else tuple(map(bool, window_layers))
        # Of all layers, and of those with a window where they differ: (features, base, scaling).
        rotated = int(head_width * rope_fraction)
        self.rope = rotated, rope_base, _plain(rope_scaling)
        self.window_rope = None if window_rope_base is None else (rotated, window_rope_base, None)
        self._sights()  # what cannot be rotated is told at once
        kinds = dict(dtype=jnp.dtype(dtype), param_dtype=jnp.dtype(param_dtype))
        # Residual branches start small, so that the stream's scale does not grow with depth.
        out_scale = 1.0 / (2 * layers)
        attention = dict(
            heads=heads,
            kv_heads=kv_heads,
            head_width=head_width,
            out_scale=out_scale,
            bias=attention_bias,
            out_bias=out_bias,
            query_key_norm=query_key_norm,
            scale=attention_scale,
            soft_cap=attention_soft_cap,
            layout=rope_layout,
        )
        mlp = dict(
            ff_width=ff_width,
            gated=gated,
            activation=activation,
            bias=mlp_bias,
            out_scale=out_scale,
        )
        every_norm = dict(kind=norm, eps=norm_eps, offset=norm_offset)

        def block(rngs):
            return Block(
                width, attention, mlp, every_norm, norm_place, parallel, **kinds, rngs=rngs
            )

        def table(rows, axis):
            return nnx.Embed(
                rows,
                width,
                embedding_init=nnx.initializers.normal(width**-0.5),
                embedding_metadata={"axes": (axis, "embed")},
                **kinds,
                rngs=rngs,
            )

        self.embedding = table(vocab_size, "vocab")
        if max_positions:
            self.position_embedding = table(max_positions, None)
        if scan:
            self.layers = nnx.vmap(block)(rngs.fork(split=layers))
        else:
            # The same keys as the stacked layers get, so that both start from the same weights.
            keys = rngs.fork(split=layers)
            state, graph = nnx.state(keys), nnx.graphdef(keys)
            take = [jax.tree.map(lambda x, i=i: x[i], state) for i in range(layers)]
            self.layers = nnx.List([block(nnx.merge(graph, s)) for s in take])
        self.final_norm = norms.make_norm(width=width, **every_norm, **kinds, rngs=rngs)
        if not tied:
            self.head = linear(width, vocab_size, ("embed", "vocab"), 1.0, **kinds, rngs=rngs)

    def _sights(self) -> tuple[Sight, bool]:
        """What layers make of positions; and whether it differs by layer and is stacked, [L, …]."""

        def rotation(rope):
            return None if self.max_positions else positions.rotation(*_dict(rope))

        everywhere = rotation(self.rope)
        if self.window_layers is None:
            if self.window_rope is not None:
                everywhere = rotation(self.window_rope)
            return Sight(everywhere, self.window), False
        near = rotation(self.window_rope) if self.window_rope is not None else everywhere
        with_window, without = Sight(near, self.window), Sight(everywhere, _EVERYTHING)
        each = [with_window if w else without for w in self.window_layers]
        return jax.tree.map(lambda *x: jnp.stack([jnp.asarray(y) for y in x]), *each), True

    def hidden(self, tokens_BxT):
        """The residual stream after the final norm, [B, T, D], of token ids [B, T].

        Raises:
            ValueError: more positions than have an embedding.
        """
        return self.final_norm(self._stream(tokens_BxT, self.layers, *self._sights()))

    def residual_stream(self, tokens_BxT, layers: int):
        """The residual stream after the first so many layers, [B, T, D], of token ids [B, T].

        Raises:
            ValueError: the model has no such number of layers, or none is asked for; more positions
                than have an embedding.
        """
        if not 1 <= layers <= self.layer_count:
            raise ValueError(f"layers={layers}: the model has {self.layer_count}")
        sight, stacked = self._sights()
        if stacked:
            sight = jax.tree.map(lambda x: x[:layers], sight)
        if not self.scan:
            return self._stream(tokens_BxT, list(self.layers)[:layers], sight, stacked)
        graphdef, state = nnx.split(self.layers)
        first = nnx.merge(graphdef, jax.tree.map(lambda x: x[:layers], state))
        return self._stream(tokens_BxT, first, sight, stacked)

    def _stream(self, tokens_BxT, layers, sight: Sight, stacked: bool):
        """The residual stream after these layers; `stacked`, each has a sight of its own."""
        x_BxTxD = self.embedding(tokens_BxT)
        if self.embedding_scale != 1.0:
            x_BxTxD = x_BxTxD * jnp.asarray(self.embedding_scale, x_BxTxD.dtype)
        if self.max_positions:
            T = tokens_BxT.shape[1]
            if T > self.max_positions:
                raise ValueError(f"{T} positions are more than max_positions={self.max_positions}")
            # One row of numbers for each example: a tap gives each example's own gradient.
            x_BxTxD += self.position_embedding(jnp.broadcast_to(jnp.arange(T), tokens_BxT.shape))
        x_BxTxD = sharding.constrain(x_BxTxD, "batch", None, None)

        def layer(x_BxTxD, block, *own):
            return block(x_BxTxD, *(own or (sight,)))

        if self.remat:
            layer = nnx.remat(layer)
        if self.scan:
            each = (layers, sight) if stacked else (layers,)
            axes = (nnx.Carry, *[0] * len(each))
            return nnx.scan(layer, in_axes=axes, out_axes=nnx.Carry)(x_BxTxD, *each)
        for i, block in enumerate(layers):
            own = [jax.tree.map(lambda x, i=i: x[i], sight)] if stacked else []
            x_BxTxD = layer(x_BxTxD, block, *own)
        return x_BxTxD

    def logits(self, hidden_BxTxD):
        """The output matrix applied to hidden states: float32 [B, T, V]."""
        if self.tied:
            y_BxTxV = self.embedding.attend(hidden_BxTxD)
        else:
            y_BxTxV = self.head(hidden_BxTxD)
        y_BxTxV = y_BxTxV.astype(jnp.float32)
        if self.logit_soft_cap is not None:
            y_BxTxV = self.logit_soft_cap * jnp.tanh(y_BxTxV / self.logit_soft_cap)
        return y_BxTxV

    def __call__(self, tokens_BxT):
        """Logits of the next token at every position: int32 [B, T] to float32 [B, T, V]."""
        return self.logits(self.hidden(tokens_BxT))


def _check(name: str, value, known) -> None:
    if value not in known:
        raise ValueError(f"unknown {name} {value!r}; use {', '.join(known)}")


def _plain(scaling: dict | None) -> tuple | None:
    """A dict as what can be hashed, for a module's structure."""
    if scaling is None:
        return None
    return tuple((k, tuple(v) if isinstance(v, list) else v) for k, v in sorted(scaling.items()))


def _dict(rope: tuple) -> tuple:
    features, base, scaling = rope
    return features, base, None if scaling is None else dict(scaling)


def parameter_count(**shape) -> int:
    """How many parameters a `Decoder(**shape)` has, found by shape alone (nothing is allocated)."""
    model = nnx.eval_shape(lambda: Decoder(**shape, rngs=nnx.Rngs(0)))
    return sum(p.size for p in jax.tree.leaves(nnx.state(model, nnx.Param)))
