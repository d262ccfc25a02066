"""Compares encodings with gradients formed without any tap, until every block was compared once.

A tap takes a layer's output to be its input times the parameter, and the parameter to be the
model's own. A loss may break either in ways that no trace shows: it scales or noises the parameters
before it calls the model, it differentiates the model with respect to its inputs (a gradient
penalty), a layer's product has a backward rule of its own. The tap's gradient then looks like any
other. So the losses of two examples, each by itself, are differentiated with respect to the
parameters themselves.
"""

import re
import traceback
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from tda.gradients import full_gradients
from tda.gradients import projection as projections
from tda.gradients.batch_mates import MatesCheck, examples_of, is_local
from tda.gradients.projection import Projection
from tda.gradients.sites import Site
from tda.gradients.taps import Tap
from tda.gradients.unseen import count_examples
from tda.model import functional

# The largest difference that may be rounding, relative to a block's norm, and the least norm that
# counts, relative to the largest block's: a key's bias has rounding only, about 1e-7 of it in
# float32. Accelerators round float32 products to TF32 or bfloat16.
_FLOAT32, _HALF = (0.03, 1e-4), (0.25, 0.1)
# jax's message for the forward-mode derivative of a tap, which has a rule for reverse mode only.
_IS_FORWARD = re.compile("custom_vjp|custom_lin")
_HALF_TYPES = re.compile(r"\b(bf16|f16|f8_\w+)\[")


class TapsCheck:
    """Finds the sites whose taps do not give the gradient of the parameter.

    Attributes:
        is_open_N: the blocks without a gradient in any example compared so far, bool [N].
        is_alone: whether only batches of one example were compared so far, in which a division by
            the number of examples does not show.
    """

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
        self._tolerance: tuple[float, float] | None = None
        self.is_open_N, self.is_alone = np.ones(len(self._layout.slices), bool), True

    def is_done(self, count: int) -> bool:
        """Returns whether a batch of `count` examples has nothing left to tell."""
        return not self.is_open_N.any() and (count < 2 or not self.is_alone)

    def is_computable(self, batch) -> bool:
        """Returns whether the loss of a batch can be differentiated without taps."""
        try:
            jax.eval_shape(self._encode, self._parameters, batch)
        except Exception:  # whatever the user's loss raises
            return False
        return True

    def wrong_paths(self, batch, encodings_BxE) -> list[str]:
        """Returns the paths of the sites in whose blocks the encodings differ from the gradients.

        Args:
            batch: a tree of arrays that this process can address, the examples first.
            encodings_BxE: its encodings by taps.
        """
        encodings_BxE = np.asarray(encodings_BxE, np.float64)
        is_wrong_N = np.zeros_like(self.is_open_N)
        if self.is_alone and len(encodings_BxE) > 1:
            self.is_open_N[:], self.is_alone = True, False
        for row in self._rows_to_compare(batch, np.nan_to_num(self._block_norms(encodings_BxE))):
            expected_E = self._encode(self._parameters, _example(batch, row))
            is_wrong_N |= self._compare(np.asarray(expected_E, np.float64), encodings_BxE[row])
        members = self._layout.members.items()
        return [path for path, blocks in members if is_wrong_N[[*blocks]].any()]

    def _rows_to_compare(self, batch, norms_BxN: np.ndarray) -> list[int]:
        """Returns a few examples in which all open blocks have gradients that have any here."""
        rows: list[int] = []
        if self.is_open_N.all():
            # The two largest gradients, which rounding changes least. Two are enough: a use that
            # taps do not see is the same for all examples.
            rows = [*map(int, np.argsort(-np.linalg.norm(norms_BxN, axis=1), stable=True)[:2])]
            if self._tolerance is None:
                self._tolerance = self._choose_tolerance(_example(batch, rows[0]))
        counted_BxN = self._is_counted(norms_BxN)
        waiting_BxN = counted_BxN & self.is_open_N & ~counted_BxN[rows].any(axis=0)
        while waiting_BxN.any():
            rows.append(int(np.argmax(waiting_BxN.sum(axis=1))))
            waiting_BxN &= ~counted_BxN[rows[-1]]
        return rows

    def _choose_tolerance(self, example) -> tuple[float, float]:
        try:
            traced = self._encode.trace(self._parameters, example)
        except Exception as error:
            raise ValueError(
                "the loss of a whole batch can be computed, that of one example by itself cannot, "
                f"with which encodings are compared ({type(error).__name__}: {error}); write it, "
                "and the layouts in it, for any number of examples"
            ) from error
        is_half = _HALF_TYPES.search(str(traced.jaxpr))
        return _HALF if is_half or jax.default_backend() != "cpu" else _FLOAT32

    def _block_norms(self, encodings: np.ndarray) -> np.ndarray:
        """Returns the norm of each block of encodings [..., E]: float64 [..., N]."""
        slices = self._layout.slices
        return np.stack([np.linalg.norm(encodings[..., s], axis=-1) for s in slices], axis=-1)

    def _is_counted(self, norms: np.ndarray) -> np.ndarray:
        """Returns whether blocks [..., N] have more than rounding beside their largest: bool."""
        return norms > self._tolerance[1] * norms.max(axis=-1, keepdims=True)

    def _compare(self, expected_E, got_E) -> np.ndarray:
        """Closes the blocks with a gradient; returns which blocks are wrong by more than rounding.

        Returns:
            bool [N].
        """
        relative, floor = self._tolerance
        norms, own_norms, errors = map(self._block_norms, (expected_E, got_E, got_E - expected_E))
        # Infinities and NaN come from the model, and are the same either way.
        finite = np.isfinite(norms) & np.isfinite(errors)
        norms, own_norms = np.where(finite, norms, 0), np.where(finite, own_norms, 0)
        self.is_open_N &= ~(self._is_counted(norms) | self._is_counted(own_norms))
        return finite & (errors > relative * np.maximum(norms, floor * norms.max()))


def _example(batch, row: int):
    """Returns one example of a batch, not laid out as the batch is: devices cannot share it."""
    return jax.tree.map(lambda x: examples_of(x, np.array([row])), batch)


class FirstBatch:
    """Checks of a model's first batch, and of later ones where the first could not tell.

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
        except Exception as error:
            if not self._is_caused_by_taps(error, batch):
                raise
            self._replace([s for s in self._sites if s.tapped], error)
            return ()
        self._mates(encode, batch, encodings)
        count = count_examples(batch)
        if self._taps_check and is_local(batch) and not self._taps_check.is_done(count):
            wrong = self._taps_check.wrong_paths(batch, *encodings)
            if wrong or self._taps_check.is_done(2):
                self._taps_check = None  # done: release the model's arrays
            if wrong:
                self._replace([s for s in self._sites if s.path in wrong])
        if self._taps_check is None:
            self._without_taps = None
        return encodings

    def _is_caused_by_taps(self, error: Exception, batch) -> bool:
        """Returns whether a loss fails because of the taps on its model."""
        if isinstance(error, NotImplementedError | TypeError) and _IS_FORWARD.search(str(error)):
            return True
        # This package's own errors say what is wrong; others are of the model if it has them, too,
        # without taps. Memory that runs out is neither's fault.
        *_, (frame, _) = traceback.walk_tb(error.__traceback__)
        is_own = frame.f_globals.get("__name__", "").partition(".")[0] == "tda"
        if is_own or self._taps_check is None or isinstance(error, jax.errors.JaxRuntimeError):
            return False
        return self._taps_check.is_computable(batch)

    def _replace(self, wrong: list[Site], error: Exception | None = None) -> None:
        tapped = [s for s in wrong if s.tapped]
        if self._without_taps and tapped and all(s.by_reference for s in tapped):
            self.successor = self._without_taps(tapped)
            return
        remedy = " or pass untapped='reference' to form their full gradients" if tapped else ""
        if error is not None and not _IS_FORWARD.search(str(error)):
            raise ValueError(
                f"with taps on {', '.join(s.path for s in wrong)} the loss fails, and without it "
                f"does not ({type(error).__name__}: {error}). Use exclude= to leave out the layer "
                f"that it fails in{remedy}"
            ) from error
        raise ValueError(
            f"taps do not give the gradient of {', '.join(s.path for s in wrong)}: the loss "
            "changes the parameters before it uses them (scales, noises, stops), differentiates "
            "the model itself, or divides by the number of examples; or a layer's product is not "
            f"its class's. Use exclude= to leave out what is named{remedy}"
        ) from error
