"""Taps: how a layer yields the projected gradient of each example.

A tap is an array of zeros, k × k for every example, that a layer y = x W carries along. It adds
nothing to y, but its gradient is defined, by `jax.custom_vjp`, to be Aᵀ(Σ_t x_t δ_tᵀ)B = (xA)ᵀ(δB):
the projection of that example's weight gradient, where δ is the gradient of y. Differentiating the
summed loss with respect to the taps alone therefore gives the projected gradients of a whole batch
in one backward pass, in which no weight gradient is formed.

All kinds of taps have one shape: the identity on y, and a *rule* that makes the tap's gradient of δ
and of the forward pass's residuals (`identity_with_rule`). The rules:

- `_project_factored`: (xA)ᵀ(δB). A correction 1/√V that is a sum of R outer products puts R scaled
  copies side by side in A and in B, as if there were R times as many positions.
- `_project_scaled`: Aᵀ(G ∘ 1/√V)B for an exact 1/√V, which needs G = Σ_t x_t δ_tᵀ itself.
- `_project_rotated`: the same in other bases (EK-FAC's eigenvectors).
- `_split_over_positions`: the part of each position in an inner product ⟨K, G⟩, x_tᵀKδ_t. Such a
  tap is one zero per example and position.

Taps are put on a model from outside (`put_on`): the class of a module becomes a subclass that taps
the output of the known class in it (`tda.gradients.layers.wrap_calls`). Paths, parameters and the
model's own code stay unchanged. A layer may carry several taps, of different corrections.
`tda.gradients.unseen` finds uses of a parameter that its tap does not see.
"""

import dataclasses
import functools
from collections.abc import Callable, Iterable, Mapping

import jax
import jax.numpy as jnp
from flax import nnx
from jax.sharding import AxisType, PartitionSpec

from tda.gradients import layers, unseen
from tda.gradients.sites import Site, module_at
from tda.runtime import sharding

# Numbers of weight gradients that a device holds at once (at least one example's): on CPUs 4 MiB of
# float32, which stay in a cache until they are projected; elsewhere 256 MiB, since every portion
# launches small kernels for each layer.
_AT_ONCE, _AT_ONCE_ACCELERATED = 2**20, 2**26


class Zeros(nnx.Variable):
    """The zeros that are differentiated: [(L,) B, k, k], or [(L,) B, T] for a tap of positions."""


@dataclasses.dataclass(frozen=True)
class Tap:
    """The matrices of one tap of one site. Axes are stacked as the site's are.

    Attributes:
        left: A, float32 [(L,) M, R·k]: R scaled copies side by side.
        right: B, float32 [(L,) N, R·k].
        side: k.
        scale: 1/√V of every weight, float32 [(L,) M, N], where it is exact.
        direction: W of a tap of positions, K = AWBᵀ: float32 [(L,) k, k].
        bases: Q_A and Q_S, float32 [(L,) M, M] and [(L,) N, N]: the gradient is rotated to Q_AᵀGQ_S
            before it is scaled, and A, B and the scale are in that basis. Only with a scale, and
            never for a table of tokens (`tda.gradients.kronecker.factored`).
    """

    left: jax.Array
    right: jax.Array
    side: int
    scale: jax.Array | None = None
    direction: jax.Array | None = None
    bases: tuple[jax.Array, jax.Array] | None = None


def put_on(model: nnx.Module, taps: Mapping[Site, tuple[Tap, ...]]) -> nnx.Module:
    """Returns a copy of `model` whose sites carry taps; the copy shares the arrays.

    Args:
        model: any NNX model.
        taps: the taps of each site.

    Returns:
        The model with a list `tda_taps` in each module, of dicts of variables: "zeros" of type
        `Zeros` ([(L,) 1, k, k], or [(L,) 1, 1] for positions: one example of one position), and the
        arrays of `Tap`. The prefix sets it apart from a layer's own attributes.
    """
    tapped = nnx.clone(model)
    modules = dict(nnx.iter_modules(tapped))
    for site, of_site in taps.items():
        module = modules[site.module]
        layers.wrap_calls(module, _tap_call)
        axes = _matrix_axes(getattr(module, site.parameter), site)
        module.tda_taps = nnx.List([nnx.Dict(_variables(tap, site, axes)) for tap in of_site])
    return tapped


def _matrix_axes(variable, site: Site) -> tuple:
    """Returns the logical axes of rows and columns; None where the parameter does not tell."""
    stated = tuple(variable.get_metadata().get("axes") or ())
    return stated if len(stated) == 2 and site.order is None else (None, None)


def _variables(tap: Tap, site: Site, axes: tuple) -> dict[str, nnx.Variable]:
    """Returns a tap's variables, A and B with the parameter's layout on a mesh."""
    shape = (1, tap.side, tap.side) if tap.direction is None else (1, 1)
    variables = {
        "zeros": Zeros(jnp.zeros((*site.stack_shape, *shape))),
        "left": nnx.Variable(tap.left, axes=(axes[0], None)),
        "right": nnx.Variable(tap.right, axes=(axes[1], None)),
    }
    if tap.scale is not None:
        variables["scale"] = nnx.Variable(tap.scale, axes=axes)
    if tap.direction is not None:
        variables["direction"] = nnx.Variable(tap.direction)
    if tap.bases is not None:
        left_basis, right_basis = map(nnx.Variable, tap.bases)
        variables |= {"left_basis": left_basis, "right_basis": right_basis}
    return variables


def _carried_taps(layer: nnx.Module, inputs) -> list[tuple[jax.Array, Tap]]:
    """Returns the zeros and the matrices of each tap of a layer, or of one layer of a stack.

    Raises:
        ValueError: the first axis of the layer's inputs is not the batch.
    """
    carried = []
    for variables in layer.tda_taps:
        arrays = {name: variable[...] for name, variable in variables.items()}
        zeros = arrays.pop("zeros")
        bases = arrays.pop("left_basis", None), arrays.pop("right_basis", None)
        direction = arrays.get("direction")
        side = (zeros if direction is None else direction).shape[-1]
        tap = Tap(**arrays, side=side, bases=None if bases[0] is None else bases)
        _check_batch(zeros, tap, inputs)
        carried.append((zeros, tap))
    return carried


def _check_batch(zeros, tap: Tap, inputs) -> None:
    """Checks the batch axis, for what `tda.gradients.unseen` cannot tell by its length."""
    M, N = tap.left.shape[-2], tap.right.shape[-2]
    if zeros.ndim != (3 if tap.direction is None else 2):
        raise ValueError(
            f"a layer of shape {M} × {N} got the taps of its whole stack, {zeros.shape}: scan or "
            "map over all variables of the stack, not over its parameters alone"
        )
    if inputs.shape[0] != zeros.shape[0]:
        raise ValueError(
            f"a layer of shape {M} × {N} was called with {inputs.shape[0]} inputs: their first "
            f"axis must be the batch ({zeros.shape[0]} examples)"
        )


def without_taps(model: nnx.Module, sites: Iterable[Site]) -> nnx.Module:
    """Takes the taps off some sites of a model from `put_on`, in place, and returns the model."""
    modules = dict(nnx.iter_modules(model))
    for site in sites:
        modules[site.module].tda_taps = nnx.List([])
    return model


def zeros_for(templates: dict, batch) -> dict:
    """Returns zeros for every example of a batch, given templates [(L,) 1, k, k].

    Where the type of an array says how devices share it (axes of a mesh that are `Explicit`, or
    `Manual` inside `jax.shard_map`), the zeros are shared as the batch's examples are: a tap's
    gradient is made of theirs, and must be of the type of the zeros.
    """
    zeros_B = _shared_zeros(batch)

    def zeros(template):
        *stack, _, p, q = template.shape
        return jnp.broadcast_to(zeros_B[:, None, None], (*stack, len(zeros_B), p, q))

    return jax.tree.map(zeros, templates)


def _shared_zeros(batch) -> jax.Array:
    """Returns a zero for each example of a batch: float32 [B]."""
    zeros_B = jnp.zeros(unseen.count_examples(batch), jnp.float32)
    for x in jax.tree.leaves(batch):
        if isinstance(x, jax.Array) and not jnp.issubdtype(x.dtype, jax.dtypes.extended):
            if any(kind != AxisType.Auto for kind in jax.typeof(x).sharding.mesh.axis_types):
                # Adding one array's zeros shares the sum as that array is, in any version of jax.
                zeros = jnp.zeros_like(x, jnp.float32)
                zeros_B += jnp.sum(zeros, axis=tuple(range(1, x.ndim)))
    return zeros_B


def cotangents_at(cotangents: dict, site: Site) -> list:
    """Returns the gradients of a site's taps."""
    of_site = module_at(cotangents, site)["tda_taps"]
    return [of_site[i]["zeros"] for i in range(len(of_site))]


def matrices_at(variables: dict, site: Site) -> tuple:
    """Returns A, B and the scale (or None) of each of a site's taps."""
    of_site = module_at(variables, site)["tda_taps"]
    each = (of_site[i] for i in range(len(of_site)))
    return tuple((tap["left"], tap["right"], tap.get("scale")) for tap in each)


def identity_with_rule(rule: Callable) -> Callable:
    """Makes a function of (y, zeros, *residuals) that returns y and gives `zeros` a gradient.

    In the backward pass y passes its cotangent δ on unchanged, `zeros` gets the cotangent
    `rule(δ, *residuals)`, and the residuals get none.

    Args:
        rule: returns arrays of the shapes of `zeros`, which may be a tuple.
    """

    @jax.custom_vjp
    def identity(y, zeros, *residuals):
        del zeros, residuals
        return y

    def forward(y, zeros, *residuals):
        del zeros
        return y, residuals

    def backward(residuals, d):
        return d, rule(d, *residuals), *(None for _ in residuals)

    identity.defvjp(forward, backward)
    return identity


def _f32(x):
    return x.astype(jnp.float32)


def _einsum(equation, *operands):
    # Accelerators round float32 operands (to bfloat16 or TF32) unless told not to, which is coarser
    # than what scores differ by. Sums are float32 whatever the operands are.
    return jnp.einsum(equation, *operands, precision="highest", preferred_element_type=jnp.float32)


def _project(x_BxTxM, A_MxRP, side: int):
    """Returns x A: float32 [B, T·R, k], multiplied in bfloat16 or float64 if x is, else in float32.

    float16 ends at 65,504 and is coarse below 6e-5: A with a scale 1/√V in it leaves that range at
    both ends, and integers have none of it. bfloat16 has the range of float32.
    """
    if x_BxTxM.dtype not in (jnp.bfloat16, jnp.float64):
        x_BxTxM = _f32(x_BxTxM)
    xA_BxTxRP = _einsum("btm,mp->btp", x_BxTxM, A_MxRP.astype(x_BxTxM.dtype))
    return sharding.reshape_examples(xA_BxTxRP, x_BxTxM.shape[0], -1, side)


def _project_factored(d_BxTxN, xA_BxSxP, B_NxRP, scale_BxTxN=None):
    """Returns (xA)ᵀ(δB), or (xA)ᵀ((δ ∘ scale)B): float32 [B, k, k]."""
    scaled = d_BxTxN if scale_BxTxN is None else _f32(d_BxTxN) * scale_BxTxN
    dB_BxSxP = _project(scaled, B_NxRP, xA_BxSxP.shape[-1])
    return _einsum("bsp,bsq->bpq", xA_BxSxP, dB_BxSxP)


def _project_scaled(d_BxTxN, x_BxTxM, A_MxP, B_NxP, scale_MxN):
    """Returns Aᵀ((Σ_t x_t δ_tᵀ) ∘ scale)B: float32 [B, k, k]."""

    def project(examples):
        # A few examples' weight gradients at a time: the batch's would not fit.
        x_DxCxTxM, d_DxCxTxN = examples
        G_DxCxMxN = _einsum("dctm,dctn->dcmn", x_DxCxTxM, d_DxCxTxN) * scale_MxN
        return _einsum("dcmq,mp->dcpq", _einsum("dcmn,nq->dcmq", G_DxCxMxN, B_NxP), A_MxP)

    limit = _AT_ONCE_ACCELERATED if sharding.is_accelerated() else _AT_ONCE
    return sharding.map_in_portions(project, (x_BxTxM, d_BxTxN), scale_MxN.size, limit)


def _project_rotated(d_BxTxN, xQ_BxTxM, A_MxP, B_NxP, scale_MxN, Q_NxN):
    """Returns Aᵀ((Σ_t (xQ)_t (δQ)_tᵀ) ∘ scale)B: float32 [B, k, k]."""
    dQ_BxTxN = _einsum("btn,nm->btm", _f32(d_BxTxN), Q_NxN)
    return _project_scaled(dQ_BxTxN, xQ_BxTxM, A_MxP, B_NxP, scale_MxN)


def _split_over_positions(d_BxTxN, xK_BxTxSxP, B_NxRP):
    """Returns Σ (xK) ∘ (δB) at every position: float32 [B, T].

    S counts a layer's axes other than the sequence, and the R copies; they are summed. B is None
    where K already has the output's width.
    """
    *shape, _, side = xK_BxTxSxP.shape
    dB = _f32(d_BxTxN) if B_NxRP is None else _project(d_BxTxN, B_NxRP, side)
    parts = jnp.sum(xK_BxTxSxP * dB.reshape(xK_BxTxSxP.shape), axis=-1)
    return jnp.sum(parts.reshape(*shape, -1), axis=-1)


_tap_factored = identity_with_rule(_project_factored)
_tap_scaled = identity_with_rule(_project_scaled)
_tap_rotated = identity_with_rule(_project_rotated)
_tap_positions = identity_with_rule(_split_over_positions)


def _tap_call(layer, use: str, call, inputs):
    """Calls a layer and taps its output (`tda.gradients.layers.wrap_calls`)."""
    if not layer.tda_taps:
        return call(layer, inputs)
    if use == "look_up":
        return layers.change_rows(layer, call, inputs, lambda y: _tap_rows(layer, y, inputs))
    # A tied head multiplies by the table's transpose: input and output change places.
    transposed = use == "attend"
    return layers.change_product(
        layer, call, inputs, lambda y, x: _tap_product(layer, y, x, transposed)
    )


def _tap_product(layer, y_BxTxN, x_BxTxM, transposed: bool):
    """Puts a layer's taps on the product y = x W, or y = x Wᵀ if `transposed`."""
    x_BxTxM = jax.lax.stop_gradient(x_BxTxM)
    for zeros, tap in _carried_taps(layer, x_BxTxM):
        if transposed:
            # The gradient of y = x Wᵀ with respect to W is Σ_t δ_t x_tᵀ, the transpose of what the
            # rules project. So A and B change places, and the projection is transposed back.
            zeros = zeros if tap.direction is not None else jnp.swapaxes(zeros, 1, 2)
            tap = _transpose(tap)
        y_BxTxN = _tap_one_product(zeros, tap, y_BxTxN, x_BxTxM)
    return y_BxTxN


def _transpose(tap: Tap) -> Tap:
    scale, direction = (None if x is None else x.T for x in (tap.scale, tap.direction))
    return Tap(tap.right, tap.left, tap.side, scale, direction, tap.bases)


def _tap_one_product(zeros, tap: Tap, y_BxTxN, x_BxTxM):
    A, B, scale = tap.left, tap.right, tap.scale
    if tap.direction is not None:
        return _tap_product_positions(zeros, tap, y_BxTxN, x_BxTxM)
    if tap.bases is not None:
        xQ_BxTxM = _einsum("btm,mn->btn", _f32(x_BxTxM), tap.bases[0])
        return _tap_rotated(y_BxTxN, zeros, xQ_BxTxM, A, B, scale, tap.bases[1])
    if scale is not None:
        return _tap_scaled(y_BxTxN, zeros, x_BxTxM, A, B, scale)
    # Only k numbers a position are kept for the backward pass, not the layer's whole input.
    return _tap_factored(y_BxTxN, zeros, _project(x_BxTxM, A, tap.side), B)


def _tap_product_positions(zeros_BxT, tap: Tap, y_BxTxN, x_BxTxM):
    A, B, W = tap.left, tap.right, tap.direction
    if x_BxTxM.shape[1] % zeros_BxT.shape[1]:
        raise ValueError(
            f"a layer of shape {A.shape[0]} × {B.shape[0]} has {x_BxTxM.shape[1]} positions, not a "
            f"multiple of the sequence's {zeros_BxT.shape[1]}; leave it out of the contributions"
        )
    if tap.scale is not None:
        K_MxN = _einsum("mp,pq,nq->mn", A, W, B) * tap.scale
        xK_BxTxN = _einsum("btm,mn->btn", _f32(x_BxTxM), K_MxN)
        return _tap_positions(y_BxTxN, zeros_BxT, _by_position(xK_BxTxN, zeros_BxT), None)
    xAW_BxSxP = _einsum("bsp,pq->bsq", _project(x_BxTxM, A, tap.side), W)
    return _tap_positions(y_BxTxN, zeros_BxT, _by_position(xAW_BxSxP, zeros_BxT), B)


def _by_position(x_BxSxP, zeros_BxT):
    """Returns [B, S, k] as [B, T, S/T, k]: T is the first of a layer's axes of positions."""
    return x_BxSxP.reshape(*zeros_BxT.shape, -1, x_BxSxP.shape[-1])


def _tap_rows(layer, y_BxTxN, inputs):
    """Puts a layer's taps on looked-up rows: the product of one-hot rows with the table.

    So exact scales need no weight gradient: each position has a row of its own.
    """
    for zeros, tap in _carried_taps(layer, inputs):
        y_BxTxN = _tap_rows_once(zeros, tap, y_BxTxN, inputs)
    return y_BxTxN


def _tap_rows_once(zeros, tap: Tap, y_BxTxN, inputs):
    B, scale_BxTxN = tap.right, None
    look_up = functools.partial(_look_up, indices_BxT=inputs)
    if tap.scale is not None:
        scale_BxTxN = sharding.reshape_examples(look_up(tap.scale), *y_BxTxN.shape)
    xA_BxTxRP = look_up(tap.left)
    xA_BxSxP = sharding.reshape_examples(xA_BxTxRP, len(xA_BxTxRP), -1, tap.side)
    if tap.direction is None:
        return _tap_factored(y_BxTxN, zeros, xA_BxSxP, B, scale_BxTxN)
    xAW_BxSxP = _einsum("bsp,pq->bsq", xA_BxSxP, tap.direction)
    if scale_BxTxN is None:
        return _tap_positions(y_BxTxN, zeros, _by_position(xAW_BxSxP, zeros), B)
    xK_BxTxN = _einsum("btq,nq->btn", xAW_BxSxP, B) * scale_BxTxN
    return _tap_positions(y_BxTxN, zeros, _by_position(xK_BxTxN, zeros), None)


def _look_up(table, indices_BxT):
    """Returns rows of a table; 0 for a number beyond it (of padding, say), which has no row."""
    spec = sharding.explicit_spec(indices_BxT)
    layout = None if spec is None else PartitionSpec(*spec, *[None] * (table.ndim - 1))
    return table.at[indices_BxT].get(mode="fill", fill_value=0, out_sharding=layout)
