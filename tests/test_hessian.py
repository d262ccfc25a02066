"""R, its spectra, the mixing rule and R^(−1/2)."""

import numpy as np
import pytest

from tda import hessian

SLICES = [slice(0, 3), slice(3, 8)]


def gradients(count=200, seed=0):
    return np.random.default_rng(seed).normal(size=(count, 8)).astype(np.float32)


def test_autocorrelation_is_the_mean_outer_product_of_each_block():
    x = gradients()
    R = hessian.autocorrelation([x[:70], x[70:]], SLICES)
    for block, s in zip(R, SLICES, strict=True):
        np.testing.assert_allclose(block, x[:, s].T @ x[:, s] / 200, rtol=1e-5, atol=1e-6)
    with pytest.raises(ValueError, match="no gradients"):
        hessian.autocorrelation([], SLICES)


def test_invalid_rows_have_no_part_in_it():
    x = gradients()
    x[7] = np.inf
    R = hessian.autocorrelation([x[:70], x[70:]], SLICES)
    for block, s in zip(R, SLICES, strict=True):
        kept = np.delete(x, 7, axis=0)[:, s]
        np.testing.assert_allclose(block, kept.T @ kept / 199, rtol=1e-5, atol=1e-6)


def test_inverse_root_whitens():
    x = gradients() @ np.diag([1, 5, 0.1, 30, 1, 1, 2, 7]).astype(np.float32)
    R = hessian.autocorrelation([x], SLICES)
    white = np.asarray(hessian.whiten(x, hessian.inverse_root(R, damping=0.0), SLICES))
    for s in SLICES:
        np.testing.assert_allclose(
            white[:, s].T @ white[:, s] / 200, np.eye(s.stop - s.start), atol=2e-4
        )


def test_inverse_root_is_finite_for_singular_and_vanishing_blocks():
    """Mistake: inversion in float32 without damping."""
    low_rank = np.outer([1.0, 2, 3], [1.0, 2, 3])
    for block in (low_rank, low_rank * 1e-20, low_rank * 1e20, np.zeros((3, 3))):
        (root,) = hessian.inverse_root([block], damping=1e-3)
        assert np.isfinite(root).all()
    assert not hessian.inverse_root([np.zeros((3, 3))])[0].any()


def test_damping_is_in_units_of_the_mean_eigenvalue():
    (root,) = hessian.inverse_root([np.diag([4.0, 0.0])], damping=0.5)
    np.testing.assert_allclose(np.diag(root), [(4 + 1) ** -0.5, 1.0], rtol=1e-6)


def test_spectrum_joins_the_blocks_and_falls():
    R = [np.diag([1.0, 9.0]), np.diag([4.0, 16.0, 2.0])]
    np.testing.assert_allclose(hessian.spectrum(R), [16, 9, 4, 2, 1], rtol=1e-6)


def test_component_is_in_proportion():
    assert hessian.component(65536) == 1000
    assert hessian.component(4096) == 62
    assert hessian.component(10) == 1


def test_the_mixing_rule_equalises_the_component():
    train, evaluation = np.array([9.0, 4.0, 1.0]), np.array([100.0, 1.0, 0.0])
    weight = hessian.mixing_weight(train, evaluation, 2)
    assert weight == pytest.approx(0.8)
    assert weight * evaluation[1] == pytest.approx((1 - weight) * train[1])
    (mixed,) = hessian.mix([np.diag(train)], [np.diag(evaluation)], weight)
    np.testing.assert_allclose(np.diag(mixed), 0.8 * evaluation + 0.2 * train)
    with pytest.raises(ValueError, match="vanish at component 3"):
        hessian.mixing_weight(np.zeros(3), np.zeros(3), 3)
