"""R, the autocorrelation of projected gradients, summed in one pass over a source.

R_b = Φ_bᵀΦ_b / n for each block b of an encoding (Chang et al. 2024, section 3.2).
"""

import dataclasses
import functools
from collections.abc import Callable, Iterator

import jax
import jax.numpy as jnp
import numpy as np

from tda import store
from tda.runtime import sharding

# Bytes of float32 rows that fill the devices, and the multiple of it that one step sums: a step
# reads and writes all of R, so longer steps spend less of their time on that.
_CHUNK_BYTES = 64 << 20
_CHUNKS_PER_STEP = 4


@dataclasses.dataclass(frozen=True)
class Autocorrelation:
    """R, and how far a sample of this size is from R of infinitely many rows.

    Attributes:
        blocks: R of each block, float64 [E_b, E_b].
        noise: expected squared Frobenius distance of each block from that of infinitely many rows:
            Σ_i ‖x_i x_iᵀ − R‖² / n² (Ledoit & Wolf 2004, lemma 3.4, there divided by E_b).
        count: n, the number of rows.
    """

    blocks: list[np.ndarray]
    noise: np.ndarray
    count: int


def autocorrelation_of_source(
    source,
    sample: int = 0,
    seed: int = 0,
    mesh: jax.sharding.Mesh | None = None,
    on_rows: Callable[[int], None] = lambda rows: None,
) -> Autocorrelation:
    """Returns R of a source of gradients, summed on the devices, each of which takes its own rows.

    Args:
        source: the gradients (`tda.retrieval.sources.Source`); invalid rows do not count.
        sample: number of rows to draw from the whole source without repetition; 0 takes all.
        seed: seed of the draw.
        mesh: the devices; None is the default device.
        on_rows: a function that is called with the number of rows of each step once it has begun.

    Raises:
        ValueError: the source has no valid rows.
    """
    devices = 1 if mesh is None else sharding.batch_devices(mesh)
    widths = source.form.widths
    step = _CHUNKS_PER_STEP * _chunk_rows(source.form.width) * devices

    def put(x):
        return jax.device_put(x) if mesh is None else sharding.put_leading(mesh, x)

    def zeros(*shape):
        return tuple(put(x) for x in np.zeros((2, devices, *shape), np.float32))

    def pad_and_put(x):
        # Padding rows are invalid, and let one compiled program take every step.
        padded = np.pad(x, [(0, step - len(x)), *[(0, 0)] * (x.ndim - 1)])
        return put(padded.reshape(devices, -1, *x.shape[1:]))

    sums, count = [(zeros(w, w), zeros()) for w in widths], 0
    for rows in _read_rows(source, sample, seed, step):
        scales = None if rows.scales is None else pad_and_put(rows.scales)
        sums = _add_rows(sums, pad_and_put(rows.values), scales, pad_and_put(rows.valid), widths)
        count += int(rows.valid.sum())
        on_rows(len(rows))
    if not count:
        raise ValueError("there are no gradients to take R of")
    blocks, noise = [], np.zeros(len(widths))
    for b, (gram, fourth) in enumerate(sums):
        # Frees a block on the devices before the next one is copied: R may fill half their memory.
        sums[b] = None
        R, fourth_moment = (
            sum(sharding.to_host(x).astype(np.float64).sum(0) for x in pair) / count
            for pair in (gram, fourth)
        )
        blocks.append(R)
        # Σ_i ‖x_i x_iᵀ − R‖² / n = Σ_i |x_i|⁴ / n − ‖R‖², negative only by rounding.
        noise[b] = max(0.0, fourth_moment - np.sum(np.square(R))) / count
    return Autocorrelation(blocks, noise, count)


@functools.partial(jax.jit, static_argnames="widths", donate_argnums=0)
def _add_rows(sums, values, scales, valid, widths):
    """Adds rows to the sums of Gram matrices and of fourth powers of norms, on every device.

    Products are in float32, the fastest type of most devices. A plain float32 sum of them would
    stand still after some 2²⁴ rows, and float64 is slow or missing there: each sum is a pair of
    float32 numbers, high and low, updated by Knuth's two-sum, which loses nothing.
    """

    def two_sum(pair, addend):
        high, low = pair
        total = high + addend
        added = total - high
        return total, low + ((high - (total - added)) + (addend - added))

    def add_on_device(sums, values, scales, valid):
        x_RxE = jnp.where(valid[:, None], store.decode(values, scales, widths), 0.0)
        out, start = [], 0
        for (gram_pair, fourth_pair), width in zip(sums, widths, strict=True):
            x_RxB = x_RxE[:, start : start + width]
            # By default TPUs and GPUs round the factors to bfloat16 or TF32, and R^(−1/2) magnifies
            # that error in the small eigenvalues.
            gram = jnp.matmul(x_RxB.T, x_RxB, precision=jax.lax.Precision.HIGHEST)
            fourth = jnp.sum(jnp.square(jnp.sum(jnp.square(x_RxB), axis=1)))
            out.append((two_sum(gram_pair, gram), two_sum(fourth_pair, fourth)))
            start += width
        return out

    if len(valid) > 1:
        return jax.vmap(add_on_device)(sums, values, scales, valid)
    # Without vmap on one device: its batched products are slower on CPUs.
    first = functools.partial(jax.tree.map, lambda x: x[0])
    return jax.tree.map(
        lambda x: x[None], add_on_device(*map(first, (sums, values, scales, valid)))
    )


def _chunk_rows(width: int) -> int:
    return 1 << (max(1, min(4096, _CHUNK_BYTES // (4 * width))).bit_length() - 1)


def _read_rows(source, sample: int, seed: int, step: int) -> Iterator[store.Rows]:
    """Reads all rows of a source, or a sample of them, `step` at a time."""
    if not sample or sample >= source.rows:
        yield from source.scan(step)
        return
    rng = np.random.default_rng(seed)
    # In rising order, so that a store reads every chunk once.
    drawn = np.sort(rng.choice(source.rows, sample, replace=False, shuffle=False))
    for start in range(0, sample, step):
        x_RxE = source.read(drawn[start : start + step])
        yield store.Rows(start, x_RxE, None, store.valid(x_RxE))
