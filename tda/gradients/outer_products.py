"""Gradients as sums of outer products Σ_s x_s δ_sᵀ, and what is computed from them without adding.

A layer y = x W has one such sum, of its inputs and its outputs' gradients. A table that looks up
its row v is multiplied by a one-hot x; v alone is held, and nothing as wide as the vocabulary is
formed for it: ⟨x_s, x_t⟩ = [v_s = v_t]. Where the table is the output head too (tied), its gradient
has a second sum, in which x is the logits' gradient and δ the state that the head multiplies.
"""

import functools
import itertools
import math
from typing import NamedTuple

import jax
import jax.numpy as jnp


class Factors(NamedTuple):
    """Sums of outer products, one of each example."""

    inputs: jax.Array
    """x, float32 [(L,) B, S, M], S the layer's positions; or row numbers, int32 [(L,) B, S, 1]."""
    deltas: jax.Array
    """δ, float32 [(L,) B, S, N]."""

    @property
    def looks_up(self) -> bool:
        """Whether the inputs are row numbers of a table."""
        return jnp.issubdtype(self.inputs.dtype, jnp.integer)


# A site's gradient: the sum of one, or of two where a table is looked up and multiplied by.
Terms = tuple[Factors, ...]


class Size(NamedTuple):
    """The size of one term of a gradient."""

    positions: int
    rows: int  # 0 of row numbers
    columns: int


def sizes_of(terms: Terms) -> list[Size]:
    """Returns the sizes of a gradient's terms."""
    return [
        Size(t.deltas.shape[-2], 0 if t.looks_up else t.inputs.shape[-1], t.deltas.shape[-1])
        for t in terms
    ]


def matrix_numbers(sizes: list[Size]) -> int:
    """Returns M·N of a gradient; 0 of a table that looks up rows alone, which is never formed."""
    return max(z.rows * z.columns for z in sizes)


def forming(sizes: list[Size]) -> float:
    """Returns the operations that form a gradient."""
    if not matrix_numbers(sizes):
        return math.inf
    return sum(z.positions * max(z.rows, 1) * z.columns for z in sizes)


def row_products(x, y):
    """Returns ⟨x_s, y_ut⟩, float32 [S, U, T], of inputs [S, M] and [U, T, M] or of row numbers."""
    numbers = [jnp.issubdtype(a.dtype, jnp.integer) for a in (x, y)]
    if all(numbers):
        return (x[:, None] == y[None, ..., 0]).astype(jnp.float32)
    if numbers[0]:
        return jnp.moveaxis(y[..., x[:, 0]], -1, 0)
    if numbers[1]:
        return x[:, y[..., 0]]
    return einsum("sm,utm->sut", x, y)


def multiply(x, W):
    """Returns x W, [(L,) …, S, N], of inputs, or the rows of W that are looked up.

    Args:
        x: inputs [(L,) …, S, M] or row numbers [(L,) …, S, 1].
        W: [M, N], or [L, M, N] of a stack.
    """
    if W.ndim == 3:
        return jax.vmap(multiply)(x, W)
    if jnp.issubdtype(x.dtype, jnp.integer):
        return W[x[..., 0]]
    return einsum("...m,mn->...n", x, W)


def form(terms: Terms):
    """Returns the gradient of one example, float32 [M, N]; not all of the terms look up rows."""
    G_MxN = sum(einsum("sm,sn->mn", *t) for t in terms if not t.looks_up)
    for t in terms:
        G_MxN = G_MxN.at[t.inputs[:, 0]].add(t.deltas) if t.looks_up else G_MxN
    return G_MxN


def products(passage: Terms, queries: Terms):
    """Returns ⟨G, G_u⟩ of one example's gradient and U others, float32 [U]; forms none of them."""
    return sum(
        einsum(
            "sut,sut->u",
            row_products(a.inputs, b.inputs),
            einsum("sn,utn->sut", a.deltas, b.deltas),
        )
        for a in passage
        for b in queries
    )


def second_moments(terms: Terms, rows: int | None = None):
    """Returns Σ_i G_i G_iᵀ and Σ_i G_iᵀ G_i of a batch, float32 [M, M] and [N, N].

    G Gᵀ = Σ_{s,t} x_s ⟨δ_s, δ_t⟩ x_tᵀ, so no gradient is formed.

    Args:
        terms: the gradients of B examples, unstacked.
        rows: V of a table, of which only the diagonal of Σ_i G_i G_iᵀ is returned, [V].
    """
    left, right = jnp.zeros(() if rows is None else rows), jnp.float32(0)
    for a, b in itertools.product(terms, terms):
        rows_BxSxT = jax.vmap(lambda x, y: row_products(x, y[None])[:, 0])(a.inputs, b.inputs)
        columns_BxSxT = einsum("bsn,btn->bst", a.deltas, b.deltas)
        right += einsum("bsn,bsk->nk", a.deltas, einsum("bst,btk->bsk", rows_BxSxT, b.deltas))
        if rows is None:
            sums_BxSxM = einsum("bst,btm->bsm", columns_BxSxT, b.inputs)
            left += einsum("bsm,bsk->mk", a.inputs, sums_BxSxM)
        elif a.looks_up:
            # A row that is looked up meets each other term from both sides.
            parts_BxS = jnp.sum(rows_BxSxT * columns_BxSxT, axis=-1) * (1 if b.looks_up else 2)
            left = left.at[a.inputs[..., 0]].add(parts_BxS)
        elif not b.looks_up:
            sums_BxSxV = einsum("bst,btv->bsv", columns_BxSxT, b.inputs)
            left += jnp.sum(a.inputs * sums_BxSxV, axis=(0, 1))
    return left, right


# Products of lower precision than float32 would differ by more than near candidates do.
einsum = functools.partial(jnp.einsum, precision="highest")
