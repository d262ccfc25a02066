"""R: the autocorrelation of projected gradients, block by block; its spectra, mixing and R^(−1/2).

R_b = Φ_bᵀΦ_b / n for each block b of an encoding (Chang et al. 2024, section 3.2). The mixture
R = λ R_eval + (1 − λ) R_train removes directions that all queries share.

R_eval of all queries holds each query's own gradient, and so its label: whitening then shrinks just
the direction that is asked for. The search takes it out again, exactly and at its own cost
(`tda.retrieval.scorer.Scorer.own`); or queries are whitened by a half that they are not in
(`halves`).
"""

import dataclasses
import functools
from collections.abc import Callable, Iterable, Iterator

import jax
import jax.numpy as jnp
import numpy as np

from tda import blocks, host_blas, sharding, store
from tda.blocks import Block

_CHUNK_BYTES = 64 << 20
# A step's sums read and write all of R: the more rows at a time, the fewer of them.
_GRAM_ROWS = 4
# Eigenvalues below this, in largest ones, are no direction that was seen.
_ROUNDING = 64 * np.finfo(np.float32).eps


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


@dataclasses.dataclass(frozen=True)
class Autocorrelation:
    """R, and how much of it is chance.

    Attributes:
        blocks: R of each block, float64 [E_b, E_b].
        noise: for each block, the expected squared distance (Frobenius) of R from that of
            infinitely many rows: Σ_i ‖x_i x_iᵀ − R‖² / n² (Ledoit & Wolf 2004, lemma 3.4, there
            divided by E_b).
        count: n, the rows it was taken of.
    """

    blocks: list[np.ndarray]
    noise: np.ndarray
    count: int


@functools.partial(jax.jit, static_argnames="widths", donate_argnums=0)
def _add(state, values, scales, valid, widths):
    """Sums of Gram matrices and of fourth powers of norms, after some more rows on every device.

    Sums are pairs of float32 numbers, high and low: a long sum loses nothing (Knuth's two-sum).
    """

    def two_sum(pair, new):
        high, low = pair
        total = high + new
        kept = total - high
        return total, low + ((high - (total - kept)) + (new - kept))

    def one(state, values, scales, valid):
        x_RxE = jnp.where(valid[:, None], store.decode(values, scales, widths), 0.0)
        out, start = [], 0
        for pair, width in zip(state, widths, strict=True):
            x_RxB = x_RxE[:, start : start + width]
            gram = jnp.matmul(x_RxB.T, x_RxB, precision=jax.lax.Precision.HIGHEST)
            fourth = jnp.sum(jnp.square(jnp.sum(jnp.square(x_RxB), axis=1)))
            out.append((two_sum(pair[0], gram), two_sum(pair[1], fourth)))
            start += width
        return out

    if len(valid) > 1:
        return jax.vmap(one)(state, values, scales, valid)
    first = functools.partial(jax.tree.map, lambda x: x[0])
    return jax.tree.map(lambda x: x[None], one(*map(first, (state, values, scales, valid))))


def of_source(
    source,
    sample: int = 0,
    seed: int = 0,
    mesh: jax.sharding.Mesh | None = None,
    on_rows: Callable[[int], None] = lambda rows: None,
) -> Autocorrelation:
    """R of a source of gradients, summed on the devices; over a mesh each takes rows of its own.

    Args:
        source: a store, an array, or what is encoded as it is read (`tda.retrieval.scorer.Source`);
            invalid rows do not count.
        sample: of how many rows, drawn from the whole corpus without repetition; 0 takes all.
        seed: of the draw.
        mesh: the devices; one where None.
        on_rows: told the rows of each step when it has begun.

    Raises:
        ValueError: there are no valid rows.
    """
    devices = 1 if mesh is None else sharding.batch_devices(mesh)
    widths, step = source.form.widths, _GRAM_ROWS * _step(source.form.width) * devices

    def put(x):
        x = x.reshape(devices, -1, *x.shape[1:])
        return x if mesh is None else sharding.put_leading(mesh, x)

    def zeros(*shape):
        pair = np.zeros((2, devices, *shape), np.float32)
        return tuple(
            jax.device_put(x) if mesh is None else sharding.put_leading(mesh, x) for x in pair
        )

    state, count = [(zeros(w, w), zeros()) for w in widths], 0
    for found in _rows_of(source, sample, seed, step):
        lacking = step - len(found)
        # Rows behind the last are invalid: one program fits all steps.
        longer = [
            None if x is None else put(np.pad(x, [(0, lacking), *[(0, 0)] * (x.ndim - 1)]))
            for x in (found.values, found.scales, found.valid)
        ]
        state = _add(state, *longer, widths)
        count += int(found.valid.sum())
        on_rows(len(found))
    if not count:
        raise ValueError("there are no gradients to take R of")
    blocks, noise = [], np.zeros(len(widths))
    for b, (gram, fourth) in enumerate(state):
        state[b] = None  # one block at a time is on the host and the devices both
        R, squares = (
            sum(sharding.to_host(x).astype(np.float64).sum(0) for x in pair) / count
            for pair in (gram, fourth)
        )
        blocks.append(R)
        noise[b] = max(0.0, squares - np.sum(np.square(R))) / count
    return Autocorrelation(blocks, noise, count)


def _step(width: int) -> int:
    return 1 << (max(1, min(4096, _CHUNK_BYTES // (4 * width))).bit_length() - 1)


def _rows_of(source, sample: int, seed: int, step: int) -> Iterator[store.Rows]:
    if not sample or sample >= source.rows:
        yield from source.scan(step)
        return
    first = 0
    for x_RxE in rows_for(source, sample, seed, step):
        yield store.Rows(first, x_RxE, None, store.valid(x_RxE))
        first += len(x_RxE)


def rows_for(source, sample: int = 0, seed: int = 0, step: int = 0) -> Iterator[np.ndarray]:
    """Gradients of a corpus to take R_train of, float32 [R, E] at a time.

    Args:
        source: the corpus's gradients: a store, or what is encoded as it is read.
        sample: how many rows, drawn from the whole corpus without repetition; 0 takes all.
        seed: of the draw.
        step: R; what takes 64 MiB where 0.
    """
    step = step or _step(source.form.width)
    if not sample or sample >= source.rows:
        yield from (found.decoded(source.form.widths) for found in source.scan(step))
        return
    # In rising order: a store reads what lies together once.
    rng = np.random.default_rng(seed)
    drawn = np.sort(rng.choice(source.rows, sample, replace=False, shuffle=False))
    for start in range(0, sample, step):
        yield source.read(drawn[start : start + step])


def spectra(R: list[np.ndarray]) -> list[np.ndarray]:
    """Eigenvalues of each block, falling: float64 [E_b]."""

    def one(block: np.ndarray) -> np.ndarray:
        values = np.linalg.eigvalsh(block.astype(np.float32))
        return np.maximum(values, 0.0)[::-1].astype(np.float64)

    return host_blas.each(one, R)


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
    return host_blas.each(functools.partial(_root, damping=damping, cutoff=cutoff), R)


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
