"""R: the autocorrelation of projected gradients, block by block; its spectra, mixing and R^(−1/2).

R_b = Φ_bᵀΦ_b / n for each block b of an encoding (Chang et al. 2024, section 3.2). The mixture
R = λ R_eval + (1 − λ) R_train removes directions that all queries share.
"""

import functools
from collections.abc import Iterable, Iterator

import jax
import jax.numpy as jnp
import numpy as np

from tda import store

_CHUNK_BYTES = 64 << 20


@functools.partial(jax.jit, static_argnames=("bounds",))
def _grams(x_RxE, bounds):
    return [
        jnp.matmul(x_RxE[:, a:b].T, x_RxE[:, a:b], precision=jax.lax.Precision.HIGHEST)
        for a, b in bounds
    ]


def autocorrelation(chunks: Iterable[np.ndarray], slices: list[slice]) -> list[np.ndarray]:
    """R of each block: float64 [E_b, E_b].

    Args:
        chunks: arrays of rows, float32 [R, E]; rows that the store calls invalid do not count.
        slices: where each block stands in a row.

    Raises:
        ValueError: there are no rows.
    """
    bounds = tuple((s.start, s.stop) for s in slices)
    sums = [np.zeros((b - a, b - a)) for a, b in bounds]
    count = 0
    for x_RxE in chunks:
        kept = store.valid(x_RxE)
        x_RxE = x_RxE if kept.all() else x_RxE[kept]
        # Products in float32, their sum over chunks in float64.
        for total, gram in zip(sums, _grams(jnp.asarray(x_RxE), bounds), strict=True):
            total += np.asarray(gram)
        count += len(x_RxE)
    if not count:
        raise ValueError("there are no gradients to take R of")
    for total in sums:
        total /= count
    return sums


def rows_for(source, sample: int = 0, seed: int = 0) -> Iterator[np.ndarray]:
    """Gradients of a corpus to take R_train of, float32 [R, E] at a time.

    Args:
        source: the corpus's gradients: a store, or what is encoded as it is read.
        sample: how many rows, drawn from the whole corpus without repetition; 0 takes all.
        seed: of the draw.
    """
    step = 1 << (max(1, min(4096, _CHUNK_BYTES // (4 * source.form.width))).bit_length() - 1)
    if not sample or sample >= source.rows:
        yield from (found.decoded(source.form.widths) for found in source.scan(step))
        return
    # In rising order: a store reads what lies together once.
    rng = np.random.default_rng(seed)
    drawn = np.sort(rng.choice(source.rows, sample, replace=False, shuffle=False))
    for start in range(0, sample, step):
        yield source.read(drawn[start : start + step])


def spectrum(R: list[np.ndarray]) -> np.ndarray:
    """Eigenvalues of all blocks together, falling: float64 [E]."""
    values = np.concatenate([np.asarray(jnp.linalg.eigvalsh(b.astype(np.float32))) for b in R])
    return np.sort(np.maximum(values, 0.0))[::-1].astype(np.float64)


def component(width: int) -> int:
    """The component k at which spectra are compared: 1000 of 65,536, in proportion to E."""
    return max(1, round(1000 * width / 65536))


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


def inverse_root(R: Iterable[np.ndarray], damping: float = 1e-3) -> list[np.ndarray]:
    """(R + damping · mean eigenvalue · I)^(−1/2) of each block: float32 [E_b, E_b], symmetric.

    A block whose gradients all vanish becomes zero, not infinite.

    Args:
        R: symmetric, non-negative blocks.
        damping: in units of the block's mean eigenvalue; keeps directions that the sample of
            gradients hardly saw from being blown up.
    """
    return [_root(b, damping) for b in R]


def _root(block: np.ndarray, damping: float) -> np.ndarray:
    mean = np.trace(block) / len(block)
    if mean <= 0:
        return np.zeros(block.shape, np.float32)
    # Scaled to a mean eigenvalue of one, so that float32 holds every block alike.
    values, vectors = map(np.asarray, jnp.linalg.eigh((block / mean).astype(np.float32)))
    root = (np.maximum(values, 0.0) + damping) ** -0.5 / np.sqrt(mean)
    return ((vectors * root) @ vectors.T).astype(np.float32)


def whiten(x_RxE, roots: list, slices: list[slice]):
    """R^(−1/2) applied to every row: float32 [R, E]."""
    return jnp.concatenate(
        [
            jnp.matmul(x_RxE[:, s], root, precision=jax.lax.Precision.HIGHEST)
            for s, root in zip(slices, roots, strict=True)
        ],
        axis=-1,
    )
