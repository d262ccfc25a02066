"""R, the autocorrelation of projected gradients, summed in one pass over a source.

R_b = Φ_bᵀΦ_b / n for each block b of an encoding (Chang et al. 2024, section 3.2).
"""

import dataclasses
import functools
import itertools
from collections.abc import Callable, Iterator, Sequence

import jax
import jax.numpy as jnp
import numpy as np

from tda import store
from tda.runtime import sharding
from tda.runtime.groups import ONE_GROUP, Groups

# Bytes of float32 rows that fill the devices, and the multiple of it that one step sums: a step
# reads and writes all of R, so longer steps spend less of their time on that.
_CHUNK_BYTES = 64 << 20
_CHUNKS_PER_STEP = 4
# Bytes of R that one loop sums, at least a block: a program with a product for each of 210 blocks
# takes 15 s to compile, and a portion is copied to the host whole.
_PORTION_BYTES = 64 << 20


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
    groups: Groups = ONE_GROUP,
    name: str = "",
) -> Autocorrelation | None:
    """Returns R of a source of gradients, summed on the devices, each of which takes its own rows.

    Args:
        source: the gradients (`tda.retrieval.sources.Source`); invalid rows do not count.
        sample: number of rows to draw from the whole source without repetition; 0 takes all.
        seed: seed of the draw.
        mesh: the devices; None is the default device.
        on_rows: a function that is called with the number of rows of each step once it has begun.
        groups: how rows are cut into groups whose sums are kept, and which processes share.
        name: what identifies the source and the sample, for the files of `groups`.

    Returns:
        R; None in all processes but the first if `groups` has a directory.

    Raises:
        ValueError: the source has no valid rows.
    """
    widths = source.form.widths
    drawn = _draw(source.rows, sample, seed)
    # A group of rows that holds a sample of them reads and sums as much less.
    row_bytes = max(1, source.form.row_bytes * (sample or source.rows) // max(1, source.rows))
    ranges = groups.ranges(source.rows, row_bytes, 8 * sum(w * w for w in widths))

    def work(rows: range) -> dict[str, np.ndarray]:
        return _sum_rows(source, rows, drawn, mesh, on_rows)

    return groups.reduce(f"R-{name}", ranges, work, functools.partial(_mean, widths), on_rows)


def _draw(rows: int, sample: int, seed: int) -> np.ndarray | None:
    """Draws rows in rising order, so that a store reads every chunk once; None takes all."""
    if not sample or sample >= rows:
        return None
    return np.sort(np.random.default_rng(seed).choice(rows, sample, replace=False, shuffle=False))


def _sum_rows(source, rows: range, drawn, mesh, on_rows) -> dict[str, np.ndarray]:
    """Returns the sums of a range of rows, float64: "0", "1", … by portion, "fourth", "count"."""
    devices = 1 if mesh is None else sharding.batch_devices(mesh)
    widths = source.form.widths
    # Of a small source no more: rows of padding cost as much as others. The step is that of the
    # whole source, so that a group's sums have the same bits however the source is cut.
    total = source.rows if drawn is None else len(drawn)
    share = 1 << max(0, (-(-total // devices) - 1).bit_length())
    step = devices * min(share, _CHUNKS_PER_STEP * _chunk_rows(source.form.width))

    def put(x):
        return jax.device_put(x) if mesh is None else sharding.put_leading(mesh, x)

    def zeros(*shape):
        return tuple(put(x) for x in np.zeros((2, devices, *shape), np.float32))

    def pad_and_put(x):
        # Padding rows are invalid, and let one compiled program take every step.
        padded = np.pad(x, [(0, step - len(x)), *[(0, 0)] * (x.ndim - 1)])
        return put(padded.reshape(devices, -1, *x.shape[1:]))

    portions, count = _portions(widths), 0
    sums = [(zeros(p.count, p.width, p.width), zeros(p.count)) for p in portions]
    for piece in _read_rows(source, rows, drawn, step):
        scales = None if piece.scales is None else pad_and_put(piece.scales)
        sums = _add_rows(sums, pad_and_put(piece.values), scales, pad_and_put(piece.valid), widths)
        count += int(piece.valid.sum())
        on_rows(len(piece))
    out, fourth = {}, []
    for i, pairs in enumerate(sums):
        # Frees a portion on the devices before the next one is copied: R may fill half their
        # memory.
        sums[i] = None
        out[str(i)], fourth_N = (
            sum(sharding.to_host(x).astype(np.float64).sum(0) for x in pair) for pair in pairs
        )
        fourth.append(fourth_N)
    return out | {"fourth": np.concatenate(fourth), "count": np.int64(count)}


def _mean(widths, results: Iterator[dict[str, np.ndarray]]) -> Autocorrelation:
    """Returns R from the sums of every group, added in float64 in their order."""
    total = next(results)
    for result in results:
        for name, x in result.items():
            total[name] += x
    count = int(total["count"])
    if not count:
        raise ValueError("there are no gradients to take R of")
    blocks = [R for i in range(len(_portions(widths))) for R in total[str(i)] / count]
    # Σ_i ‖x_i x_iᵀ − R‖² / n = Σ_i |x_i|⁴ / n − ‖R‖², negative only by rounding.
    squares = np.array([np.sum(np.square(R)) for R in blocks])
    noise = np.maximum(0.0, total["fourth"] / count - squares) / count
    return Autocorrelation(blocks, noise, count)


@dataclasses.dataclass(frozen=True)
class _Portion:
    """Blocks of one width that stand side by side, summed by one loop.

    Attributes:
        start: the first column.
        width: the number of columns of each block.
        count: the number of blocks.
    """

    start: int
    width: int
    count: int


def _portions(widths: Sequence[int]) -> list[_Portion]:
    """Returns the portions of the blocks, in order."""
    portions, start = [], 0
    for width, equal_widths in itertools.groupby(widths):
        remaining, most = len(list(equal_widths)), max(1, _PORTION_BYTES // (8 * width**2))
        while remaining:
            count = min(most, remaining)
            portions.append(_Portion(start, width, count))
            start, remaining = start + count * width, remaining - count
    return portions


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

        def add_block(i, portion_sums, portion: _Portion):
            start = portion.start + i * portion.width
            x_RxB = jax.lax.dynamic_slice_in_dim(x_RxE, start, portion.width, axis=1)
            # By default TPUs and GPUs round the factors to bfloat16 or TF32, and R^(−1/2) magnifies
            # that error in the small eigenvalues.
            gram = jnp.matmul(x_RxB.T, x_RxB, precision=jax.lax.Precision.HIGHEST)
            fourth = jnp.sum(jnp.square(jnp.sum(jnp.square(x_RxB), axis=1)))
            gram_pair, fourth_pair = jax.tree.map(lambda x: x[i], portion_sums)
            added = two_sum(gram_pair, gram), two_sum(fourth_pair, fourth)
            # In place: the loop holds no second copy of the sums.
            return jax.tree.map(
                lambda x, x_i: jax.lax.dynamic_update_index_in_dim(x, x_i, i, 0),
                portion_sums,
                added,
            )

        return [
            jax.lax.fori_loop(
                0, portion.count, functools.partial(add_block, portion=portion), portion_sums
            )
            for portion, portion_sums in zip(_portions(widths), sums, strict=True)
        ]

    if len(valid) > 1:
        return jax.vmap(add_on_device)(sums, values, scales, valid)
    # Without vmap on one device: its batched products are slower on CPUs.
    first = functools.partial(jax.tree.map, lambda x: x[0])
    return jax.tree.map(
        lambda x: x[None], add_on_device(*map(first, (sums, values, scales, valid)))
    )


def _chunk_rows(width: int) -> int:
    return 1 << (max(1, min(4096, _CHUNK_BYTES // (4 * width))).bit_length() - 1)


def _read_rows(source, rows: range, drawn: np.ndarray | None, step: int) -> Iterator[store.Rows]:
    """Reads a range of rows, or those of them that were drawn, `step` at a time."""
    if drawn is None:
        yield from source.scan(step, rows)
        return
    drawn = drawn[slice(*np.searchsorted(drawn, [rows.start, rows.stop]))]
    for start in range(0, len(drawn), step):
        x_RxE = source.read(drawn[start : start + step])
        yield store.Rows(start, x_RxE, None, store.valid(x_RxE))
