"""The encoder: projected per-example gradients of a batch in one backward pass."""

import dataclasses
from collections.abc import Callable

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from tda.gradients import projection as projections
from tda.gradients import sites, taps, together
from tda.gradients.moments.second_moments import Scale
from tda.gradients.sites import find_sites


@dataclasses.dataclass(frozen=True)
class Encoder:
    """Encodes batches with one set of parameters.

    Attributes:
        layout: which matrices are pooled into which block.
        chosen: the sites whose gradients are taken.
        arrays: what `compiled` takes first: parameters and projections.
        axes: logical axes of the variables among them, by path name.
        compiled: the jitted function of (arrays, batch, scored=None).
    """

    layout: projections.Layout
    chosen: tuple[sites.Site, ...]
    arrays: tuple
    axes: dict[str, tuple]
    compiled: Callable

    @property
    def layouts(self) -> tuple[projections.Layout, ...]:
        """Of the one kind of gradients; see `tda.gradients.together.Together`."""
        return (self.layout,)

    def all(self, batch: dict, scored: int | None = None) -> tuple[jax.Array, ...]:
        """Encodings of the one kind; see `tda.gradients.together.Together`."""
        return (self(batch, scored),)

    def __call__(self, batch: dict, scored: int | None = None) -> jax.Array:
        """Encodings of a batch {"tokens", "targets", "weights"}, each [B, T]: float32 [B, E].

        Args:
            batch: the batch; compiled once for every shape.
            scored: positions that logits are computed at, from `scored_positions`; None for all.
        """
        return self.compiled(self.arrays, batch, scored)


def scored_positions(weights_BxT: np.ndarray) -> int | None:
    """The most positions that an example scores, as a power of two; None if that spares nothing."""
    most = int(np.count_nonzero(weights_BxT, axis=1).max(initial=1))
    rounded = 1 << (max(1, most) - 1).bit_length()
    return rounded if rounded <= weights_BxT.shape[1] // 2 else None


def ends_of(
    chosen: list[sites.Site], projection: projections.Projection, scales: dict[str, Scale] | None
) -> dict[sites.Site, taps.End]:
    """What the tap of every site multiplies by, outer products of scales folded into A and B."""
    ends = {}
    for site in chosen:
        left, right = map(jnp.asarray, projections.matrices(site, projection))
        scale = scales[site.path] if scales else None
        if scale is not None and scale.full is None:
            left, right = _copies(left, scale.left), _copies(right, scale.right)
        full = None if scale is None else scale.full
        ends[site] = taps.End(left, right, projection.side, full)
    return ends


def _copies(matrix, scales):
    """A scaled by each of R rows: [(L,) M, R·k] of [(L,) M, k] and [(L,) R, M]."""
    copies = jnp.swapaxes(scales, -1, -2)[..., None] * matrix[..., None, :]
    return copies.reshape(*matrix.shape[:-1], -1)


def make_encoder(
    model: nnx.Module,
    projection: projections.Projection,
    scales: dict[str, Scale] | None = None,
    output: str | Callable = "loss",
    include: str | None = None,
    exclude: str | None = None,
    untapped: str = "leave",
    mesh: jax.sharding.Mesh | None = None,
) -> Encoder:
    """An encoder of P·(∇L/√V) (Chang et al. 2024, eq. 3).

    Args:
        model: an NNX model that maps tokens [B, T] to logits [B, T, V].
        projection: P.
        scales: 1/√V by path of parameter (`tda.gradients.moments.second_moments`); None for no
            correction.
        output: the function L that is differentiated: "loss", "margin" or "logit" of the model's
            logits; or a function of (model, batch) to float32 [B], for a model that is called in
            another way.
        include, exclude: regular expressions on parameters' path names (`tda.gradients.sites`).
        untapped: what becomes of chosen parameters that no tap can be put on: "leave", "reference"
            (the gradient of each example is formed whole; also where a tap turns out to miss a part
            of it) or "error".
        mesh: where given, projections and scales are laid out on it as the parameters they belong
            to, by their logical axes; else they are replicated.

    Raises:
        ValueError: nothing is included, or `projection` does not fit the model; with a batch, if
            taps miss a part of a gradient (`tda.gradients.unseen`), unless `untapped` allows it.
        KeyError: `scales` lacks a parameter.
    """
    chosen = find_sites(model, include, exclude, untapped)
    ends = ends_of(chosen, projection, scales)
    return build(model, chosen, projection, ends, output, mesh)


def build(
    model: nnx.Module,
    chosen: list[sites.Site],
    projection: projections.Projection,
    ends: dict[sites.Site, taps.End],
    output: str | Callable = "loss",
    mesh: jax.sharding.Mesh | None = None,
) -> Encoder:
    """The encoder of given sites and ends; without a mesh its arrays may be abstract (shapes)."""
    taken = together.take(model, [together.Part(chosen, projection, ends)], output)

    def alone(arrays, batch, scored=None):
        return taken.encode(arrays, batch, scored)[0]

    compiled = jax.jit(alone, static_argnums=2)
    found = Encoder(taken.layouts[0], tuple(chosen), taken.arrays, taken.axes, compiled)
    return found if mesh is None else dataclasses.replace(found, arrays=together.place(found, mesh))
