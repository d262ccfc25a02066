"""Programs over blocks: a loop over alike ones is what one after another is."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from tda.hessian import blocks
from tda.retrieval.scorer import slices_of


def matrices(*widths):
    rng = np.random.default_rng(0)
    return [rng.normal(size=(w, w)).astype(np.float32) for w in widths]


def folded(x_RxE, made, widths, scales):
    """Something that takes every argument of a step, and the order of the blocks."""

    def step(carry, block, matrix, scale):
        return 0.5 * carry + scale * (block.of(x_RxE) @ matrix).sum(axis=1) + block.start

    return blocks.over(step, jnp.zeros(len(x_RxE)), slices_of(widths), made, scales)


def test_a_loop_is_what_one_after_another_is():
    widths, x = (4,) * 5, np.random.default_rng(1).normal(size=(7, 20)).astype(np.float32)
    made, scales = matrices(*widths), (1.0, -2.0, 3.0, 0.5, 0.25)
    one_by_one = folded(x, made, widths, scales)
    loop = jax.jit(lambda x, m: folded(x, m, widths, scales))(x, blocks.stacked(made))
    np.testing.assert_allclose(loop, one_by_one, rtol=1e-6)
    by_hand = np.zeros(7)
    for i, s in enumerate(slices_of(widths)):
        by_hand = 0.5 * by_hand + scales[i] * (x[:, s] @ made[i]).sum(axis=1) + s.start
    np.testing.assert_allclose(loop, by_hand, rtol=1e-5)


def test_the_program_does_not_grow_with_the_blocks():
    def length(made, count):
        x = np.zeros((2, 4 * count), np.float32)
        scales = (1.0,) * count
        told = jax.jit(lambda x, m: folded(x, m, (4,) * count, scales)).lower(x, made).as_text()
        return told.count("dot_general")

    assert length(blocks.stacked(matrices(*[4] * 50)), 50) == 1
    assert length(matrices(*[4] * 50), 50) == 50


def test_blocks_that_differ_or_are_large_are_left_apart(monkeypatch):
    assert isinstance(blocks.stacked(matrices(3, 5)), list)
    assert blocks.stacked(matrices(4, 4)).shape == (2, 4, 4)
    monkeypatch.setattr(blocks, "_STACKED_BYTES", 2 * 16 * 4 - 1)
    assert isinstance(blocks.stacked(matrices(4, 4)), list)


def test_matrices_that_do_not_fit_are_an_error():
    x, made = np.zeros((2, 8), np.float32), blocks.stacked(matrices(4, 4))
    with pytest.raises(ValueError, match="2 matrices of width 4 do not fit"):
        folded(x, made, (2, 6), (1.0, 1.0))
    with pytest.raises(ValueError, match="2 matrices of width 4 do not fit"):
        folded(x, made, (4,), (1.0, 1.0))
    with pytest.raises(ValueError, match="longer than"):
        folded(x, matrices(4, 4), (4,), (1.0, 1.0))
