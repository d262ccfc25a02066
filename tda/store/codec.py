"""How rows of gradients are stored: as floats, or as codes of 8, 4, 3 or 2 bits with scales.

With a rank c, what is stored of each block is not its k × k numbers but c pairs of vectors, each
vector a block of its own: u_1 to u_c, then v_1 to v_c (`tda.store.vector_pairs`).

A row of codes is uint8: the codes of every group of (usually 64) consecutive numbers of a block,
one group after the other, then a bfloat16 scale for each group. No group reaches into another
block, whose numbers may be of another size; a block's last group is padded with zeros.

- int8: multiples (two's complement) of the scale, the group's largest number / 127 rounded up.
- 4bit, 3bit, 2bit: levels times the scale, the group's root mean square. The levels minimise the
  squared error of a unit Gaussian. A code's highest bit is the sign, the others are the number of
  the level's magnitude. A group's codes are planes of one bit, from the lowest to the sign: bit
  k % 8 of byte k // 8 belongs to number k, as `np.unpackbits(..., bitorder="little")` reads it. On
  CPUs XLA decodes planes twice as fast as codes side by side in a byte.

Levels, and the thresholds between them, have 15 bits at most and a scale has 8, so their products
are exact in float32: every device, and NumPy, decodes the same numbers, and the same vectors, whose
products are sums that each may round otherwise.
"""

import dataclasses
import functools
import math

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np

from tda.store import vector_pairs

_FLOATS = {"float32": np.dtype(np.float32), "bfloat16": np.dtype(ml_dtypes.bfloat16)}
_BITS = {"int8": 8, "4bit": 4, "3bit": 3, "2bit": 2}
DTYPES = (*_FLOATS, *_BITS)
# Magnitudes of the levels (Max 1960, Quantizing for minimum distortion, table I), in 2^-12.
_MAGNITUDES = {
    bits: np.round(np.multiply(levels, 4096)).astype(np.float32) / 4096
    for bits, levels in {
        2: (0.4528, 1.5104),
        3: (0.2451, 0.7560, 1.3439, 2.1520),
        4: (0.1284, 0.3881, 0.6568, 0.9423, 1.2562, 1.6181, 2.0690, 2.7326),
    }.items()
}
# Root mean squares of rounding errors, in those of their groups: of the levels of a unit Gaussian
# (Max, table I); of steps whose largest multiple, 127, is about three; of a significand of 8 bits.
_ROUNDING = {
    "float32": 0.0,
    "bfloat16": 2**-9,
    "int8": 3 / 127 / 12**0.5,
    "4bit": 0.0975,
    "3bit": 0.1859,
    "2bit": 0.3428,
}
# The same of a block's numbers that some pairs of vectors leave out: measured on gradients of
# sentences, 0.27 of the norm for 4 pairs at side 64, 0.19 for 8.
_LEFT_OUT = 0.25
# −128 is left out, so that the codes are symmetric around 0.
_LARGEST = 127
# The smallest normal float32: most devices flush smaller numbers to 0.
_TINY = np.finfo(np.float32).tiny
_MOST = np.finfo(np.float32).max
# The most numbers in a group: with 2 bits a scale then adds an eighth to the codes.
_GROUP = 64
# Bytes of float32 rows that the host encodes at a time.
_STEP_BYTES = 16 << 20


@dataclasses.dataclass(frozen=True)
class Form:
    """The form of all rows of a store."""

    dtype: str
    """Dtype of the numbers on disk, of `DTYPES`."""
    widths: tuple[int, ...]
    """How many numbers each block of a row has."""
    rank: int = 0
    """c, the pairs of vectors that each block is stored as; 0: its numbers themselves."""

    def __post_init__(self):
        if self.dtype not in DTYPES:
            raise ValueError(f"unknown dtype {self.dtype!r}; use {', '.join(DTYPES)}")
        if self.rank:
            vector_pairs.side(self.widths, self.rank)

    @property
    def width(self) -> int:
        """E, the numbers in a row."""
        return sum(self.widths)

    @property
    def side(self) -> int:
        """k, the numbers in each vector of a pair."""
        return vector_pairs.side(self.widths, self.rank)

    @functools.cached_property
    def stored_widths(self) -> tuple[int, ...]:
        """How many numbers each block, or each vector, of a row as stored has."""
        if not self.rank:
            return self.widths
        return (self.side,) * (len(self.widths) * 2 * self.rank)

    @property
    def is_plain(self) -> bool:
        """Whether a row as stored is the float32 numbers themselves."""
        return self.dtype == "float32" and not self.rank

    @property
    def bits(self) -> int:
        """Bits of a code; 0 if numbers are stored as floats."""
        return _BITS.get(self.dtype, 0)

    @functools.cached_property
    def group(self) -> int:
        """The numbers in a group: 64, or a smaller multiple of 8 if it makes rows shorter."""
        sizes = range(_GROUP, 0, -8)
        return min(
            sizes, key=lambda n: sum(-(-w // n) for w in self.stored_widths) * (n * self.bits + 16)
        )

    @functools.cached_property
    def groups(self) -> int:
        """G, the groups of a row."""
        return sum(-(-w // self.group) for w in self.stored_widths)

    @property
    def code_bytes(self) -> int:
        """Bytes of the codes of a group."""
        return self.group * self.bits // 8

    @property
    def columns(self) -> int:
        """The length of a row in the array on disk: numbers, or bytes of codes and scales."""
        return self.groups * (self.code_bytes + 2) if self.bits else sum(self.stored_widths)

    @property
    def array_dtype(self) -> np.dtype:
        """The dtype of the array on disk."""
        return np.dtype(np.uint8) if self.bits else _FLOATS[self.dtype]

    @property
    def row_bytes(self) -> int:
        """Bytes of a row on disk."""
        return self.columns * self.array_dtype.itemsize

    @property
    def rounding(self) -> float:
        """About the root mean square of a number's rounding error, in that of its group."""
        rounding = _ROUNDING[self.dtype]
        # Both vectors of a pair are rounded.
        return math.hypot(rounding, rounding, _LEFT_OUT) if self.rank else rounding

    def describe(self) -> dict:
        """Returns JSON values with which a reader without this package can decode rows."""
        described = {"rank": self.rank} if self.rank else {}
        if not self.bits:
            return described
        levels = {} if self.bits == 8 else {"levels": _levels(self.bits).tolist()}
        return described | {"codes": {"bits": self.bits, "group": self.group} | levels}


def _levels(bits: int) -> np.ndarray:
    """Returns the level of every code, float32 [2^bits]."""
    return np.concatenate([_MAGNITUDES[bits], -_MAGNITUDES[bits]])


def _thresholds(bits: int) -> np.ndarray:
    """Returns the magnitudes between levels at which the upper one takes over, float32."""
    m = _MAGNITUDES[bits]
    return (m[1:] + m[:-1]) / 2


def encode(x_RxE: jax.Array, form: Form) -> jax.Array:
    """Returns rows as stored, [R, columns], on the device.

    A row with a number that is not finite is infinite throughout, or has infinite scales.
    """
    finite_Rx1 = jnp.isfinite(x_RxE).all(axis=1, keepdims=True)
    if form.rank:
        x_RxE = vector_pairs.split(x_RxE, form.side, form.rank)
        finite_Rx1 &= jnp.isfinite(x_RxE).all(axis=1, keepdims=True)
    if not form.bits:
        if form.dtype == "bfloat16":
            # XLA drops a plain cast to bfloat16 and back, and numbers that round to ∞ with it.
            x_RxE = jax.lax.reduce_precision(x_RxE, 8, 7)
            finite_Rx1 &= jnp.isfinite(x_RxE).all(axis=1, keepdims=True)
        return jnp.where(finite_Rx1, x_RxE, jnp.inf).astype(form.array_dtype)
    x_RxGxN = _into_groups(x_RxE, form)
    scale_RxG = _scales(x_RxGxN, form)
    # Groups of zeros, of numbers that devices flush to 0, and of invalid rows.
    is_empty_RxG = ~finite_Rx1 | (scale_RxG == 0)
    x_RxGxN = jnp.where(is_empty_RxG[..., None], 0, x_RxGxN)
    codes = _codes(x_RxGxN, jnp.where(is_empty_RxG, 1, scale_RxG)[..., None], form)
    scale_bits = jnp.where(finite_Rx1, scale_RxG, jnp.inf).view(jnp.uint32) >> 16
    scale_bytes = scale_bits.astype(jnp.uint16).view(jnp.uint8)
    return jnp.concatenate([codes.reshape(len(codes), -1), scale_bytes], axis=1)


def _codes(x_RxGxN, scale_RxGx1, form: Form):
    """Returns the bytes of the codes, uint8 [R, G, code_bytes]."""
    if form.bits == 8:
        multiple = jnp.rint(x_RxGxN * (1 / scale_RxGx1))
        return jnp.clip(multiple, -_LARGEST, _LARGEST).astype(jnp.int8).view(jnp.uint8)
    size_RxGxN = jnp.abs(x_RxGxN)
    magnitude = sum(
        (size_RxGxN >= t * scale_RxGx1).astype(jnp.uint8) for t in _thresholds(form.bits)
    )
    planes = [(magnitude >> b) & 1 for b in range(form.bits - 1)] + [
        (x_RxGxN < 0).astype(jnp.uint8)
    ]
    bits = jnp.stack(planes, axis=2).reshape(*x_RxGxN.shape[:2], form.code_bytes, 8)
    return jnp.sum(bits << jnp.arange(8, dtype=jnp.uint8), axis=-1, dtype=jnp.uint8)


def _scales(x_RxGxN, form: Form):
    """Returns the scale of every group, float32 [R, G] with the precision of bfloat16.

    Uses only operations whose results do not depend on the device: squares of bfloat16 are exact in
    float32, fused with a sum or not, and the order of the sum is written out.
    """
    largest_RxG = jnp.max(jnp.abs(x_RxGxN), axis=-1)
    top = _LARGEST if form.bits == 8 else float(_MAGNITUDES[form.bits][-1])
    if form.bits == 8:
        step = (largest_RxG * np.float32(1 / _LARGEST)).view(jnp.uint32)
        scale = ((step + np.uint32(0xFFFF)) & np.uint32(0xFFFF0000)).view(jnp.float32)
    else:
        # Scaling by a power of two keeps the squares from overflow and underflow.
        power = jnp.clip(largest_RxG.view(jnp.uint32) & 0x7F800000, 0x00800000, 0x7E800000)
        inverse = (0x7F000000 - power).view(jnp.float32)[..., None]
        square = jnp.square(jax.lax.reduce_precision(x_RxGxN * inverse, 8, 7))
        while (n := square.shape[-1]) > 1:
            low, high = square[..., : (n + 1) // 2], square[..., (n + 1) // 2 :]
            square = jnp.concatenate([low[..., : n // 2] + high, low[..., n // 2 :]], axis=-1)
        counts = [
            min(form.group, w - i) for w in form.stored_widths for i in range(0, w, form.group)
        ]
        mean = square[..., 0] * (1 / np.array(counts, np.float32))
        scale = jax.lax.reduce_precision(jnp.sqrt(mean) * power.view(jnp.float32), 8, 7)
    # The largest bfloat16 whose product with the highest level is finite.
    limit = np.float32(_MOST / top).view(np.uint32) & np.uint32(0xFFFF0000)
    return jnp.where(scale < _TINY, 0, jnp.minimum(scale, limit.view(np.float32)))


_encode = jax.jit(encode, static_argnames="form")


def encode_all(encodings: tuple, forms: tuple[Form, ...] | None) -> tuple:
    """Returns the rows of every kind of gradients as stored; unchanged if `forms` is None."""
    return encodings if forms is None else tuple(map(_encode, encodings, forms))


def encode_on_host(x_RxE: np.ndarray, form: Form) -> np.ndarray:
    """Returns rows as stored, with the bytes of `encode`, from and to the host's memory."""
    if not form.bits and not form.rank:
        with np.errstate(over="ignore"):
            stored = x_RxE.astype(form.array_dtype, copy=False)
        bad = ~np.isfinite(stored).all(axis=1)
        return (
            np.where(bad[:, None], form.array_dtype.type(np.inf), stored) if bad.any() else stored
        )
    out = np.empty((len(x_RxE), form.columns), form.array_dtype)
    step = 1 << max(4, (_STEP_BYTES // (4 * form.width)).bit_length() - 1)
    step = min(step, 1 << (max(16, len(x_RxE)) - 1).bit_length())
    for i in range(0, len(x_RxE), step):
        part = x_RxE[i : i + step]
        # Padded, so that one program takes every step.
        padded = np.pad(part, [(0, step - len(part)), (0, 0)])
        out[i : i + step] = _encode(padded, form)[: len(part)]
    return out


def decode(values, form: Form) -> jax.Array:
    """Decodes rows on the device, float32 [R, E]; the numbers of an invalid row are undefined.

    Rows of E floats count as decoded, whatever the form.
    """
    if values.dtype != np.uint8 and values.shape[1] == form.width:
        return values.astype(jnp.float32)
    stored = _decode_codes(values, form) if form.bits else values.astype(jnp.float32)
    return vector_pairs.join(stored, form.side, form.rank) if form.rank else stored


def _decode_codes(values, form: Form) -> jax.Array:
    """Returns the numbers that are stored as codes: of blocks, or of their pairs of vectors."""
    codes_RxGxC, scale_RxG = _split(values, form)
    if form.bits == 8:
        level_RxGxN = codes_RxGxC.view(jnp.int8).astype(jnp.float32)
    else:
        planes = codes_RxGxC.reshape(*scale_RxG.shape, form.bits, -1, 1)
        bits = (planes >> jnp.arange(8, dtype=jnp.uint8)) & 1
        *magnitude_bits, sign = (
            bits[:, :, b].reshape(*scale_RxG.shape, form.group) != 0 for b in range(form.bits)
        )
        # A tree of choices between constants: vector units have no table to look up.
        levels = list(map(jnp.float32, _MAGNITUDES[form.bits]))
        for bit in magnitude_bits:
            pairs = zip(levels[::2], levels[1::2], strict=True)
            levels = [jnp.where(bit, upper, lower) for lower, upper in pairs]
        level_RxGxN = jnp.where(sign, -levels[0], levels[0])
    return _out_of_groups(level_RxGxN * scale_RxG[..., None], form, jnp.concatenate)


def decode_on_host(values: np.ndarray, form: Form) -> np.ndarray:
    """Decodes rows in NumPy, to the bits of `decode`; an invalid row is infinite throughout."""
    is_valid = np.isfinite(marks(values, form))
    # What is infinite counts as 0 until the end: 0 × ∞ would warn.
    if not form.bits:
        out = values.astype(np.float32)
    else:
        scale_RxG = np.where(is_valid[:, None], _split(values, form)[1], 0)
        level_RxGxN = _numbers(values, form)
        if form.bits < 8:
            level_RxGxN = _levels(form.bits)[level_RxGxN]
        out = _out_of_groups(level_RxGxN * scale_RxG[..., None], form, np.concatenate)
    if form.rank:
        out[~is_valid] = 0
        out = vector_pairs.join_on_host(out, form.side, form.rank)
    out[~is_valid] = np.inf
    return out


def marks(values: np.ndarray, form: Form) -> np.ndarray:
    """Returns a mark of every row, float32 [R]: ∞ if it is invalid, NaN if it was never written.

    It is the row's first number, or its first scale: the fill value of codes, 255, makes that NaN.
    """
    return _split(values, form)[1][:, 0] if form.bits else values[:, 0].astype(np.float32)


def _numbers(values: np.ndarray, form: Form) -> np.ndarray:
    """Returns the codes in NumPy, integers [R, G, N]."""
    codes_RxGxC = _split(values, form)[0]
    if form.bits == 8:
        return codes_RxGxC.view(np.int8)
    planes = codes_RxGxC.reshape(*codes_RxGxC.shape[:2], form.bits, -1)
    bits = np.unpackbits(planes, axis=3, bitorder="little")
    return (bits << np.arange(form.bits, dtype=np.uint8)[:, None]).sum(axis=2, dtype=np.uint8)


def _split(values, form: Form):
    """Returns codes, uint8 [R, G, code_bytes], and scales, float32 [R, G], in NumPy or jax."""
    end = form.groups * form.code_bytes
    codes = values[:, :end].reshape(len(values), form.groups, form.code_bytes)
    pairs = values[:, end:].reshape(len(values), form.groups, 2).astype(np.uint32)
    return codes, (pairs[..., 0] << 16 | pairs[..., 1] << 24).view(np.float32)


def _padded(form: Form) -> list[int]:
    """Returns the widths as stored with what fills up each one's last group."""
    return [-(-w // form.group) * form.group for w in form.stored_widths]


def _into_groups(x_RxE, form: Form):
    """Returns the groups of rows, [R, G, N], each block's last one padded with zeros."""
    widths, padded = form.stored_widths, _padded(form)
    if len(set(widths)) == 1:
        x_RxBxW = x_RxE.reshape(len(x_RxE), len(widths), -1)
        x_RxE = jnp.pad(x_RxBxW, [(0, 0), (0, 0), (0, padded[0] - widths[0])])
    elif padded != list(widths):
        blocks = jnp.split(x_RxE, np.cumsum(widths)[:-1], axis=1)
        pairs = zip(blocks, padded, strict=True)
        x_RxE = jnp.concatenate(
            [jnp.pad(x, [(0, 0), (0, p - x.shape[1])]) for x, p in pairs], axis=1
        )
    return x_RxE.reshape(len(x_RxE), form.groups, form.group)


def _out_of_groups(x_RxGxN, form: Form, concatenate):
    """Joins groups to rows, without their padding."""
    rows, widths, padded = len(x_RxGxN), form.stored_widths, _padded(form)
    if len(set(widths)) == 1:
        # One slice cuts all blocks of equal width.
        return x_RxGxN.reshape(rows, len(widths), -1)[:, :, : widths[0]].reshape(rows, -1)
    flat = x_RxGxN.reshape(rows, -1)
    starts = np.cumsum([0, *padded[:-1]])
    return concatenate([flat[:, s : s + w] for s, w in zip(starts, widths, strict=True)], axis=1)
