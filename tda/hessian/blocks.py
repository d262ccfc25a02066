"""The blocks of an encoding, and loops over them: one compiled body where all blocks are alike.

A block's *shape* says what its R is: (E_b,) for a dense R, [E_b, E_b]; (k₁, k₂) if the block is one
k₁ × k₂ matrix, row by row, and R the Kronecker product of a factor for each axis.
"""

import dataclasses
import math
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

# Stacking copies the matrices, so larger ones stay in a list: compiling a program with one product
# for each block takes little time compared with a search with matrices of this size.
_STACKED_BYTES = 256 << 20


Shape = tuple[int, ...]


class KroneckerRoot(NamedTuple):
    """W of a k₁ × k₂ block G, for WᵀW = R⁻¹: G ↦ (scales ∘ (rowsᵀ G columns))ᵀ."""

    rows: np.ndarray
    """Eigenvectors of the rows' factor, in columns, float32 [k₁, k₁]."""
    columns: np.ndarray
    """Eigenvectors of the columns' factor, float32 [k₂, k₂]."""
    scales: np.ndarray
    """Float32 [k₁, k₂]."""


Root = np.ndarray | KroneckerRoot


def dense_shapes(widths: Iterable[int]) -> tuple[Shape, ...]:
    """Returns the shapes of blocks of these widths whose R are dense."""
    return tuple((w,) for w in widths)


def group_factors(
    factors: Iterable[np.ndarray], shapes: Sequence[Shape]
) -> Iterator[tuple[np.ndarray, ...]]:
    """Yields the factors of each block: one for a dense block, two for a Kronecker product."""
    remaining = iter(factors)
    for shape in shapes:
        yield tuple(next(remaining) for _ in shape)


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


def stack(roots: Sequence[Root]):
    """Puts the roots of all blocks on the device, for `fold`.

    Returns:
        One tree of arrays with the blocks in front if all roots are alike and take little memory,
        else a list.
    """
    leaves = jax.tree.leaves(list(roots))
    alike = len({tuple(x.shape for x in jax.tree.leaves(root)) for root in roots}) == 1
    if alike and sum(4 * x.size for x in leaves) <= _STACKED_BYTES:
        return jax.tree.map(lambda *x: jnp.asarray(np.stack(x)), *roots)
    return [jax.tree.map(jnp.asarray, root) for root in roots]


def _width(root) -> int:
    """Returns the columns of the block that a root, or a stack of roots, belongs to."""
    if isinstance(root, KroneckerRoot):
        return math.prod(root.scales.shape[-2:])
    return root.shape[-1]


def fold(step: Callable, carry, slices: Sequence[slice], roots, *values):
    """Folds `step(carry, block, root, *values)` over all blocks.

    One stack of roots gives a loop whose program does not grow with the number of blocks. A list
    gives a program with one copy of `step` for each block.

    Args:
        step: a function that returns the next carry.
        carry: the first carry.
        slices: the columns of each block.
        roots: a root for each block, as `stack` returns them.
        values: further sequences with one item for each block.

    Raises:
        ValueError: the stack's roots differ from the blocks in width or number.
    """
    blocks = [Block(s.start, s.stop - s.start) for s in slices]
    if isinstance(roots, list):
        for block, root, *items in zip(blocks, roots, *values, strict=True):
            carry = step(carry, block, root, *items)
        return carry
    count, width = len(jax.tree.leaves(roots)[0]), _width(roots)
    if len(blocks) != count or {b.width for b in blocks} != {width}:
        raise ValueError(f"{count} matrices of width {width} do not fit the blocks {slices}")

    def body(carry, block_values):
        start, root, *items = block_values
        return step(carry, Block(start, width), root, *items), None

    starts = jnp.asarray([b.start for b in blocks], jnp.int32)
    return jax.lax.scan(body, carry, (starts, roots, *map(jnp.asarray, values)))[0]
