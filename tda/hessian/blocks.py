"""Programs over the blocks of an encoding: a loop where they are alike, else one after another."""

import dataclasses
from collections.abc import Callable, Sequence

import jax
import jax.numpy as jnp
import numpy as np

# Matrices are copied into one array up to this size.
_STACKED_BYTES = 256 << 20


@dataclasses.dataclass(frozen=True)
class Block:
    """Where a block stands in a row.

    Attributes:
        start: its first column; in a loop it is traced.
        width: how many columns it has.
    """

    start: int | jax.Array
    width: int

    def of(self, x_RxE):
        """The block's part of every row."""
        return jax.lax.dynamic_slice_in_dim(x_RxE, self.start, self.width, axis=1)


def stacked(matrices: Sequence[np.ndarray]):
    """A matrix for each block, on the device: one array [B, N, N] where they are alike, or a list.

    `over` loops over an array. From a list it makes a program that is as long as the list, and
    takes as long to compile; large matrices are left in one, rather than copied.
    """
    size = sum(m.shape[0] * m.shape[1] * 4 for m in matrices)
    if len({m.shape for m in matrices}) == 1 and size <= _STACKED_BYTES:
        return jnp.asarray(np.stack(matrices))
    return [jnp.asarray(m) for m in matrices]


def over(step: Callable, carry, slices: Sequence[slice], matrices, *values):
    """Folds `step(carry, block, matrix, *values)` over all blocks.

    Args:
        step: returns the next carry.
        carry: the first.
        slices: where each block stands in a row.
        matrices: one for each block, as a list or in one array.
        values: more lists with an item for each block.

    Raises:
        ValueError: the array's matrices are not as wide or as many as the blocks.
    """
    blocks = [Block(s.start, s.stop - s.start) for s in slices]
    if isinstance(matrices, list):
        for block, matrix, *others in zip(blocks, matrices, *values, strict=True):
            carry = step(carry, block, matrix, *others)
        return carry
    count, width = matrices.shape[:2]
    if len(blocks) != count or {b.width for b in blocks} != {width}:
        raise ValueError(f"{count} matrices of width {width} do not fit the blocks {slices}")

    def body(carry, at):
        start, matrix, *others = at
        return step(carry, Block(start, width), matrix, *others), None

    starts = jnp.asarray([b.start for b in blocks], jnp.int32)
    return jax.lax.scan(body, carry, (starts, matrices, *map(jnp.asarray, values)))[0]
