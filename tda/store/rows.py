"""Rows of gradients as stored on disk: float32, bfloat16, or int8 with a scale for each block."""

import dataclasses
from collections.abc import Callable

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np

DTYPES = {
    "float32": np.dtype(np.float32),
    "bfloat16": np.dtype(ml_dtypes.bfloat16),
    "int8": np.dtype(np.int8),
}
# −128 is left out, so that the codes are symmetric around 0.
_LARGEST = 127
# The smallest normal float32.
_TINY = np.finfo(np.float32).tiny


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Rows:
    """R consecutive rows of a store, as stored."""

    first: int
    """Number of the first row."""
    values: np.ndarray
    """[R, E], of the store's dtype."""
    scales: np.ndarray | None
    """float32 [R, blocks] if the values are int8, else None."""
    valid: np.ndarray
    """bool [R], false if a row holds no finite gradient or was withdrawn."""

    def __len__(self) -> int:
        return len(self.values)

    def __getitem__(self, part: slice) -> "Rows":
        return Rows(self.first + part.start, *self.map(lambda x: x[part]))

    def map(self, change: Callable, *others: "Rows") -> tuple:
        """Returns `change` of the values, of the scales (None if there are none), and of `valid`.

        With the rows' own arrays, `change` takes those of `others`.
        """
        arrays = ((rows.values, rows.scales, rows.valid) for rows in (self, *others))
        # None is a tree without leaves.
        return jax.tree.map(change, *arrays)

    def decoded(self, widths: tuple[int, ...]) -> np.ndarray:
        """Returns the gradients, float32 [R, E]; an invalid row is infinite throughout."""
        if self.scales is None:
            out = self.values.astype(np.float32)
        else:
            # Scales of invalid rows are infinite, and 0 × ∞ would warn.
            scales = np.where(self.valid[:, None], self.scales, 0)
            out = self.values * np.repeat(scales, widths, axis=1)
        out[~self.valid] = np.inf
        return out


def valid(rows_RxE: np.ndarray) -> np.ndarray:
    """Returns which rows hold a gradient, bool [R]; an invalid one is infinite throughout."""
    # So its first number tells, and the others are not read.
    return np.isfinite(rows_RxE[:, 0])


def encode(
    rows_RxE: np.ndarray, dtype: str, widths: tuple[int, ...]
) -> tuple[np.ndarray, np.ndarray | None]:
    """Returns rows as stored: values [R, E], and for int8 scales, float32 [R, blocks].

    int8 rounds each block of a row to multiples of its largest number / 127 (half to even). A row
    that is infinite keeps that: in its values, or in its scales.
    """
    if dtype != "int8":
        return rows_RxE.astype(DTYPES[dtype], copy=False), None
    values = np.empty(rows_RxE.shape, np.int8)
    scales = np.empty((len(rows_RxE), len(widths)), np.float32)
    ends = np.cumsum([0, *widths])
    for b, (start, stop) in enumerate(zip(ends[:-1], ends[1:], strict=True)):
        x = rows_RxE[:, start:stop]
        scale = np.maximum(x.max(axis=1), -x.min(axis=1)) / np.float32(_LARGEST)
        # Most devices flush subnormal numbers to 0, so a block of them is one of zeros.
        scale[scale < _TINY] = 0
        step = np.where(scale > 0, scale, np.float32(np.inf))[:, None]
        with np.errstate(invalid="ignore"):
            quotient = x / step
        # ∞/∞ is NaN, which has no int8; an infinite row is recognised by its scales.
        quotient[np.isinf(scale)] = 0
        values[:, start:stop] = np.rint(quotient, out=quotient)
        scales[:, b] = scale
    return values, scales


def decode(values_RxE, scales_Rxb, widths: tuple[int, ...]):
    """Decodes rows on the device, float32 [R, E]; the numbers of an invalid row are undefined."""
    x_RxE = values_RxE.astype(jnp.float32)
    if scales_Rxb is None:
        return x_RxE
    # Equal blocks are scaled by broadcasting, without an index of every column.
    if len(set(widths)) > 1:
        return x_RxE * scales_Rxb[:, np.repeat(np.arange(len(widths)), widths)]
    blocks = x_RxE.reshape(len(x_RxE), len(widths), -1) * scales_Rxb[:, :, None]
    return blocks.reshape(x_RxE.shape)
