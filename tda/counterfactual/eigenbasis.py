"""Functions of a Fisher matrix that is diagonal in a Kronecker basis, and Shampoo's fit of one.

F = (Q_A ⊗ Q_S) Λ (Q_A ⊗ Q_S)ᵀ of every matrix, so that f(F) G = Q_A (f(Λ) ∘ (Q_Aᵀ G Q_S)) Q_Sᵀ.
EK-FAC (`tda.gradients.fitted_curvature`) takes Q_A and Q_S from the covariances of a layer's inputs
and output gradients; eigenvalue-corrected Shampoo from the passages' gradients themselves, E[G Gᵀ]
and E[Gᵀ G]. Both have Λ = E[(Q_Aᵀ G Q_S)²], with labels drawn from the model (George et al. 2018).
"""

from collections.abc import Callable, Iterable

import jax
import jax.numpy as jnp
import numpy as np

from tda.gradients import kronecker, sites
from tda.gradients.kronecker import Curvature
from tda.runtime import sharding

Gradients = dict[str, jax.Array]


def fit_shampoo(
    chosen: list[sites.Site], gradients: Callable[[], Iterable[Gradients]]
) -> dict[str, Curvature]:
    """Returns the eigenvectors of E[G Gᵀ] and E[Gᵀ G], and the eigenvalues in their basis.

    Args:
        chosen: the matrices.
        gradients: returns the whole gradients of a sample by path, [B, …], batch by batch.

    Raises:
        ValueError: the sample has no gradients.
    """

    def moments(matrices, _):
        pairs = {p: (_einsum("b...mn,b...kn->...mk", G, G),) for p, G in matrices.items()}
        return {
            p: (*x, _einsum("b...mn,b...mk->...nk", *[matrices[p]] * 2)) for p, x in pairs.items()
        }

    def squares(matrices, bases):
        return {p: (jnp.sum(rotate(G, *bases[p]) ** 2, axis=0),) for p, G in matrices.items()}

    bases = kronecker.eigenvectors(_mean(chosen, gradients(), moments, {}))
    ends = {p: (jnp.asarray(c.left), jnp.asarray(c.right)) for p, c in bases.items()}
    values = _mean(chosen, gradients(), squares, ends)
    return {p: Curvature(c.left, c.right, sharding.to_host(values[p][0])) for p, c in bases.items()}


def _mean(chosen, gradients: Iterable[Gradients], statistics, bases) -> dict[str, tuple]:
    """Returns the mean over examples of statistics of each matrix's gradients."""

    @jax.jit
    def of_batch(batch, bases):
        matrices = {s.path: jax.vmap(s.matrix)(batch[s.path]) for s in chosen}
        return statistics(matrices, bases)

    total, count = None, 0
    for batch in gradients:
        batch = {s.path: batch[s.path] for s in chosen}
        count += len(batch[chosen[0].path])
        sums = of_batch(batch, bases)
        total = sums if total is None else jax.tree.map(jnp.add, total, sums)
    if not count:
        raise ValueError("the sample has no gradients; give at least one passage that is scored")
    return jax.tree.map(lambda x: x / count, total)


def rotate(G, left, right):
    """Returns Q_Aᵀ G Q_S of matrices [B, (L,) M, N]."""
    return _einsum("...mp,b...mn,...nq->b...pq", left, G, right)


def apply(
    chosen: list[sites.Site],
    curvature: dict[str, Curvature],
    function: Callable[[Curvature], np.ndarray],
    gradients: Gradients,
) -> Gradients:
    """Returns f(F) of gradients of the chosen matrices, by path in the parameters' shapes.

    Args:
        chosen: the matrices.
        curvature: eigenvectors and eigenvalues by path.
        function: maps a matrix's curvature to f(Λ), in the shape of Λ.
        gradients: by path, [B, …]; those of other parameters are left out.
    """
    out = {}
    for site in chosen:
        c, G = curvature[site.path], gradients[site.path]
        G = G.astype(jnp.float32)
        rotated = rotate(jax.vmap(site.matrix)(G), c.left, c.right)
        scaled = rotated * jnp.asarray(function(c), jnp.float32)
        matrices = _einsum("...mp,b...pq,...nq->b...mn", c.left, scaled, c.right)
        # `matrix` only moves numbers: its transpose is its inverse.
        back = jax.linear_transpose(site.matrix, jax.ShapeDtypeStruct(G.shape[1:], G.dtype))
        out[site.path] = jax.vmap(lambda x, back=back: back(x)[0])(matrices)
    return out


def _einsum(subscripts, *operands):
    # In full float32: lower precision changes the eigenvectors of a covariance.
    return jnp.einsum(subscripts, *operands, precision="highest")
