"""The encoder: projected per-example gradients of a batch in one backward pass.

The gradient of a layer y = x W is G = Σ_t x_t δ_tᵀ, δ being the gradient of y. An encoding needs
only its projection AᵀGB = (xA)ᵀ(δB), k × k numbers, and these are computed without G. So every
layer gets a *tap* (`tda.gradients.taps`): zeros of shape k × k for each example, whose gradient is
defined to be that projection. The summed loss of a batch is differentiated with respect to the taps
alone. One backward pass then gives the projections of all examples and layers, and XLA computes no
gradient of a weight: 4N operations a token for N weights, where a training step takes 6N.

Kinds of gradients that differ in correction, sites or projection share that pass: each kind has its
own taps, and the gradient of each layer's output is computed once for all of them.

Where a parameter has no tap (a norm, a bias, a layer of an unknown class), or its tap misses a part
of its gradient (`tda.gradients.unseen`), each example's full gradient is formed and projected, if
the caller allows that with untapped="reference".
"""

import dataclasses
from collections.abc import Callable, Sequence
from typing import Literal

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from tda import loss as losses
from tda.gradients import program as programs
from tda.gradients import projection as projections
from tda.gradients import taps, unseen
from tda.gradients.batch_mates import MatesCheck
from tda.gradients.first_batch import FirstBatch, TapsCheck
from tda.gradients.moments.scales import Scale, check_scales
from tda.gradients.projection import Layout, Projection
from tda.gradients.sites import Site, find_sites, has_numbered_layers, tell_coverage
from tda.gradients.taps import Tap
from tda.model import functional
from tda.model.decoder import is_as_built
from tda.runtime import sharding
from tda.store import Form, codec

# One kind of gradients: the projection, and the tap of every site.
Kind = tuple[Projection, dict[Site, Tap]]


@dataclasses.dataclass(frozen=True)
class Encoder:
    """Encodes batches into gradients of one kind, or of several, with one set of parameters.

    Attributes:
        layouts: for each kind, which matrices are pooled into which block of its encodings.
        arrays: the first argument of `compiled`: variables of the model and of its taps by path,
            and the matrices of the parameters without taps.
        axes: logical axes of the variables, by path name.
        compiled: the jitted function of (arrays, batch, scored=None, forms=None), which returns a
            tuple of rows, one for each kind; see `encode_all`.
        first_batch: checks the first batch's gradients; None for models known to be right.
    """

    layouts: tuple[Layout, ...]
    arrays: tuple
    axes: dict[str, tuple]
    compiled: Callable
    first_batch: FirstBatch | None = None

    @property
    def layout(self) -> Layout:
        """The layout of the only kind."""
        (layout,) = self.layouts
        return layout

    def __call__(self, batch: dict, scored: int | None = None) -> jax.Array:
        """Encodes a batch into gradients of the only kind: float32 [B, E].

        Args:
            batch: {"tokens", "targets", "weights"}, each [B, T]; compiled once for every shape.
            scored: number of positions that logits are computed at, from `scored_positions`; None
                for all.
        """
        (encoding_BxE,) = self.encode_all(batch, scored)
        return encoding_BxE

    def encode_all(
        self, batch: dict, scored: int | None = None, forms: tuple[Form, ...] | None = None
    ) -> tuple[jax.Array, ...]:
        """Encodes a batch into gradients of every kind.

        Args:
            batch, scored: see `__call__`.
            forms: how each kind is stored, to be computed by the same program; None for float32.

        Returns:
            For each kind float32 [B, E], or rows as stored, [B, columns].
        """
        if self.first_batch is None:
            return self.compiled(self.arrays, batch, scored, forms)

        def encode(batch: dict) -> tuple[jax.Array, ...]:
            return self.compiled(self.arrays, batch, scored, None)

        # Checked in float32: a separate program converts the rows to their form.
        if self.first_batch.successor is None:
            encodings = self.first_batch.encode(encode, batch)
        if self.first_batch.successor is not None:
            return self.first_batch.successor.encode_all(batch, scored, forms)
        return codec.encode_all(encodings, forms)

    def shardings(self, mesh: jax.sharding.Mesh) -> tuple:
        """Returns the sharding of each of `arrays` on a mesh, by its logical axes."""
        variables, untapped = self.arrays

        def of_variable(path: tuple, x: jax.Array) -> jax.sharding.NamedSharding:
            return sharding.named(mesh, self.axes[functional.path_name(path)], x.shape)

        replicated = sharding.named(mesh, ())
        return (
            jax.tree_util.tree_map_with_path(of_variable, variables),
            jax.tree.map(lambda _: replicated, untapped),
        )

    def place(self, mesh: jax.sharding.Mesh) -> "Encoder":
        """Returns the same encoder with its arrays laid out on a mesh."""
        arrays = jax.tree.map(jax.device_put, self.arrays, self.shardings(mesh))
        return dataclasses.replace(self, arrays=arrays)


def scored_positions(weights_BxT: np.ndarray) -> int | None:
    """Returns the most positions that any example scores, rounded up to a power of two.

    None if that saves nothing. Powers of two keep the number of compiled programs small.
    """
    most = int(np.count_nonzero(weights_BxT, axis=1).max(initial=1))
    rounded = 1 << (max(1, most) - 1).bit_length()
    return rounded if rounded <= weights_BxT.shape[1] // 2 else None


def make_encoder(
    model: nnx.Module,
    projection: Projection,
    scales: dict[str, Scale] | None = None,
    output: str | Callable = "loss",
    include: str | None = None,
    exclude: str | None = None,
    untapped: Literal["leave", "reference", "error"] = "leave",
    mesh: jax.sharding.Mesh | None = None,
    tell: bool = True,
) -> Encoder:
    """Makes an encoder of P·(∇L/√V) (Chang et al. 2024, eq. 3).

    Args:
        model: an NNX model that maps tokens [B, T] to logits [B, T, V].
        projection: P.
        scales: 1/√V by path of the parameter (`tda.gradients.moments.second_moments`); None for no
            correction.
        output: L, the function that is differentiated: "loss", "margin" or "logit" of the model's
            logits; or a function of (model, batch) to float32 [B], for a model with another call.
        include, exclude: regular expressions on parameters' path names (`tda.gradients.sites`).
        untapped: treatment of selected parameters that no tap can be put on: "leave" them out,
            "reference" (form each example's full gradient; also where a tap turns out to miss a
            part of the gradient) or "error".
        mesh: the mesh on which projections and scales are laid out as the parameters they belong
            to, by their logical axes; None replicates them.
        tell: whether the share of the parameters that the gradients cover is printed, with a
            warning below a half.

    Raises:
        ValueError: nothing is included, `projection` does not fit the model (more blocks than
            layers, or blocks of a model without numbered layers), or a scale is no `Scale` of its
            matrix's shape; with a batch, if taps miss a part of a gradient
            (`tda.gradients.unseen`), unless `untapped` allows it.
        KeyError: `scales` lacks a parameter.
    """
    sites = find_sites(model, include, exclude, untapped)
    check_blocks(model, projection)
    if scales is not None:
        check_scales(scales, sites)
    if tell:
        tell_coverage(model, sites, is_default=include is None and exclude is None)
    return _make_checked(model, sites, projection, scales, output, mesh)


def _make_checked(
    model: nnx.Module,
    sites: Sequence[Site],
    projection_: Projection,
    scales: dict[str, Scale] | None,
    output: str | Callable,
    mesh: jax.sharding.Mesh | None,
) -> Encoder:
    """Makes an encoder of some sites that checks its first batch."""
    taps_ = make_taps(sites, projection_, scales)
    encoder = build_encoder(model, [(projection_, taps_)], output, mesh)
    # The decoder computes each example by itself, and so do the losses that have a name.
    if isinstance(output, str) and is_as_built(model):
        return encoder
    example_losses = losses.of_examples(output)

    def without_taps(wrong: list[Site]) -> Encoder:
        changed = [dataclasses.replace(s, tapped=s.tapped and s not in wrong) for s in sites]
        return _make_checked(model, changed, projection_, scales, output, mesh)

    mates = MatesCheck(model, example_losses)
    taps_check = TapsCheck(model, example_losses, projection_, taps_)
    first_batch = FirstBatch(mates, taps_check, sites, without_taps)
    return dataclasses.replace(encoder, first_batch=first_batch)


def check_blocks(model: nnx.Module, projection: Projection) -> None:
    """Checks that the projection's number of blocks has an effect if it is not the default.

    Raises:
        ValueError: it has none; the message says why.
    """
    if projection.blocks != projections.DEFAULT_BLOCKS and projection.pooling != "blocks":
        raise ValueError(
            f"blocks={projection.blocks} has no effect with pooling={projection.pooling!r}; leave "
            "it out, or use pooling='blocks'"
        )
    if projection.blocks not in (1, projections.DEFAULT_BLOCKS) and not has_numbered_layers(model):
        raise ValueError(
            f"blocks={projection.blocks} has no effect: no parameter of the model has a layer's "
            "number in its path; leave it out, or use pooling='matrix'"
        )


def make_taps(
    sites: Sequence[Site], projection_: Projection, scales: dict[str, Scale] | None
) -> dict[Site, Tap]:
    """Returns the tap of every site; scales that are outer products are folded into A and B."""
    by_site = {}
    for site in sites:
        left, right = map(jnp.asarray, projections.matrices(site, projection_))
        scale = scales[site.path] if scales else None
        if scale is not None and scale.full is None:
            left, right = _scaled_copies(left, scale.left), _scaled_copies(right, scale.right)
        full = None if scale is None else scale.full
        by_site[site] = Tap(left, right, projection_.side, full)
    return by_site


def _scaled_copies(matrix: jax.Array, scales: jax.Array) -> jax.Array:
    """Returns R copies of A, each with its rows scaled, side by side.

    [(L,) M, R·k] of [(L,) M, k] and [(L,) R, M].
    """
    copies = jnp.swapaxes(scales, -1, -2)[..., None] * matrix[..., None, :]
    return copies.reshape(*matrix.shape[:-1], -1)


def build_encoder(
    model: nnx.Module,
    kinds: Sequence[Kind],
    output: str | Callable = "loss",
    mesh: jax.sharding.Mesh | None = None,
) -> Encoder:
    """Builds an encoder of one or several kinds of gradients, each from its taps.

    Args:
        model: any NNX model.
        kinds: the projection and the taps by site of each kind (`make_taps`).
        output: see `make_encoder`.
        mesh: see `make_encoder`; without one the taps may be shapes alone.
    """
    # The taps of each site in the order of the kinds, as a layer carries them.
    taps_of: dict[Site, list[Tap]] = {}
    for _, by_site in kinds:
        for site, tap in by_site.items():
            taps_of.setdefault(site, []).append(tap)
    tapped = {s: tuple(of_site) for s, of_site in taps_of.items() if s.tapped}
    graphdef, *states = nnx.split(taps.put_on(model, tapped), taps.Zeros, ...)
    templates, variables = map(nnx.to_pure_dict, states)
    untapped = {
        s.path: tuple((t.left, t.right, t.scale) for t in of_site)
        for s, of_site in taps_of.items()
        if not s.tapped
    }
    program = programs.Program(
        graphdef,
        tuple(programs.KindOfProgram.describe(p, taps_) for p, taps_ in kinds),
        output,
        jax.eval_shape(lambda x: x, templates),
        unseen.make_search(model, list(tapped)),
    )
    # A decoder's settings are frozen. Attributes of other models may change between two calls
    # where neither jax nor NNX can see it.
    is_frozen = isinstance(output, str) and losses.has_separate_head(model)
    compiled = programs.compile_shared(program) if is_frozen else programs.compile_once(program)
    axes = functional.logical_axes(states[1])
    encoder = Encoder(program.layouts, (variables, untapped), axes, compiled)
    return encoder if mesh is None else encoder.place(mesh)
