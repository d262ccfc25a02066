"""Sums of outer products, against what must hold of the best one."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from tda.gradients.moments import low_rank
from tda.gradients.moments.scales import factored_scale


def heavy_tailed(shape, seed=0):
    """1/√V with rows, columns and a few directions of their own, and entries far off them."""
    rng = np.random.default_rng(seed)
    *stack, M, N = shape
    rows, columns = rng.normal(size=(*stack, M, 3)), rng.normal(size=(*stack, 3, N))
    x = np.exp(rows[..., :1] + columns[..., :1, :] + 0.4 * rows @ columns)
    x *= np.exp(0.3 * rng.standard_t(4, size=shape))
    return jnp.asarray(1e4 * x, jnp.float32)


def factors(S):
    scale = factored_scale(S)
    return scale.left[..., 0, :], scale.right[..., 0, :]


def approximate(S, rank, **options):
    return low_rank.approximate(S, *factors(S), rank, **options)


def relative_error(S, left, right):
    """√(mean (1 − Ŝ/S)²) of each matrix, what is minimised: float32 [(L,)]."""
    share = np.asarray(low_rank.product(left, right)) / np.asarray(S)
    return np.sqrt(np.mean(np.square(1 - share), axis=(-1, -2)))


def test_relative_error_and_product():
    S = heavy_tailed((2, 5, 7))
    rng = np.random.default_rng(1)
    left, right = (rng.normal(size=(2, 3, n)).astype(np.float32) for n in (5, 7))
    for layer in range(2):
        dense = sum(np.outer(left[layer, r], right[layer, r]) for r in range(3))
        expected = np.sqrt(np.mean((1 - dense / np.asarray(S[layer])) ** 2))
        np.testing.assert_allclose(low_rank.product(left, right)[layer], dense, rtol=1e-5)
        np.testing.assert_allclose(relative_error(S, left, right)[layer], expected, rtol=1e-5)


@pytest.mark.parametrize("shape", [(12, 30), (30, 12), (12, 12), (3, 12, 12)], ids=str)
@pytest.mark.parametrize("rank", [12, 40])
def test_the_full_rank_is_exact(shape, rank):
    """Guards: sides that change places where both have one length."""
    S = heavy_tailed(shape)
    left, right = approximate(S, rank)
    assert left.shape == (*shape[:-2], 12, shape[-2])
    assert right.shape == (*shape[:-2], 12, shape[-1])
    np.testing.assert_allclose(low_rank.product(left, right), S, rtol=1e-6)


@pytest.mark.parametrize("shape", [(20, 50), (50, 20), (24, 24)], ids=str)
def test_a_sum_of_outer_products_is_found(shape):
    """Guards: too few passes, or a start that leaves a direction out."""
    rng = np.random.default_rng(0)
    left, right = (np.exp(rng.normal(size=(3, n))) for n in shape)
    S = jnp.asarray(1e3 * np.einsum("rm,rn->mn", left, right), jnp.float32)
    assert relative_error(S, *approximate(S, 2)) > 0.02
    assert relative_error(S, *approximate(S, 3, sweeps=8)) < 1e-4


def test_more_outer_products_are_closer_and_one_is_about_factored():
    S = heavy_tailed((60, 80))
    left, right = factors(S)
    factored = relative_error(S, *(left[None], right[None]))
    errors = [relative_error(S, *approximate(S, rank)) for rank in (1, 2, 4, 8)]
    assert 0.7 * factored < errors[0] < factored
    assert all(b < 0.97 * a for a, b in zip(errors, errors[1:], strict=False))


def test_no_other_side_is_closer_in_relative_terms():
    """Guards: weights left out, or of the wrong power: the few largest entries would decide."""
    S = heavy_tailed((60, 80))
    left, right = approximate(S, 4, sweeps=40)
    S64, left, right = (np.asarray(x, np.float64) for x in (S, left, right))
    for this, other, target in ((left, right, S64), (right, left, S64.T)):
        best = [np.linalg.lstsq((other / s).T, np.ones(len(s)), rcond=None)[0] for s in target]
        there = np.mean((1 - (this.T @ other) / target) ** 2)
        least = np.mean((1 - (np.asarray(best) @ other) / target) ** 2)
        assert least > 0.01
        np.testing.assert_allclose(there, least, rtol=2e-3)


@pytest.mark.parametrize("shape", [(60, 80), (80, 60)], ids=str)
def test_the_start_is_the_truncated_svd_of_the_balanced_matrix(shape):
    # Mild enough that nothing is clipped.
    S = jnp.exp(0.1 * jnp.log(heavy_tailed(shape)))
    left, right = (np.asarray(x) for x in factors(S))
    balanced = np.asarray(S) / np.outer(left, right)
    U, s, Vt = np.linalg.svd(balanced)
    found = low_rank.product(*approximate(S, 3, sweeps=0)) / np.outer(left, right)
    least = np.linalg.norm(s[3:])
    assert least < 0.7 * np.linalg.norm(s[1:])
    np.testing.assert_allclose(np.linalg.norm(found - balanced), least, rtol=1e-2)


def test_passes_lower_the_error_of_the_truncated_svd():
    S = heavy_tailed((60, 80))
    errors = [relative_error(S, *approximate(S, 4, sweeps=sweeps)) for sweeps in (0, 1, 3, 40)]
    assert errors[1] < 0.9 * errors[0]
    assert errors[3] <= errors[2] <= errors[1]
    assert relative_error(S, *approximate(S, 4)) < 1.03 * errors[3]


def test_layers_of_a_stack_are_approximated_each_on_its_own():
    S = heavy_tailed((3, 16, 20)) * jnp.asarray([1e-6, 1.0, 1e6])[:, None, None]
    left, right = approximate(S, 2)
    assert left.shape == (3, 2, 16) and right.shape == (3, 2, 20)
    for layer in range(3):
        alone = low_rank.product(*approximate(S[layer], 2))
        np.testing.assert_allclose(low_rank.product(left, right)[layer], alone, rtol=1e-3)


def test_weights_that_were_never_touched_do_no_harm():
    """Guards: infinite or useless scales where rows, columns or entries of V are 0."""
    V = 1 / np.square(np.asarray(heavy_tailed((40, 50))))
    V[3], V[:, 4], V[10, 10] = 0, 0, 0
    S = jnp.asarray(1 / (np.sqrt(V) + 1e-8), jnp.float32)
    assert relative_error(S, *approximate(S, 4)) < 0.6


def test_memory_is_for_one_layer_of_a_stack():
    """Guards: temporary arrays of the whole stack's size."""
    S = jax.ShapeDtypeStruct((64, 96, 128), jnp.float32)
    ends = [jax.ShapeDtypeStruct((64, n), jnp.float32) for n in (96, 128)]
    compiled = low_rank.approximate.lower(S, *ends, rank=4).compile()
    assert compiled.memory_analysis().temp_size_in_bytes < 16 * 96 * 128 * 4
