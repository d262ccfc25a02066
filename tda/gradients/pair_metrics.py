"""Metrics C^(1/2) of whole gradients, applied to both sides of a product (`pair_products`)."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np

from tda.gradients import kronecker
from tda.gradients.moments.scales import Scale
from tda.gradients.sites import Site
from tda.hessian.root import ROUNDING
from tda.runtime import host_blas

NOT_FACTORED = (
    "R without projection is a product of a row's and a column's part, and the exact Adam "
    "correction (gradients.correction=adam) is not: use factored or low_rank(R), or a method "
    "without R"
)
# Added to a Kronecker factor of R, in mean eigenvalues.
DAMPING = 1e-3


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class SiteMetric:
    """C^(1/2) of one site, applied to both sides of a product; None is the identity.

    Attributes:
        scales: a sum of outer products by which every number is multiplied first: [(L,) R, M] and
            [(L,) R, N].
        bases: matrices that rows and columns are then multiplied by: [(L,) M, M] and [(L,) N, N];
            of a table's rows a diagonal, [(L,) M].
        weights: what every number is multiplied by last: [(L,) M, N].
    """

    scales: tuple[jax.Array, jax.Array] | None = None
    bases: tuple[jax.Array, jax.Array] | None = None
    weights: jax.Array | None = None

    @classmethod
    def of_scale(cls, scale: Scale) -> "SiteMetric":
        """Returns the metric that multiplies a gradient by 1/√V."""
        if scale.full is not None:
            return cls(weights=jnp.asarray(scale.full, jnp.float32))
        return cls(scales=(jnp.asarray(scale.left), jnp.asarray(scale.right)))


# C^(1/2) by path of site.
Metric = dict[str, SiteMetric]


def identity(sites: list[Site]) -> Metric:
    """Returns the metric that leaves gradients unchanged."""
    return {s.path: SiteMetric() for s in sites}


def corrected(sites: list[Site], scales: dict[str, Scale]) -> Metric:
    """Returns the metric of 1/√V on both sides."""
    return {s.path: SiteMetric.of_scale(scales[s.path]) for s in sites}


def ekfac(sites: list[Site], curvature: dict[str, kronecker.Curvature], damping: float) -> Metric:
    """Returns the metric of (F + λ)^(−1), F EK-FAC's Fisher matrix (`tda.gradients.kronecker`)."""
    metric = {}
    for site in sites:
        c = curvature[site.path]
        bases = jnp.asarray(c.left), jnp.asarray(c.right)
        weights = kronecker.inverse_root_values(site, c, damping)
        metric[site.path] = SiteMetric(bases=bases, weights=weights)
    return metric


def whitened(
    metric: Metric, moments: dict[str, tuple[np.ndarray, np.ndarray]], damping: float = DAMPING
) -> Metric:
    """Returns a metric followed by R^(−1/2), R = A ⊗ B / tr A of each matrix.

    Args:
        metric: without weights, from `identity` or `corrected`.
        moments: A = E[G Gᵀ] and B = E[Gᵀ G] by path, under `metric`, from
            `pair_products.fit_moments`.
        damping: added to A and B, in mean eigenvalues of each; with 0, directions that are no more
            than rounding are left out (a pseudo-inverse).

    Raises:
        ValueError: the metric has weights, or all gradients of a matrix vanish.
    """
    whitened_metric = {}
    for path, m in metric.items():
        if m.weights is not None:
            raise ValueError(NOT_FACTORED)
        A, B = moments[path]
        trace = np.trace(B, axis1=-2, axis2=-1)[..., None, None]
        if not (trace > 0).all():
            raise ValueError(f"{path} has no R: all gradients of the sample vanish")
        with host_blas.one_thread():
            right = _inverse_root(B / trace, damping)
            if A.ndim < B.ndim:
                left = _damped_root(np.asarray(A / trace[..., 0], np.float64), damping)
            else:
                left = _inverse_root(A / trace, damping)
        # R is A ⊗ B / tr A, so that E‖G‖² is its trace; left and right here are those of A / tr A.
        bases = jnp.asarray(left, jnp.float32), jnp.asarray(right / np.sqrt(trace), jnp.float32)
        whitened_metric[path] = dataclasses.replace(m, bases=bases)
    return whitened_metric


def _inverse_root(A: np.ndarray, damping: float) -> np.ndarray:
    """Returns A^(−1/2) of a damped moment, float64 [(L,) M, M]."""
    values, vectors = np.linalg.eigh(np.asarray(A, np.float64))
    return np.einsum("...mk,...k,...nk->...mn", vectors, _damped_root(values, damping), vectors)


def _damped_root(values: np.ndarray, damping: float) -> np.ndarray:
    """Returns (λ + damping · mean)^(−1/2) of eigenvalues; with 0, those of rounding are left out.

    So does `tda.hessian.inverse_root`.
    """
    values = np.maximum(values, 0) + damping * values.mean(-1, keepdims=True)
    if damping:
        return values**-0.5
    is_rounding = values <= ROUNDING * values.max(-1, keepdims=True)
    return np.where(is_rounding, 0.0, np.where(is_rounding, 1.0, values) ** -0.5)
