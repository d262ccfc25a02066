"""Loops over the blocks of an encoding: one compiled body where all blocks have the same width."""

import dataclasses
from collections.abc import Callable, Sequence

import jax
import jax.numpy as jnp
import numpy as np

# Stacking copies the matrices, so larger ones stay in a list: the time to compile a program with
# one product for each block is small beside that of a search with matrices of this size.
_STACKED_BYTES = 256 << 20


@dataclasses.dataclass(frozen=True)
class Block:
    """The columns of a block.

    Attributes:
        start: the first column; a tracer inside a loop.
        width: the number of columns.
    """

    start: int | jax.Array
    width: int

    def columns(self, x_RxE):
        """Returns the block's columns of every row, [R, width]."""
        return jax.lax.dynamic_slice_in_dim(x_RxE, self.start, self.width, axis=1)


def block_slices(widths: Sequence[int]) -> list[slice]:
    """Returns the columns of each block in a row."""
    ends = np.cumsum([0, *widths]).tolist()
    return [slice(a, b) for a, b in zip(ends[:-1], ends[1:], strict=True)]


def stack(matrices: Sequence[np.ndarray]):
    """Puts the matrices of all blocks on the device, for `fold`.

    Returns:
        One array [blocks, N, N] if all matrices have the same shape and take little memory, else
        a list.
    """
    size = sum(m.shape[0] * m.shape[1] * 4 for m in matrices)
    if len({m.shape for m in matrices}) == 1 and size <= _STACKED_BYTES:
        return jnp.asarray(np.stack(matrices))
    return [jnp.asarray(m) for m in matrices]


def fold(step: Callable, carry, slices: Sequence[slice], matrices, *values):
    """Folds `step(carry, block, matrix, *values)` over all blocks.

    One array of matrices gives a loop whose program does not grow with the number of blocks. A list
    gives a program with one copy of `step` for each block.

    Args:
        step: a function that returns the next carry.
        carry: the first carry.
        slices: the columns of each block.
        matrices: a matrix for each block, as `stack` returns them.
        values: further sequences with one item for each block.

    Raises:
        ValueError: the array's matrices differ from the blocks in width or number.
    """
    blocks = [Block(s.start, s.stop - s.start) for s in slices]
    if isinstance(matrices, list):
        for block, matrix, *items in zip(blocks, matrices, *values, strict=True):
            carry = step(carry, block, matrix, *items)
        return carry
    count, width = matrices.shape[:2]
    if len(blocks) != count or {b.width for b in blocks} != {width}:
        raise ValueError(f"{count} matrices of width {width} do not fit the blocks {slices}")

    def body(carry, block_values):
        start, matrix, *items = block_values
        return step(carry, Block(start, width), matrix, *items), None

    starts = jnp.asarray([b.start for b in blocks], jnp.int32)
    return jax.lax.scan(body, carry, (starts, matrices, *map(jnp.asarray, values)))[0]
