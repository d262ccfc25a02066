"""Scores by whole gradients, without any projection: dot, cosine, optimizer-corrected, EK-FAC.

Each is ⟨T g_q, T g_i⟩ of the gradients of a query's and a passage's loss, with or without unit
norm; T is the identity, a diagonal of Adam's second moments, or the inverse root of EK-FAC's Fisher
matrix. The passages' full gradients are formed a batch at a time, which suits models of up to about
ten million parameters.
"""

import dataclasses
from collections.abc import Callable, Iterable

import jax
import jax.numpy as jnp
import numpy as np

from tda.counterfactual import eigenbasis
from tda.counterfactual.eigenbasis import Gradients
from tda.counterfactual.example_gradients import as_rows
from tda.counterfactual.training import Training
from tda.data.batches import Batch
from tda.gradients import kronecker, sites
from tda.runtime import progress, sharding

# Maps gradients by path, each [B, …], to T of them: arrays [B, …], whose inner products are scores.
Transform = Callable[[dict[str, jax.Array]], list[jax.Array]]


@dataclasses.dataclass(frozen=True)
class GradientScore:
    """A method that compares transformed gradients."""

    transform: Transform
    unit_norm: bool = False


def identity(gradients: dict[str, jax.Array]) -> list[jax.Array]:
    """Returns the gradients unchanged."""
    return list(gradients.values())


def only(paths: Iterable[str]) -> Transform:
    """Returns a transform that keeps the gradients of some parameters."""
    chosen = tuple(paths)
    return lambda gradients: [gradients[p] for p in chosen]


def times(scales: dict[str, jax.Array], power: float = 1.0) -> Transform:
    """Returns a transform that multiplies every weight's gradient by a scale, to a power."""
    return lambda gradients: [g * scales[p] ** power for p, g in gradients.items()]


def ekfac(
    chosen: list[sites.Site],
    curvature: dict[str, kronecker.Curvature],
    damping: float = kronecker.DAMPING,
) -> Transform:
    """Returns the transform (F + λ)^(−1/2), in the basis of F's eigenvectors.

    Args:
        chosen: the matrices, from `tda.gradients.kronecker.factored`; all other gradients are left
            out.
        curvature: eigenvectors and eigenvalues by path.
        damping: λ over the mean of a matrix's eigenvalues, above 0.

    Raises:
        ValueError: all gradients of a matrix vanish, or the damping is not above 0.
    """
    roots = [kronecker.inverse_root_values(s, curvature[s.path], damping) for s in chosen]

    def transform(gradients):
        out = []
        for site, root in zip(chosen, roots, strict=True):
            c = curvature[site.path]
            G = jax.vmap(site.matrix)(gradients[site.path]).astype(jnp.float32)
            out.append(eigenbasis.rotate(G, c.left, c.right) * root)
        return out

    return transform


def score(
    training: Training,
    queries: Gradients,
    params: dict,
    passages: Iterable[Batch],
    method: GradientScore,
) -> np.ndarray:
    """Returns a method's scores of every query and passage, float32 [Q, N].

    Args:
        training: the training, for the model's structure and the number of passages.
        queries: the queries' gradients by path, [Q, …].
        params: the parameters at which the passages' gradients are taken.
        passages: batches of the table's rows, each row once.
        method: the method.
    """
    transform = _as_rows(method)
    queries_QxP = transform(queries)
    scores_QxN = np.zeros((len(queries_QxP), len(training.table)), np.float32)
    with progress.bar(len(training.table), "whole gradients", "passage") as bar:
        for batch in passages:
            rows_BxP = transform(training.example_gradients(params, batch.arrays()))
            product_QxB = sharding.to_host(_products(queries_QxP, rows_BxP))
            scores_QxN[:, batch.rows] = product_QxB[:, : len(batch.rows)]
            bar.update(len(batch.rows))
    return scores_QxN


@jax.jit
def _products(queries_QxP, rows_BxP):
    return jnp.matmul(queries_QxP, rows_BxP.T, precision="highest")


def _as_rows(method: GradientScore) -> Callable[[dict], jax.Array]:
    """Returns the function of gradients by path to rows [B, P] whose inner products are scores."""

    @jax.jit
    def transformed(gradients):
        rows_BxP = as_rows(dict(enumerate(method.transform(gradients))))
        if not method.unit_norm:
            return rows_BxP
        norm_B = jnp.linalg.norm(rows_BxP, axis=1, keepdims=True)
        return rows_BxP / jnp.where(norm_B > 0, norm_B, 1.0)

    return transformed
