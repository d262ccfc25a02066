"""Taps: where a model gives up its projected per-example gradients.

A tap is an array of zeros, k × k for every example, that a layer y = x W carries along. It adds
nothing to y; its cotangent, by `jax.custom_vjp`, is Aᵀ(Σ_t x_t δ_tᵀ)B = (xA)ᵀ(δB), the projection
of that example's weight gradient. So differentiating the summed loss with respect to the taps alone
gives the projected gradients of a whole batch in one backward pass, in which no weight gradient is
ever formed. A sum of R outer products in place of 1/√V puts R scaled copies side by side in A and
in B, as if there were R times as many positions.

A tap of positions is one zero for every example and position; its cotangent is x_tᵀKδ_t, that
position's part of ⟨K, G⟩.

Taps are put on a model from outside: the class of a module becomes a subclass that taps what the
known class in it gives. Paths and parameters stay what they were, and the model's own code runs
unchanged. A layer may carry several taps, of different corrections: what comes back to its output
is computed once for all. What taps do not see of a parameter's use, `tda.gradients.unseen` finds.
"""

import dataclasses

import jax
import jax.numpy as jnp
from flax import nnx

from tda.gradients import layers, sites
from tda.runtime import sharding

# Weight gradients that a device holds at once, in numbers (but one example's at least): 4 MiB, what
# a cache keeps until they are projected.
_AT_ONCE = 2**20


class Tap(nnx.Variable):
    """The zeros whose cotangent is asked for: [(L,) B, k, k], or [(L,) B, T] for positions."""


class Ends(nnx.Variable):
    """What a tap multiplies by."""


@dataclasses.dataclass(frozen=True)
class End:
    """What the tap of one site multiplies by. Axes are stacked as the site's are.

    Attributes:
        left: A, float32 [(L,) M, R·k]: R scaled copies side by side.
        right: B, float32 [(L,) N, R·k].
        side: k.
        scale: 1/√V of every weight, float32 [(L,) M, N], where it is exact.
        direction: for a tap of positions K = AWBᵀ; W, float32 [(L,) k, k].
        bases: Q_A and Q_S, float32 [(L,) M, M] and [(L,) N, N]: the gradient is turned to Q_AᵀGQ_S
            before it is scaled; A, B and the scale are in that basis then.
    """

    left: jax.Array
    right: jax.Array
    side: int
    scale: jax.Array | None = None
    direction: jax.Array | None = None
    bases: tuple[jax.Array, jax.Array] | None = None


class Tapping(nnx.Module):
    """One tap of a module, and what it multiplies by, as variables; fields are those of `End`."""

    def __init__(self, end: End, stack: tuple[int, ...], axes: tuple):
        one = (1, end.side, end.side) if end.direction is None else (1, 1)
        self.tap = Tap(jnp.zeros((*stack, *one)))
        self.left = Ends(end.left, axes=(axes[0], None))
        self.right = Ends(end.right, axes=(axes[1], None))
        self.scale = None if end.scale is None else Ends(end.scale, axes=axes)
        self.direction = None if end.direction is None else Ends(end.direction)
        left, right = (None, None) if end.bases is None else map(Ends, end.bases)
        self.left_basis, self.right_basis = left, right


def _f32(x):
    return x.astype(jnp.float32)


def _einsum(equation, *operands):
    # float32 operands are not rounded, as accelerators do unless told; sums are always float32.
    return jnp.einsum(equation, *operands, precision="highest", preferred_element_type=jnp.float32)


def _project(x_BxTxM, A_MxRP, side: int):
    """x A as float32 [B, T·R, k], with the product in the precision of x."""
    xA_BxTxRP = _einsum("btm,mp->btp", x_BxTxM, A_MxRP.astype(x_BxTxM.dtype))
    return xA_BxTxRP.reshape(x_BxTxM.shape[0], -1, side)


@jax.custom_vjp
def tap_factored(y_BxTxN, xA_BxSxP, tap_BxPxP, B_NxRP, scale_BxTxN=None):
    """`y`, whose cotangent δ reaches the tap as (xA)ᵀ(δB), or as (xA)ᵀ((δ ∘ scale)B).

    `xA` is the projected input.
    """
    del xA_BxSxP, tap_BxPxP, B_NxRP, scale_BxTxN
    return y_BxTxN


def _factored_forward(y, xA_BxSxP, tap, B_NxRP, scale_BxTxN):
    del tap
    return y, (xA_BxSxP, B_NxRP, scale_BxTxN)


def _factored_backward(kept, d_BxTxN):
    xA_BxSxP, B_NxRP, scale_BxTxN = kept
    scaled = d_BxTxN if scale_BxTxN is None else _f32(d_BxTxN) * scale_BxTxN
    dB_BxSxP = _project(scaled, B_NxRP, xA_BxSxP.shape[-1])
    return d_BxTxN, None, _einsum("bsp,bsq->bpq", xA_BxSxP, dB_BxSxP), None, None


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
    return d_BxTxN, None, _scaled_projections(*kept, d_BxTxN), None, None, None


def _scaled_projections(x_BxTxM, A_MxP, B_NxP, scale_MxN, d_BxTxN):
    """Aᵀ((Σ_t x_t δ_tᵀ) ∘ scale)B of every example: float32 [B, k, k]."""

    def some(examples):
        # A few examples' weight gradients at a time: the batch's would not fit.
        x_DxCxTxM, d_DxCxTxN = examples
        G_DxCxMxN = _einsum("dctm,dctn->dcmn", x_DxCxTxM, d_DxCxTxN) * scale_MxN
        return _einsum("dcmq,mp->dcpq", _einsum("dcmn,nq->dcmq", G_DxCxMxN, B_NxP), A_MxP)

    batch = x_BxTxM, d_BxTxN
    return sharding.map_in_portions(some, batch, scale_MxN.size, _AT_ONCE)


tap_exact.defvjp(_exact_forward, _exact_backward)


@jax.custom_vjp
def tap_turned(y_BxTxN, xQ_BxTxM, tap_BxPxP, A_MxP, B_NxP, scale_MxN, Q_NxN):
    """`y`, whose cotangent δ reaches the tap as Aᵀ((Σ_t (xQ)_t (δQ)_tᵀ) ∘ scale)B.

    `xQ` is the input in the basis of its factor.
    """
    del xQ_BxTxM, tap_BxPxP, A_MxP, B_NxP, scale_MxN, Q_NxN
    return y_BxTxN


def _turned_forward(y, xQ_BxTxM, tap, A_MxP, B_NxP, scale_MxN, Q_NxN):
    del tap
    return y, (xQ_BxTxM, A_MxP, B_NxP, scale_MxN, Q_NxN)


def _turned_backward(kept, d_BxTxN):
    *kept, Q_NxN = kept
    dQ_BxTxN = _einsum("btn,nm->btm", _f32(d_BxTxN), Q_NxN)
    return d_BxTxN, None, _scaled_projections(*kept, dQ_BxTxN), None, None, None, None


tap_turned.defvjp(_turned_forward, _turned_backward)


@jax.custom_vjp
def tap_positions(y_BxTxN, xK_BxSxP, tap_BxT, B_NxRP):
    """`y`, whose cotangent δ reaches the tap as Σ (xK) ∘ (δB) at every position.

    B is None where K already has the output's width.
    """
    del xK_BxSxP, tap_BxT, B_NxRP
    return y_BxTxN


def _positions_forward(y, xK_BxSxP, tap_BxT, B_NxRP):
    return y, (xK_BxSxP, B_NxRP, tap_BxT)


def _positions_backward(kept, d_BxTxN):
    xK_BxSxP, B_NxRP, tap_BxT = kept
    dB_BxSxP = _f32(d_BxTxN) if B_NxRP is None else _project(d_BxTxN, B_NxRP, xK_BxSxP.shape[-1])
    parts_BxS = jnp.sum(xK_BxSxP * dB_BxSxP, axis=-1)
    # The sequence is the first axis of positions; whatever else a layer has is added up.
    return d_BxTxN, None, jnp.sum(parts_BxS.reshape(*tap_BxT.shape, -1), axis=-1), None


tap_positions.defvjp(_positions_forward, _positions_backward)


def _tap_product(module, y_BxTxN, x_BxTxM, turned: bool = False):
    """Puts a module's taps on the product y = x W.

    `turned` where the weight's rows are the output's.
    """
    for tapping in module.taps:
        y_BxTxN = _tap_product_once(tapping, y_BxTxN, x_BxTxM, turned)
    return y_BxTxN


def _tap_product_once(tapping: Tapping, y_BxTxN, x_BxTxM, turned: bool):
    A, B, tap = tapping.left[...], tapping.right[...], tapping.tap[...]
    scale = None if tapping.scale is None else tapping.scale[...]
    direction = None if tapping.direction is None else tapping.direction[...]
    if turned:
        A, B = B, A
        scale = None if scale is None else scale.T
        direction = None if direction is None else direction.T
        tap = tap if direction is not None else jnp.swapaxes(tap, 1, 2)
    if x_BxTxM.shape[0] != tap.shape[0]:
        raise ValueError(
            f"a layer of shape {A.shape[0]} × {B.shape[0]} was called with {x_BxTxM.shape[0]} "
            f"inputs: their first axis must be the batch ({tap.shape[0]} examples)"
        )
    x_BxTxM = jax.lax.stop_gradient(x_BxTxM)
    if direction is not None:
        return _tap_positions_of(y_BxTxN, x_BxTxM, tap, A, B, scale, direction)
    if tapping.left_basis is not None:
        xQ_BxTxM = _einsum("btm,mn->btn", _f32(x_BxTxM), tapping.left_basis[...])
        return tap_turned(y_BxTxN, xQ_BxTxM, tap, A, B, scale, tapping.right_basis[...])
    if scale is not None:
        return tap_exact(y_BxTxN, x_BxTxM, tap, A, B, scale)
    # Kept for the backward pass: k numbers a position, not the layer's whole input.
    return tap_factored(y_BxTxN, _project(x_BxTxM, A, tap.shape[-1]), tap, B)


def _tap_positions_of(y, x_BxTxM, tap_BxT, A, B, scale, W_PxP):
    if x_BxTxM.shape[1] % tap_BxT.shape[1]:
        raise ValueError(
            f"a layer of shape {A.shape[0]} × {B.shape[0]} has {x_BxTxM.shape[1]} positions, not a "
            f"multiple of the sequence's {tap_BxT.shape[1]}; leave it out of the contributions"
        )
    if scale is not None:
        K_MxN = _einsum("mp,pq,nq->mn", A, W_PxP, B) * scale
        return tap_positions(y, _einsum("btm,mn->btn", _f32(x_BxTxM), K_MxN), tap_BxT, None)
    xAW_BxSxP = _einsum("bsp,pq->bsq", _project(x_BxTxM, A, W_PxP.shape[0]), W_PxP)
    return tap_positions(y, xAW_BxSxP, tap_BxT, B)


def _tapped_product(base: type) -> type:
    class Tapped(base):
        def __call__(self, inputs, *args, **kwargs):
            y = super().__call__(inputs, *args, **kwargs)
            known = layers.product(self)
            y_BxTxN, back = known.outputs(y)
            return back(_tap_product(self, y_BxTxN, known.inputs(inputs)))

    return Tapped


def _tapped_embed(base: type) -> type:
    table = layers.table(base)
    own_look_up, own_attend = (
        getattr(base, m) if m else None for m in (table.look_up, table.attend)
    )

    class Tapped(base):
        pass

    def look_up(self, inputs, *args, **kwargs):
        if base is nnx.Embed:
            return _tap_look_up(self, own_look_up(self, inputs, *args, **kwargs), inputs)
        # What the class does with its rows is its own affair: it is given a table of just these.
        rows = _tap_look_up(self, getattr(self, table.parameter)[...][inputs], inputs)
        graphdef, state = nnx.split(self)
        state[table.parameter] = state[table.parameter].replace(rows.reshape(-1, rows.shape[-1]))
        numbers = jnp.arange(inputs.size).reshape(inputs.shape)
        return own_look_up(nnx.merge(graphdef, state), numbers, *args, **kwargs)

    # The table's gradient is Σ_t δ_t q_tᵀ: input and output change places, so the tap turns.
    def attend(self, query, *args, **kwargs):
        y_BxTxV, back = layers.product(self).outputs(own_attend(self, query, *args, **kwargs))
        return back(_tap_product(self, y_BxTxV, layers.product(self).inputs(query), turned=True))

    setattr(Tapped, table.look_up, look_up)
    if table.attend:
        setattr(Tapped, table.attend, attend)
    return Tapped


def _tap_look_up(module, y, inputs):
    """Puts a module's taps on the rows `y` that `inputs` look up: a product with one-hot rows.

    So exact scales cost no weight gradient: each position has a row of its own.
    """
    y_BxTxN, back = layers.product(module).outputs(y)
    for tapping in module.taps:
        y_BxTxN = _tap_look_up_once(tapping, y_BxTxN, inputs)
    return back(y_BxTxN)


def _tap_look_up_once(tapping: Tapping, y_BxTxN, inputs):
    tap, B, scale_BxTxN = tapping.tap[...], tapping.right[...], None
    if tapping.scale is not None:
        scale_BxTxN = jnp.take(tapping.scale[...], inputs, axis=0).reshape(y_BxTxN.shape)
    side = (tap if tapping.direction is None else tapping.direction[...]).shape[-1]
    xA_BxTxRP = jnp.take(tapping.left[...], inputs, axis=0)
    xA_BxSxP = xA_BxTxRP.reshape(xA_BxTxRP.shape[0], -1, side)
    if tapping.direction is None:
        return tap_factored(y_BxTxN, xA_BxSxP, tap, B, scale_BxTxN)
    xAW_BxSxP = _einsum("bsp,pq->bsq", xA_BxSxP, tapping.direction[...])
    if scale_BxTxN is None:
        return tap_positions(y_BxTxN, xAW_BxSxP, tap, B)
    xK_BxTxN = _einsum("btq,nq->btn", xAW_BxSxP, B) * scale_BxTxN
    return tap_positions(y_BxTxN, xK_BxTxN, tap, None)


def _tapped(base: type) -> type:
    return _tapped_product(base) if layers.table(base) is None else _tapped_embed(base)


def _matrix_axes(variable, site: sites.Site) -> tuple:
    """Logical axes of a weight matrix's rows and columns, where the parameter states them."""
    stated = tuple(variable.get_metadata().get("axes") or ())
    return stated if len(stated) == 2 and site.order is None else (None, None)


def put_on(model: nnx.Module, ends: dict[sites.Site, tuple[End, ...]]) -> nnx.Module:
    """A copy of `model` whose sites carry taps; the copy shares the arrays.

    Args:
        model: any NNX model.
        ends: what each of a site's taps multiplies by.

    Returns:
        The model with variables of type `Tap` ([(L,) 1, k, k], or [(L,) 1, 1] for positions: one
        example of one position) and `Ends`, in a list `taps` of each module.

    Raises:
        ValueError: an embedding or a head has bases, or a site has bases and no scale.
    """
    every = [(s, end) for s, found in ends.items() for end in found]
    turned = [s.path for s, end in every if end.bases and s.group in ("embedding", "head")]
    if turned:
        raise ValueError(f"{', '.join(turned)}: tables of tokens cannot be turned to a basis")
    unscaled = [s.path for s, end in every if end.bases and end.scale is None]
    if unscaled:
        raise ValueError(f"{', '.join(unscaled)}: a gradient is turned to be scaled; give a scale")
    tapped = nnx.clone(model)
    modules = dict(nnx.iter_modules(tapped))
    for site, found in ends.items():
        module = modules[site.module]
        object.__setattr__(module, "__class__", layers.with_known(type(module), _tapped))
        stack = () if site.stack is None else (site.stack,)
        axes = _matrix_axes(getattr(module, site.parameter), site)
        module.taps = nnx.List([Tapping(end, stack, axes) for end in found])
    return tapped
