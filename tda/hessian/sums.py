"""R: the autocorrelation of projected gradients, block by block.

R_b = Φ_bᵀΦ_b / n for each block b of an encoding (Chang et al. 2024, section 3.2).
"""

import dataclasses
import functools
from collections.abc import Callable, Iterable, Iterator

import jax
import jax.numpy as jnp
import numpy as np

from tda import store
from tda.runtime import sharding

_CHUNK_BYTES = 64 << 20
# A step's sums read and write all of R: the more rows at a time, the fewer of them.
_GRAM_ROWS = 4


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
