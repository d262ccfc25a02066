"""R, its spectra, the mixing rule and R^(−1/2)."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from tda import hessian, store
from tda.hessian import autocorrelation
from tda.retrieval import scorer
from tda.retrieval.sources import InMemory
from tda.runtime import groups, sharding
from tda.runtime.groups import ONE_GROUP, Groups
from tda.store import Form

SLICES = [slice(0, 3), slice(3, 8)]


def gradients(count=200, seed=0):
    return np.random.default_rng(seed).normal(size=(count, 8)).astype(np.float32)


def test_autocorrelation_is_the_mean_outer_product_of_each_block():
    x = gradients()
    R = hessian.autocorrelation_of_source(InMemory(x, SLICES)).blocks
    for block, s in zip(R, SLICES, strict=True):
        np.testing.assert_allclose(block, x[:, s].T @ x[:, s] / 200, rtol=1e-5, atol=1e-6)
    with pytest.raises(ValueError, match="no gradients"):
        hessian.autocorrelation_of_source(InMemory(x[:0], SLICES))


@pytest.mark.parametrize("portion_bytes", [1, 3 * 8 * 4**2, 64 << 20])
def test_blocks_are_the_same_however_many_one_loop_sums(monkeypatch, portion_bytes):
    monkeypatch.setattr(autocorrelation, "_PORTION_BYTES", portion_bytes)
    widths = (4, 4, 4, 4, 6, 6, 4)
    x = np.random.default_rng(1).normal(size=(50, sum(widths))).astype(np.float32)
    slices = hessian.block_slices(widths)
    R = hessian.autocorrelation_of_source(InMemory(x, slices))
    assert [b.shape[0] for b in R.blocks] == list(widths)
    for block, noise, s in zip(R.blocks, R.noise, slices, strict=True):
        outer_products = x[:, s, None].astype(np.float64) * x[:, None, s]
        np.testing.assert_allclose(block, outer_products.mean(0), rtol=0, atol=1e-6)
        expected = np.sum(np.square(outer_products - outer_products.mean(0))) / 50**2
        np.testing.assert_allclose(noise, expected, rtol=1e-5)


def test_the_program_of_its_sums_does_not_grow_with_the_number_of_blocks():
    def count_products(blocks):
        rows = np.ones((1, 4, 8 * blocks), np.float32), np.ones((1, 4), bool)
        sums = [((np.zeros((1, blocks, 8, 8)),) * 2, (np.ones((1, blocks)),) * 3)]
        form = Form("float32", (8,) * blocks)
        program = autocorrelation._add_rows.lower(sums, *rows, form, ((8,),) * blocks).as_text()
        return program.count("dot_general")

    assert count_products(40) == count_products(2) == 1


def test_invalid_rows_have_no_part_in_it():
    x = gradients()
    x[7] = np.inf
    R = hessian.autocorrelation_of_source(InMemory(x, SLICES)).blocks
    for block, s in zip(R, SLICES, strict=True):
        valid = np.delete(x, 7, axis=0)[:, s]
        np.testing.assert_allclose(block, valid.T @ valid / 199, rtol=1e-5, atol=1e-6)


def test_inverse_root_whitens():
    x = gradients() @ np.diag([1, 5, 0.1, 30, 1, 1, 2, 7]).astype(np.float32)
    R = hessian.autocorrelation_of_source(InMemory(x, SLICES)).blocks
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


def test_without_damping_a_singular_block_has_a_pseudo_inverse():
    rows = gradients(5)  # of 8 numbers: three directions that nothing is in
    (root,) = hessian.inverse_root([rows.T @ rows / 5], damping=0.0)
    expected = np.linalg.pinv((rows.T @ rows / 5).astype(np.float64), rcond=1e-6)
    np.testing.assert_allclose(root @ root, expected, rtol=1e-3, atol=1e-3 * expected.max())
    # In a wide block too only rounding is left out, not what is small.
    values = np.geomspace(1, 1e-5, 300)
    (root,) = hessian.inverse_root([np.diag(values)], damping=0.0)
    np.testing.assert_allclose(np.diag(root), values**-0.5, rtol=1e-3)
    for wrong in (dict(damping=-1e-3), dict(cutoff=-1.0)):
        with pytest.raises(ValueError, match="must not be negative"):
            hessian.inverse_root([np.eye(3)], **wrong)


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
    gradient_store = store.create(
        tmp_path / "s", [f"p{i}" for i in range(400)], {"b": 24}, {}, dtype=dtype
    )
    gradient_store.write(0, x)
    stored = gradient_store.read(slice(0, 400)).astype(np.float64)
    (R,) = hessian.autocorrelation_of_source(gradient_store).blocks
    np.testing.assert_allclose(R, stored.T @ stored / 400, rtol=0, atol=1e-6 * np.abs(R).max())
    damping = 1e-3
    (root,) = hessian.inverse_root([R], damping)
    values, vectors = np.linalg.eigh(stored.T @ stored / 400)
    expected = (vectors * (values + damping * values.mean()) ** -0.5) @ vectors.T
    assert np.linalg.norm(root - expected, 2) < 1e-3 * np.linalg.norm(expected, 2)


def test_products_are_in_full_precision_on_every_device():
    """Guards: low-precision Gram matrices: accelerators round a float32 product unless told."""
    widths, roots = (3, 5), [np.eye(3), np.eye(5)]
    form = Form("float32", widths)
    sums = [((jnp.zeros((1, 1, w, w)),) * 2, (jnp.ones((1, 1)),) * 3) for w in widths]
    valid = np.ones((1, 4), bool)
    for function in (
        lambda x: autocorrelation._add_rows(sums, x[None], valid, form, ((3,), (5,))),
        lambda x: hessian.whiten(x, roots, SLICES),
        lambda x: scorer.score(scorer.ScorerGroup(x, roots, (0,)), x, widths),
    ):
        text = jax.jit(function).lower(np.ones((4, 8), np.float32)).as_text()
        assert 0 < text.count("dot_general") == text.count("precision = [HIGHEST, HIGHEST]")


def test_damping_is_in_units_of_the_mean_eigenvalue():
    (root,) = hessian.inverse_root([np.diag([4.0, 0.0])], damping=0.5)
    np.testing.assert_allclose(np.diag(root), [(4 + 1) ** -0.5, 1.0], rtol=1e-6)


def test_component_is_in_proportion():
    assert hessian.default_component(65536) == 1000
    assert hessian.default_component(4096) == 62
    assert hessian.default_component(10) == 1


def test_the_mixing_rule_equalises_the_component():
    train, evaluation = np.array([9.0, 4.0, 1.0]), np.array([100.0, 1.0, 0.0])
    weight = hessian.mixing_weight([train[:1], train[1:]], [evaluation], 2)
    assert weight == pytest.approx(0.8)
    assert weight * evaluation[1] == pytest.approx((1 - weight) * train[1])
    (mixed,) = hessian.mix([np.diag(train)], [np.diag(evaluation)], weight)
    np.testing.assert_allclose(np.diag(mixed), 0.8 * evaluation + 0.2 * train)
    with pytest.raises(ValueError, match="vanish at component 3"):
        hessian.mixing_weight([np.zeros(3)], [np.zeros(3)], 3)


def test_a_component_that_no_query_reaches_is_refused():
    few, many = gradients(3), gradients(30)
    for rows, k in ((many, 8), (few, 3)):
        hessian.check_component(hessian.spectra([rows.T @ rows]), k, len(rows))
    spectra = hessian.spectra([few.T @ few])
    with pytest.raises(ValueError, match="R_eval of 3 queries has no direction at component 4"):
        hessian.check_component(spectra, 4, 3)
    with pytest.raises(ValueError, match="no component 9 .hessian.component. of 8 dimensions"):
        hessian.check_component(spectra, 9, 3)


class Recording(InMemory):
    """Notes the numbers of the rows that are read."""

    def __init__(self, x):
        super().__init__(x, SLICES)
        self.numbers = np.zeros(0, np.int64)

    def read(self, numbers):
        self.numbers = np.concatenate([self.numbers, numbers])
        return super().read(numbers)


def drawn_rows(x, sample, seed=0):
    source = Recording(x)
    hessian.autocorrelation_of_source(source, sample, seed)
    return source.numbers


def test_a_sample_for_R_is_drawn_from_the_whole_corpus():
    """Mistakes: the Hessian from the first rows of the corpus instead of a sample of it."""
    x = np.repeat(np.arange(1000, dtype=np.float32)[:, None], 8, axis=1)
    drawn = drawn_rows(x, 100)
    assert len(set(drawn)) == 100
    counts = np.histogram(drawn, bins=4, range=(0, 1000))[0]
    assert (counts > 10).all() and drawn.max() > 900
    np.testing.assert_array_equal(drawn, drawn_rows(x, 100))
    assert set(drawn_rows(x, 100, seed=1)) != set(drawn)
    for count in (0, 1000, 2000):
        assert hessian.autocorrelation_of_source(InMemory(x, SLICES), count).count == 1000
        assert not len(drawn_rows(x, count))  # it is scanned from end to end


@pytest.mark.parametrize("devices", [1, 4])
@pytest.mark.parametrize("dtype", ["float32", "int8"])
def test_R_of_a_source_is_summed_on_the_devices(tmp_path, dtype, devices):
    """From a store as it lies on disk, steps that end anywhere, invalid rows among them."""
    x = gradients(77)
    x[[5, 76]] = np.inf
    gradient_store = store.create(
        tmp_path / "s", [f"p{i}" for i in range(77)], {"a": 3, "b": 5}, {}, dtype=dtype
    )
    gradient_store.write(0, x)
    mesh = None if devices == 1 else sharding.make_mesh(devices=jax.devices()[:devices])
    seen = []
    R = hessian.autocorrelation_of_source(gradient_store, mesh=mesh, on_rows=seen.append)
    assert sum(seen) == 77 and R.count == 75
    stored = np.delete(gradient_store.read(slice(0, 77)), [5, 76], axis=0).astype(np.float64)
    for b, s in enumerate(SLICES):
        block = stored[:, s]
        expected = block.T @ block / 75
        np.testing.assert_allclose(R.blocks[b], expected, rtol=1e-5, atol=1e-6)
        each = np.einsum("ri,rj->rij", block, block) - expected
        np.testing.assert_allclose(R.noise[b], np.square(each).sum() / 75**2, rtol=1e-4)


@pytest.mark.parametrize("sample", [0, 50])
def test_R_of_groups_is_R_of_all_rows_whatever_was_killed(tmp_path, monkeypatch, sample):
    """Summed in the order of the groups: the same bits after a kill, and close to one sum."""
    monkeypatch.setattr(groups, "_ROWS_PER_RESULT", 0)
    x = gradients(77)
    x[5] = np.inf
    read: list[int] = []

    class Source(InMemory):
        killed = True

        def scan(self, step, rows=None):
            if self.killed and rows.start == 32:
                raise KeyboardInterrupt
            read.append(rows.start)
            return super().scan(step, rows)

        def read(self, numbers):
            if self.killed and numbers[0] >= 32:
                raise KeyboardInterrupt
            read.append(numbers[0])
            return super().read(numbers)

    source, kept = Source(x, SLICES), Groups(tmp_path, group_bytes=16 * 32)

    def R(kept):
        return hessian.autocorrelation_of_source(source, sample, 3, groups=kept, name="x")

    with pytest.raises(KeyboardInterrupt):
        R(kept)
    read.clear()
    source.killed = False
    resumed = R(kept)
    assert min(read) >= 32
    whole, one_sum = R(Groups(tmp_path / "whole", group_bytes=16 * 32)), R(ONE_GROUP)
    assert resumed.count == whole.count == one_sum.count
    np.testing.assert_array_equal(resumed.noise, whole.noise)
    np.testing.assert_allclose(resumed.noise, one_sum.noise, rtol=1e-5)
    for a, b, c in zip(resumed.blocks, whole.blocks, one_sum.blocks, strict=True):
        np.testing.assert_array_equal(a, b)
        np.testing.assert_allclose(a, c, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("devices", [1, 2])
@pytest.mark.parametrize("shapes", [((8,),), ((2, 4),)])
@pytest.mark.parametrize("exponent", [-50, -34, 26, 31, 50])
def test_noise_scales_with_the_gradients(shapes, exponent, devices):
    """Guards: fourth powers of norms that overflow or vanish in float32, and with them shrinkage.

    R of NaN's shrinkage became a multiple of the identity.
    """
    x, mesh = gradients(60), sharding.make_mesh(devices=jax.devices()[:devices])
    one, scaled = (
        hessian.autocorrelation_of_source(
            InMemory(x * np.float32(2.0**power), [slice(0, 8)]), mesh=mesh, shapes=shapes
        )
        for power in (0, exponent)
    )
    np.testing.assert_allclose(scaled.noise, one.noise * 2.0 ** (4 * exponent), rtol=1e-6)
    shares = hessian.shrinkage(one.blocks, one.noise)
    np.testing.assert_allclose(hessian.shrinkage(scaled.blocks, scaled.noise), shares, rtol=1e-6)


def test_noise_of_rows_whose_scale_changes_is_exact(monkeypatch):
    """Guards: a unit of the first rows alone, in which later ones overflow."""
    monkeypatch.setattr(autocorrelation, "_chunk_rows", lambda width: 1)
    monkeypatch.setattr(autocorrelation, "_CHUNKS_PER_STEP", 1)
    powers = np.array([-60, 0, -2, 30, 31, -10])
    x = np.ldexp(gradients(6), powers[:, None]).astype(np.float32)
    R = hessian.autocorrelation_of_source(InMemory(x, [slice(0, 8)]))
    outer_products = x[:, :, None].astype(np.float64) * x[:, None, :]
    expected = np.sum(np.square(outer_products - outer_products.mean(0))) / 6**2
    np.testing.assert_allclose(R.noise, expected, rtol=1e-5)


def test_what_is_beyond_float32_is_refused():
    with pytest.raises(ValueError, match="R is not finite.*scale the loss"):
        hessian.autocorrelation_of_source(InMemory(gradients() * np.float32(1e20), SLICES))
    with pytest.raises(ValueError, match="noise of block 1 is NaN"):
        hessian.shrinkage([np.eye(3), np.eye(5)], np.array([0.5, np.nan]))


def test_a_long_sum_on_the_devices_does_not_stand_still(monkeypatch):
    """Guards: low-precision Gram matrices: in float32, 2²⁴ + 1 is 2²⁴."""
    monkeypatch.setattr(autocorrelation, "_chunk_rows", lambda width: 1)
    monkeypatch.setattr(autocorrelation, "_CHUNKS_PER_STEP", 1)
    one = np.ones((1, 2), np.float32)
    x = np.concatenate([one * 2.0**12, *[one] * 64])
    R = hessian.autocorrelation_of_source(InMemory(x, [slice(0, 2)])).blocks[0]
    np.testing.assert_array_equal(R * 65, 2.0**24 + 64)


def test_R_of_a_sample_of_a_source_is_that_of_the_rows_drawn():
    x = gradients(300)
    source = InMemory(x, SLICES)
    R = hessian.autocorrelation_of_source(source, sample=50, seed=3)
    drawn = x[drawn_rows(x, 50, 3)]
    for block, s in zip(R.blocks, SLICES, strict=True):
        np.testing.assert_allclose(block, drawn[:, s].T @ drawn[:, s] / 50, rtol=1e-5)
    assert R.count == 50
    # As many rows at a time as a step on the devices takes: none is mostly padding.
    steps = []
    hessian.autocorrelation_of_source(source, sample=200, seed=3, on_rows=steps.append)
    assert steps == [200]
    with pytest.raises(ValueError, match="no gradients"):
        hessian.autocorrelation_of_source(InMemory(np.full((3, 8), np.inf, np.float32), SLICES))


def test_shrinkage_is_the_best_mixture_with_a_multiple_of_one():
    """Ledoit & Wolf: nearest to the true R on average, closer than any other share tried."""
    rng = np.random.default_rng(0)
    root = np.diag(np.sqrt(np.geomspace(4, 0.25, 12)))
    true = root @ root
    shares, errors = [], []
    tried = np.linspace(0, 1, 21)
    for _ in range(60):
        x = (rng.normal(size=(30, 12)) @ root).astype(np.float32)
        R = hessian.autocorrelation_of_source(InMemory(x, [slice(0, 12)]))
        (share,) = hessian.shrinkage(R.blocks, R.noise)
        shares.append(share)
        each = [
            np.sum(np.square(next(hessian.shrink(R.blocks, [s])) - true)) for s in (share, *tried)
        ]
        errors.append(each)
    mean = np.mean(errors, axis=0)
    assert mean[0] < 0.7 * mean[1]  # than R itself
    assert mean[0] < 1.1 * mean[1:].min()  # the best share, known only afterwards
    assert abs(np.mean(shares) - tried[mean[1:].argmin()]) < 0.1


def test_shrinkage_vanishes_with_many_rows_and_takes_all_of_a_multiple_of_one():
    many = hessian.autocorrelation_of_source(InMemory(spread(4000), [slice(0, 24)]))
    assert hessian.shrinkage(many.blocks, many.noise)[0] < 0.01
    np.testing.assert_array_equal(hessian.shrinkage([np.eye(3)], np.array([0.5])), [1.0])
    (block,) = hessian.shrink([np.diag([3.0, 1.0])], [0.5])
    np.testing.assert_allclose(np.diag(block), [2.5, 1.5])


def test_a_cutoff_leaves_small_directions_out():
    (root,) = hessian.inverse_root([np.diag([4.0, 2.0, 0.0])], damping=0.0, cutoff=1e-3)
    np.testing.assert_allclose(np.diag(root), [0.5, 2**-0.5, 0.0], rtol=1e-6)
    assert np.isfinite(root).all()


@pytest.mark.parametrize("shapes", [None, [(2, 2)]])
def test_a_cutoff_above_every_eigenvalue_is_refused(shapes):
    """Guards: R^(−1/2) of zeros, and so scores of zero, without a word."""
    R = [np.diag([3.0, 1.0])] if shapes is None else [np.diag([3.0, 1.0]), np.diag([2.0, 2.0])]
    assert hessian.inverse_root(R, damping=0.0, cutoff=1.4, shapes=shapes)
    with pytest.raises(ValueError, match="hessian.cutoff=2 is above every .* largest is 1.5 in"):
        hessian.inverse_root(R, damping=0.0, cutoff=2.0, shapes=shapes)


def test_halves_hold_every_query_once():
    a, b = hessian.draw_halves(7, seed=1)
    assert sorted([*a, *b]) == list(range(7)) and len(a) == 3
    assert (np.diff(a) > 0).all() and (np.diff(b) > 0).all()
    with pytest.raises(ValueError, match="two or more"):
        hessian.draw_halves(1)
