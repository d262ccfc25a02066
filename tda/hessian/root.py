"""From R to R^(−1/2): spectra, the mixture of R_eval and R_train, shrinkage and inverse roots.

The mixture R = λ R_eval + (1 − λ) R_train removes directions that all queries share (Chang et al.
2024, section 3.2).

The eigenvalues of a Kronecker product A ⊗ B / t are all a_i b_j / t. Mixing rule, damping and
cutoff treat this spectrum like that of a dense R. Mixing and shrinkage apply to the factors:
λ A_eval + (1 − λ) A_train is E[G Gᵀ] of the mixture of both samples, as λ R_eval + (1 − λ) R_train
is its E[g gᵀ], while a mixture of two Kronecker products is no Kronecker product.

R_eval of all queries contains each query's own gradient, and so its label: whitening then shrinks
the very direction that the query asks for. The search can remove it, exactly and at little
cost (`tda.retrieval.scorer.Scorer.query_weight`), or each half of the queries can be whitened by
R_eval of the other half (`draw_halves`).
"""

import functools
import math
from collections.abc import Iterable, Iterator, Sequence

import jax
import jax.numpy as jnp
import numpy as np

from tda.hessian import blocks
from tda.hessian.blocks import Block, KroneckerRoot, Root, Shape, dense_shapes, group_factors
from tda.runtime import host_blas

# An eigenvalue below this share of the largest is rounding. LAPACK's float32 eigenvalues of
# rank-deficient blocks of up to 2,048 columns are off by 0.2 eps of the largest; the float32
# products that R is the sum of add more, which 64 eps covers.
ROUNDING = 64 * np.finfo(np.float32).eps


def spectra(R: list[np.ndarray], shapes: Sequence[Shape] | None = None) -> list[np.ndarray]:
    """Returns the eigenvalues of each block in descending order: float64 [E_b].

    Args:
        R: the blocks, or the factors of each (`Autocorrelation.blocks`).
        shapes: the shape of each block; None: all are dense.
    """

    def values(matrix: np.ndarray) -> np.ndarray:
        return np.maximum(np.linalg.eigvalsh(matrix.astype(np.float32)), 0.0).astype(np.float64)

    out, by_factor = [], host_blas.map_blocks(values, R)
    for factors in group_factors(by_factor, shapes or dense_shapes(map(len, R))):
        product = factors[0]
        if len(factors) == 2:
            trace = factors[0].sum()
            product = np.outer(factors[0], factors[1] / trace if trace else factors[1]).ravel()
        out.append(np.sort(product)[::-1])
    return out


def default_component(width: int) -> int:
    """Returns the component k of the mixing rule: 1000 of 65,536 columns, in proportion."""
    return max(1, round(1000 * width / 65536))


def check_component(evaluation: list[np.ndarray], k: int, count: int) -> None:
    """Checks that R_eval has an eigenvalue above rounding at component k of the mixing rule.

    Otherwise the rule gives λ = 1, which leaves R_train out silently.

    Args:
        evaluation: eigenvalues of R_eval by block, descending.
        k: the component, counted from 1.
        count: number of queries in R_eval.

    Raises:
        ValueError: there are fewer than k eigenvalues, or the k-th is no more than the rounding of
            its block's largest.
    """
    values = np.concatenate(evaluation)
    if k > len(values):
        raise ValueError(
            f"there is no component {k} (hessian.component) of {len(values)} dimensions"
        )
    rounding = np.concatenate([np.full(len(x), ROUNDING * x[0]) for x in evaluation])
    at_k = np.argsort(-values, kind="stable")[k - 1]
    if values[at_k] <= rounding[at_k]:
        raise ValueError(
            f"R_eval of {count} queries has no direction at component {k}, where the mixing rule "
            "compares it with R_train: λ would be 1, which leaves R_train out. Ask more queries, "
            "set a smaller hessian.component or a hessian.weight from 0 to 1, or use "
            "trackstar_train (also exp5) instead of trackstar, or exp4 instead of trackstar_raw: "
            "they take R of the passages alone"
        )


def mixing_weight(train: Sequence[np.ndarray], evaluation: Sequence[np.ndarray], k: int) -> float:
    """Returns λ of the paper's rule: λ σ_eval[k] = (1 − λ) σ_train[k].

    Args:
        train: eigenvalues of R_train by block, in any order.
        evaluation: eigenvalues of R_eval, likewise.
        k: the component, counted from 1.

    Raises:
        ValueError: both spectra vanish at k, since the gradients span fewer than k directions.
    """
    a, b = (np.sort(np.concatenate(values))[-k] for values in (train, evaluation))
    if a + b <= 0:
        raise ValueError(f"both spectra vanish at component {k}; choose a smaller one")
    return float(a / (a + b))


def mix(
    train: list[np.ndarray], evaluation: Iterable[np.ndarray], weight: float
) -> Iterator[np.ndarray]:
    """Yields λ R_eval + (1 − λ) R_train by block, so that only one more block is in memory."""
    for train_block, evaluation_block in zip(train, evaluation, strict=True):
        yield weight * evaluation_block + (1 - weight) * train_block


def shrinkage(
    R: Sequence[np.ndarray], noise: np.ndarray, targets: Sequence[np.ndarray] | None = None
) -> np.ndarray:
    """Returns the share ρ of each block to replace by its target: float64 [blocks].

    With ρ of Ledoit & Wolf (2004, eq. 14), (1 − ρ) R + ρ T is nearest to R of infinitely many
    rows: ρ is the share of ‖R − T‖² that is due to chance. Towards a multiple of I it is the
    damping that a sample of this size needs: little with many rows, much in a block that has more
    columns than there were rows.

    Args:
        R: the blocks.
        noise: expected squared error of each block (`Autocorrelation.noise`).
        targets: each block is shrunk towards the multiple T of its target with the same trace; None
            for I.

    Raises:
        ValueError: the noise of a block is not a number.
    """
    if np.isnan(noise).any():
        raise ValueError(
            f"noise of block {int(np.flatnonzero(np.isnan(noise))[0])} is NaN, which tells no "
            "shrinkage; give gradients whose squares float32 can hold, or set a damping"
        )
    shares = np.zeros(len(R))
    for i, (block, block_noise) in enumerate(zip(R, noise, strict=True)):
        distance = np.sum(np.square(block - _target(block, targets, i)))
        shares[i] = 1.0 if distance <= 0 else min(1.0, block_noise / distance)
    return shares


def shrink(
    R: Iterable[np.ndarray], shares: np.ndarray, targets: Sequence[np.ndarray] | None = None
) -> Iterator[np.ndarray]:
    """Yields (1 − ρ) R + ρ T of each block, T as in `shrinkage`."""
    for i, (block, share) in enumerate(zip(R, shares, strict=True)):
        yield (1 - share) * block + share * _target(block, targets, i)


def _target(block: np.ndarray, targets: Sequence[np.ndarray] | None, i: int) -> np.ndarray:
    shape = np.eye(len(block)) if targets is None else targets[i]
    trace = np.trace(shape)
    return shape * (np.trace(block) / trace) if trace > 0 else np.zeros_like(block)


def draw_halves(count: int, seed: int = 0) -> tuple[np.ndarray, np.ndarray]:
    """Splits the numbers below `count` at random into two halves, each int64 and ascending.

    Raises:
        ValueError: `count` is below two.
    """
    if count < 2:
        raise ValueError(f"{count} query cannot be whitened by others; ask two or more")
    order = np.random.default_rng(seed).permutation(count)
    return np.sort(order[: count // 2]), np.sort(order[count // 2 :])


def inverse_root(
    R: Iterable[np.ndarray],
    damping: float = 1e-3,
    cutoff: float = 0.0,
    shapes: Sequence[Shape] | None = None,
) -> list[Root]:
    """Returns (R + damping · m I)^(−1/2) of each block, m its mean eigenvalue.

    A block whose gradients all vanish becomes zero, not infinite. Of a Kronecker product it is that
    root in the eigenvectors of the factors, which whitens as well: WᵀW = (R + damping · m I)⁻¹.

    Args:
        R: symmetric, non-negative blocks, or the factors of each (`Autocorrelation.blocks`).
        damping: a multiple of the block's mean eigenvalue, so that one number suits blocks of any
            scale. It bounds the weight of directions that the sampled gradients hardly have. With
            0, directions that are no more than rounding are left out (a pseudo-inverse).
        cutoff: directions with an eigenvalue below this multiple of the mean are left out (a
            pseudo-inverse); the damping should be small then.
        shapes: the shape of each block; None: all are dense.

    Returns:
        The roots, float32: symmetric [E_b, E_b] of dense blocks, `KroneckerRoot` of the others.

    Raises:
        ValueError: damping or cutoff is below 0, or the cutoff leaves no direction of a block.
    """
    if damping < 0 or cutoff < 0:
        raise ValueError(f"damping={damping} and cutoff={cutoff} must not be negative")
    grouped = ((x,) for x in R) if shapes is None else group_factors(R, shapes)
    root = functools.partial(_block_inverse_root, damping=damping, cutoff=cutoff)
    return host_blas.map_blocks(root, grouped)


def _block_inverse_root(factors: tuple[np.ndarray, ...], damping: float, cutoff: float) -> Root:
    trace, size = np.trace(factors[0]), math.prod(map(len, factors))
    if trace <= 0:
        zeros = [np.zeros(x.shape, np.float32) for x in factors]
        if len(zeros) == 1:
            return zeros[0]
        scales = np.zeros([len(x) for x in factors], np.float32)
        return KroneckerRoot(zeros[0], zeros[1], scales)
    pairs = []
    for x in factors:
        # Gradients of 1e-20 would underflow when squared in float32; after division by the mean
        # eigenvalue, computed in float64, all factors are of order one.
        values, vectors = np.linalg.eigh((x / (trace / len(x))).astype(np.float32))
        values = np.maximum(values, 0.0)
        if not damping:
            values[values < ROUNDING * values[-1]] = 0.0
        pairs.append((values, vectors))
    # In units of R's mean eigenvalue, the trace over E_b, for a Kronecker product too.
    values = pairs[0][0] if len(pairs) == 1 else np.outer(pairs[0][0], pairs[1][0])
    left_out = (values < cutoff) | (values + damping <= 0)
    if left_out.all():
        raise ValueError(
            f"hessian.cutoff={cutoff:g} is above every eigenvalue of a block: the largest is "
            f"{values.max():.3g} in its unit, the block's mean eigenvalue; lower the cutoff"
        )
    with np.errstate(divide="ignore"):
        scales = np.where(left_out, 0.0, (values + damping) ** -0.5) / np.sqrt(trace / size)
    if len(pairs) == 1:
        vectors = pairs[0][1]
        return ((vectors * scales) @ vectors.T).astype(np.float32)
    return KroneckerRoot(pairs[0][1], pairs[1][1], scales.astype(np.float32))


def apply_root(root: Root, x):
    """Applies W to one block's rows, [..., E_b], in NumPy or, inside a program, in jax."""
    if not isinstance(root, KroneckerRoot):
        return x @ root
    k1, k2 = root.scales.shape
    # Two products of all rows at once, with one transposition: up to 1.4 times as fast on CPUs as
    # a small product for every row. The result stays transposed, as W's rows may have any order.
    right = (x.reshape(-1, k2) @ root.columns).reshape(-1, k1, k2).swapaxes(1, 2)
    both = (right.reshape(-1, k1) @ root.rows).reshape(-1, k2, k1)
    return (root.scales.T * both).reshape(x.shape)


def apply_transposed_root(root: Root, x):
    """Applies Wᵀ to one block's rows, as `apply_root` applies W."""
    if not isinstance(root, KroneckerRoot):
        return x @ root.T
    k1, k2 = root.scales.shape
    G = root.scales * x.reshape(-1, k2, k1).swapaxes(1, 2)
    return (root.rows @ G @ root.columns.T).reshape(x.shape)


def whiten(x_RxE, roots, slices: list[slice]):
    """Applies R^(−1/2) to every row: float32 [R, E].

    Args:
        x_RxE: gradients.
        roots: R^(−1/2) by block, a list or one stack (`blocks.stack`).
        slices: the columns of each block.
    """

    def whiten_block(out_RxE, block: Block, root):
        # By default TPUs and GPUs round the factors, which loses directions of small eigenvalues.
        with jax.default_matmul_precision("highest"):
            white_RxB = apply_root(root, block.columns(x_RxE))
        return jax.lax.dynamic_update_slice_in_dim(out_RxE, white_RxB, block.start, axis=1)

    return blocks.fold(whiten_block, jnp.zeros(x_RxE.shape, jnp.float32), slices, roots)
