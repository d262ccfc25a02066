"""Rotary positions: layouts, parts of heads, and contexts that are stretched."""

import math

import jax.numpy as jnp
import numpy as np
import pytest

from tda.model.positions import Rotation, check, rotary, rotation

K = 8


def turned(x_TxK, inverse, factor=1.0):
    """Pairs (i, i + K/2) of each position as complex numbers, multiplied by e^(i t θ)."""
    half = len(inverse)
    angle = np.exp(1j * np.arange(len(x_TxK))[:, None] * np.asarray(inverse, np.float64))
    z = (x_TxK[:, :half] + 1j * x_TxK[:, half:]) * angle * factor
    return np.concatenate([z.real, z.imag], -1)


def random(T=9, width=K):
    return np.random.default_rng(0).normal(size=(T, width)).astype(np.float32)


def call(x_TxK, *args, **how):
    return np.asarray(rotary(jnp.asarray(x_TxK)[None, :, None], *args, **how))[0, :, 0]


def test_interleaved_pairs_are_the_same_turns_in_another_order():
    x = random()
    order = np.arange(K).reshape(2, K // 2).T.reshape(-1)  # 0, K/2, 1, K/2 + 1, …
    got = call(x[:, order], rotation(K), layout="interleaved")
    np.testing.assert_allclose(got, turned(x, rotation(K).inverse_period_K)[:, order], atol=1e-5)


def test_a_part_of_a_head_is_turned_and_the_rest_left():
    x = random()
    got = call(x, rotation(4))
    np.testing.assert_array_equal(got[:, 4:], x[:, 4:])
    np.testing.assert_allclose(got[:, :4], turned(x[:, :4], [1.0, 10_000**-0.5]), atol=1e-5)


def test_a_factor_scales_what_is_turned():
    x = random()
    inverse = rotation(K).inverse_period_K
    np.testing.assert_allclose(call(x, Rotation(inverse, 1.5)), turned(x, inverse, 1.5), atol=1e-5)


def test_linear_and_given_factors():
    plain = np.asarray(rotation(K, 100.0).inverse_period_K)
    linear = rotation(K, 100.0, {"kind": "linear", "factor": 4.0})
    np.testing.assert_allclose(linear.inverse_period_K, plain / 4, rtol=1e-6)
    given = rotation(K, 100.0, {"kind": "factors", "factors": [1.0, 2.0, 3.0, 8.0]})
    np.testing.assert_allclose(given.inverse_period_K, plain / [1, 2, 3, 8], rtol=1e-6)


def test_llama3_keeps_short_periods_and_stretches_long_ones():
    scaling = dict(
        kind="llama3",
        factor=8.0,
        low_freq_factor=1.0,
        high_freq_factor=4.0,
        original_max_position_embeddings=64,
    )
    plain = np.asarray(rotation(32, 500.0).inverse_period_K, np.float64)
    got = np.asarray(rotation(32, 500.0, scaling).inverse_period_K)
    period = 2 * math.pi / plain
    for i in range(16):
        if period[i] < 64 / 4:
            expected = plain[i]
        elif period[i] > 64:
            expected = plain[i] / 8
        else:
            smooth = (64 / period[i] - 1) / 3
            expected = (1 - smooth) * plain[i] / 8 + smooth * plain[i]
        assert got[i] == pytest.approx(expected, rel=1e-5)
    assert np.sum((got < plain * 0.99) & (got > plain / 7.9)) >= 2


def test_yarn_keeps_pairs_that_turn_often():
    scaling = dict(kind="yarn", factor=4.0, original_max_position_embeddings=64, beta_fast=4)
    plain = np.asarray(rotation(32, 500.0).inverse_period_K)
    found = rotation(32, 500.0, scaling)
    got = np.asarray(found.inverse_period_K)
    np.testing.assert_allclose(got[0], plain[0])
    np.testing.assert_allclose(got[-1], plain[-1] / 4, rtol=1e-6)
    assert found.factor == pytest.approx(0.1 * math.log(4) + 1)


def test_longrope_has_other_factors_beyond_the_trained_length():
    scaling = dict(kind="longrope", attention_factor=1.25, original_max_position_embeddings=9)
    scaling |= dict(short_factor=[1.0, 2.0, 3.0, 4.0], long_factor=[5.0, 6.0, 7.0, 8.0])
    plain = np.asarray(rotation(K, 100.0).inverse_period_K)
    for T, factors in ((9, scaling["short_factor"]), (10, scaling["long_factor"])):
        found = rotation(K, 100.0, scaling, T)
        np.testing.assert_allclose(found.inverse_period_K, plain / factors, rtol=1e-6)
        assert found.factor == 1.25


def test_dynamic_scaling_stretches_the_longest_period_by_the_excess_alone():
    scaling = dict(kind="dynamic", factor=2.0, max_position_embeddings=16)
    plain = np.asarray(rotation(K, 100.0).inverse_period_K)
    np.testing.assert_array_equal(rotation(K, 100.0, scaling, 16).inverse_period_K, plain)
    found = np.asarray(rotation(K, 100.0, scaling, 24).inverse_period_K)
    # Half more positions, by a factor of 2: the longest period doubles, the shortest stays.
    np.testing.assert_allclose(found[[0, -1]], plain[[0, -1]] / [1, 2], rtol=1e-5)


@pytest.mark.parametrize(
    ("width", "scaling", "message"),
    [
        (7, None, "7 features of a head"),
        (8, {"kind": "ntk"}, "unknown rope_scaling kind 'ntk'"),
        (8, {"kind": "factors", "factors": [1.0] * 3}, "has 3 numbers in 'factors'; give one"),
        (8, {"kind": "linear"}, "needs factor"),
        (8, {"kind": "linear", "factor": 2.0, "mscale": 1.0}, "it has factor, mscale"),
        (8, {"kind": "linear", "factor": 0}, "'factor' of rope_scaling is 0; give .* above 0"),
        (8, {"kind": "linear", "factor": "8"}, "'factor' of rope_scaling is '8'"),
        (4, {"kind": "factors", "factors": [1.0, 0.0]}, r"'factors' of rope_scaling is \[1.0, 0.0"),
    ],
)
def test_scalings_with_other_keys_are_refused(width, scaling, message):
    with pytest.raises(ValueError, match=message):
        check(width, scaling)
