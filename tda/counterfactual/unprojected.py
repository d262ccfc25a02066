"""Scores by whole gradients, without any projection: dot, cosine, optimizer-corrected, EK-FAC.

Every one is ⟨T g_q, T g_i⟩ of the gradients of a query's and a passage's loss, perhaps with unit
norm; T is the identity, a diagonal of Adam's second moments, or the inverse root of EK-FAC's
Fisher matrix. Each passage's gradient is formed in full, a batch at a time: for models of up to
some ten million parameters.
"""

import dataclasses
from collections.abc import Callable, Iterable

import jax
import jax.numpy as jnp
import numpy as np

from tda.counterfactual.example_gradients import as_rows
from tda.counterfactual.training import QueryLosses, Training
from tda.gradients import kronecker, sites
from tda.runtime import progress, sharding

# Maps gradients by path, each [B, …], to T of them: arrays [B, …] whose inner products count.
Transform = Callable[[dict[str, jax.Array]], list[jax.Array]]


@dataclasses.dataclass(frozen=True)
class GradientScore:
    """A method that compares transformed gradients."""

    transform: Transform
    unit_norm: bool = False


def identity(gradients: dict[str, jax.Array]) -> list[jax.Array]:
    """Returns the gradients as they are."""
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
        damping: λ over the mean of a matrix's eigenvalues.
    """

    def transform(gradients):
        out = []
        for site in chosen:
            c = curvature[site.path]
            G = jax.vmap(site.matrix)(gradients[site.path]).astype(jnp.float32)
            rotated = jnp.einsum(
                "...mp,b...mn,...nq->b...pq", c.left, G, c.right, precision="highest"
            )
            scale = c.values + damping * c.values.mean(axis=(-1, -2), keepdims=True)
            out.append(rotated * jnp.asarray(scale) ** -0.5)
        return out

    return transform


def fit_ekfac(
    model, chosen: list[sites.Site], batches: Callable[[], Iterable[dict]]
) -> dict[str, kronecker.Curvature]:
    """Returns EK-FAC's eigenvectors and eigenvalues of a model, with labels drawn from it.

    Args:
        model: the model.
        chosen: the matrices.
        batches: returns the batches of passages with sampled labels (`kronecker.batches`).
    """
    covariances = kronecker.covariances(model, chosen, batches(), "sampled")
    bases = kronecker.eigenvectors(covariances)
    return kronecker.corrected(model, chosen, batches(), "sampled", bases)


def score(
    training: Training,
    queries: QueryLosses,
    params: dict,
    passages: Iterable,
    methods: dict[str, GradientScore],
) -> dict[str, np.ndarray]:
    """Returns the scores of every query and passage by several methods, float32 [Q, N].

    Args:
        training: the training, for the model's structure and the number of passages.
        queries: the queries.
        params: the parameters at which gradients are taken.
        passages: batches of the table's rows, each row once.
        methods: the methods by name.
    """
    N = len(training.table)
    transforms = {name: _as_rows(m) for name, m in methods.items()}
    query_gradients = queries.all_gradients(params)
    query_sides = {name: transform(query_gradients) for name, transform in transforms.items()}
    scores = {name: np.zeros((len(queries), N), np.float32) for name in methods}
    with progress.bar(N, "whole gradients", "passage") as bar:
        for batch in passages:
            gradients = training.example_gradients(params, batch.arrays())
            for name, transform in transforms.items():
                product_QxB = _products(query_sides[name], transform(gradients))
                scores[name][:, batch.rows] = sharding.to_host(product_QxB)[:, : len(batch.rows)]
            bar.update(len(batch.rows))
    return scores


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
