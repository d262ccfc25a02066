"""1/√V of a site: its forms, how one is made from 1/√V of every weight, and what is checked."""

import dataclasses
import re
from collections.abc import Callable, Mapping, Sequence

import jax
import jax.numpy as jnp
import numpy as np

from tda.gradients import sites
from tda.gradients.moments import low_rank
from tda.gradients.moments.optimizer_state import SecondMomentError
from tda.runtime.differences import shorten

CORRECTIONS = ("none", "adam", "factored", "low_rank(R)")


@dataclasses.dataclass(frozen=True)
class Scale:
    """1/√V of one site, as a sum of outer products or in full; stacked if the site is.

    Attributes:
        left: float32 [(L,) R, M], or None.
        right: float32 [(L,) R, N], or None.
        full: float32 [(L,) M, N], or None.
    """

    left: jnp.ndarray | None = None
    right: jnp.ndarray | None = None
    full: jnp.ndarray | None = None

    def dense(self) -> jnp.ndarray:
        """Returns the scale of every weight, Σ_r left_r right_rᵀ: float32 [(L,) M, N]."""
        if self.full is not None:
            return self.full
        return low_rank.product(self.left, self.right)

    def map(self, change: Callable) -> "Scale":
        """Returns a scale with `change` applied to each array."""
        parts = self.left, self.right, self.full
        return Scale(*(None if x is None else change(x) for x in parts))


def check_scales(scales: Mapping[str, Scale], chosen: Sequence[sites.Site]) -> None:
    """Checks that there is a scale of the right shape for every site.

    Raises:
        KeyError: a site has none.
        ValueError: `scales` is no mapping, a scale is no `Scale`, or its arrays have other shapes;
            the message names the site.
    """
    if not isinstance(scales, Mapping):
        raise ValueError(
            f"scales is of type {type(scales).__name__}, not 1/√V by path of parameter; for an "
            "optimizer's state give tda.second_moments(state, ...)"
        )
    if missing := [s.path for s in chosen if s.path not in scales]:
        raise KeyError(f"scales has no 1/√V of {shorten(missing)}; it has {shorten([*scales])}")
    for site in chosen:
        scale, stack, sides = scales[site.path], site.stack_shape, (site.rows, site.columns)
        if not isinstance(scale, Scale):
            raise ValueError(
                f"scales[{site.path!r}] is of type {type(scale).__name__}; give a Scale "
                "(tda.gradients.moments.scales), or tda.second_moments of an optimizer"
            )
        parts = scale.left, scale.right, scale.full
        shapes = [None if x is None else np.shape(x) for x in parts]
        rank = shapes[0][-2:-1] if shapes[0] else ()
        whole, product = (*stack, *sides), [(*stack, *rank, side) for side in sides]
        if shapes not in ([None, None, whole], [*product, None]):
            raise ValueError(
                f"scales[{site.path!r}] has left, right and full of the shapes {shapes}; give full "
                f"of the shape {whole}, or left and right of {[(*stack, 'R', n) for n in sides]}"
            )


def parse_correction(text: str) -> tuple[str, int | None]:
    """Returns a correction's name and, for "low_rank(R)", the rank R.

    Raises:
        SecondMomentError: the correction is unknown, or its rank is below 1.
    """
    match = re.fullmatch(r"low_rank\((\d+)\)", text)
    if match and int(match[1]) >= 1:
        return "low_rank", int(match[1])
    if text not in CORRECTIONS[:-1]:
        raise SecondMomentError(
            f"unknown correction {text!r}; use {', '.join(CORRECTIONS)} with a rank R from 1"
        )
    return text, None


def factored_scale(full: jax.typing.ArrayLike) -> Scale:
    """Returns the rank-one scale from the row and column means of V = full⁻².

    This is Adafactor's factorisation (Shazeer & Stern 2018, eq. 3), and shares its weakness: where
    a row and a column are both far below the mean of V, the weight at their crossing gets a scale
    far above the exact one.

    Args:
        full: 1/√V, float32 [(L,) M, N].
    """
    left, right = _factor(jnp.asarray(full, jnp.float32))
    return Scale(left[..., None, :], right[..., None, :])


@jax.jit
def _factor(full: jax.Array) -> tuple[jax.Array, jax.Array]:
    # √V over the matrix's largest √V, so that squares are at most 1 and do not all underflow.
    least = jnp.min(full, axis=(-1, -2), keepdims=True)
    rows, columns = (_root_mean_square(least / full, axis) for axis in (-1, -2))
    overall = _root_mean_square(rows[..., None], -2)
    return overall / rows, columns**-1 * least[..., 0]


def _root_mean_square(x: jax.Array, axis: int) -> jax.Array:
    most = jnp.max(x, axis=axis, keepdims=True)
    return jnp.squeeze(most, axis) * jnp.sqrt(jnp.mean(jnp.square(x / most), axis=axis))


def low_rank_scale(full: jax.typing.ArrayLike, rank: int) -> Scale:
    """Returns the sum of `rank` outer products closest to 1/√V in relative terms.

    It minimises Σ (1 − Ŝ/S)², after S is balanced by `factored_scale`
    (`tda.gradients.moments.low_rank`). Rank 1 gives about that scale; rank min(M, N) is exact.

    Args:
        full: S = 1/√V, float32 [(L,) M, N].
        rank: at least 1.
    """
    full = jnp.asarray(full, jnp.float32)
    return Scale(*low_rank.approximate(full, *_factor(full), rank))


def check_full(correction: str) -> tuple[str, int | None]:
    """Parses a correction and checks that it is made from second moments of every weight.

    Raises:
        SecondMomentError: it is not "adam", "factored" or "low_rank(R)".
    """
    name, rank = parse_correction(correction)
    if name == "none":
        raise SecondMomentError(
            "correction 'none' is not made from second moments; use adam, factored or low_rank(R)"
        )
    return name, rank


def from_full(full: jax.Array, correction: str) -> Scale:
    """Returns a correction's scale, made from 1/√V of every weight: float32 [(L,) M, N].

    Raises:
        SecondMomentError: the correction is not "adam", "factored" or "low_rank(R)".
    """
    name, rank = check_full(correction)
    if name == "low_rank":
        return low_rank_scale(full, rank)
    return factored_scale(full) if name == "factored" else Scale(full=full)


def finite(scales: dict[str, Scale]) -> dict[str, Scale]:
    """Returns the scales after checking that they are finite and above 0.

    Raises:
        SecondMomentError: a scale is not: its moments are not finite, or are 0 without an epsilon.
    """
    for path, scale in scales.items():
        parts = [x for x in (scale.left, scale.right, scale.full) if x is not None]
        good = all(bool(jnp.isfinite(x).all()) for x in parts)
        if not good or (scale.full is not None and not bool((scale.full > 0).all())):
            raise SecondMomentError(
                f"1/√V of {path} is not finite and above 0: its second moments are not finite, or "
                "are 0 without an epsilon"
            )
    return scales
