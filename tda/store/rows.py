"""Rows of gradients as stored on disk: float32, bfloat16, or int8 with a scale for each block."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np

DTYPES = {
    "float32": np.dtype(np.float32),
    "bfloat16": np.dtype(ml_dtypes.bfloat16),
    "int8": np.dtype(np.int8),
}
_LARGEST = 127
_TINY = np.finfo(np.float32).tiny
# Rows of at least this many bytes are quantised by a compiled program.
_LARGE = 1 << 20


@dataclasses.dataclass(frozen=True)
class Rows:
    """R consecutive rows of a store, as stored.

    Attributes:
        first: number of the first row.
        values: [R, E], of the store's dtype.
        scales: float32 [R, blocks] where the values are int8, else None.
        valid: bool [R], false where a row holds no finite gradient or was withdrawn.
    """

    first: int
    values: np.ndarray
    scales: np.ndarray | None
    valid: np.ndarray

    def __len__(self) -> int:
        return len(self.values)

    def __getitem__(self, part: slice) -> "Rows":
        scales = None if self.scales is None else self.scales[part]
        return Rows(self.first + part.start, self.values[part], scales, self.valid[part])

    def decoded(self, widths: tuple[int, ...]) -> np.ndarray:
        """The gradients, float32 [R, E]; an invalid row is infinite throughout."""
        if self.scales is None:
            out = self.values.astype(np.float32)
        else:
            out = self.values * np.repeat(np.where(self.valid[:, None], self.scales, 0), widths, 1)
        out[~self.valid] = np.inf
        return out


def valid(rows_RxE: np.ndarray) -> np.ndarray:
    """Which rows hold a gradient, bool [R]; an invalid one is infinite throughout."""
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
    if rows_RxE.nbytes >= _LARGE:
        largest_Rxb = np.full((len(rows_RxE), len(widths)), _LARGEST, np.float32)
        return tuple(np.asarray(x) for x in _quantise_compiled(rows_RxE, largest_Rxb, widths))
    return quantise(rows_RxE, widths)


def quantise(rows_RxE: np.ndarray, widths: tuple[int, ...]) -> tuple[np.ndarray, np.ndarray]:
    """Returns int8 values and their scales, computed with numpy."""
    values = np.empty(rows_RxE.shape, np.int8)
    scales = np.empty((len(rows_RxE), len(widths)), np.float32)
    ends = np.cumsum([0, *widths])
    for b, (start, stop) in enumerate(zip(ends[:-1], ends[1:], strict=True)):
        x = rows_RxE[:, start:stop]
        scale = np.maximum(x.max(axis=1), -x.min(axis=1)) / np.float32(_LARGEST)
        # Most devices flush subnormal numbers to 0.
        scales[:, b] = np.where(scale < _TINY, 0, scale)
        # In a block of zeros, and in an infinite one, all values are 0.
        usable = np.isfinite(scales[:, b]) & (scales[:, b] > 0)
        step = np.where(usable, scales[:, b], np.float32(np.inf))[:, None]
        with np.errstate(invalid="ignore"):
            values[:, start:stop] = np.rint(np.where(usable[:, None], x / step, 0))
    return values, scales


@functools.partial(jax.jit, static_argnames="widths")
def _quantise_compiled(rows_RxE, largest_Rxb, widths):
    """Returns the same bits as `quantise`, in one pass on all cores.

    `largest_Rxb` holds 127 for every block: XLA replaces division by a shared constant with
    multiplication by its inverse, which rounds differently.
    """
    if len(set(widths)) == 1:
        blocks = [rows_RxE.reshape(len(rows_RxE), len(widths), -1)]
    else:
        ends = np.cumsum([0, *widths]).tolist()
        blocks = [rows_RxE[:, None, a:b] for a, b in zip(ends[:-1], ends[1:], strict=True)]
    values, scales, at = [], [], 0
    for x_Rxbxw in blocks:
        largest = largest_Rxb[:, at : at + x_Rxbxw.shape[1]]
        at += x_Rxbxw.shape[1]
        scale = jnp.abs(x_Rxbxw).max(axis=-1) / largest
        scale = jnp.where(scale < _TINY, 0, scale)
        usable = jnp.isfinite(scale) & (scale > 0)
        step = jnp.where(usable, scale, np.float32(np.inf))[..., None]
        rounded = jnp.round(jnp.where(usable[..., None], x_Rxbxw / step, 0)).astype(jnp.int8)
        values.append(rounded.reshape(len(rounded), -1))
        scales.append(scale)
    return jnp.concatenate(values, axis=1), jnp.concatenate(scales, axis=1)


def decode(values_RxE, scales_Rxb, widths: tuple[int, ...]):
    """Decodes rows on the device, float32 [R, E]; the numbers of an invalid row are undefined."""
    x_RxE = values_RxE.astype(jnp.float32)
    if scales_Rxb is None:
        return x_RxE
    if len(set(widths)) > 1:
        return x_RxE * scales_Rxb[:, np.repeat(np.arange(len(widths)), widths)]
    blocks = x_RxE.reshape(len(x_RxE), len(widths), -1) * scales_Rxb[:, :, None]
    return blocks.reshape(x_RxE.shape)
