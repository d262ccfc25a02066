"""How rows lie on disk: what is lost by rounding, what is never lost, and who decodes alike."""

import fractions
import math

import jax
import ml_dtypes
import numpy as np
import pytest

from tda import store as stores
from tda.store import codec
from tda.store.codec import Form

WIDTHS = (72, 136, 64)
CODES = ["int8", "4bit", "3bit", "2bit"]
# The squared error of a unit Gaussian's levels (Max 1960, table I), and of int8's steps.
DISTORTION = {"int8": 3.6e-5, "4bit": 0.009497, "3bit": 0.03454, "2bit": 0.1175}


def data(count=20, widths=WIDTHS, seed=0):
    x = np.random.default_rng(seed).normal(size=(count, sum(widths))).astype(np.float32)
    # Blocks of very different size, as layers have.
    return x * np.repeat(10.0 ** np.arange(-3, len(widths) - 3), widths).astype(np.float32)


def reference(x, dtype, widths, group):
    """The bytes of rows, a number at a time in exact arithmetic, straight from the description."""
    bits = {"int8": 8, "4bit": 4, "3bit": 3, "2bit": 2}[dtype]
    levels = codec._MAGNITUDES.get(bits)
    rows = []
    for row in x:
        codes, scales, start = bytearray(), bytearray(), 0
        for width in widths:
            for first in range(start, start + width, group):
                numbers = [float(v) for v in row[first : min(first + group, start + width)]]
                scale = reference_scale(numbers, bits) if np.isfinite(row).all() else math.inf
                scales += np.float32(scale).astype(ml_dtypes.bfloat16).tobytes()
                codes += reference_codes(numbers, scale, group, bits, levels)
            start += width
        rows.append(np.frombuffer(bytes(codes + scales), np.uint8))
    return np.stack(rows)


def reference_scale(numbers, bits):
    largest = max(map(abs, numbers))
    if bits == 8:
        step = np.float32(largest) * np.float32(1 / 127)
        scale = float(step.astype(ml_dtypes.bfloat16))
        while scale < step:
            scale = float(np.nextafter(ml_dtypes.bfloat16(scale), ml_dtypes.bfloat16(np.inf)))
    else:
        power = 2.0 ** np.clip(math.frexp(largest)[1] - 1, -126, 125)
        rounded = [float(np.float32(v / power).astype(ml_dtypes.bfloat16)) for v in numbers]
        mean = sum(fractions.Fraction(v) ** 2 for v in rounded) / len(numbers)
        scale = math.sqrt(mean) * power
    scale = float(np.float32(scale).astype(ml_dtypes.bfloat16))
    return scale if scale >= 2**-126 else 0.0


def reference_codes(numbers, scale, group, bits, levels):
    is_empty = scale == 0 or not math.isfinite(scale)
    numbers = [0.0 if is_empty else v for v in numbers] + [0.0] * (group - len(numbers))
    scale = 1.0 if is_empty else scale
    if bits == 8:
        return np.array(
            [round(v * float(np.float32(1 / scale))) for v in numbers], np.int8
        ).tobytes()
    edges = [
        (float(a) + float(b)) / 2 * scale for a, b in zip(levels[:-1], levels[1:], strict=True)
    ]
    found = [sum(abs(v) >= e for e in edges) | (v < 0) << (bits - 1) for v in numbers]
    planes = ([(c >> b) & 1 for c in found] for b in range(bits))
    return b"".join(np.packbits(p, bitorder="little").tobytes() for p in planes)


@pytest.mark.parametrize("dtype", CODES)
def test_the_device_writes_the_bytes_that_exact_arithmetic_gives(dtype):
    """Guards: sums in another order, fused products, casts that XLA drops; ties; every border."""
    form = Form(dtype, WIDTHS)
    x = data()
    x[3, :72], x[4], x[5, 7], x[6, 200] = 0, 0, np.nan, -np.inf
    x[7] *= np.float32(1e-30)
    x[8, :72] = 1e-42
    x[9, 72:208] = np.float32(1e36) * x[9, 72:208]
    # Numbers on the thresholds themselves, of both signs, among others that make the scale 1.
    ties = codec._thresholds(form.bits) if form.bits < 8 else np.float32([0.5, 1.5, 2.5])
    rest = math.sqrt((64 - 2 * np.square(ties).sum()) / (64 - 2 * len(ties)))
    x[10, -64:] = rest if form.bits < 8 else 127
    x[10, -64 : -64 + 2 * len(ties)] = np.concatenate([ties, -ties])
    assert reference_scale(x[10, -64:].tolist(), form.bits) == 1
    stored = np.asarray(jax.jit(codec.encode, static_argnames="form")(x, form))
    np.testing.assert_array_equal(stored, reference(x, dtype, WIDTHS, form.group))
    np.testing.assert_array_equal(codec.encode_on_host(x, form), stored)
    assert (~np.isfinite(codec.marks(stored, form))).nonzero()[0].tolist() == [5, 6]


@pytest.mark.parametrize("dtype", CODES)
@pytest.mark.parametrize("widths", [WIDTHS, (64, 64), (9, 9, 9), (144, 144), (3, 70)])
def test_every_decoder_gives_the_same_bits(dtype, widths):
    form = Form(dtype, widths)
    x = data(40, widths)
    x[3] = 0
    values = codec.encode_on_host(x, form)
    assert values.shape == (40, form.columns) and values.dtype == np.uint8
    rows = stores.Rows(0, values, np.ones(40, bool))
    back = rows.decoded(form)
    decode = jax.jit(stores.decode, static_argnames="form")
    assert np.asarray(decode(values, form)).tobytes() == back.tobytes()
    assert not back[3].any()
    # No group reaches into another block: each keeps its own size.
    error = np.square(back - x).sum(axis=0), np.square(x).sum(axis=0)
    starts = np.cumsum([0, *widths[:-1]])
    of_blocks = np.divide(*(np.add.reduceat(e, starts) for e in error))
    assert (of_blocks < 1.5 * DISTORTION[dtype]).all()


@pytest.mark.parametrize("dtype", CODES)
def test_the_error_is_that_of_the_best_levels_for_a_gaussian(dtype):
    x = np.random.default_rng(0).normal(size=(256, 1024)).astype(np.float32)
    form = Form(dtype, (512, 512))
    back = codec.decode_on_host(codec.encode_on_host(x, form), form)
    assert np.square(back - x).mean() == pytest.approx(DISTORTION[dtype], rel=0.15)
    assert form.rounding == pytest.approx(DISTORTION[dtype] ** 0.5, rel=0.15)
    assert form.row_bytes == 1024 * form.bits // 8 + 2 * 16


def test_int8_is_within_half_a_step():
    x, form = data(), Form("int8", WIDTHS)
    values = codec.encode_on_host(x, form)
    back = codec.decode_on_host(values, form)
    largest = np.abs(x[:, -64:]).max(axis=1)
    assert (np.abs(back - x)[:, -64:].max(axis=1) <= largest / 127 / 2 * 1.009).all()
    assert np.abs(codec._numbers(values, form)).max() >= 126


@pytest.mark.parametrize(
    ("dtype", "width", "group"),
    [("2bit", 576, 64), ("2bit", 144, 48), ("4bit", 16, 16), ("3bit", 36, 40), ("int8", 4, 8)],
)
def test_groups_are_64_numbers_or_what_makes_rows_shorter(dtype, width, group):
    form = Form(dtype, (width,) * 3)
    assert form.group == group
    assert form.row_bytes == 3 * -(-width // group) * (group * form.bits // 8 + 2)


@pytest.mark.filterwarnings("error")  # as of a cast that is not defined
@pytest.mark.parametrize("dtype", stores.DTYPES)
def test_zeros_stay_zeros_and_the_infinite_stay_infinite(dtype):
    x, form = data(), Form(dtype, WIDTHS)
    x[3, :72], x[5], x[7], x[8, 99] = 0, 0, np.inf, np.nan
    values = codec.encode_on_host(x, form)
    back = codec.decode_on_host(values, form)
    assert (back[3, :72] == 0).all() and (back[5] == 0).all() and (back[3, 72:] != 0).any()
    assert np.flatnonzero(~stores.valid(back)).tolist() == [7, 8] and np.isinf(back[[7, 8]]).all()
    encode = jax.jit(codec.encode, static_argnames="form")
    np.testing.assert_array_equal(np.asarray(encode(x, form)), values)


@pytest.mark.parametrize("dtype", CODES)
def test_numbers_of_any_size_keep_their_precision(dtype):
    """Guards: float16 overflow; squares and scales that vanish or overflow."""
    form = Form(dtype, (64, 64))
    x = np.random.default_rng(0).normal(size=(8, 128)).astype(np.float32)
    for size in (1e-35, 1e-20, 1e20, 3e37):
        scaled = x * np.float32(size)
        back = codec.decode_on_host(codec.encode_on_host(scaled, form), form)
        error = np.linalg.norm(back / size - x) ** 2 / np.linalg.norm(x) ** 2
        assert error < 1.5 * DISTORTION[dtype]
    largest = np.full((1, 128), np.finfo(np.float32).max)
    assert np.isfinite(codec.decode_on_host(codec.encode_on_host(largest, form), form)).all()
    values = codec.encode_on_host(np.full((1, 128), 1e-42, np.float32), form)
    assert not codec.decode_on_host(values, form).any()


def test_floats_are_rounded_to_nearest():
    x = data()
    for dtype, error in (("float32", 0), ("bfloat16", 2**-8)):
        values = codec.encode_on_host(x, Form(dtype, WIDTHS))
        assert values.dtype.name == dtype
        back = np.asarray(stores.decode(values, Form(dtype, WIDTHS)))
        assert (np.abs(back - x) <= np.abs(x) * error).all()


def test_other_dtypes_are_refused():
    with pytest.raises(ValueError, match="'int4'; use float32, bfloat16, int8, 4bit, 3bit, 2bit"):
        Form("int4", (4,))


def blocks_of_rank(rank, count=6, k=24, noise=0.0):
    """Rows of two k × k blocks, sums of `rank` products of vectors of falling size."""
    rng = np.random.default_rng(rank)
    u, v = rng.normal(size=(2, count, 2, rank, k))
    G = np.einsum("nbci,nbcj,c->nbij", u, v, 2.0 ** -np.arange(rank))
    G += noise * rng.normal(size=G.shape)
    return G.astype(np.float32).reshape(count, -1)


@pytest.mark.parametrize("dtype", stores.DTYPES)
@pytest.mark.parametrize("k", [24, 20])
def test_pairs_of_vectors_keep_what_has_their_rank(dtype, k):
    x, form = blocks_of_rank(3, k=k), Form(dtype, (k * k,) * 2, 4)
    x[2, : k * k], x[3], x[4] = 0, 1e-25 * x[3], 1e25 * x[4]
    back = codec.decode_on_host(codec.encode_on_host(x, form), form)
    x, back = x.astype(np.float64), back.astype(np.float64)
    error = np.linalg.norm(back - x, axis=1) / np.linalg.norm(x, axis=1)
    # Both vectors of a pair are rounded.
    assert (error < 1.2 * 2**0.5 * codec._ROUNDING[dtype] + 1e-5).all()
    assert not back[2, : k * k].any()
    numbers = 2 * 2 * 4 * k
    assert form.row_bytes >= numbers * (form.bits or 8 * form.array_dtype.itemsize) // 8
    assert sum(form.stored_widths) == numbers and form.width == 2 * k * k


@pytest.mark.parametrize("rank", [1, 4, 8])
def test_pairs_of_vectors_leave_out_little_more_than_the_best(rank):
    """Guards: too few rounds, or vectors that are not orthonormal."""
    x, form = blocks_of_rank(12, 20, noise=0.02), Form("float32", (576,) * 2, rank)
    values = codec.encode_on_host(x, form)
    back = codec.decode_on_host(values, form)
    s = np.linalg.svd(x.reshape(-1, 24, 24), compute_uv=False)
    kept = 1 - np.square((back - x).reshape(-1, 576)).sum(axis=1) / np.square(s).sum(axis=1)
    best = np.square(s[:, :rank]).sum(axis=1) / np.square(s).sum(axis=1)
    assert (kept < best + 1e-6).all() and (kept > 0.8 * best).all()
    assert (kept / best).mean() > 0.99
    u = values.reshape(-1, 2, rank, 24)[:, 0]
    np.testing.assert_allclose(u @ u.swapaxes(1, 2), np.tile(np.eye(rank), (40, 1, 1)), atol=1e-5)


@pytest.mark.parametrize("dtype", stores.DTYPES)
def test_the_device_and_numpy_read_pairs_alike(dtype):
    x, form = blocks_of_rank(8, 40, noise=0.1), Form(dtype, (576,) * 2, 4)
    x[5, 700], x[6, 3] = np.nan, -np.inf
    values = codec.encode_on_host(x, form)
    stored = np.asarray(jax.jit(codec.encode, static_argnames="form")(x, form))
    np.testing.assert_array_equal(stored, values)
    assert values.shape == (40, form.columns) and values.dtype == form.array_dtype
    assert (~np.isfinite(codec.marks(values, form))).nonzero()[0].tolist() == [5, 6]
    back = codec.decode_on_host(values, form)
    assert np.isinf(back[[5, 6]]).all()
    on_device = np.asarray(jax.jit(stores.decode, static_argnames="form")(values, form))
    valid = np.delete(np.arange(40), [5, 6])
    np.testing.assert_allclose(on_device[valid], back[valid], atol=1e-5 * np.abs(back[valid]).max())
    # Decoded rows stay as they are.
    np.testing.assert_array_equal(stores.decode(back[valid], form), back[valid])


def test_pairs_that_save_nothing_and_blocks_that_are_not_square_are_refused():
    with pytest.raises(ValueError, match="rank 8: 8 pairs .* 256 numbers, and a whole block 256"):
        Form("int8", (256, 256), 8)
    with pytest.raises(ValueError, match="square blocks of one side"):
        Form("int8", (256, 144), 2)
    with pytest.raises(ValueError, match="square blocks of one side"):
        Form("int8", (60, 60), 2)
    with pytest.raises(ValueError, match="rank -1"):
        Form("int8", (256, 256), -1)
