"""Norms of the decoder: RMSNorm and LayerNorm, their statistics in float32."""

import jax
import jax.numpy as jnp
from flax import nnx

KINDS = ("rms", "layer")


def recomputed(f):
    """`f`, of whose results the backward pass keeps none: it runs `f` again on the arguments.

    For what is cheap: writing and reading its results would take longer.
    """
    return jax.checkpoint(f, prevent_cse=False)


class Norm(nnx.RMSNorm):
    """RMSNorm (Zhang & Sennrich 2019, eq. 4), its statistics in float32.

    Attributes:
        offset: what is added to the scale; 1 where the scale is kept as its distance from 1.
    """

    offset = 0.0

    def __call__(self, x_BxTxD):
        """Divides each position's features by their root mean square: [B, T, D] to the same."""

        @recomputed
        def normalised(x_BxTxD, scale_D):
            x_BxTxD = x_BxTxD.astype(jnp.float32)
            mean_BxTx1 = jnp.mean(jnp.square(x_BxTxD), axis=-1, keepdims=True)
            scale_D = scale_D.astype(jnp.float32) + self.offset if self.offset else scale_D
            y_BxTxD = x_BxTxD * jax.lax.rsqrt(mean_BxTx1 + self.epsilon) * scale_D
            return y_BxTxD.astype(self.dtype)

        return normalised(x_BxTxD, self.scale[...])


class LayerNorm(nnx.LayerNorm):
    """LayerNorm with scale and bias (Ba et al. 2016, eq. 4), its statistics in float32."""

    def __call__(self, x_BxTxD):
        """Centres each position's features and divides by their deviation: [B, T, D] to same."""

        @recomputed
        def normalised(x_BxTxD, scale_D, bias_D):
            x_BxTxD = x_BxTxD.astype(jnp.float32)
            x_BxTxD = x_BxTxD - jnp.mean(x_BxTxD, axis=-1, keepdims=True)
            variance_BxTx1 = jnp.mean(jnp.square(x_BxTxD), axis=-1, keepdims=True)
            y_BxTxD = x_BxTxD * jax.lax.rsqrt(variance_BxTx1 + self.epsilon) * scale_D + bias_D
            return y_BxTxD.astype(self.dtype)

        return normalised(x_BxTxD, self.scale[...], self.bias[...])


def make_norm(kind: str, width: int, *, eps: float, offset: float = 0.0, **kinds):
    """A norm of the kind "rms" or "layer" over `width` features; it starts as a scale of one."""
    if kind == "layer":
        return LayerNorm(width, epsilon=eps, **kinds)
    if not offset:
        return Norm(width, epsilon=eps, **kinds)
    norm = Norm(width, epsilon=eps, scale_init=nnx.initializers.constant(1.0 - offset), **kinds)
    norm.offset = offset
    return norm
