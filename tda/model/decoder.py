"""A decoder-only transformer in Flax NNX: one module whose settings make it one family or another.

By default it has RMSNorm before attention and MLP, rotary positions, causal grouped-query attention
and a gated MLP. Layers are stacked and scanned (`scan=True`) or a list. Every matrix is an
`nnx.Linear` or an `nnx.Embed` whose parameters carry their logical axes in the metadata key `axes`.
"""

import dataclasses
import functools

import jax
import jax.numpy as jnp
from flax import nnx

from tda.model import positions
from tda.model.layers import Block, Sight, linear
from tda.model.norms import make_norm
from tda.model.settings import DecoderSettings
from tda.runtime import sharding

# A window that no sequence reaches, for layers without one among layers that have one.
_NO_WINDOW = 2**30


class Decoder(nnx.Module):
    """A decoder-only language model.

    Args:
        settings: its sizes and choices.
        rngs: keys of the initial weights.
    """

    has_separate_head = True  # see `tda.loss.has_separate_head`

    def __init__(self, settings: DecoderSettings, *, rngs: nnx.Rngs):
        self.settings = settings

        def table(rows: int, axis: str | None) -> nnx.Embed:
            return nnx.Embed(
                rows,
                settings.width,
                # A tied head's logits then begin with a variance of 1.
                embedding_init=nnx.initializers.normal(settings.width**-0.5),
                embedding_metadata={"axes": (axis, "embed")},
                dtype=jnp.dtype(settings.dtype),
                param_dtype=jnp.dtype(settings.param_dtype),
                rngs=rngs,
            )

        # Random keys are drawn in this order; another order would change the initial weights.
        self.embedding = table(settings.vocab_size, "vocab")
        if settings.max_positions:
            self.position_embedding = table(settings.max_positions, None)
        keys = rngs.fork(split=settings.layers)
        if settings.scan:
            self.layers = nnx.vmap(lambda keys: Block(settings, keys))(keys)
        else:
            # The same keys as for stacked layers, so that both start from the same weights.
            state, graph = nnx.state(keys), nnx.graphdef(keys)
            by_layer = [jax.tree.map(lambda x, i=i: x[i], state) for i in range(settings.layers)]
            self.layers = nnx.List([Block(settings, nnx.merge(graph, k)) for k in by_layer])
        self.final_norm = make_norm(settings, settings.width, rngs)
        if not settings.tied:
            shape = settings.width, settings.vocab_size
            self.head = linear(settings, shape, ("embed", "vocab"), rngs)

    @property
    def layer_count(self) -> int:
        """L, the number of layers."""
        return self.settings.layers

    @property
    def vocab_size(self) -> int:
        """V, the number of tokens."""
        return self.settings.vocab_size

    @property
    def max_positions(self) -> int:
        """The number of positions that have an embedding; 0 where positions are rotary."""
        return self.settings.max_positions

    def _sights(self, T: int) -> tuple[Sight, bool]:
        """Returns the layers' sight, and whether it differs by layer and so is stacked, [L, …]."""
        s = self.settings
        rotation = in_window = None
        if not s.max_positions:
            rotation = in_window = positions.rotation(
                s.rotated_features, s.rope_base, s.rope_scaling, T
            )
            # Gemma 3 has another base in layers with a window, without stretching.
            if s.window_rope_base is not None:
                in_window = positions.rotation(s.rotated_features, s.window_rope_base)
        if s.window_layers is None and s.rope_layers is None:
            return Sight(in_window, s.window), False
        by_layer = []
        for i in range(s.layers):
            has_window = s.window is not None and (s.window_layers is None or s.window_layers[i])
            in_layer = in_window if has_window else rotation
            if s.rope_layers is not None and not s.rope_layers[i]:
                # A rotation by 0 changes nothing, and lets the layers be stacked.
                in_layer = positions.Rotation(jnp.zeros_like(rotation.inverse_period_K))
            no_window = None if s.window is None else _NO_WINDOW
            by_layer.append(Sight(in_layer, s.window if has_window else no_window))
        stacked = jax.tree.map(lambda *x: jnp.stack([jnp.asarray(y) for y in x]), *by_layer)
        return stacked, True

    def hidden(self, tokens_BxT):
        """Returns the residual stream after the final norm, [B, T, D], of token ids [B, T].

        Raises:
            ValueError: more positions than have an embedding.
        """
        return self.final_norm(
            self._stream(tokens_BxT, self.layers, *self._sights(tokens_BxT.shape[1]))
        )

    def residual_stream(self, tokens_BxT, layers: int):
        """Returns the residual stream after the first `layers` of L layers, [B, T, D].

        Raises:
            ValueError: the model has no such number of layers; more positions than have an
                embedding.
        """
        if not 1 <= layers <= self.layer_count:
            raise ValueError(f"layers={layers}: give 1 to {self.layer_count}, the model's layers")
        sight, stacked = self._sights(tokens_BxT.shape[1])
        if stacked:
            sight = jax.tree.map(lambda x: x[:layers], sight)
        if not self.settings.scan:
            return self._stream(tokens_BxT, list(self.layers)[:layers], sight, stacked)
        graphdef, state = nnx.split(self.layers)
        first = nnx.merge(graphdef, jax.tree.map(lambda x: x[:layers], state))
        return self._stream(tokens_BxT, first, sight, stacked)

    def _stream(self, tokens_BxT, layers, sight: Sight, stacked: bool):
        """Returns the residual stream after some layers; if `stacked`, each has its own sight."""
        s = self.settings
        x_BxTxD = self.embedding(tokens_BxT)
        if s.embedding_scale != 1.0:
            # The factor is rounded to the embeddings' dtype, as in Gemma's own code.
            x_BxTxD = x_BxTxD * jnp.asarray(s.embedding_scale, x_BxTxD.dtype)
        if s.max_positions:
            T = tokens_BxT.shape[1]
            if T > s.max_positions:
                raise ValueError(f"{T} positions are more than max_positions={s.max_positions}")
            # Position numbers for each example, so that a tap gives each example's own gradient.
            x_BxTxD += self.position_embedding(jnp.broadcast_to(jnp.arange(T), tokens_BxT.shape))
        x_BxTxD = sharding.constrain(x_BxTxD, "batch", None, None)

        def layer(x_BxTxD, block, *sight_of_layer):
            return block(x_BxTxD, *(sight_of_layer or (sight,)))

        if s.remat:
            layer = nnx.remat(layer)
        if s.scan:
            scanned = (layers, sight) if stacked else (layers,)
            axes = (nnx.Carry, *[0] * len(scanned))
            return nnx.scan(layer, in_axes=axes, out_axes=nnx.Carry)(x_BxTxD, *scanned)
        for i, block in enumerate(layers):
            sights = [jax.tree.map(lambda x, i=i: x[i], sight)] if stacked else []
            x_BxTxD = layer(x_BxTxD, block, *sights)
        return x_BxTxD

    def logits(self, hidden_BxTxD):
        """Applies the output matrix to hidden states: float32 [B, T, V]."""
        if self.settings.tied:
            with jax.default_matmul_precision("highest"):  # as all linear layers
                y_BxTxV = self.embedding.attend(hidden_BxTxD)
        else:
            y_BxTxV = self.head(hidden_BxTxD)
        y_BxTxV = y_BxTxV.astype(jnp.float32)
        soft_cap = self.settings.logit_soft_cap
        return y_BxTxV if soft_cap is None else soft_cap * jnp.tanh(y_BxTxV / soft_cap)

    def __call__(self, tokens_BxT):
        """Returns logits of the next token at each position: int32 [B, T] to float32 [B, T, V]."""
        return self.logits(self.hidden(tokens_BxT))


def abstract_decoder(settings: DecoderSettings) -> Decoder:
    """Returns a decoder with shapes and dtypes but no arrays.

    Initialising them would compile for seconds, and take 32 GB at 8B parameters.
    """
    stacked = dataclasses.replace(settings, scan=True)
    model = nnx.eval_shape(lambda: Decoder(stacked, rngs=nnx.Rngs(0)))
    if not settings.scan:
        # A list of layers is copied from one: jax needs a minute to trace 126 of them.
        block = nnx.eval_shape(lambda: Block(settings, nnx.Rngs(0)))
        model.layers = nnx.List([nnx.clone(block) for _ in range(settings.layers)])
        model.settings = settings
    return model


def is_as_built(model) -> bool:
    """Returns whether a model is a `Decoder` whose structure is the one that its settings build.

    Such a decoder calls each of its layers once, computes each product as the layer's class does,
    and treats each example by itself. None of that holds of a subclass or of a decoder whose parts
    were shared or replaced (`model.layers[1] = model.layers[0]`), whatever its class states.
    """
    if type(model) is not Decoder or type(model.settings) is not DecoderSettings:
        return False
    return nnx.graphdef(model) == _built_structure(model.settings)


@functools.lru_cache(maxsize=8)
def _built_structure(settings: DecoderSettings) -> nnx.GraphDef:
    """Returns the classes, static attributes and shared parts of a new decoder."""
    return nnx.graphdef(abstract_decoder(settings))
