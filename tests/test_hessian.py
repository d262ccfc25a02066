"""R, its spectra, the mixing rule and R^(−1/2)."""

import jax
import numpy as np
import pytest

from tda import hessian, store
from tda.retrieval import exact

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
    """Guards: float32 inversion without damping."""
    low_rank = np.outer([1.0, 2, 3], [1.0, 2, 3])
    for block in (low_rank, low_rank * 1e-20, low_rank * 1e20, np.zeros((3, 3))):
        (root,) = hessian.inverse_root([block], damping=1e-3)
        assert np.isfinite(root).all()
    assert not hessian.inverse_root([np.zeros((3, 3))])[0].any()


def spread(count=400, width=24, condition=1e3):
    """Gradients in whose R eigenvalues fall from 1 to 1/condition², about some common mean."""
    rng = np.random.default_rng(0)
    turn = np.linalg.qr(rng.normal(size=(width, width)))[0]
    x = rng.normal(size=(count, width)) * np.geomspace(1, 1 / condition, width)
    return ((x + 2 * (np.arange(width) == 3)) @ turn).astype(np.float32)


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_roots_are_those_of_float64(tmp_path, dtype):
    """Guards: low-precision Gram matrices with broken eigenvectors."""
    x = spread()
    kept = store.create(tmp_path / "s", [f"p{i}" for i in range(400)], {"b": 24}, {}, dtype=dtype)
    kept.write(0, x)
    stored = kept.read(slice(0, 400)).astype(np.float64)
    (R,) = hessian.autocorrelation((chunk for _, chunk in kept.chunks(100)), [slice(0, 24)])
    np.testing.assert_allclose(R, stored.T @ stored / 400, rtol=0, atol=1e-6 * np.abs(R).max())
    damping = 1e-3
    (root,) = hessian.inverse_root([R], damping)
    values, vectors = np.linalg.eigh(stored.T @ stored / 400)
    expected = (vectors * (values + damping * values.mean()) ** -0.5) @ vectors.T
    assert np.linalg.norm(root - expected, 2) < 1e-3 * np.linalg.norm(expected, 2)


def test_a_sum_over_many_chunks_does_not_stand_still():
    """Guards: low-precision Gram matrices: in float32, 2²⁴ + 1 is 2²⁴."""
    one = np.ones((1, 2), np.float32)
    R = hessian.autocorrelation([one * 2.0**12, *[one] * 64], [slice(0, 2)])[0]
    np.testing.assert_array_equal(R * 65, 2.0**24 + 64)


def test_products_are_in_full_precision_on_every_device():
    """Guards: low-precision Gram matrices: accelerators round a float32 product unless told."""
    roots, bounds = [np.eye(3), np.eye(5)], ((0, 3), (3, 8))
    for function in (
        lambda x: hessian._grams(x, bounds),
        lambda x: hessian.whiten(x, roots, SLICES),
        lambda x: exact._scores(exact._Group(x, roots, (0,)), x, (3, 5)),
    ):
        text = jax.jit(function).lower(np.ones((4, 8), np.float32)).as_text()
        assert 0 < text.count("dot_general") == text.count("precision = [HIGHEST, HIGHEST]")


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


def test_a_sample_for_R_is_drawn_from_the_whole_corpus():
    """Mistakes: the Hessian from the first rows of the corpus instead of a sample of it."""
    x = np.repeat(np.arange(1000, dtype=np.float32)[:, None], 8, axis=1)
    source = exact.InMemory(x, SLICES)
    drawn = np.concatenate(list(hessian.rows_for(source, 100)))[:, 0]
    assert len(set(drawn)) == 100
    counts = np.histogram(drawn, bins=4, range=(0, 1000))[0]
    assert (counts > 10).all() and drawn.max() > 900
    again = np.concatenate(list(hessian.rows_for(source, 100)))[:, 0]
    other = np.concatenate(list(hessian.rows_for(source, 100, seed=1)))[:, 0]
    np.testing.assert_array_equal(drawn, again)
    assert set(other) != set(drawn)
    for count in (0, 1000, 2000):
        np.testing.assert_array_equal(np.concatenate(list(hessian.rows_for(source, count))), x)
