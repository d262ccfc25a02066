"""The arguments of `tda.trace` other than its data."""

import dataclasses
import pathlib
from collections.abc import Callable, Iterable
from typing import Any

import jax
import numpy as np
from flax import nnx

from tda import loss as losses
from tda.gradients import kronecker, sites
from tda.gradients.moments import estimate
from tda.gradients.moments.scales import Scale, check_scales
from tda.gradients.moments.second_moments import SecondMoments
from tda.gradients.projection import Layout, Projection, layout
from tda.gradients.sites import find_sites
from tda.runtime import progress


@dataclasses.dataclass(frozen=True)
class MomentSettings:
    """The source of 1/√V of corrected gradients."""

    correction: str
    """The form of √V: "factored", "low_rank(R)" or "adam"."""
    scales: dict[str, Scale] | SecondMoments | None
    """The optimizer's moments, or 1/√V by path of parameter; None: estimated from passages."""
    sample: int
    """Batches in the sample."""
    seed: int
    """Seed of the draw."""


@dataclasses.dataclass(frozen=True)
class TextSettings:
    """How passages and queries that are texts are read."""

    tokenizer: Any
    """The model's tokenizer, with the methods of `PretrainedTokenizer`."""
    context: int
    """The most positions of a passage, and of a query."""
    text_field: str | None
    """The field of a passage's text, in rows with named fields; None: "text"."""
    id_field: str | None
    """The field of a passage's id; None: the usual names."""
    directory: pathlib.Path | None
    """The directory of tokens, second moments and gradients; None keeps them in memory."""


@dataclasses.dataclass(frozen=True)
class TraceSettings:
    """The arguments of `tda.trace` other than its data."""

    model: nnx.Module
    """The model whose gradients are taken."""
    loss: str | Callable
    """A name of `tda.loss.output`, or a function of the model and a batch to [B]."""
    corrected: bool
    """Whether gradients are divided by the root of the optimizer's second moments."""
    moments: MomentSettings
    """The second moments that gradients are corrected by."""
    projection: Projection
    """The random projection of every weight matrix's gradient."""
    scope: dict
    """Which parameters: include, exclude and untapped of `tda.gradients.sites.find_sites`."""
    tokens_per_batch: int
    """The most positions that are encoded together."""
    mesh: jax.sharding.Mesh | None
    """The devices that batches are split over; one device if None."""
    curvature: str = "none"
    """What changes gradients before the projection: "ekfac" or "none" (`GradientKind`)."""
    structure: str = "auto"
    """The structure of R (`tda.retrieval.hessian_settings.HessianSettings`)."""

    @property
    def needs_estimate(self) -> bool:
        """Whether second moments are estimated from the passages."""
        return self.corrected and self.moments.scales is None

    @property
    def parameter_count(self) -> int:
        """The number of the model's parameters."""
        return sum(np.size(x) for x in jax.tree.leaves(nnx.state(self.model, nnx.Param)))

    def sites(self) -> list[sites.Site]:
        """Returns the parameters whose gradients are taken."""
        chosen = find_sites(self.model, **self.scope)
        return chosen if self.curvature == "none" else kronecker.factored(chosen)

    def layout(self) -> Layout:
        """Returns the blocks of an encoding."""
        return layout(self.sites(), self.projection)

    def print_coverage(self) -> None:
        """Prints what share of the parameters the gradients cover, and what is left out."""
        is_default = self.scope.get("include") is None and self.scope.get("exclude") is None
        sites.tell_coverage(self.model, self.sites(), is_default)

    def example_losses(self, model, batch) -> jax.Array:
        """Returns the loss of each example of a batch, [B]."""
        return losses.of_examples(self.loss)(model, batch)

    def total_loss(self, model, batch) -> jax.Array:
        """Returns the losses of a batch, [B], or their sum, [1], if that saves memory."""
        if callable(self.loss):
            return self.loss(model, batch)
        return losses.total(model, batch, losses.output(self.loss))[None]

    def known_scales(self) -> dict[str, Scale] | None:
        """Returns the given 1/√V by path; None for raw gradients, or if it is to be estimated."""
        if not self.corrected or self.moments.scales is None:
            return None
        if isinstance(self.moments.scales, SecondMoments):
            return self.moments.scales.scales(self.sites(), self.moments.correction)
        check_scales(self.moments.scales, self.sites())
        return self.moments.scales

    def estimate_scales(self, batches: Iterable) -> dict[str, Scale]:
        """Returns 1/√V by path, estimated from batches."""
        batches = list(batches)
        with progress.bar(len(batches), "second moments", "batch") as bar:

            def counted():
                for batch in batches:
                    yield batch
                    bar.update()

            return estimate.estimate(
                self.model, self.total_loss, counted(), self.sites(), self.moments.correction
            )
