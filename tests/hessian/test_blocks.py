"""Programs over blocks: a loop gives what one block after another gives."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from tda.hessian import block_slices, blocks


def matrices(*widths):
    rng = np.random.default_rng(0)
    return [rng.normal(size=(w, w)).astype(np.float32) for w in widths]


def fold_all(x_RxE, roots, widths, scales):
    """A fold that depends on every argument of a step and on the order of the blocks."""

    def step(carry, block, matrix, scale):
        return 0.5 * carry + scale * (block.columns(x_RxE) @ matrix).sum(axis=1) + block.start

    return blocks.fold(step, jnp.zeros(len(x_RxE)), block_slices(widths), roots, scales)


def test_a_loop_gives_what_one_block_after_another_gives():
    widths, x = (4,) * 5, np.random.default_rng(1).normal(size=(7, 20)).astype(np.float32)
    roots, scales = matrices(*widths), (1.0, -2.0, 3.0, 0.5, 0.25)
    one_by_one = fold_all(x, roots, widths, scales)
    loop = jax.jit(lambda x, m: fold_all(x, m, widths, scales))(x, blocks.stack(roots))
    np.testing.assert_allclose(loop, one_by_one, rtol=1e-6)
    by_hand = np.zeros(7)
    for i, s in enumerate(block_slices(widths)):
        by_hand = 0.5 * by_hand + scales[i] * (x[:, s] @ roots[i]).sum(axis=1) + s.start
    np.testing.assert_allclose(loop, by_hand, rtol=1e-5)


def test_the_program_does_not_grow_with_the_blocks():
    def length(roots, count):
        x = np.zeros((2, 4 * count), np.float32)
        scales = (1.0,) * count
        program = jax.jit(lambda x, m: fold_all(x, m, (4,) * count, scales)).lower(x, roots)
        return program.as_text().count("dot_general")

    assert length(blocks.stack(matrices(*[4] * 50)), 50) == 1
    assert length(matrices(*[4] * 50), 50) == 50


def test_blocks_that_differ_or_are_large_are_left_apart(monkeypatch):
    assert isinstance(blocks.stack(matrices(3, 5)), list)
    assert blocks.stack(matrices(4, 4)).shape == (2, 4, 4)
    monkeypatch.setattr(blocks, "_STACKED_BYTES", 2 * 16 * 4 - 1)
    assert isinstance(blocks.stack(matrices(4, 4)), list)


def test_matrices_that_do_not_fit_are_an_error():
    x, roots = np.zeros((2, 8), np.float32), blocks.stack(matrices(4, 4))
    with pytest.raises(ValueError, match="2 matrices of width 4 do not fit"):
        fold_all(x, roots, (2, 6), (1.0, 1.0))
    with pytest.raises(ValueError, match="2 matrices of width 4 do not fit"):
        fold_all(x, roots, (4,), (1.0, 1.0))
    with pytest.raises(ValueError, match="longer than"):
        fold_all(x, matrices(4, 4), (4,), (1.0, 1.0))
