"""Compares the first batch's encodings with gradients formed without any tap.

A tap takes a layer's output to be its input times the parameter, and the parameter to be the
model's own. A loss may break either in ways that no trace shows: it scales or noises the parameters
before it calls the model, it differentiates the model with respect to its inputs (a gradient
penalty), a layer's product has a backward rule of its own. The tap's gradient then looks like any
other. So the losses of two examples, each by itself, are differentiated with respect to the
parameters themselves.
"""

import re
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from tda.gradients import full_gradients
from tda.gradients import projection as projections
from tda.gradients.batch_mates import MatesCheck, is_local
from tda.gradients.projection import Projection
from tda.gradients.sites import Site
from tda.gradients.taps import Tap
from tda.model import functional

# The largest difference that may be rounding, relative to a block's norm, and the least norm that
# counts, relative to the largest block's. Accelerators round float32 products to TF32 or bfloat16.
_FLOAT32, _HALF = (0.03, 0.01), (0.25, 0.1)
_HALF_TYPES = re.compile(r"\b(bf16|f16|f8_\w+)\[")


class TapsCheck:
    """Finds the sites whose taps do not give the gradient of the parameter, on the first batch."""

    def __init__(
        self, model: nnx.Module, losses: Callable, projection: Projection, taps: Mapping[Site, Tap]
    ):
        """Makes the check.

        Args:
            model: the model whose gradients are taken.
            losses: a function of the model and a batch to each example's loss, [B].
            projection: P.
            taps: the taps of all sites.
        """
        sites, side = list(taps), projection.side
        self._layout = projections.layout(sites, projection)
        model_fn, self._parameters = functional.split(model)

        def loss(chosen, rest, example):
            own_model = model_fn.merge(full_gradients.join_parameters(rest, chosen))
            return jnp.sum(losses(own_model, example))

        def encode(parameters, example):
            rest, chosen = full_gradients.split_parameters(parameters, sites)
            gradients = jax.grad(loss)(chosen, rest, example)
            projected = {}
            for s, tap in taps.items():
                gradient = gradients[(*s.module, s.parameter)][None]
                matrices = tap.left, tap.right, tap.scale
                projected[s] = full_gradients.project(s, gradient, *matrices, side)
            return projections.pool(self._layout, projected)[0]

        self._encode = jax.jit(encode)

    def wrong_paths(self, batch, encodings_BxE) -> list[str]:
        """Returns the paths of the sites in whose blocks the encodings differ from the gradients.

        Args:
            batch: a tree of arrays that this process can address, the examples first.
            encodings_BxE: its encodings by taps.
        """
        # The two largest gradients, which rounding changes least. Two are enough: a use that taps
        # do not see is the same for all examples.
        encodings_BxE = np.asarray(encodings_BxE, np.float64)
        norms_B = np.nan_to_num(np.linalg.norm(encodings_BxE, axis=1))
        rows = np.argsort(-norms_B, stable=True)[:2]
        # Not laid out as the batch is: one example cannot be split over devices.
        examples = [jax.tree.map(lambda x, i=i: np.asarray(x)[[i]], batch) for i in rows]
        is_half = _HALF_TYPES.search(str(self._encode.trace(self._parameters, examples[0]).jaxpr))
        tolerance = _HALF if is_half or jax.default_backend() != "cpu" else _FLOAT32
        wrong: set[int] = set()
        for row, example in zip(rows, examples, strict=True):
            expected_E = np.asarray(self._encode(self._parameters, example), np.float64)
            wrong |= self._different_blocks(expected_E, encodings_BxE[row], *tolerance)
        return [path for path, blocks in self._layout.members.items() if wrong & {*blocks}]

    def _different_blocks(self, expected_E, got_E, relative: float, floor: float) -> set[int]:
        """Returns the numbers of the blocks that differ by more than rounding."""
        slices = self._layout.slices
        norms = np.array([np.linalg.norm(expected_E[s]) for s in slices])
        errors = np.array([np.linalg.norm((got_E - expected_E)[s]) for s in slices])
        # Infinities and NaN come from the model, and are the same either way.
        finite = np.isfinite(norms) & np.isfinite(errors)
        largest = norms.max(initial=0, where=finite)
        return {*np.flatnonzero(finite & (errors > relative * np.maximum(norms, floor * largest)))}


class FirstBatch:
    """Checks that run once, on a model's first batch.

    Attributes:
        successor: the encoder that takes over where taps turn out not to give the gradient; None
            if they do.
    """

    def __init__(
        self,
        mates: MatesCheck,
        taps_check: TapsCheck,
        sites: Sequence[Site],
        without_taps: Callable[[list[Site]], Any],
    ):
        """Makes the checks.

        Args:
            mates: finds losses that depend on the other examples.
            taps_check: finds taps that do not give the gradient.
            sites: all sites of the encoder.
            without_taps: makes the encoder that forms the gradients of some sites without taps.
        """
        self.successor: Any = None
        self._sites = sites
        self._mates = mates
        self._taps_check: TapsCheck | None = taps_check
        self._without_taps: Callable | None = without_taps

    def encode(self, encode: Callable, batch) -> tuple[jax.Array, ...]:
        """Encodes a batch and checks it if it is the first; it has a `successor` if taps are wrong.

        Args:
            encode: a function from a batch to a tuple of one array [B, E].
            batch: a tree of arrays, the examples first.

        Raises:
            ValueError: an example's gradient depends on the others of its batch, or is not that of
                the parameters and may not be formed by the reference path.
        """
        try:
            encodings = encode(batch)
        except (NotImplementedError, TypeError) as error:
            # jax's message for the forward-mode derivative of a tap, which has a rule for reverse
            # mode only.
            if not re.search("custom_vjp|custom_lin", str(error)):
                raise
            self._replace([s for s in self._sites if s.tapped], error)
            return ()
        self._mates(encode, batch, encodings)
        if self._taps_check is not None and is_local(batch):
            wrong = self._taps_check.wrong_paths(batch, *encodings)
            self._taps_check = None  # done: release the model's arrays
            if wrong:
                self._replace([s for s in self._sites if s.path in wrong])
        if self._taps_check is None:
            self._without_taps = None
        return encodings

    def _replace(self, wrong: list[Site], error: Exception | None = None) -> None:
        tapped = [s for s in wrong if s.tapped]
        if self._without_taps and tapped and all(s.by_reference for s in tapped):
            self.successor = self._without_taps(tapped)
            return
        remedy = " or pass untapped='reference' to form their full gradients" if tapped else ""
        raise ValueError(
            f"taps do not give the gradient of {', '.join(s.path for s in wrong)}: the loss "
            "changes the parameters before it uses them (scales, noises, stops), differentiates "
            "the model itself, or divides by the number of examples; or a layer's product is not "
            f"its class's. Use exclude= to leave out what is named{remedy}"
        ) from error
