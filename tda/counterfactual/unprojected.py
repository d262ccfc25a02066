"""Scores by whole gradients, without any projection: dot, cosine, optimizer-corrected, EK-FAC.

Each is ⟨T g_q, T g_i⟩ of the gradients of a query's and a passage's loss, with or without unit
norm; T is the identity, a diagonal of Adam's second moments, or the inverse root of EK-FAC's Fisher
matrix. The passages' full gradients are formed a batch at a time, which suits models of up to about
ten million parameters.
"""

import dataclasses
import functools
from collections.abc import Callable, Iterable

import jax
import jax.numpy as jnp
import numpy as np

from tda.counterfactual import eigenbasis
from tda.counterfactual.eigenbasis import Gradients
from tda.counterfactual.example_gradients import as_rows
from tda.counterfactual.loss_products import LossProducts
from tda.counterfactual.training import Training, place_tokens
from tda.data.batches import Batch
from tda.gradients import kronecker, sites
from tda.model import functional
from tda.runtime import progress, sharding

# Maps gradients by path, each [B, …], to T of them by path, whose inner products are scores.
Transform = Callable[[Gradients], Gradients]


@dataclasses.dataclass(frozen=True)
class GradientScore:
    """A method that compares transformed gradients."""

    transform: Transform
    unit_norm: bool = False


def identity(gradients: Gradients) -> Gradients:
    """Returns the gradients unchanged."""
    return gradients


def only(paths: Iterable[str]) -> Transform:
    """Returns a transform that keeps the gradients of some parameters."""
    chosen = tuple(paths)
    return lambda gradients: {p: gradients[p] for p in chosen}


def times(scales: dict[str, jax.Array], power: float = 1.0) -> Transform:
    """Returns a transform that multiplies every weight's gradient by a scale, to a power."""
    return lambda gradients: {p: g * scales[p] ** power for p, g in gradients.items()}


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
        out = {}
        for site, root in zip(chosen, roots, strict=True):
            c = curvature[site.path]
            G = jax.vmap(site.matrix)(gradients[site.path]).astype(jnp.float32)
            out[site.path] = eigenbasis.rotate(G, c.left, c.right) * root
        return out

    return transform


def score(
    training: Training,
    queries: Gradients,
    params: dict,
    passages: Iterable[Batch],
    method: GradientScore,
    by_token: bool = False,
) -> np.ndarray:
    """Returns a method's scores of every query and passage, float32 [Q, N], or token, [Q, C].

    Args:
        training: the training, for the model's structure and the number of passages.
        queries: the queries' gradients by path, [Q, …].
        params: the parameters at which the passages' gradients are taken.
        passages: batches of the table's rows, each row once.
        method: the method.
        by_token: whether the scores are of tokens, which have no norm of their own.

    Raises:
        ValueError: by token, and the method has unit norm.
    """
    if by_token and method.unit_norm:
        raise ValueError("a cosine divides by a passage's norm, which single tokens do not have")
    table, products = training.table, LossProducts(training, by_token)
    rows_of = jax.jit(functools.partial(_unit_rows, method))
    make_queries = rows_of if method.unit_norm else functools.partial(_directions, method, params)
    queries_QxP = make_queries(queries)
    scores = products.zeros(len(queries_QxP))
    with progress.bar(len(table), "whole gradients", "passage") as bar:
        for batch in (place_tokens(table, b) for b in passages):
            if method.unit_norm:
                rows_BxP = rows_of(training.example_gradients(params, batch.arrays))
                cosines_QxB = jnp.matmul(queries_QxP, rows_BxP.T, precision="highest")
                scores[:, batch.rows] = sharding.to_host(cosines_QxB)[:, : len(batch.rows)]
            else:
                products.add(scores, params, batch, queries_QxP)
            bar.update(len(batch.rows))
    return scores


def _directions(method: GradientScore, params: dict, queries: Gradients) -> jax.Array:
    """Returns Tᵀ T g_q of every query, [Q, P]: its products with whole gradients are the scores."""
    transformed = method.transform(queries)
    flat = functional.flat_parameters(params)
    Q = len(next(iter(transformed.values())))
    whole = {p: jax.ShapeDtypeStruct((Q, *x.shape), jnp.float32) for p, x in flat.items()}
    (pulled,) = jax.linear_transpose(method.transform, whole)(transformed)
    # A transposed dict has the order of its names, and rows that of the parameters.
    return as_rows({p: pulled[p] for p in flat})


def _unit_rows(method: GradientScore, gradients: Gradients) -> jax.Array:
    """Returns T of gradients by path as rows of unit norm, [B, P]."""
    rows_BxP = as_rows(method.transform(gradients))
    norm_B = jnp.linalg.norm(rows_BxP, axis=1, keepdims=True)
    return rows_BxP / jnp.where(norm_B > 0, norm_B, 1.0)
