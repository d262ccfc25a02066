"""R as a Kronecker product of a matrix's rows and columns, against numpy in float64."""

import jax
import numpy as np
import pytest

from tda import hessian
from tda.gradients.projection import Projection, layout
from tda.gradients.sites import Site
from tda.hessian import autocorrelation, blocks
from tda.methods import METHODS
from tda.retrieval import exact
from tda.retrieval.hessian_settings import HessianSettings
from tda.retrieval.sources import InMemory
from tda.retrieval.whitening import Whitening
from tda.run import retrieve
from tda.runtime import groups, sharding
from tda.runtime.engine import Engine
from tda.runtime.groups import Groups

# A dense block, two equal matrices, and one that is not square.
SHAPES = ((4,), (3, 3), (3, 3), (2, 4))
SLICES = hessian.block_slices([4, 9, 9, 8])
LAMBDA = 0.4


def gradients(rows, seed):
    """Rows whose numbers differ in scale and depend on one another."""
    rng = np.random.default_rng(seed)
    scales = np.geomspace(0.2, 3, 30)[np.random.default_rng(9).permutation(30)]
    return (rng.normal(size=(rows, 30)) * scales + 0.3 * rng.normal(size=(rows, 1))).astype("f4")


@pytest.fixture(scope="module")
def data():
    """The passages' and the queries' gradients."""
    return gradients(90, 1), gradients(8, 2)


def samples(x, number):
    """Returns x xᵀ, or G Gᵀ and Gᵀ G, of each row's block: float64 [R, N, N] of each."""
    block = x[:, SLICES[number]].astype(np.float64)
    if len(SHAPES[number]) == 1:
        return [np.einsum("ri,rj->rij", block, block)]
    G = block.reshape(-1, *SHAPES[number])
    return [np.einsum("rij,rkj->rik", G, G), np.einsum("rij,rik->rjk", G, G)]


def all_samples(x):
    return [s for number in range(len(SHAPES)) for s in samples(x, number)]


def product(factors):
    """Returns R in full: the factor itself, or A ⊗ B / t."""
    return factors[0] if len(factors) == 1 else np.kron(*factors) / np.trace(factors[0])


def shrink(sample, sample_noise, target):
    """Ledoit and Wolf, by hand: the matrix, the noise of it, and what it is drawn to."""
    target = np.trace(sample) / np.trace(target) * target
    rho = min(1.0, sample_noise / np.sum(np.square(sample - target)))
    return (1 - rho) * sample + rho * target


def noise(each):
    return np.sum(np.square(each - each.mean(0))) / len(each) ** 2


def reference(data, damping, mixed):
    """R of each block in full, float64: the slow way."""
    out = []
    for number in range(len(SHAPES)):
        factors = []
        for p, q in zip(*(samples(x, number) for x in data), strict=True):
            weight = LAMBDA if mixed else 0.0
            train, evaluation = p.mean(0), q.mean(0)
            if damping < 0:
                train = shrink(train, noise(p), np.eye(len(train)))
                if len(SHAPES[number]) == 2:
                    evaluation = shrink(evaluation, noise(q), train)
            factors.append(weight * evaluation + (1 - weight) * train)
        R = product(factors)
        out.append(R + max(damping, 1e-6) * np.trace(R) / len(R) * np.eye(len(R)))
    return out


def whitening(data, folder=None, **settings):
    settings = HessianSettings(**{"structure": "kronecker", "weight": LAMBDA} | settings)
    source, groups = InMemory(data[0], SLICES), Groups(folder)
    return Whitening(settings, source, data[1], folder=folder, shapes=SHAPES, groups=groups)


def scores(data, scorer):
    passages, queries = data
    ranked = exact.search(queries, InMemory(passages, SLICES), {"": scorer}, len(passages))[""]
    out = np.empty((len(queries), len(passages)))
    np.put_along_axis(out, ranked.proponents, ranked.proponent_scores.astype(np.float64), 1)
    return out


@pytest.mark.parametrize("damping", [0.05, -1.0])
@pytest.mark.parametrize("mixed", [False, True])
def test_scores_are_cosines_under_the_explicit_product(data, damping, mixed):
    method = METHODS["trackstar" if mixed else "trackstar_train"]
    made = whitening(data, damping=damping)
    got = scores(data, made.scorer(method, None))
    p, q = (x.astype(np.float64) for x in data)
    inverses = [np.linalg.inv(R) for R in reference(data, damping, mixed)]

    def inner(a, b):
        pairs = zip(SLICES, inverses, strict=True)
        return sum(a[:, s] @ M @ b[:, s].T for s, M in pairs)

    expected = inner(q, p) / np.sqrt(np.outer(np.diag(inner(q, q)), np.diag(inner(p, p))))
    np.testing.assert_allclose(got, expected, atol=1e-5)
    note = retrieve.describe(made.note(method))
    assert note.endswith("; a Kronecker product in 3 of 4 blocks")


@pytest.mark.parametrize("portion_bytes", [1, 64 << 20])
@pytest.mark.parametrize("devices", [1, 2])
def test_factors_and_their_noise(monkeypatch, portion_bytes, devices):
    monkeypatch.setattr(autocorrelation, "_PORTION_BYTES", portion_bytes)
    x = gradients(77, 3)
    x[[5, 76]] = np.inf
    mesh = None if devices == 1 else sharding.make_mesh(devices=jax.devices()[:devices])
    R = hessian.autocorrelation_of_source(InMemory(x, SLICES), mesh=mesh, shapes=SHAPES)
    expected = all_samples(np.delete(x, [5, 76], axis=0))
    assert R.count == 75
    for factor, each in zip(R.blocks, expected, strict=True):
        np.testing.assert_allclose(factor, each.mean(0), rtol=1e-5, atol=1e-5)
    np.testing.assert_allclose(R.noise, [*map(noise, expected)], rtol=1e-4)


class First(Engine):
    """The first of two processes, which computes every other group and leaves."""

    def compute(self, work):
        work.compute(work.find_missing()[::2])
        raise KeyboardInterrupt


def test_factors_are_the_same_whoever_sums_which_group(tmp_path, monkeypatch):
    monkeypatch.setattr(groups, "_ROWS_PER_RESULT", 0)
    source = InMemory(gradients(70, 4), SLICES)

    def sum_in(folder, **engine):
        kept = Groups(tmp_path / folder, group_bytes=16 * 4 * 30, **engine)
        return hessian.autocorrelation_of_source(source, groups=kept, name="x", shapes=SHAPES)

    with pytest.raises(KeyboardInterrupt):
        sum_in("two", engine=First())
    assert len(list((tmp_path / "two").glob("*/*.npz"))) == 3
    two, alone = sum_in("two"), sum_in("alone")
    in_one = hessian.autocorrelation_of_source(source, shapes=SHAPES)
    np.testing.assert_array_equal(two.noise, alone.noise)
    for a, b, c in zip(two.blocks, alone.blocks, in_one.blocks, strict=True):
        np.testing.assert_array_equal(a, b)
        np.testing.assert_allclose(a, c, rtol=1e-5, atol=1e-6)


def test_where_r_is_a_kronecker_product_both_structures_agree():
    """Rows that are the columns of L ⊗ M: their R is (L Lᵀ) ⊗ (M Mᵀ) to the last digit."""
    rng = np.random.default_rng(0)
    left, right = rng.normal(size=(3, 3)), rng.normal(size=(4, 4))
    rows = np.float32(np.kron(left, right).T * np.sqrt(12))
    queries, slices = np.float32(rng.normal(size=(5, 12))), [slice(0, 12)]
    source = InMemory(rows, slices)
    by_structure = []
    for structure in ("dense", "kronecker"):
        settings = HessianSettings(structure=structure, damping=0.02)
        made = Whitening(settings, source, queries, shapes=((3, 4),))
        scorer = made.scorer(METHODS["exp5"], None)
        ranked = exact.search(queries, source, {"": scorer}, 12)[""]
        by_structure.append((ranked.proponents, ranked.proponent_scores, made.spectra["train"]))
    (dense, dense_scores, dense_spectrum), (factored, factored_scores, spectrum) = by_structure
    np.testing.assert_array_equal(dense, factored)
    np.testing.assert_allclose(factored_scores, dense_scores, atol=1e-5)
    np.testing.assert_allclose(spectrum, dense_spectrum, rtol=1e-4)


def test_the_rule_reads_the_products_of_eigenvalues(data):
    settings = HessianSettings(structure="kronecker", component=5)
    made = Whitening(settings, InMemory(data[0], SLICES), data[1], shapes=SHAPES)
    made.scorer(METHODS["trackstar"], 0)
    weight = made.note(METHODS["trackstar"])["lambda"]
    at_5 = []
    for x in data:
        R = [product([s.mean(0) for s in samples(x, n)]) for n in range(len(SHAPES))]
        at_5.append(np.sort(np.concatenate([*map(np.linalg.eigvalsh, R)]))[-5])
    assert weight == pytest.approx(at_5[0] / sum(at_5), rel=1e-5)
    assert [len(s) for s in made.spectra.values()] == [30, 30]


def test_roots_of_products_without_rank_or_scale():
    """Guards: a row of a matrix that no gradient has, and gradients of 1e-20."""
    A, B = np.diag([4.0, 1.0, 0.0]), np.diag([3.0, 2.0])
    for scale in (1.0, 1e-20, 1e20):
        factors = [A * scale, B * scale]
        (root,) = hessian.inverse_root(factors, damping=0.0, shapes=[(3, 2)])
        white = hessian.apply_root(root, np.ones(6) * np.sqrt(scale))
        expected = (np.outer([4, 1], [3, 2]) / 5).ravel() ** -0.5
        np.testing.assert_allclose(np.sort(np.abs(white)), np.sort([0, 0, *expected]), rtol=1e-5)
    (cut,) = hessian.inverse_root([A, B], damping=0.0, cutoff=0.9, shapes=[(3, 2)])
    # The products 12, 8, 3, 2 and a mean of 25/6.
    assert np.count_nonzero(cut.scales) == 2
    (zero,) = hessian.inverse_root([0 * A, 0 * B], shapes=[(3, 2)])
    assert not zero.scales.any() and np.isfinite(zero.rows).all()
    (spectrum,) = hessian.spectra([0 * A, 0 * B], [(3, 2)])
    assert not spectrum.any()
    rng = np.random.default_rng(0)
    (root,) = hessian.inverse_root(
        [np.cov(rng.normal(size=(n, 9))) for n in (3, 2)], 0.1, 0, [(3, 2)]
    )
    x, y = rng.normal(size=(2, 6))
    turned = x @ hessian.apply_transposed_root(root, y)
    assert hessian.apply_root(root, x) @ y == pytest.approx(turned)


def test_the_program_does_not_grow_with_the_matrices():
    def count_products(count):
        pairs = [np.cov(np.random.default_rng(0).normal(size=(3, 9)))] * (2 * count)
        roots = blocks.stack(hessian.inverse_root(pairs, shapes=[(3, 3)] * count))
        slices = hessian.block_slices([9] * count)
        whiten = jax.jit(lambda x, r: hessian.whiten(x, r, slices))
        return whiten.lower(np.ones((4, 9 * count), np.float32), roots).as_text()

    few, many = count_products(2), count_products(20)
    assert few.count("dot_general") == many.count("dot_general") == 2
    assert many.count("precision = [HIGHEST, HIGHEST]") == 2


def test_roots_are_read_again(data, tmp_path):
    """The sums of either structure have files of their own."""
    method = METHODS["trackstar"]
    whitening(data, tmp_path, structure="dense").scorer(method, None)
    first = whitening(data, tmp_path).scorer(method, None)
    in_memory = whitening(data).scorer(method, None)
    for a, b in zip(*map(jax.tree.leaves, (first.roots, in_memory.roots)), strict=True):
        np.testing.assert_allclose(a, b, atol=1e-5)
    again = whitening(data, tmp_path)
    again._make = None  # nothing is decomposed again
    roots = again.scorer(method, None).roots
    assert [isinstance(r, hessian.KroneckerRoot) for r in roots] == [False, True, True, True]
    for a, b in zip(*map(jax.tree.leaves, (first.roots, roots)), strict=True):
        np.testing.assert_array_equal(a, b)
    assert again.note(method)["kronecker"] == 3


def test_only_blocks_of_one_matrix_are_factored():
    sites = [Site(("layers", "attention", "query"), "kernel", 8, 6, stack=4)]
    sites += [Site(("layers", "attention", "out"), "kernel", 6, 8, stack=4)]
    sites += [Site(("embedding",), "embedding", 20, 8)]
    pooled = layout(sites, Projection(side=3, blocks=2))
    assert dict(zip(pooled.blocks, pooled.shapes, strict=True)) == {
        "embedding": (3, 3),
        "0/attention": (9,),
        "1/attention": (9,),
    }
    apart = layout(sites, Projection(side=3, pooling="matrix"))
    assert apart.shapes == ((3, 3),) * 9


def test_what_no_product_can_be_is_refused(data):
    source = InMemory(data[0], SLICES)
    with pytest.raises(ValueError, match="no effect.*pooling=matrix"):
        Whitening(HessianSettings(structure="kronecker"), source, shapes=((4,), (26,)))
    unknown = "unknown structure='block' of R; use auto, dense, kronecker"
    with pytest.raises(ValueError, match=unknown):
        Whitening(HessianSettings(structure="block"), source)


def test_passages_decide_where_r_is_a_product():
    shapes = ((4, 4), (2, 3), (5,))
    auto = HessianSettings(structure="auto")
    assert auto.shapes_of(shapes, 48) == ((16,), (6,), (5,))
    assert auto.shapes_of(shapes, 47) == ((4, 4), (6,), (5,))
    assert auto.shapes_of(shapes, 17) == shapes
    # Of too few passages the factors are noise as well.
    assert auto.shapes_of(shapes, 7) == ((16,), (2, 3), (5,))
    assert auto.shapes_of(shapes, 5) == ((16,), (6,), (5,))
    # What counts is the passages that R is computed from.
    assert HessianSettings(structure="auto", sample=17).shapes_of(shapes, 64) == shapes
    assert HessianSettings(structure="auto", sample=99).shapes_of(shapes, 64)[0] == (16,)
    # Where each query is left out, R has to be dense.
    left_out = HessianSettings(structure="auto", evaluation="leave_one_out")
    assert left_out.shapes_of(shapes, 17) == ((16,), (6,), (5,))


def test_a_query_that_is_left_out_has_factors_of_the_others(data):
    """Against R without it, made anew; a query that is in no R_eval has that of all."""
    method, n = METHODS["trackstar_leave_one_out"], len(data[1])
    made = whitening(data, damping=0.05, weight=-1.0, component=2)
    parts = made.parts({"m": method})
    assert [p.queries.tolist() for p in sorted(parts, key=lambda p: p.queries[0])] == [
        [q] for q in range(n)
    ]
    weights = []
    for part in parts:
        rest = np.delete(data[1], part.queries, axis=0)
        of_rest = whitening((data[0], rest), damping=0.05, weight=-1.0, component=2)
        expected = scores(data, of_rest.scorer(METHODS["trackstar_all"], None))
        np.testing.assert_allclose(scores(data, part.scorers["m"]), expected, atol=1e-6)
        weights.append(of_rest.note(METHODS["trackstar_all"])["lambda"])
    note = made.note(method)
    assert len(set(weights)) == n and note["lambda"] == pytest.approx(np.mean(weights))
    assert note["evaluation"] == "leave_one_out" and note["kronecker"] == 3
    # A live question makes one of them.
    alone = whitening(data, damping=0.05, weight=-1.0, component=2)
    alone.scorer(method, 3)
    assert alone.note(method)["evaluation"] == "leave_one_out"
    assert "all but the query" in retrieve.describe(alone.note(method))
    # Each is made for its search alone.
    assert not [kind for kind in made._roots if kind.startswith("without")]
    stranger, of_all = made.scorer(method, None), made.scorer(METHODS["trackstar_all"], None)
    assert stranger.roots is of_all.roots


def test_halves_have_factors_of_the_other_half(data):
    made = whitening(data, damping=0.05)
    parts = made.parts({"m": METHODS["trackstar_disjoint"]})
    assert sorted(np.concatenate([p.queries for p in parts])) == list(range(8))
    for part in parts:
        rest = np.setdiff1d(np.arange(8), part.queries)
        of_rest = whitening((data[0], data[1][rest]), damping=0.05)
        expected = scores(data, of_rest.scorer(METHODS["trackstar_all"], None))
        np.testing.assert_allclose(scores(data, part.scorers["m"]), expected, atol=1e-6)


def test_a_sample_of_one_row_is_taken_for_noise_alone(data):
    """Guards: a row whose distance to its own mean is 0, taken for R of infinitely many rows."""
    passages, queries = data
    one = whitening((passages, queries[:1]))
    mixed = one.scorer(METHODS["trackstar"], 0).roots
    train = one.scorer(METHODS["trackstar_train"], None).roots
    assert one.note(METHODS["trackstar"])["shrinkage of R_eval"] == 1
    # R of the passages, but for its scale.
    for a, b in list(zip(mixed, train, strict=True))[1:]:
        ratios = np.sort(a.scales, axis=None) / np.sort(b.scales, axis=None)
        np.testing.assert_allclose(ratios, ratios[0], rtol=1e-4)
    alone = whitening((passages[:1], queries))
    alone.scorer(METHODS["trackstar_train"], None)
    assert alone.note(METHODS["trackstar_train"])["shrinkage"] == 1
