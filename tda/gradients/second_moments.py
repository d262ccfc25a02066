"""1/√V from the optimizer's second moments, read from a checkpoint without anything else of it.

The optimizer's own rule decides where epsilon goes: Adam divides by √(ν̂ + eps_root) + eps with the
bias-corrected ν̂ = ν / (1 − b2ᵗ) (Kingma & Ba 2015, algorithm 1); Adafactor multiplies by
(r / mean r)^(−1/2) c^(−1/2) of its row and column statistics (Shazeer & Stern 2018, algorithm 4).
"""

import dataclasses
import re

import jax.numpy as jnp
import numpy as np

from tda import checkpoint
from tda.gradients import sites
from tda.model.functional import flat_parameters

CORRECTIONS = ("none", "factored", "adam")


class SecondMomentError(ValueError):
    """The optimizer's state does not hold what a correction needs."""


@dataclasses.dataclass(frozen=True)
class Scale:
    """1/√V of one site, an outer product or in full. Axes are stacked as the site's are.

    Attributes:
        left: float32 [(L,) M], or None.
        right: float32 [(L,) N], or None.
        full: float32 [(L,) M, N], or None.
    """

    left: jnp.ndarray | None = None
    right: jnp.ndarray | None = None
    full: jnp.ndarray | None = None

    def dense(self) -> jnp.ndarray:
        """The scale of every weight: float32 [(L,) M, N]."""
        return (
            self.full
            if self.full is not None
            else self.left[..., :, None] * self.right[..., None, :]
        )


def adam_scale(nu, count, b2: float, eps: float, eps_root: float = 0.0) -> Scale:
    """Adam's own scale of every weight, from ν after `count` steps."""
    nu_hat = jnp.asarray(nu, jnp.float32) / (1.0 - b2 ** jnp.asarray(count, jnp.float32))
    return Scale(full=1.0 / (jnp.sqrt(nu_hat + eps_root) + eps))


def factored_scale(full) -> Scale:
    """The rank-one scale with the row and column means of V = full⁻² (Shazeer & Stern 2018, eq. 3).

    Args:
        full: 1/√V, float32 [(L,) M, N].
    """
    v = jnp.square(1.0 / full)
    rows, columns = jnp.mean(v, axis=-1), jnp.mean(v, axis=-2)
    overall = jnp.mean(rows, axis=-1, keepdims=True)
    return Scale(left=jnp.sqrt(overall / rows), right=1.0 / jnp.sqrt(columns))


def adafactor_scale(v_row, v_col, v, shape: tuple[int, ...]) -> Scale:
    """The scale that optax's Adafactor multiplies a gradient of this shape by.

    optax keeps, of the two largest axes d1 ≤ d0, v_row = mean over d0 and v_col = mean over d1, and
    `v` where it does not factor.

    Args:
        v_row, v_col, v: the state's leaves of this parameter; those unused have shape (1,).
        shape: of the parameter.

    Raises:
        SecondMomentError: no leaf fits the shape.
    """
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
    # v_row lacks axis d0, so d1 keeps its number unless it came after d0.
    reduced = d1 - 1 if d1 > d0 else d1
    row = 1.0 / jnp.sqrt(v_row / jnp.mean(v_row, axis=reduced, keepdims=True))
    col = 1.0 / jnp.sqrt(v_col)
    if {d0, d1} == {len(shape) - 2, len(shape) - 1}:
        return Scale(left=row, right=col) if d0 > d1 else Scale(left=col, right=row)
    return Scale(full=jnp.expand_dims(row, d0) * jnp.expand_dims(col, d1))


def read(
    root, chosen: list[sites.Site], correction: str, step: int | None = None
) -> dict[str, Scale]:
    """The scale of every site, from the optimizer's state of a checkpoint.

    Args:
        root: the directory of checkpoints; its description's `optimizer` gives b2, eps, eps_root.
        chosen: the sites.
        correction: "factored" (row and column statistics, Adafactor's own or made from Adam's ν) or
            "adam" (exact, every weight).
        step: None for the last checkpoint.

    Returns:
        A `Scale` by the site's path.

    Raises:
        SecondMomentError: unknown correction, or the state lacks what it needs.
        tda.checkpoint.CheckpointError: no checkpoint, or one without optimizer state.
    """
    if correction not in ("factored", "adam"):
        raise SecondMomentError(f"unknown correction {correction!r}; use {', '.join(CORRECTIONS)}")
    paths = {s.path: s for s in chosen}
    statistic = re.compile(r"(^|/)(nu|v|v_row|v_col)/(.+)$")

    def wanted(name: str) -> bool:
        match = statistic.search(name)
        return name.split("/")[-1] == "count" or bool(match and match[3] in paths)

    flat = flat_parameters(checkpoint.restore_optimizer(root, wanted, step))
    leaves = {}
    for name, x in flat.items():
        if x is ... or not (match := statistic.search(name)):
            continue
        key = (match[2], match[3])
        if key in leaves:
            raise SecondMomentError(f"the optimizer's state has more than one {'/'.join(key)}")
        leaves[key] = (name, x)
    constants = checkpoint.describe(root, step).get("optimizer", {})
    return {
        path: _site_scale(site, leaves, flat, constants, correction) for path, site in paths.items()
    }


def _site_scale(site, leaves, flat, constants, correction) -> Scale:
    shape = (site.rows, site.columns)
    shape = shape if site.stack is None else (site.stack, *shape)
    if ("nu", site.path) in leaves:
        name, nu = leaves["nu", site.path]
        if nu.shape != shape:
            raise SecondMomentError(f"ν of {site.path} has shape {nu.shape}, the matrix {shape}")
        missing = {"b2", "eps"} - constants.keys()
        if missing:
            raise SecondMomentError(
                f"the checkpoint's description lacks optimizer.{' and '.join(sorted(missing))}, "
                "which Adam's correction needs"
            )
        count = flat[name[: name.index("nu/")] + "count"]
        scale = adam_scale(
            nu, count, constants["b2"], constants["eps"], constants.get("eps_root", 0.0)
        )
        return factored_scale(scale.full) if correction == "factored" else scale
    if ("v_row", site.path) in leaves:
        if correction == "adam":
            raise SecondMomentError(
                "the checkpoint was trained with Adafactor, which keeps no second moment for every "
                "weight; use correction='factored'"
            )
        found = [leaves[kind, site.path][1] for kind in ("v_row", "v_col", "v")]
        return adafactor_scale(*found, shape)
    held = ", ".join(sorted({k for k, _ in leaves})) or "no second moments"
    raise SecondMomentError(f"the optimizer's state has none for {site.path} (it has {held})")
