"""R, the autocorrelation of projected gradients, summed in one pass over a source.

R_b = Φ_bᵀΦ_b / n for each block b of an encoding (Chang et al. 2024, section 3.2). If a block is
one matrix G, R_b may be the Kronecker product A ⊗ B / t of the second moments of its rows and its
columns, A = E[G Gᵀ] and B = E[Gᵀ G], as in Shampoo (Gupta et al. 2018). With t = E|G|², the trace
of A and of B, the product has R_b's trace, and equals R_b if R_b is a Kronecker product.
"""

import dataclasses
import functools
import itertools
import math
from collections.abc import Callable, Iterator, Sequence
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from tda import store
from tda.hessian import blocks
from tda.hessian.blocks import Shape
from tda.runtime import sharding
from tda.runtime.groups import ONE_GROUP, Groups

# Bytes of float32 rows that keep the devices busy, and how many such chunks one step sums: a step
# reads and writes all of R, so longer steps spend a smaller share of their time on that.
_CHUNK_BYTES = 64 << 20
_CHUNKS_PER_STEP = 4
# Bytes of R that one loop sums (at least a block): a program with a product for each of 210 blocks
# takes 15 s to compile, and a portion is copied to the host at once.
_PORTION_BYTES = 64 << 20
# The first unit of sums of squares: the smallest normal number of float32, a power of two.
_TINY = np.finfo(np.float32).tiny


@dataclasses.dataclass(frozen=True)
class Autocorrelation:
    """R, and how far a sample of this size is from R of infinitely many rows.

    Attributes:
        blocks: R of each block, float64 [E_b, E_b]; of a Kronecker product A, then B, not yet
            divided by t.
        noise: expected squared Frobenius distance of each of these matrices from that of infinitely
            many rows: Σ_i ‖x_i x_iᵀ − R‖² / n² (Ledoit & Wolf 2004, lemma 3.4, there divided by
            E_b), with G_i G_iᵀ or G_iᵀ G_i in place of x_i x_iᵀ for A and B. Infinite if n is 1:
            one row tells nothing of its own chance.
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
    shapes: Sequence[Shape] | None = None,
) -> Autocorrelation | None:
    """Returns R of a source of gradients, summed on the devices, each of which takes its own rows.

    Args:
        source: the gradients (`tda.retrieval.sources.Source`); invalid rows do not count.
        sample: number of rows to draw from the whole source without repetition; 0 takes all.
        seed: seed of the draw.
        mesh: the devices; None is the default device.
        on_rows: called with the number of rows of each step once the step has begun.
        groups: how rows are cut into groups whose sums are kept, and which processes share.
        name: identifies the source, the sample and the shapes in the files of `groups`.
        shapes: the shape of each block (`tda.hessian.blocks`); None: all are dense.

    Returns:
        R; None in all processes but the first if `groups` has a directory.

    Raises:
        ValueError: the source has no valid rows.
    """
    shapes = blocks.dense_shapes(source.form.widths) if shapes is None else tuple(shapes)
    drawn = _draw(source.rows, sample, seed)
    # With a sample, a group of rows reads and sums only its share of the sample.
    row_bytes = max(1, source.form.row_bytes * (sample or source.rows) // max(1, source.rows))
    ranges = groups.ranges(source.rows, row_bytes, 8 * sum(d * d for s in shapes for d in s))

    def work(rows: range) -> dict[str, np.ndarray]:
        return _sum_rows(source, rows, drawn, mesh, on_rows, shapes)

    # "scaled": unlike sums of earlier versions, whose fourth powers may have overflowed.
    return groups.reduce(
        f"R-scaled-{name}", ranges, work, functools.partial(_mean, shapes), on_rows
    )


def _draw(rows: int, sample: int, seed: int) -> np.ndarray | None:
    """Draws row numbers, ascending so that a store reads every chunk once; None takes all."""
    if not sample or sample >= rows:
        return None
    return np.sort(np.random.default_rng(seed).choice(rows, sample, replace=False, shuffle=False))


def _sum_rows(source, rows: range, drawn, mesh, on_rows, shapes) -> dict[str, np.ndarray]:
    """Returns the sums of a range of rows, float64: "0", … by portion and axis, "fourth", "count".

    "fourth" has the sums of fourth powers in the same order.
    """
    devices = 1 if mesh is None else sharding.batch_devices(mesh)
    # No longer than a small source needs: rows of padding cost as much as others. Taken from the
    # whole source, so that a group's sums have the same bits however the source is cut.
    total = source.rows if drawn is None else len(drawn)
    share = 1 << max(0, (-(-total // devices) - 1).bit_length())
    step = devices * min(share, _CHUNKS_PER_STEP * _chunk_rows(source.form.width))

    def put(x):
        return jax.device_put(x) if mesh is None else sharding.put_leading(mesh, x)

    def zeros(*shape):
        return tuple(put(x) for x in np.zeros((2, devices, *shape), np.float32))

    def no_squares(count):
        return *zeros(count), put(np.full((devices, count), _TINY))

    def pad_and_put(x):
        # Padding rows are invalid, and let one compiled program take every step.
        padded = np.pad(x, [(0, step - len(x)), *[(0, 0)] * (x.ndim - 1)])
        return put(padded.reshape(devices, -1, *x.shape[1:]))

    count = 0
    sums = [(zeros(p.count, d, d), no_squares(p.count)) for p in _portions(shapes) for d in p.shape]
    for piece in _read_rows(source, rows, drawn, step):
        rows_on_device = pad_and_put(piece.values), pad_and_put(piece.valid)
        sums = _add_rows(sums, *rows_on_device, source.form, shapes)
        count += int(piece.valid.sum())
        on_rows(len(piece))
    out, fourth = {}, []
    for i, (gram, squares) in enumerate(sums):
        # Frees a portion on the devices before the next one is copied: R may fill half their
        # memory.
        sums[i] = None
        out[str(i)] = sum(sharding.to_host(x).astype(np.float64).sum(0) for x in gram)
        high, low, scale = (sharding.to_host(x).astype(np.float64) for x in squares)
        fourth.append(np.sum((high + low) * np.square(scale), axis=0))
    return out | {"fourth": np.concatenate(fourth), "count": np.int64(count)}


def _mean(shapes, results: Iterator[dict[str, np.ndarray]]) -> Autocorrelation:
    """Returns R from the sums of every group, added in float64 in their order."""
    total = next(results)
    for result in results:
        for name, x in result.items():
            total[name] += x
    count = int(total["count"])
    if not count:
        raise ValueError("there are no gradients to compute R from")
    matrices, fourth_powers, number, start = [], [], 0, 0
    for portion in _portions(shapes):
        axes, n = len(portion.shape), portion.count
        sums = [total[str(number + axis)] / count for axis in range(axes)]
        fourth_AxN = total["fourth"][start : start + axes * n].reshape(axes, n) / count
        for i in range(n):
            matrices += [x[i] for x in sums]
            fourth_powers += fourth_AxN[:, i].tolist()
        number, start = number + axes, start + axes * n
    # Σ_i ‖x_i x_iᵀ − R‖² / n = Σ_i |x_i|⁴ / n − ‖R‖², negative only by rounding.
    squares = np.array([np.sum(np.square(R)) for R in matrices])
    noise = np.maximum(0.0, np.array(fourth_powers) - squares) / count
    if not np.isfinite(noise).all():
        raise ValueError(
            "R is not finite: squares of the gradients' numbers, or their sums, exceed the range "
            "of float32 (3e38); scale the loss, or the scales of the correction, down"
        )
    if count == 1:
        noise = np.full_like(noise, np.inf)
    return Autocorrelation(matrices, noise, count)


@dataclasses.dataclass(frozen=True)
class _Portion:
    """Neighbouring blocks of one shape, summed by one loop.

    Attributes:
        start: the first column.
        shape: the shape of each block.
        count: the number of blocks.
    """

    start: int
    shape: Shape
    count: int

    width = property(lambda self: math.prod(self.shape))


def _portions(shapes: Sequence[Shape]) -> list[_Portion]:
    """Returns the portions of the blocks, in order."""
    portions, start = [], 0
    for shape, alike in itertools.groupby(shapes):
        most = max(1, _PORTION_BYTES // (8 * sum(d * d for d in shape)))
        remaining = len(list(alike))
        while remaining:
            count = min(most, remaining)
            portions.append(_Portion(start, shape, count))
            start, remaining = start + count * math.prod(shape), remaining - count
    return portions


class _Addends(NamedTuple):
    """What rows of a block add to its sums."""

    grams: tuple[jax.Array, ...]
    """For each axis the sum of outer products."""
    terms: jax.Array
    """Numbers whose squares add up to the sum of the outer products' squared norms."""
    largest: jax.Array
    """The largest of these numbers."""


def _second_moments(x_RxB, shape: Shape) -> _Addends:
    """Returns what rows of a block add to its sums."""
    # By default TPUs and GPUs round the factors to bfloat16 or TF32, and R^(−1/2) magnifies that
    # error in the small eigenvalues.
    product = functools.partial(jnp.matmul, precision=jax.lax.Precision.HIGHEST)
    if len(shape) == 1:
        squared_norms_R = jnp.sum(jnp.square(x_RxB), axis=1)
        return _Addends((product(x_RxB.T, x_RxB),), squared_norms_R, jnp.max(squared_norms_R))
    G_RxMxN, columns_RMxN = x_RxB.reshape(-1, *shape), x_RxB.reshape(-1, shape[1])
    outer_RxMxM = product(G_RxMxN, G_RxMxN.transpose(0, 2, 1))
    grams = outer_RxMxM.sum(0), product(columns_RMxN.T, columns_RMxN)
    # ‖G Gᵀ‖ = ‖Gᵀ G‖, and the largest number of a product G Gᵀ is on its diagonal.
    return _Addends(grams, outer_RxMxM, jnp.max(jnp.diagonal(outer_RxMxM, axis1=1, axis2=2)))


def _two_sum(pair, addend):
    """Adds to a sum of two float32 numbers, high and low, without losing anything (Knuth)."""
    high, low = pair
    total = high + addend
    added = total - high
    return total, low + ((high - (total - added)) + (addend - added))


def _add_squares(squares, terms, largest):
    """Adds the squares of some terms to a sum (high, low, scale) of (high + low) · scale².

    Squares of squared norms span four times the exponents of the gradients: in float32 they
    overflow from norms of 4e9 on, and vanish below 1e-10. So they are those of terms in units of a
    power of two, which changes no digit, and which grows with the largest term so far.
    """
    high, low, scale = squares
    # Units whose reciprocal is a normal number too: products are faster than divisions.
    unit = jnp.minimum(jnp.maximum(scale, _power_of_two(largest)), 1 / _TINY)
    shrunk = jnp.square(scale * (1 / unit))
    sum_of_squares = jnp.sum(jnp.square(terms * (1 / unit)))
    return *_two_sum((high * shrunk, low * shrunk), sum_of_squares), unit


def _power_of_two(x):
    """Returns the largest power of two that is not above x, or 0 below float32's normal numbers."""
    exponent = jax.lax.bitcast_convert_type(x, jnp.uint32) & jnp.uint32(0x7F800000)
    return jax.lax.bitcast_convert_type(exponent, jnp.float32)


@functools.partial(jax.jit, static_argnames=("form", "shapes"), donate_argnums=0)
def _add_rows(sums, values, valid, form: store.Form, shapes):
    """Adds rows to the sums of Gram matrices and of fourth powers of norms, on every device.

    Products are in float32, the fastest type of most devices. A plain float32 sum of them would
    stop growing after some 2²⁴ rows, and devices are slow in float64 or lack it. So each sum is a
    pair of float32 numbers, high and low.
    """

    def add_on_device(sums, values, valid):
        x_RxE = jnp.where(valid[:, None], store.decode(values, form), 0.0)

        def add_block(i, portion_sums, portion: _Portion):
            start = portion.start + i * portion.width
            x_RxB = jax.lax.dynamic_slice_in_dim(x_RxE, start, portion.width, axis=1)
            addends = _second_moments(x_RxB, portion.shape)
            grams, squares = zip(*jax.tree.map(lambda x: x[i], portion_sums), strict=True)
            # The axes have the same squares, which are summed once.
            sum_of_squares = _add_squares(squares[0], addends.terms, addends.largest)
            added = [
                (_two_sum(pair, gram), sum_of_squares)
                for pair, gram in zip(grams, addends.grams, strict=True)
            ]
            # In place: the loop holds no second copy of the sums.
            return jax.tree.map(
                lambda x, x_i: jax.lax.dynamic_update_index_in_dim(x, x_i, i, 0),
                portion_sums,
                added,
            )

        remaining, out = iter(sums), []
        for portion in _portions(shapes):
            add = functools.partial(add_block, portion=portion)
            portion_sums = [next(remaining) for _ in portion.shape]
            out += jax.lax.fori_loop(0, portion.count, add, portion_sums)
        return out

    if len(valid) > 1:
        return jax.vmap(add_on_device)(sums, values, valid)
    # Without vmap on one device: its batched products are slower on CPUs.
    first = functools.partial(jax.tree.map, lambda x: x[0])
    return jax.tree.map(lambda x: x[None], add_on_device(*map(first, (sums, values, valid))))


def _chunk_rows(width: int) -> int:
    return 1 << (max(1, min(4096, _CHUNK_BYTES // (4 * width))).bit_length() - 1)


def _read_rows(source, rows: range, drawn: np.ndarray | None, step: int) -> Iterator[store.Rows]:
    """Reads a range of rows, or the drawn ones among them, `step` at a time."""
    if drawn is None:
        yield from source.scan(step, rows)
        return
    drawn = drawn[slice(*np.searchsorted(drawn, [rows.start, rows.stop]))]
    for start in range(0, len(drawn), step):
        x_RxE = source.read(drawn[start : start + step])
        yield store.Rows(start, x_RxE, store.valid(x_RxE))
