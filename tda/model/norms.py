"""Norms of the decoder: RMSNorm and LayerNorm, with statistics in float32."""

import jax
import jax.numpy as jnp
from flax import nnx

from tda.model.settings import DecoderSettings


def recomputed(f):
    """Returns `f` such that the backward pass runs it again instead of storing its results.

    For cheap functions, whose results would take longer to write and read than to compute.
    """
    # The barriers that keep XLA from merging both runs would also prevent fusion.
    return jax.checkpoint(f, prevent_cse=False)


class Norm(nnx.RMSNorm):
    """RMSNorm (Zhang & Sennrich 2019, eq. 4), with statistics in float32.

    Attributes:
        offset: added to the scale; 1 where the scale is stored as its distance from 1.
    """

    offset = 0.0

    def __call__(self, x_BxTxD):
        """Divides each position's features by their root mean square: [B, T, D] to the same."""

        @recomputed
        def normalise(x_BxTxD, scale_D):
            x_BxTxD = x_BxTxD.astype(jnp.float32)
            mean_BxTx1 = jnp.mean(jnp.square(x_BxTxD), axis=-1, keepdims=True)
            scale_D = scale_D.astype(jnp.float32) + self.offset if self.offset else scale_D
            y_BxTxD = x_BxTxD * jax.lax.rsqrt(mean_BxTx1 + self.epsilon) * scale_D
            return y_BxTxD.astype(self.dtype)

        return normalise(x_BxTxD, self.scale[...])


class LayerNorm(nnx.LayerNorm):
    """LayerNorm (Ba et al. 2016, eq. 4) with scale and bias or neither; statistics in float32."""

    def __call__(self, x_BxTxD):
        """Centres each position's features and divides by their deviation: [B, T, D] to same."""

        @recomputed
        def normalise(x_BxTxD, scale_D=1.0, bias_D=0.0):
            x_BxTxD = x_BxTxD.astype(jnp.float32)
            x_BxTxD = x_BxTxD - jnp.mean(x_BxTxD, axis=-1, keepdims=True)
            variance_BxTx1 = jnp.mean(jnp.square(x_BxTxD), axis=-1, keepdims=True)
            y_BxTxD = x_BxTxD * jax.lax.rsqrt(variance_BxTx1 + self.epsilon) * scale_D + bias_D
            return y_BxTxD.astype(self.dtype)

        parameters = (self.scale[...], self.bias[...]) if self.use_scale else ()
        return normalise(x_BxTxD, *parameters)


def make_norm(settings: DecoderSettings, width: int, rngs: nnx.Rngs) -> Norm | LayerNorm:
    """Returns the settings' norm over `width` features, which starts as a scale of one."""
    arguments = dict(
        epsilon=settings.norm_eps,
        dtype=jnp.dtype(settings.dtype),
        param_dtype=jnp.dtype(settings.param_dtype),
        rngs=rngs,
    )
    if settings.norm != "rms":
        has_parameters = settings.norm == "layer"
        return LayerNorm(width, use_scale=has_parameters, use_bias=has_parameters, **arguments)
    if not settings.norm_offset:
        return Norm(width, **arguments)
    start = nnx.initializers.constant(1.0 - settings.norm_offset)
    norm = Norm(width, scale_init=start, **arguments)
    norm.offset = settings.norm_offset
    return norm
