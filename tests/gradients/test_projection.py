"""Projections: inner products kept in expectation for every shape, and matrices that never move."""

import numpy as np
import pytest

from tda.gradients import projection as projections
from tda.gradients.projection import Projection, layout, matrices, random_matrix
from tda.gradients.sites import Site, find_sites

FAMILIES = ("gaussian", "rademacher")


def site(rows, columns, name="mlp", stack=None):
    return Site((name,), "kernel", rows, columns, stack)


def project(G, p, name="mlp"):
    left, right = matrices(site(*G.shape, name), p)
    return left.T @ G @ right


def mean_and_error(samples):
    samples = np.asarray(samples)
    return samples.mean(), samples.std(ddof=1) / np.sqrt(len(samples))


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("shape", [(8, 128), (128, 8), (64, 64), (200, 3), (3, 200), (1, 16)])
def test_inner_products_are_kept_whatever_the_shape(shape, family):
    """Guards: projection scaled by the matrix's own size, which reweights modules by shape."""
    rng = np.random.default_rng(0)
    G = rng.normal(size=shape)
    H = 0.6 * G + 0.8 * rng.normal(size=shape)
    G, H = G / np.linalg.norm(G), H / np.linalg.norm(H)
    norms, products = [], []
    for seed in range(400):
        p = Projection(side=8, seed=seed, family=family)
        g, h = project(G, p), project(H, p)
        norms.append((g * g).sum())
        products.append((g * h).sum())
    for samples, expected in ((norms, 1.0), (products, (G * H).sum())):
        mean, error = mean_and_error(samples)
        assert error < 0.05
        assert abs(mean - expected) < 4 * error


def test_inner_products_of_structured_matrices_are_kept():
    """Guards: one matrix for both ends (A = B), which the identity and symmetry give away."""
    matrices_of = {
        "identity": np.eye(32),
        "rank one": np.ones((32, 32)),
        "spike": np.zeros((32, 32)),
    }
    matrices_of["spike"][3, 3] = 1.0
    for name, G in matrices_of.items():
        G = G / np.linalg.norm(G)
        norms = []
        for seed in range(600):
            g = project(G, Projection(side=8, seed=seed))
            norms.append((g * g).sum())
        mean, error = mean_and_error(norms)
        assert error < 0.06, name
        assert abs(mean - 1.0) < 4 * error, name


def test_cross_terms_of_pooled_matrices_vanish():
    """Guards: the same random matrix for all layers of a block."""
    rng = np.random.default_rng(1)
    G = [rng.normal(size=(24, 12)) for _ in range(3)]
    # The layers' gradients are alike, so that cross terms would show.
    G = [g + 2 * G[0] for g in G]
    H = [g + rng.normal(size=g.shape) for g in G]
    scale = np.sqrt(sum((g**2).sum() for g in G) * sum((h**2).sum() for h in H))
    products = []
    for seed in range(600):
        p = Projection(side=8, seed=seed)
        g = sum(project(x, p, f"layers/{i}") for i, x in enumerate(G))
        h = sum(project(x, p, f"layers/{i}") for i, x in enumerate(H))
        products.append((g * h).sum() / scale)
    mean, error = mean_and_error(products)
    assert error < 0.05
    assert abs(mean - sum((g * h).sum() for g, h in zip(G, H, strict=True)) / scale) < 4 * error


PINNED = {
    ("gaussian", 0, "layers/3/mlp/up/kernel", "left"): [
        [0.4467945992946625, -0.11910861730575562, 0.36290618777275085, 0.37272992730140686],
        [0.16631634533405304, -0.40847381949424744, -0.6501989364624023, 0.7543100714683533],
        [-0.2406451553106308, 0.8178860545158386, -0.47133973240852356, -0.5773535370826721],
    ],
    ("gaussian", 7, "head/kernel", "right"): [
        [-0.11756689846515656, 0.6269749999046326, -0.6808872818946838, 0.04949202015995979],
        [0.4935438632965088, 0.07967519760131836, 0.7319138646125793, 0.06622769683599472],
        [0.10015770047903061, 0.2880460321903229, 1.036727786064148, -0.7008179426193237],
    ],
    ("rademacher", 0, "layers/3/mlp/up/kernel", "left"): [
        [0.5, 0.5, 0.5, 0.5],
        [0.5, -0.5, 0.5, 0.5],
        [-0.5, -0.5, 0.5, -0.5],
    ],
    ("rademacher", 7, "head/kernel", "right"): [
        [-0.5, 0.5, 0.5, -0.5],
        [-0.5, -0.5, -0.5, -0.5],
        [-0.5, -0.5, 0.5, -0.5],
    ],
}


@pytest.mark.parametrize("key", PINNED, ids=lambda k: "-".join(map(str, k)).replace("/", "."))
def test_entries_are_these_numbers(key):
    """Guards: random projections that differ by device or version without the store knowing."""
    family, seed, name, end = key
    got = random_matrix(seed, name, end, 3, 4, family)
    assert got.dtype == np.float32
    # The last bit may differ between mathematical libraries; a generator's change may not hide.
    np.testing.assert_allclose(got, PINNED[key], rtol=1e-6)


@pytest.mark.parametrize("family", FAMILIES)
def test_entries_have_mean_zero_and_variance_one_over_side(family):
    for side in (4, 25):
        x = random_matrix(3, "a", "left", 20_000, side, family)
        n = x.size
        assert abs(x.mean()) < 5 / np.sqrt(side * n)
        assert abs(x.var() * side - 1) < 5 * np.sqrt(2 / n)
    if family == "rademacher":
        np.testing.assert_allclose(np.unique(x), [-0.2, 0.2], rtol=1e-6)


@pytest.mark.parametrize("family", FAMILIES)
def test_matrices_differ_by_seed_name_end_and_layer(family):
    base = (0, "layers/1/mlp/up/kernel", "left")
    others = [
        (1, base[1], "left"),
        (0, "layers/2/mlp/up/kernel", "left"),
        (0, "layers/11/mlp/up/kernel", "left"),
        (0, base[1], "right"),
    ]
    x = random_matrix(*base, 64, 16, family)
    for other in others:
        y = random_matrix(*other, 64, 16, family)
        # 1024 independent entries of variance 1/16: the correlation is noise.
        assert abs((x * y).sum() / 64) < 5 / np.sqrt(x.size)


def test_a_matrix_is_a_function_of_its_own_name_alone(decoder):
    """Guards: matrices that follow the order of traversal or the other matrices that are chosen."""
    p = Projection(side=4, blocks=1)

    def by_name(chosen):
        out = {}
        for s in chosen:
            left, right = matrices(s, p)
            if s.stack is None:
                left, right = left[None], right[None]
            out.update({n: (left[i], right[i]) for i, n in enumerate(s.names())})
        return out

    scanned = by_name(find_sites(decoder(layers=3), "."))
    for other in (
        by_name(reversed(find_sites(decoder(layers=3), "."))),
        by_name(find_sites(decoder(layers=3, scan=False), ".")),
        by_name(find_sites(decoder(layers=3), "mlp/down")),
    ):
        assert other.keys() <= scanned.keys() and other
        for name, ends in other.items():
            for got, expected in zip(ends, scanned[name], strict=True):
                np.testing.assert_array_equal(got, expected)


def test_blocks_are_contiguous_layers_by_kind(decoder):
    plan = layout(find_sites(decoder(layers=5), None), Projection(side=3, blocks=2))
    assert plan.blocks == ("0/attention", "0/mlp", "1/attention", "1/mlp")
    assert plan.members["layers/attention/key/kernel"] == (0, 0, 0, 2, 2)
    assert plan.members["layers/mlp/down/kernel"] == (1, 1, 1, 3, 3)
    assert plan.width == 4 * 9
    assert plan.slices == [slice(0, 9), slice(9, 18), slice(18, 27), slice(27, 36)]


def test_matrices_outside_layers_have_their_own_blocks(decoder):
    plan = layout(find_sites(decoder(tied=False), "."), Projection(side=2, blocks=1))
    assert plan.blocks == ("embedding", "head", "0/attention", "0/mlp")
    assert plan.members["embedding/embedding"] == (0,)
    assert plan.members["head/kernel"] == (1,)


def test_more_than_nine_layers_stay_in_numerical_order():
    """Guards: layer 10 before layer 2, as sorting by text would have it."""
    chosen = [Site(("layers", i, "mlp", "up"), "kernel", 2, 3, None) for i in range(12)]
    plan = layout(chosen, Projection(side=2, blocks=12))
    assert plan.blocks == tuple(f"{i}/mlp" for i in range(12))
    for i, s in enumerate(chosen):
        assert plan.members[s.path] == (i,)
    stacked = layout([Site(("layers", "mlp", "up"), "kernel", 2, 3, 12)], Projection(2, 12))
    assert stacked.blocks == plan.blocks
    assert stacked.members["layers/mlp/up/kernel"] == tuple(range(12))


def test_errors(decoder):
    with pytest.raises(ValueError, match="unknown family 'sparse'; use gaussian, rademacher"):
        Projection(family="sparse")
    for bad in (dict(side=0), dict(blocks=0)):
        with pytest.raises(ValueError, match="must be positive"):
            Projection(**bad)
    with pytest.raises(ValueError, match="blocks=3 exceeds the model's 2 layers"):
        layout(find_sites(decoder(layers=2)), Projection(blocks=3))
    assert projections.FAMILIES == FAMILIES


def test_pooling_by_layer_and_by_matrix(decoder):
    """Blocks of one layer, and of one matrix; the order of blocks is the layers'."""
    chosen = find_sites(decoder(layers=3, tied=False), ".")
    by_layer = projections.layout(chosen, Projection(side=2, pooling="layer"))
    assert by_layer.blocks == ("embedding", "head", "0", "1", "2")
    by_matrix = projections.layout(chosen, Projection(side=2, pooling="matrix"))
    assert len(by_matrix.blocks) == len(set(by_matrix.blocks)) == 2 + 3 * 7
    assert by_matrix.blocks[:2] == ("embedding/embedding", "head/kernel")
    for site in chosen:
        assert [by_matrix.blocks[i] for i in by_matrix.members[site.path]] == site.names()
        layers = [None if site.stack is None else str(i) for i in range(site.stack or 1)]
        for i, layer in zip(by_layer.members[site.path], layers, strict=True):
            assert by_layer.blocks[i] == (layer or site.group)
    with pytest.raises(ValueError, match="unknown pooling 'rows'; use blocks, layer, matrix"):
        Projection(pooling="rows")
