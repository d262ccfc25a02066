"""How rows lie on disk: what is lost by rounding, and what is never lost."""

import numpy as np
import pytest

from tda import store as stores
from tda.store import rows

WIDTHS = (4, 8, 4)
EVEN = (4, 4, 8)[:2] * 2


def data(count=50, widths=WIDTHS):
    x = np.random.default_rng(0).normal(size=(count, sum(widths))).astype(np.float32)
    # Blocks of very different size, as layers have.
    return x * np.repeat(10.0 ** np.arange(-3, len(widths) - 3), widths).astype(np.float32)


@pytest.mark.parametrize("widths", [WIDTHS, EVEN])
def test_int8_is_within_half_a_step_in_every_block(widths):
    """Guards: one scale for a whole row, which loses the blocks of small numbers."""
    x = data(widths=widths)
    values, scales = rows.encode(x, "int8", widths)
    assert values.dtype == np.int8 and scales.shape == (50, len(widths))
    stored = stores.Rows(0, values, scales, np.ones(50, bool))
    back = stored.decoded(widths)
    largest = np.maximum.reduceat(np.abs(x), np.cumsum([0, *widths[:-1]]), axis=1)
    bound = np.repeat(largest / 127 / 2, widths, axis=1)
    assert (np.abs(back - x) <= bound * 1.001).all()
    assert np.abs(values).max() == 127
    np.testing.assert_array_equal(np.asarray(stores.decode(values, scales, widths)), back)


@pytest.mark.filterwarnings("error")  # as of a cast that is not defined
def test_zeros_stay_zeros_and_the_infinite_stay_infinite():
    x = data()
    x[3, :4] = 0
    x[5] = 0
    x[7] = np.inf
    values, scales = rows.encode(x, "int8", WIDTHS)
    valid = np.isfinite(scales[:, 0])
    back = stores.Rows(0, values, scales, valid).decoded(WIDTHS)
    assert (back[3, :4] == 0).all() and (back[5] == 0).all() and (back[3, 4:] != 0).any()
    np.testing.assert_array_equal(stores.valid(back), np.arange(50) != 7)
    assert np.isinf(back[7]).all() and not values[7].any()


def test_numbers_of_any_size_keep_their_precision():
    """Guards: float16 overflow; scales that vanish or overflow."""
    for size in (1e-30, 1e30):
        x = data() * np.float32(size)
        values, scales = rows.encode(x, "int8", WIDTHS)
        back = stores.Rows(0, values, scales, np.ones(50, bool)).decoded(WIDTHS)
        assert np.abs(back - x).max() <= np.abs(x).max() / 200


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_floats_are_rounded_to_nearest(dtype):
    x = data()
    values, scales = rows.encode(x, dtype, WIDTHS)
    assert scales is None and values.dtype == stores.DTYPES[dtype]
    back = np.asarray(stores.decode(values, None, WIDTHS))
    assert (np.abs(back - x) <= np.abs(x) * {"float32": 0, "bfloat16": 2**-8}[dtype]).all()


def test_blocks_that_devices_would_flush_to_zero_are_stored_as_zeros():
    x = data()
    x[3, :4] = 1e-42
    x[5, 4:12] = [1e38, -3e38, 0, 0, 0, 0, 0, 1e37]
    values, scales = rows.encode(x, "int8", WIDTHS)
    assert not values[3, :4].any() and scales[3, 0] == 0 and values[3, 4:].any()
    assert values[5, 4:12].tolist() == [42, -127, 0, 0, 0, 0, 0, 4]
