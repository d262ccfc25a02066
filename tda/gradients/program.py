"""The compiled part of an encoder: a function of arrays and a batch.

Encoders that differ in their arrays alone, such as those of two calls of `tda.trace` with one
model, share what is compiled.
"""

import dataclasses
import functools
from collections.abc import Callable, Sequence

import jax
import jax.numpy as jnp
from flax import nnx

from tda import loss as losses
from tda.gradients import full_gradients, taps, unseen
from tda.gradients import projection as projections
from tda.gradients.projection import Layout, Projection
from tda.gradients.sites import Site
from tda.gradients.taps import Tap
from tda.store import codec


@dataclasses.dataclass(frozen=True)
class KindOfProgram:
    """One kind of gradients, without arrays.

    Attributes:
        projection: P.
        sites: the sites, in order.
        tap_shapes: for each site, whether its full gradient may be formed, k, and whether its tap
            lacks scales, a direction and bases.
    """

    projection: Projection
    sites: tuple[Site, ...]
    tap_shapes: tuple[tuple, ...]

    @classmethod
    def describe(cls, projection: Projection, taps_: dict[Site, Tap]) -> "KindOfProgram":
        """Describes a kind of gradients by its projection and the taps of its sites."""
        shapes = (
            (s.by_reference, t.side, *(x is None for x in (t.scale, t.direction, t.bases)))
            for s, t in taps_.items()
        )
        return cls(projection, tuple(taps_), tuple(shapes))

    def has_bases(self, site: Site) -> bool:
        """Returns whether a site's tap rotates its gradient to another basis."""
        return not self.tap_shapes[self.sites.index(site)][-1]


@dataclasses.dataclass(frozen=True)
class Program:
    """All that an encoder's function depends on beside its arguments; it holds no arrays.

    Attributes:
        graphdef: the structure of the model with its taps.
        kinds: the kinds of gradients.
        output: see `tda.gradients.encoder.make_encoder`.
        templates: shapes of the taps' zeros, by path; they follow from the rest.
        search: finds sites whose taps miss a part of the gradient (`unseen.make_search`).
    """

    graphdef: nnx.GraphDef
    kinds: tuple[KindOfProgram, ...]
    output: str | Callable
    templates: dict = dataclasses.field(compare=False)
    search: Callable = dataclasses.field(compare=False)

    @functools.cached_property
    def layouts(self) -> tuple[Layout, ...]:
        """For each kind, which matrices are pooled into which block of its encodings."""
        return tuple(projections.layout(list(k.sites), k.projection) for k in self.kinds)


def compile_once(program: Program) -> Callable:
    """Returns the jitted function of (arrays, batch, scored, forms) (`Encoder.compiled`)."""
    # `scored` sets the shapes of the logits, so each value is a program of its own.
    return jax.jit(_Encoding(program).encode, static_argnums=(2, 3))


# Room for the kinds of gradients of a table. What is kept is code, not arrays.
compile_shared = functools.lru_cache(maxsize=16)(compile_once)


class _Encoding:
    """The function that is compiled: a batch's encodings, one array for each kind of gradients."""

    def __init__(self, program: Program):
        self._program, output = program, program.output
        self._is_named = isinstance(output, str)
        self._output_fn = losses.output(output) if isinstance(output, str) else output
        # The numbers of the kinds that take each site's gradient, as a layer carries their taps.
        self._kinds_of: dict[Site, list[int]] = {}
        for i, kind in enumerate(program.kinds):
            for site in kind.sites:
                self._kinds_of.setdefault(site, []).append(i)
        self._tapped = [s for s in self._kinds_of if s.tapped]
        self._untapped = [s for s in self._kinds_of if not s.tapped]

    def encode(
        self,
        arrays: tuple,
        batch: dict,
        scored: int | None = None,
        forms: tuple[codec.Form, ...] | None = None,
    ) -> tuple[jax.Array, ...]:
        """See `tda.gradients.encoder.Encoder.compiled`."""
        variables, matrices = arrays
        missed = self._missed_sites(batch, scored)
        if self._untapped or missed:
            matrices = matrices | {s.path: taps.matrices_at(variables, s) for s in missed}
            projected = self._by_example(variables, missed, matrices, batch, scored)
        else:
            projected = self._by_taps(variables, batch, scored)
        # A site's taps are in the order of the kinds that take its gradient (`_kinds_of`).
        encodings = tuple(
            projections.pool(
                layout, {s: projected[s][self._kinds_of[s].index(i)] for s in kind.sites}
            )
            for i, (layout, kind) in enumerate(
                zip(self._program.layouts, self._program.kinds, strict=True)
            )
        )
        return codec.encode_all(encodings, forms)

    def _by_taps(self, variables: dict, batch: dict, scored: int | None) -> dict[Site, list]:
        """Returns the projections of the whole batch, by site and tap, in one backward pass."""
        zeros = taps.zeros_for(self._program.templates, batch)
        cotangents = jax.grad(self._total)(zeros, variables, batch, scored)
        return {s: taps.cotangents_at(cotangents, s) for s in self._tapped}

    def _by_example(
        self,
        variables: dict,
        missed: list[Site],
        matrices: dict,
        batch: dict,
        scored: int | None,
    ) -> dict[Site, list]:
        """Returns the same from one backward pass per example, forming some full gradients."""
        full_sites = [*self._untapped, *missed]
        rest, parameters = full_gradients.split_parameters(variables, full_sites)

        def total_of_example(zeros: dict, parameters: dict, example: dict) -> jax.Array:
            joined = full_gradients.join_parameters(rest, parameters)
            return self._total(zeros, joined, example, scored, missed)

        def encode_example(example: dict) -> tuple[dict, dict]:
            example = jax.tree.map(lambda x: x[None], example)
            zeros = taps.zeros_for(self._program.templates, example)
            return jax.grad(total_of_example, argnums=(0, 1))(zeros, parameters, example)

        cotangents, gradients = jax.vmap(encode_example)(batch)
        projected = {
            s: [_without_example_axis(x, s) for x in taps.cotangents_at(cotangents, s)]
            for s in self._tapped
        }
        for site in full_sites:
            gradient = gradients[(*site.module, site.parameter)]
            sides = (self._program.kinds[i].projection.side for i in self._kinds_of[site])
            projected[site] = [
                full_gradients.project(site, gradient, left, right, scale, side)
                for (left, right, scale), side in zip(matrices[site.path], sides, strict=True)
            ]
        return projected

    def _total(
        self,
        zeros: dict,
        variables: dict,
        batch: dict,
        scored: int | None,
        missed: Sequence[Site] = (),
    ) -> jax.Array:
        """Returns the sum of the examples' losses, as a function of the taps' zeros."""
        merged = nnx.merge(self._program.graphdef, zeros, variables)
        return self._total_of(taps.without_taps(merged, missed), batch, scored)

    def _total_of(self, own_model: nnx.Module, batch: dict, scored: int | None) -> jax.Array:
        if self._is_named:
            return losses.total(own_model, batch, self._output_fn, scored)
        loss_B = self._output_fn(own_model, batch)
        losses.check_shape(loss_B, unseen.count_examples(batch))
        return jnp.sum(loss_B)

    def _missed_sites(self, batch: dict, scored: int | None) -> list[Site]:
        """Returns the sites whose taps miss a part of the gradient.

        Raises:
            ValueError: a kind does not allow the full gradient of one of them.
        """
        missed = self._program.search(
            lambda own_model, batch: self._total_of(own_model, batch, scored), batch
        )
        kinds = self._program.kinds
        # Gradients in another basis (EK-FAC) are formed by their taps alone.
        refused = {
            site: missed[site]
            for kind in kinds
            for site in kind.sites
            if site in missed
            and (
                not site.by_reference or any(kinds[i].has_bases(site) for i in self._kinds_of[site])
            )
        }
        unseen.refuse(refused, ", or untapped='reference' to form its full gradients")
        return list(missed)


def _without_example_axis(x: jax.Array, site: Site) -> jax.Array:
    """Returns taps of examples encoded one by one, [B, (L,) 1, k, k], as [(L,) B, k, k]."""
    return x[:, 0] if site.stack is None else jnp.swapaxes(x[:, :, 0], 0, 1)
