"""Taps: where a model gives up its projected per-example gradients.

A tap is an array of zeros, k × k for every example, that a layer y = x W carries along. It adds
nothing to y; its cotangent, by `jax.custom_vjp`, is Aᵀ(Σ_t x_t δ_tᵀ)B = (xA)ᵀ(δB), the projection
of that example's weight gradient. So differentiating the summed loss with respect to the taps alone
gives the projected gradients of a whole batch in one backward pass, in which no weight gradient is
ever formed.

Taps are put on a model from outside: the class of a module becomes a subclass that taps its output.
Paths and parameters stay what they were, and the model's own code runs unchanged.
"""

import functools

import jax
import jax.numpy as jnp
from flax import nnx

from tda.gradients import sites


class Tap(nnx.Variable):
    """The zeros whose cotangent is the projected gradient: [(L,) B, k, k]."""


class Ends(nnx.Variable):
    """What a tap multiplies by: A, B, and the scale of every weight where it is exact."""


def _f32(x):
    return x.astype(jnp.float32)


def _einsum(equation, *operands):
    return jnp.einsum(equation, *operands, preferred_element_type=jnp.float32)


@jax.custom_vjp
def tap_factored(y_BxTxN, xA_BxTxP, tap_BxPxP, B_NxP):
    """`y`, whose cotangent δ reaches the tap as (xA)ᵀ(δB); `xA` is the projected input."""
    del xA_BxTxP, tap_BxPxP, B_NxP
    return y_BxTxN


def _factored_forward(y, xA_BxTxP, tap, B_NxP):
    del tap
    return y, (xA_BxTxP, B_NxP)


def _factored_backward(kept, d_BxTxN):
    xA_BxTxP, B_NxP = kept
    dB_BxTxP = _einsum("btn,np->btp", _f32(d_BxTxN), B_NxP)
    return d_BxTxN, None, _einsum("btp,btq->bpq", xA_BxTxP, dB_BxTxP), None


tap_factored.defvjp(_factored_forward, _factored_backward)


@jax.custom_vjp
def tap_exact(y_BxTxN, x_BxTxM, tap_BxPxP, A_MxP, B_NxP, scale_MxN):
    """`y`, whose cotangent δ reaches the tap as Aᵀ((Σ_t x_t δ_tᵀ) ∘ scale)B."""
    del x_BxTxM, tap_BxPxP, A_MxP, B_NxP, scale_MxN
    return y_BxTxN


def _exact_forward(y, x_BxTxM, tap, A_MxP, B_NxP, scale_MxN):
    del tap
    return y, (x_BxTxM, A_MxP, B_NxP, scale_MxN)


def _exact_backward(kept, d_BxTxN):
    x_BxTxM, A_MxP, B_NxP, scale_MxN = kept

    def one(example):
        # One example's weight gradient at a time: the batch's would not fit.
        x_TxM, d_TxN = example
        G_MxN = _einsum("tm,tn->mn", _f32(x_TxM), _f32(d_TxN)) * scale_MxN
        return A_MxP.T @ (G_MxN @ B_NxP)

    return d_BxTxN, None, jax.lax.map(one, (x_BxTxM, d_BxTxN)), None, None, None


tap_exact.defvjp(_exact_forward, _exact_backward)


def _positions(x):
    """`x` with exactly one axis of positions between batch and features."""
    return x.reshape(x.shape[0], -1, x.shape[-1])


def _tap_output(module, y, x):
    """Taps the product y = x W of inputs [B, …, M] and outputs [B, …, N]."""
    A, B, tap = module.tap_left[...], module.tap_right[...], module.tap[...]
    if x.ndim < 2 or x.shape[0] != tap.shape[0]:
        raise ValueError(
            f"a layer of shape {A.shape[0]} × {B.shape[0]} was called with inputs {x.shape}: their "
            f"first axis must be the batch ({tap.shape[0]} examples)"
        )
    x_BxTxM, y_BxTxN = _positions(jax.lax.stop_gradient(x)), _positions(y)
    if module.tap_scale is not None:
        out = tap_exact(y_BxTxN, x_BxTxM, tap, A, B, module.tap_scale[...])
    else:
        # Kept for the backward pass: k numbers a position, not the layer's whole input.
        xA_BxTxP = _einsum("btm,mp->btp", _f32(x_BxTxM), A)
        out = tap_factored(y_BxTxN, xA_BxTxP, tap, B)
    return out.reshape(y.shape)


def _tapped_linear(kind: type) -> type:
    class Tapped(kind):
        def __call__(self, inputs, *args, **kwargs):
            return _tap_output(self, super().__call__(inputs, *args, **kwargs), inputs)

    return Tapped


def _tapped_embed(kind: type) -> type:
    class Tapped(kind):
        # A look-up is a product with one-hot rows.
        def __call__(self, inputs, *args, **kwargs):
            y = super().__call__(inputs, *args, **kwargs)
            if self.tap_scale is not None:
                hot = jax.nn.one_hot(inputs, self.num_embeddings, dtype=jnp.float32)
                return _tap_output(self, y, hot)
            xA_BxTxP = jnp.take(self.tap_left[...], inputs, axis=0)
            tap, B_DxP = self.tap[...], self.tap_right[...]
            return tap_factored(_positions(y), _positions(xA_BxTxP), tap, B_DxP).reshape(y.shape)

        # The table's gradient is Σ_t δ_t q_tᵀ: input and output change places, so the tap turns.
        def attend(self, query, *args, **kwargs):
            y = super().attend(query, *args, **kwargs)
            A_VxP, B_DxP = self.tap_left[...], self.tap_right[...]
            q_BxTxD, y_BxTxV = _positions(jax.lax.stop_gradient(query)), _positions(y)
            turned = jnp.swapaxes(self.tap[...], 1, 2)
            if self.tap_scale is not None:
                out = tap_exact(y_BxTxV, q_BxTxD, turned, B_DxP, A_VxP, self.tap_scale[...].T)
            else:
                qB_BxTxP = _einsum("btd,dp->btp", _f32(q_BxTxD), B_DxP)
                out = tap_factored(y_BxTxV, qB_BxTxP, turned, A_VxP)
            return out.reshape(y.shape)

    return Tapped


_TAPPED = {nnx.Linear: _tapped_linear, nnx.Embed: _tapped_embed}


@functools.cache
def _tapped_class(kind: type) -> type:
    make = next(make for base, make in _TAPPED.items() if issubclass(kind, base))
    tapped = make(kind)
    tapped.__name__ = tapped.__qualname__ = f"Tapped{kind.__name__}"
    return tapped


def put_on(model: nnx.Module, ends: dict[sites.Site, tuple]) -> nnx.Module:
    """A copy of `model` whose sites carry taps; the copy shares the arrays.

    Args:
        model: any NNX model.
        ends: for each site A, B and the exact scale or None, stacked as the site is.

    Returns:
        The model with variables of type `Tap` ([(L,) 1, k, k]: one example) and `Ends`.
    """
    tapped = nnx.clone(model)
    modules = dict(nnx.iter_modules(tapped))
    for site, (left, right, scale) in ends.items():
        module = modules[site.module]
        object.__setattr__(module, "__class__", _tapped_class(type(module)))
        stack = () if site.stack is None else (site.stack,)
        module.tap = Tap(jnp.zeros((*stack, 1, left.shape[-1], right.shape[-1])))
        module.tap_left, module.tap_right = Ends(left), Ends(right)
        module.tap_scale = None if scale is None else Ends(scale)
    return tapped
