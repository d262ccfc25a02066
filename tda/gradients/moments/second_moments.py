"""1/√V from the optimizer's second moments; only these are read from a checkpoint.

The optimizer's rule decides where epsilon goes: Adam divides by √(ν̂ + eps_root) + eps with the
bias-corrected ν̂ = ν / (1 − b2ᵗ) (Kingma & Ba 2015, algorithm 1); Adafactor multiplies by
(r / mean r)^(−1/2) c^(−1/2) of its row and column statistics (Shazeer & Stern 2018, algorithm 4).
Half-precision moments are cast to float32 before any arithmetic.

**The floor.** V of a weight that training, or a sample, has hardly reached is near 0 by chance, and
1/√V would let a single example decide a whole encoding (1e8 for a token seen once, under Adam's
epsilon). So V counts as at least 1e-6 times its mean over the matrix, wherever it comes from: the
optimizer's state, another program's files, or an estimate. No weight is scaled to more than 1e3
times what the matrix's mean gives; 1e6 times in a "factored" scale, where neither a weight's row
nor its column is reached. Matrices of trained transformers lie far above the floor (their least V
was 2e-2 of the mean in the demo); embeddings of rare tokens do not. Adam's steps
(`tda.gradients.adam_steps`) need none, since the example's own gradient is in their denominator;
EK-FAC's damping is one (`tda.gradients.kronecker`).
"""

import dataclasses
import numbers
import os
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from tda.gradients import sites
from tda.gradients.moments import optimizer_state
from tda.gradients.moments.optimizer_state import Moments, OptimizerState, SecondMomentError
from tda.gradients.moments.scales import Scale, finite, from_full, parse_correction
from tda.runtime import sharding


def adafactor_scale(
    v_row: jax.typing.ArrayLike,
    v_col: jax.typing.ArrayLike,
    v: jax.typing.ArrayLike,
    shape: tuple[int, ...],
) -> Scale:
    """Returns the scale by which optax's Adafactor multiplies a gradient of this shape.

    For the two largest axes d1 ≤ d0, optax stores v_row, the mean over d0, and v_col, the mean
    over d1. It stores the full `v` of parameters that it does not factor.

    Args:
        v_row, v_col, v: the state's leaves of this parameter; unused ones have shape (1,).
        shape: the parameter's shape.

    Returns:
        The scale, in the parameter's axes: an outer product (R = 1) if optax factors the last two
        axes, otherwise in full.

    Raises:
        SecondMomentError: the leaves do not fit the shape.
    """
    v_row, v_col, v = (jnp.asarray(x, jnp.float32) for x in (v_row, v_col, v))
    if tuple(v.shape) == tuple(shape):
        return Scale(full=1.0 / jnp.sqrt(v))
    if len(shape) < 2:
        raise SecondMomentError(f"Adafactor's v has shape {v.shape} for a parameter {shape}")
    d1, d0 = map(int, np.argsort(shape, kind="stable")[-2:])
    fits = tuple(np.delete(shape, d0)) == v_row.shape and tuple(np.delete(shape, d1)) == v_col.shape
    if not fits:
        raise SecondMomentError(
            f"Adafactor's statistics {v_row.shape} and {v_col.shape} do not fit {shape}"
        )
    # v_row has no axis d0, so d1 moves down by one if it came after d0; and the other way round.
    d1_of_row, d0_of_col = d1 - (d1 > d0), d0 - (d0 > d1)
    mean_row = jnp.mean(v_row, axis=d1_of_row, keepdims=True)
    # The floor of V of every weight, in terms of the means over its rows and columns.
    row = 1.0 / jnp.sqrt(optimizer_state.raise_to_floor(v_row, d1_of_row) / mean_row)
    col = 1.0 / jnp.sqrt(optimizer_state.raise_to_floor(v_col, d0_of_col))
    if {d0, d1} == {len(shape) - 2, len(shape) - 1}:
        left, right = (row, col) if d0 > d1 else (col, row)
        return Scale(left[..., None, :], right[..., None, :])
    return Scale(full=jnp.expand_dims(row, d0) * jnp.expand_dims(col, d1))


@dataclasses.dataclass(frozen=True)
class SecondMoments:
    """An optimizer's second moments, from which 1/√V of any parameters can be made.

    Attributes:
        state: the optimizer's state, in memory or in a checkpoint.
    """

    state: OptimizerState

    def scales(
        self,
        chosen: list[sites.Site],
        correction: str = "factored",
        place: Callable[[Any], Any] = lambda x: x,
    ) -> dict[str, Scale]:
        """Returns the scale of every site, by path.

        Args:
            chosen: the sites.
            correction: "adam" (the optimizer's exact scale of every weight), "factored"
                (Adafactor's row and column statistics, or the same statistics of another
                optimizer's ν) or "low_rank(R)" (the sum of R outer products closest to "adam").
            place: moves a parameter's moments to where its scale is computed.

        Raises:
            SecondMomentError: the correction is unknown, or the state does not have what it needs.
        """
        if parse_correction(correction)[0] == "none":
            raise SecondMomentError("correction 'none' has no scales to read")
        moments = self.state.moments([s.path for s in chosen])

        def scale_of(site: sites.Site) -> Scale:
            of_site = moments[site.path]
            fields = {name: place(x) for name, x in of_site.fields.items()}
            count = None if of_site.count is None else place(of_site.count)
            placed = dataclasses.replace(of_site, fields=fields, count=count)
            return site_scale(site, placed, correction)

        return finite({s.path: scale_of(s) for s in chosen})


# The arguments of `second_moments` that a description calls by the same name.
_CONSTANTS = ("b2", "eps", "eps_root", "decay", "eps_in_sqrt")


def second_moments(
    source: Any,
    *,
    optimizer: str | None = None,
    step: int | None = None,
    parts: dict[Any, dict] | None = None,
    **constants: float,
) -> SecondMoments:
    """Opens the second moments of the optimizer that a model was trained with.

    Moments are matched to parameters by their whole path name, which the optimizer's state and the
    model must share (nnx's `value` at the end and Linen's `params` in front are no part of it).

    Args:
        source: an `nnx.Optimizer`, an optax state, or a tree that holds one (a `TrainState`); or
            the path of an Orbax checkpoint of any layout: a directory by step, one step, or one
            tree.
        optimizer: "adam", "adamw", "nadam", "nadamw", "yogi", "amsgrad", "rmsprop", or "adam_pax"
            (MaxText's). Adafactor is recognised by its state.
        step: which checkpoint of a directory by step; None for the last.
        parts: constants (and `optimizer`) that differ between the parts of an `optax.partition`, by
            label.
        **constants: `b2`, `eps` and `eps_root` of the optimizer (0 if not given); for rmsprop
            `eps`, `eps_in_sqrt` and, if it corrects for bias, `decay`. No state has them, except
            for what `optax.inject_hyperparams` stores, which takes precedence; our own checkpoints
            have all of them in their description.

    Raises:
        SecondMomentError: there are no second moments, or constants are missing; the message names
            them.
        tda.training.checkpoint.CheckpointError: no checkpoint, or one without optimizer state.
    """
    # Path names are strings, whatever the labels are.
    parts = {str(label): stated for label, stated in (parts or {}).items()}
    for label, stated in {"": constants, **parts}.items():
        _check_constants(stated, f"parts[{label!r}]: " if label else "")
    described: dict[str, Any] = {k: v for k, v in constants.items() if v is not None}
    for label, stated in parts.items():
        described[label] = {"name" if k == "optimizer" else k: v for k, v in stated.items()}
    if optimizer is not None:
        described["name"] = optimizer
    state = optimizer_state.open_state(source, step, **described)
    state.check_labels(parts)
    state.check()
    return SecondMoments(state)


def _check_constants(constants: dict, place: str) -> None:
    """Checks that an optimizer's constants are known, and numbers in their range.

    Raises:
        SecondMomentError: one is not; the message names it.
    """
    # A part may have another optimizer, too.
    known = (*_CONSTANTS, "optimizer") if place else _CONSTANTS
    if unknown := constants.keys() - set(known):
        raise SecondMomentError(
            f"{place}unknown constants {', '.join(sorted(unknown))}; an optimizer's are "
            f"{', '.join(known)}"
        )
    for name, below in (("b2", 1.0), ("decay", 1.0), ("eps", np.inf), ("eps_root", np.inf)):
        x = constants.get(name)
        is_number = isinstance(x, numbers.Real | jax.Array)
        if x is not None and not (is_number and 0 <= x < below):
            limit = "" if below == np.inf else f" and below {below:g}"
            raise SecondMomentError(f"{place}{name}={x!r} must be a number from 0{limit}")


def read(
    root: str | os.PathLike,
    chosen: list[sites.Site],
    correction: str,
    step: int | None = None,
    on_host: bool = False,
) -> dict[str, Scale]:
    """Reads the scale of every site from a checkpoint that describes its optimizer.

    Args:
        root: the checkpoints.
        chosen: the sites.
        correction: as for `SecondMoments.scales`.
        step: the step; None for the last.
        on_host: whether this host computes the scales from whole moments, so that their bits do not
            depend on the devices and processes that share the state. A collective if several
            processes share it.
    """
    moments = second_moments(root, step=step)
    if not on_host:
        return moments.scales(chosen, correction)
    with jax.default_device(sharding.host_device()):
        return moments.scales(chosen, correction, sharding.to_host)


def site_scale(site: sites.Site, moments: Moments, correction: str) -> Scale:
    """Returns the scale of one site from its parameter's moments.

    Raises:
        SecondMomentError: the moments do not have what the correction needs.
    """
    if moments.count is not None and jnp.ndim(moments.count):
        raise SecondMomentError(
            f"the optimizer's count of {site.path} has the shape {jnp.shape(moments.count)}, not "
            "(): the state is of several replicas; take one, jax.tree.map(lambda x: x[0], state)"
        )
    if moments.count is not None and int(moments.count) == 0:
        raise SecondMomentError(f"the optimizer has made no step with {site.path}")
    negative = [
        f for f, x in moments.fields.items() if f != "mu" and bool((jnp.asarray(x) < 0).any())
    ]
    if negative:
        raise SecondMomentError(
            f"{', '.join(negative)} of {site.path} has numbers below 0, which no mean of squares "
            "has: the state is damaged, or is not of second moments"
        )
    if "v_row" in moments.fields:
        if correction != "factored":
            raise SecondMomentError(
                f"{site.path} was trained with Adafactor, whose statistics are of rank one and not "
                f"of every weight: {correction!r} has nothing to work from; "
                "use correction='factored'"
            )
        v_row, v_col, v = (moments.fields[field] for field in ("v_row", "v_col", "v"))
        if v.shape == site.shape:
            return Scale(full=1.0 / jnp.sqrt(optimizer_state.raise_to_floor(site.matrix(v))))
        return _as_matrix(site, adafactor_scale(v_row, v_col, v, site.shape))
    for field in ("nu", "nu_max"):
        x = moments.fields.get(field)
        if x is not None and x.shape != site.shape:
            raise SecondMomentError(f"ν of {site.path} has shape {x.shape}, the model {site.shape}")
    fields = {
        field: optimizer_state.raise_to_floor(site.matrix(x))
        for field, x in moments.fields.items()
        if field in ("nu", "nu_max")
    }
    full = optimizer_state.exact(dataclasses.replace(moments, fields=fields))
    return from_full(full, correction)


def _as_matrix(site: sites.Site, scale: Scale) -> Scale:
    if site.order is None and site.shape == (*site.stack_shape, site.rows, site.columns):
        return scale
    return Scale(full=site.matrix(scale.dense()))
