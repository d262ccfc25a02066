"""Metrics C^(1/2) of whole gradients, applied to both sides of a product (`pair_products`)."""

import dataclasses
import math
from collections.abc import Iterable

import jax
import jax.numpy as jnp
import numpy as np

from tda.gradients import kronecker
from tda.gradients.moments.scales import Scale
from tda.gradients.sites import Site
from tda.hessian.root import ROUNDING, default_component
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
# A = E[G Gᵀ] and B = E[Gᵀ G] by path of site (`pair_products.fit_moments`).
Moments = dict[str, tuple[np.ndarray, np.ndarray]]


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


def whitened(metric: Metric, moments: Moments, damping: float = DAMPING) -> Metric:
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


def mixture(
    train: Moments, evaluation: Moments, weight: float = -1.0, component: int = 0
) -> tuple[Moments, float, int]:
    """Returns λ R_eval + (1 − λ) R_train, each factor by itself (`tda.hessian.mix`), λ and k.

    Args:
        train, evaluation: moments of passages and of queries.
        weight: λ; below 0, that of `mixing_weight`.
        component: k of its rule; 0: in proportion to the numbers of a gradient.
    """
    if not component:
        numbers = sum(
            math.prod(B.shape[:-2]) * A.shape[-1] * B.shape[-1] for A, B in train.values()
        )
        component = default_component(numbers)
    if weight < 0:
        weight = mixing_weight(train, evaluation, component)
    mixed = {
        path: tuple(
            weight * e + (1 - weight) * t for t, e in zip(pair, evaluation[path], strict=True)
        )
        for path, pair in train.items()
    }
    return mixed, weight, component


def mixing_weight(train: Moments, evaluation: Moments, k: int) -> float:
    """Returns λ of the paper's rule: λ σ_eval[k] = (1 − λ) σ_train[k] (`tda.hessian`).

    Args:
        train, evaluation: moments of passages and of queries.
        k: the component among the eigenvalues of all A ⊗ B / tr A, counted from 1.

    Raises:
        ValueError: R_eval has no more than rounding at component k, so that λ would be 1.
    """
    of_train, of_queries = map(_eigenvalues, (train, evaluation))
    largest = max(float(rows.max() * columns.max()) for rows, columns in of_queries)
    a, b = _kth_product(of_train, k), _kth_product(of_queries, k)
    if b <= ROUNDING * largest:
        raise ValueError(
            f"R of the queries has no direction at component {k}, where the mixing rule compares "
            "it with R of the passages: ask more queries, set a smaller hessian.component or a "
            "hessian.weight from 0 to 1, or use a method with R of the passages alone, such as "
            "rerank_exp5 (in tda.trace, 'trackstar_train')"
        )
    return a / (a + b)


def _eigenvalues(moments: Moments) -> list[tuple[np.ndarray, np.ndarray]]:
    """Returns the eigenvalues of A / tr A and of B of every layer, float64 [M] and [N]."""
    pairs = []
    for A, B in moments.values():
        columns = np.maximum(np.linalg.eigvalsh(np.asarray(B, np.float64)), 0)
        is_diagonal = A.ndim < B.ndim
        rows = np.asarray(A, np.float64)
        rows = rows if is_diagonal else np.maximum(np.linalg.eigvalsh(rows), 0)
        rows = rows / np.maximum(rows.sum(axis=-1, keepdims=True), np.finfo(np.float64).tiny)
        flat = rows.reshape(-1, rows.shape[-1]), columns.reshape(-1, columns.shape[-1])
        pairs += zip(*flat, strict=True)
    return pairs


def _kth_product(pairs: list[tuple[np.ndarray, np.ndarray]], k: int) -> float:
    """Returns the k-th largest of all products of a number of the left and one of the right.

    By halving an interval: a model's products are as many as its weights.
    """
    columns = [np.sort(right) for _, right in pairs]

    def count(least: float) -> int:
        above = 0
        for (left, _), right in zip(pairs, columns, strict=True):
            positive = left[left > 0]
            above += len(positive) * len(right) - int(
                np.searchsorted(right, least / positive).sum()
            )
        return above

    high = max(float(left.max() * right.max()) for left, right in pairs)
    low = high * np.finfo(np.float64).eps ** 2
    if not high or count(low) < k:
        return 0.0
    for _ in range(64):
        middle = (low * high) ** 0.5
        low, high = (middle, high) if count(middle) >= k else (low, middle)
    return low


def balance_tables(
    metric: Metric, squares: dict[str, float], numbers: dict[str, int], tables: Iterable[str]
) -> Metric:
    """Scales tables so that a number of theirs weighs what one of the other matrices does.

    R^(−1/2) G has as many units of squared norm as numbers, were R right. Of a table R keeps a
    diagonal for the rows alone, and the columns' moments are those of frequent tokens: rare tokens'
    rows, whitened so, have thousands of times their share, and a cosine would compare nothing else.

    Args:
        metric: C^(1/2), with bases.
        squares: the mean of ‖C^(1/2) G‖² over passages, by path.
        numbers: how many numbers a gradient has, by path.
        tables: the paths of tables.
    """
    tables = set(tables) & set(metric)
    matrices = [path for path in metric if path not in tables]
    if not matrices:
        return metric
    usual = sum(squares[p] for p in matrices) / sum(numbers[p] for p in matrices)
    scaled = dict(metric)
    for path in tables:
        bases = metric[path].bases
        if bases is not None and squares[path] > 0:
            factor = np.float32(np.sqrt(usual * numbers[path] / squares[path]))
            bases = bases[0] * factor, bases[1]
            scaled[path] = dataclasses.replace(metric[path], bases=bases)
    return scaled


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
