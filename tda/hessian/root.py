"""What becomes of R: its spectra, the mixture of R_eval and R_train, shrinkage, R^(−1/2).

The mixture R = λ R_eval + (1 − λ) R_train removes directions that all queries share (Chang et al.
2024, section 3.2).

R_eval of all queries holds each query's own gradient, and so its label: whitening then shrinks just
the direction that is asked for. The search takes it out again, exactly and at its own cost
(`tda.retrieval.scorer.Scorer.own`); or queries are whitened by a half that they are not in
(`halves`).
"""

import functools
from collections.abc import Iterable, Iterator

import jax
import jax.numpy as jnp
import numpy as np

from tda.hessian import blocks
from tda.hessian.blocks import Block
from tda.runtime import host_blas

# Eigenvalues below this, in largest ones, are no direction that was seen.
_ROUNDING = 64 * np.finfo(np.float32).eps


def spectra(R: list[np.ndarray]) -> list[np.ndarray]:
    """Eigenvalues of each block, falling: float64 [E_b]."""

    def one(block: np.ndarray) -> np.ndarray:
        values = np.linalg.eigvalsh(block.astype(np.float32))
        return np.maximum(values, 0.0)[::-1].astype(np.float64)

    return host_blas.map_blocks(one, R)


def spectrum(R: list[np.ndarray]) -> np.ndarray:
    """Eigenvalues of all blocks together, falling: float64 [E]."""
    return np.sort(np.concatenate(spectra(R)))[::-1]


def component(width: int) -> int:
    """The component k at which spectra are compared: 1000 of 65,536, in proportion to E."""
    return max(1, round(1000 * width / 65536))


def check_component(evaluation: list[np.ndarray], k: int, count: int) -> None:
    """Nothing, where the queries have a direction at component k of the mixing rule.

    Where they have none the rule gives λ = 1: R_train is left out, and what is asked for with it.

    Args:
        evaluation: eigenvalues of R_eval by block, falling.
        k: the component, counted from 1.
        count: of how many queries R_eval is.

    Raises:
        ValueError: the eigenvalue there is the rounding of its block's largest, or there is none.
    """
    values = np.concatenate(evaluation)
    if k > len(values):
        raise ValueError(
            f"there is no component {k} (hessian.component) of {len(values)} dimensions"
        )
    rounding = np.concatenate([np.full(len(x), _ROUNDING * x[0]) for x in evaluation])
    at = np.argsort(-values, kind="stable")[k - 1]
    if values[at] <= rounding[at]:
        raise ValueError(
            f"R_eval of {count} queries has no direction at component {k}, where the mixing rule "
            "compares it with R_train, which would be left out (λ = 1): ask more queries, give a "
            "smaller hessian.component or a hessian.weight from 0 to 1, or take exp5 for trackstar "
            "(exp4 for trackstar_raw), which mixes nothing in"
        )


def mixing_weight(train: np.ndarray, evaluation: np.ndarray, k: int) -> float:
    """λ of the paper's rule: λ σ_eval[k] = (1 − λ) σ_train[k].

    Args:
        train, evaluation: spectra of R_train and R_eval, falling.
        k: the component, counted from 1.

    Raises:
        ValueError: both spectra vanish at k: the gradients have fewer than k directions.
    """
    a, b = train[k - 1], evaluation[k - 1]
    if a + b <= 0:
        raise ValueError(f"both spectra vanish at component {k}; choose a smaller one")
    return float(a / (a + b))


def mix(
    train: list[np.ndarray], evaluation: list[np.ndarray], weight: float
) -> Iterator[np.ndarray]:
    """λ R_eval + (1 − λ) R_train, block by block as they are asked for."""
    for t, e in zip(train, evaluation, strict=True):
        yield weight * e + (1 - weight) * t


def shrinkage(R: list[np.ndarray], noise: np.ndarray) -> np.ndarray:
    """How far each block is to be drawn to the multiple of I that is nearest: float64 [blocks].

    ρ of Ledoit & Wolf (2004, eq. 14): (1 − ρ) R + ρ m I, m the mean eigenvalue, is nearest to the R
    of infinitely many rows when ρ is the share that chance has in ‖R − m I‖². It says how much
    damping a sample of this size needs: little where rows are many, much where a block has more
    dimensions than there were rows.

    Args:
        R: the blocks.
        noise: expected squared error of each, as `Autocorrelation` has it; of a mixture,
            λ² noise_eval + (1 − λ)² noise_train.
    """
    out = np.zeros(len(R))
    for i, (block, chance) in enumerate(zip(R, noise, strict=True)):
        mean = np.trace(block) / len(block)
        distance = np.sum(np.square(block)) - len(block) * mean**2
        out[i] = 1.0 if distance <= 0 else min(1.0, chance / distance)
    return out


def shrunk(R: Iterable[np.ndarray], shares: np.ndarray) -> Iterator[np.ndarray]:
    """(1 − ρ) R + ρ m I of each block, as it is asked for; m is its mean eigenvalue."""
    for block, share in zip(R, shares, strict=True):
        mean = np.trace(block) / len(block)
        yield (1 - share) * block + share * mean * np.eye(len(block))


def halves(count: int, seed: int = 0) -> tuple[np.ndarray, np.ndarray]:
    """The numbers below `count`, drawn into two halves: int64, rising.

    Raises:
        ValueError: there are fewer than two.
    """
    if count < 2:
        raise ValueError(f"{count} query cannot be whitened by others; ask two or more")
    order = np.random.default_rng(seed).permutation(count)
    return np.sort(order[: count // 2]), np.sort(order[count // 2 :])


def inverse_root(
    R: Iterable[np.ndarray], damping: float = 1e-3, cutoff: float = 0.0
) -> list[np.ndarray]:
    """(R + damping · mean eigenvalue · I)^(−1/2) of each block: float32 [E_b, E_b], symmetric.

    A block whose gradients all vanish becomes zero, not infinite.

    Args:
        R: symmetric, non-negative blocks.
        damping: in units of the block's mean eigenvalue; keeps directions that the sample of
            gradients hardly saw from being blown up. With 0 those that are no more than rounding
            are left out (a pseudo-inverse).
        cutoff: directions whose eigenvalue is below so many mean eigenvalues are left out
            altogether (a pseudo-inverse). The damping should be small then.

    Raises:
        ValueError: damping or cutoff is below 0.
    """
    if damping < 0 or cutoff < 0:
        raise ValueError(f"damping={damping} and cutoff={cutoff} must not be negative")
    return host_blas.map_blocks(functools.partial(_root, damping=damping, cutoff=cutoff), R)


def _root(block: np.ndarray, damping: float, cutoff: float) -> np.ndarray:
    mean = np.trace(block) / len(block)
    if mean <= 0:
        return np.zeros(block.shape, np.float32)
    # Scaled to a mean eigenvalue of one, so that float32 holds every block alike.
    values, vectors = np.linalg.eigh((block / mean).astype(np.float32))
    values = np.maximum(values, 0.0)
    if not damping:
        cutoff = max(cutoff, _ROUNDING * values[-1])
    with np.errstate(divide="ignore"):
        root = np.where(values < cutoff, 0.0, (values + damping) ** -0.5) / np.sqrt(mean)
    return ((vectors * root) @ vectors.T).astype(np.float32)


def whiten(x_RxE, roots, slices: list[slice]):
    """R^(−1/2) applied to every row: float32 [R, E].

    Args:
        x_RxE: gradients.
        roots: R^(−1/2) by block, or all in one array, as `blocks.stacked` gives them.
        slices: where each block stands in a row.
    """

    def one(out_RxE, block: Block, root):
        part = jnp.matmul(block.of(x_RxE), root, precision=jax.lax.Precision.HIGHEST)
        return jax.lax.dynamic_update_slice_in_dim(out_RxE, part, block.start, axis=1)

    return blocks.over(one, jnp.zeros(x_RxE.shape, jnp.float32), slices, roots)
