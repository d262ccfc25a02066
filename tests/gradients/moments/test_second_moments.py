"""1/√V against what the optimizers themselves divide by."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from jax.sharding import NamedSharding, PartitionSpec

from tda.gradients.moments import optimizer_state, second_moments
from tda.gradients.moments.scales import Scale, factored_scale, low_rank_scale, parse_correction
from tda.gradients.moments.second_moments import SecondMomentError, adafactor_scale
from tda.gradients.sites import Site, find_sites
from tda.model import functional
from tda.training import checkpoint
from tda.training.optimizer import make_optimizer
from tests.gradients.moments.test_low_rank import relative_error

SHAPES = [
    (32, 64),
    (64, 32),
    (48, 48),
    (3, 40, 50),
    (3, 50, 40),
    (3, 40, 40),
    (64, 33, 40),
    (64, 40, 33),
    (48, 48, 48),
    (4, 5),
    (3, 8, 40),
]


def random(shape, seed):
    # Rows and columns of very different size, so that a transposed scale stands out.
    rng = np.random.default_rng(seed)
    x = rng.normal(size=shape)
    x += 0.1 * np.sign(x)  # squares stay above the floor
    x *= np.exp(rng.normal(size=(*shape[:-1], 1)))
    x *= np.exp(0.5 * rng.normal(size=(*shape[:-2], 1, shape[-1])))
    return x.astype(np.float32)


def test_dense_sums_over_the_rank():
    left, right = random((3, 2, 5), 0), random((3, 2, 7), 1)
    dense = Scale(jnp.asarray(left), jnp.asarray(right)).dense()
    assert dense.shape == (3, 5, 7)
    for layer in range(3):
        expected = sum(np.outer(left[layer, r], right[layer, r]) for r in range(2))
        np.testing.assert_allclose(dense[layer], expected, rtol=1e-5)


def test_corrections_are_parsed():
    assert [parse_correction(c) for c in ("none", "adam", "factored")] == [
        ("none", None),
        ("adam", None),
        ("factored", None),
    ]
    assert parse_correction("low_rank(4)") == ("low_rank", 4)
    assert parse_correction("low_rank(12)") == ("low_rank", 12)
    for wrong in (
        "",
        "adma",
        "low_rank",
        "low_rank(0)",
        "low_rank(-1)",
        "low_rank(R)",
        "adafactor",
    ):
        with pytest.raises(SecondMomentError, match="use none, adam, factored, low_rank"):
            parse_correction(wrong)


@pytest.mark.parametrize(("eps", "eps_root"), [(1e-8, 0.0), (0.3, 0.0), (1e-8, 0.3), (0.2, 0.1)])
@pytest.mark.parametrize("steps", [1, 4])
def test_adams_scale_is_adams_own_denominator(eps, eps_root, steps):
    """Guards: epsilon inside the root where it belongs outside; no bias correction."""
    # Without momentum, Adam's update is −lr g · scale.
    tx = optax.adam(0.5, b1=0.0, b2=0.9, eps=eps, eps_root=eps_root)
    params = jnp.zeros((6, 4))
    state = tx.init(params)
    for step in range(steps):
        g = random((6, 4), step)
        update, state = tx.update(jnp.asarray(g), state, params)
    scale = optimizer_state.adam(state[0].nu, state[0].count, 0.9, eps, eps_root)
    np.testing.assert_allclose(-0.5 * g * scale, update, rtol=1e-5)


def test_adams_scale_with_momentum():
    """The same denominator divides the bias-corrected mean of gradients."""
    tx = optax.adam(0.5, b1=0.9, b2=0.99, eps=0.1)
    state = tx.init(jnp.zeros((6, 4)))
    for step in range(3):
        update, state = tx.update(jnp.asarray(random((6, 4), step)), state)
    mean = state[0].mu / (1 - 0.9**3)
    scale = optimizer_state.adam(state[0].nu, state[0].count, 0.99, 0.1)
    np.testing.assert_allclose(-0.5 * mean * scale, update, rtol=1e-4)


def test_adams_scale_of_half_precision_moments_is_float32():
    """Guards: half precision before projection."""
    nu = jnp.asarray(np.square(random((2, 3), 0)), jnp.bfloat16)
    scale = optimizer_state.adam(nu, jnp.int32(7), 0.99, 1e-4, 1e-6)
    assert scale.dtype == jnp.float32
    exact = optimizer_state.adam(nu.astype(jnp.float32), jnp.int32(7), 0.99, 1e-4, 1e-6)
    np.testing.assert_array_equal(scale, exact)


@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_adafactor_scale_is_what_optax_multiplies_by(shape):
    """Guards: row and column statistics transposed for square matrices."""
    tx = optax.scale_by_factored_rms(min_dim_size_to_factor=32)
    params = {"w": jnp.zeros(shape)}
    state = tx.init(params)
    for step in range(2):
        g = {"w": jnp.asarray(random(shape, step))}
        update, state = tx.update(g, state, params)
    scale = adafactor_scale(state.v_row["w"], state.v_col["w"], state.v["w"], shape)
    np.testing.assert_allclose(g["w"] * scale.dense(), update["w"], rtol=1e-4)
    # Where the two last axes are factored, nothing of the matrix's size is made.
    factored = sorted(shape)[-2] >= 32
    two_last = len(shape) == 2 or shape[0] <= min(shape[1:])
    assert (scale.full is None) == (factored and two_last)
    if scale.full is None:
        assert scale.left.shape == (*shape[:-2], 1, shape[-2])
        assert scale.right.shape == (*shape[:-2], 1, shape[-1])


def test_adafactor_scale_of_half_precision_moments_is_float32():
    for shape in ((40, 48), (4, 5)):
        tx = optax.scale_by_factored_rms(min_dim_size_to_factor=32)
        params = {"w": jnp.zeros(shape, jnp.bfloat16)}
        _, state = tx.update(
            {"w": jnp.asarray(random(shape, 0), jnp.bfloat16)}, tx.init(params), params
        )
        stored = [x["w"] for x in (state.v_row, state.v_col, state.v)]
        assert {x.dtype for x in stored} == {jnp.dtype("bfloat16")}
        scale = adafactor_scale(*stored, shape).dense()
        exact = adafactor_scale(*[x.astype(jnp.float32) for x in stored], shape).dense()
        assert scale.dtype == jnp.float32
        np.testing.assert_array_equal(scale, exact)


def test_adafactor_scale_refuses_what_does_not_fit():
    one = jnp.ones(1)
    with pytest.raises(SecondMomentError, match="do not fit"):
        adafactor_scale(jnp.ones(32), jnp.ones(64), one, (40, 64))
    with pytest.raises(SecondMomentError, match="v has shape"):
        adafactor_scale(one, one, one, (7,))


@pytest.mark.parametrize("shape", [(5, 9), (9, 5), (6, 6), (3, 5, 7), (4, 6, 6)], ids=str)
def test_factored_scale_is_exact_for_rank_one(shape):
    """Guards: transposed for square matrices; a factor of the mean left out."""
    rng = np.random.default_rng(0)
    rows = rng.uniform(0.1, 4, (*shape[:-1], 1))
    columns = rng.uniform(1, 9, (*shape[:-2], 1, shape[-1]))
    full = jnp.asarray(1 / np.sqrt(rows * columns), jnp.float32)
    scale = factored_scale(full)
    assert scale.full is None
    assert scale.left.shape == (*shape[:-2], 1, shape[-2])
    assert scale.right.shape == (*shape[:-2], 1, shape[-1])
    np.testing.assert_allclose(scale.dense(), full, rtol=1e-5)


def test_factored_scale_keeps_the_means_of_rows_and_columns():
    V = np.exp(np.random.default_rng(0).normal(size=(3, 6, 6)))
    approximate = 1 / np.square(factored_scale(jnp.asarray(1 / np.sqrt(V), jnp.float32)).dense())
    for axis in (-1, -2):
        np.testing.assert_allclose(approximate.mean(axis), V.mean(axis), rtol=1e-4)


def test_factored_scale_of_numbers_whose_squares_float32_cannot_hold():
    """Guards: infinite scales of weights that were hardly ever touched."""
    root = np.exp(np.random.default_rng(0).normal(size=(6, 5)))
    scale = factored_scale(jnp.asarray(1e24 / root, jnp.float32))
    expected = factored_scale(jnp.asarray(1 / root, jnp.float32))
    np.testing.assert_allclose(scale.left, expected.left, rtol=1e-5)
    np.testing.assert_allclose(scale.right, 1e24 * expected.right, rtol=1e-5)
    # A row that was never touched, under Adam's epsilon.
    nu = np.square(root)
    nu[2] = 0
    left = factored_scale(optimizer_state.adam(nu, 1, 0.0, 1e-8)).left[0]
    assert np.isfinite(left).all() and left[2] > 1e7


def test_low_rank_scale_is_between_factored_and_exact():
    full = 1 / jnp.sqrt(jnp.asarray(np.square(random((2, 24, 40), 0)) + 1e-2))
    errors = [
        relative_error(full, s.left, s.right).max()
        for s in (factored_scale(full), *(low_rank_scale(full, r) for r in (1, 2, 8, 24)))
    ]
    assert errors == sorted(errors, reverse=True)
    assert errors[-1] < 1e-6 < 0.1 < errors[1]


CONSTANTS = {"name": "adam", "b2": 0.9, "eps": 0.05, "eps_root": 0.02}


def train(model, tx, steps=3):
    """The state after a few updates by gradients that differ from parameter to parameter."""
    _, params = functional.split(model)
    opt_state = tx.init(params)
    update = jax.jit(tx.update)
    for step in range(steps):
        flat, tree = jax.tree.flatten(params)
        g = jax.tree.unflatten(
            tree, [random(x.shape, 100 * step + i) if x.ndim > 1 else x for i, x in enumerate(flat)]
        )
        _, opt_state = update(g, opt_state, params)
    return {"params": params, "opt_state": opt_state, "step": jnp.int32(steps)}


@pytest.fixture(scope="module")
def adam_runs(decoder, tmp_path_factory):
    """For a scanned and an unrolled model: the model, its state and where it is saved."""
    tx = optax.chain(
        optax.clip_by_global_norm(1e9), optax.adam(1e-2, b2=0.9, eps=0.05, eps_root=0.02)
    )
    runs = {}
    for scan in (True, False):
        model = decoder(layers=3, scan=scan, tied=False)
        state = train(model, tx)
        root = tmp_path_factory.mktemp(f"adam{scan}")
        checkpoint.save(root, 3, state, {"optimizer": CONSTANTS})
        runs[scan] = (model, state, root)
    return runs


@pytest.fixture(scope="module")
def adafactor_run(decoder, tmp_path_factory):
    model = decoder(layers=3, width=32, ff_width=40, head_width=16)
    state = train(model, make_optimizer("adafactor", 1e-2, clip=1e9))
    root = tmp_path_factory.mktemp("adafactor")
    checkpoint.save(root, 3, state, {})
    return model, state, root


@pytest.mark.parametrize("scan", [True, False])
def test_adams_moments_are_read_by_path(adam_runs, scan):
    """Guards: moments mapped to the wrong modules; a correction silently dropped."""
    model, state, root = adam_runs[scan]
    chosen = find_sites(model, ".")
    got = second_moments.read(root, chosen, "adam")
    assert got.keys() == {s.path for s in chosen}
    nu = functional.flat_parameters(optax.tree.get(state["opt_state"], "nu"))
    for path, scale in got.items():
        expected = 1 / (np.sqrt(np.asarray(nu[path]) / (1 - 0.9**3) + 0.02) + 0.05)
        np.testing.assert_allclose(scale.full, expected, rtol=1e-5)
        assert scale.full.dtype == jnp.float32
    assert len({np.asarray(s.full).tobytes() for s in got.values()}) == len(got)


@pytest.mark.parametrize("scan", [True, False])
def test_factored_moments_are_made_from_adams(adam_runs, scan):
    model, state, root = adam_runs[scan]
    chosen = find_sites(model)
    got = second_moments.read(root, chosen, "factored")
    nu = functional.flat_parameters(optax.tree.get(state["opt_state"], "nu"))
    for path, scale in got.items():
        assert scale.full is None
        V = np.square(np.sqrt(np.asarray(nu[path]) / (1 - 0.9**3) + 0.02) + 0.05)
        rows, columns = V.mean(-1, keepdims=True), V.mean(-2, keepdims=True)
        expected = 1 / np.sqrt(rows * columns / rows.mean(-2, keepdims=True))
        np.testing.assert_allclose(scale.dense(), expected, rtol=1e-4)


def test_a_host_computes_the_same_bits_however_the_state_is_split(adam_runs, tmp_path):
    """Guards: stores whose rows depend on the number of processes that encoded them."""
    model, state, root = adam_runs[True]
    mesh = jax.make_mesh((8,), ("parts",))

    def split(x):
        axes = [i for i, size in enumerate(jnp.shape(x)) if size % 8 == 0]
        parts = ["parts" if i in axes[:1] else None for i in range(jnp.ndim(x))]
        return jax.device_put(x, NamedSharding(mesh, PartitionSpec(*parts)))

    checkpoint.save(tmp_path, 3, jax.tree.map(split, state), {"optimizer": CONSTANTS})
    read = lambda at: second_moments.read(at, find_sites(model), "factored", on_host=True)  # noqa: E731
    whole, parts = read(root), read(tmp_path)
    for path, scale in whole.items():
        np.testing.assert_array_equal(parts[path].left, scale.left)
        np.testing.assert_array_equal(parts[path].right, scale.right)


def test_adafactors_moments_are_read_by_path(adafactor_run):
    model, state, root = adafactor_run
    chosen = find_sites(model, ".")
    got = second_moments.read(root, chosen, "factored")
    held = {
        kind: functional.flat_parameters(optax.tree.get(state["opt_state"], kind))
        for kind in ("v_row", "v_col", "v")
    }
    for site in chosen:
        leaves = [held[kind][site.path] for kind in ("v_row", "v_col", "v")]
        expected = adafactor_scale(*leaves, site.shape)
        np.testing.assert_array_equal(got[site.path].dense(), site.matrix(expected.dense()))
    # Both kinds are there: wide enough to factor, and not.
    assert got["layers/mlp/up/kernel"].full is None
    assert got["layers/attention/key/kernel"].full is not None


def test_adafactor_has_no_exact_moments(adafactor_run):
    model, _, root = adafactor_run
    for correction in ("adam", "low_rank(2)"):
        with pytest.raises(SecondMomentError, match="Adafactor.*rank one.*correction='factored'"):
            second_moments.read(root, find_sites(model), correction)


def test_low_rank_moments_are_made_from_adams(adam_runs):
    """Guards: a rank that is not passed on; layers or sides that change places."""
    model, _, root = adam_runs[True]
    chosen = find_sites(model, "query|down")
    exact = second_moments.read(root, chosen, "adam")
    for rank in (3, 16):
        for path, scale in second_moments.read(root, chosen, f"low_rank({rank})").items():
            full = exact[path].full
            assert scale.left.shape == (3, min(rank, *full.shape[1:]), full.shape[1])
            errors = relative_error(full, scale.left, scale.right)
            few = factored_scale(full)
            assert (errors < relative_error(full, few.left, few.right)).all()
            assert rank < 16 or errors.max() < 1e-6


def test_unknown_corrections_are_refused(adam_runs):
    """Guards: a correction silently dropped."""
    model, _, root = adam_runs[True]
    with pytest.raises(SecondMomentError, match="unknown correction 'adma'"):
        second_moments.read(root, find_sites(model), "adma")
    with pytest.raises(SecondMomentError, match="'none' has no scales"):
        second_moments.read(root, find_sites(model), "none")


# Parameters that are no [(L,) M, N] themselves: path, own shape, stack, order of the axes.
OWN_SHAPES = {
    "general": Site(("m",), "kernel", 34, 40 * 2, None, (34, 40, 2)),
    "turned": Site(("m",), "kernel", 36, 40, None, (40, 36), (1, 0)),
    "square": Site(("m",), "kernel", 36, 36, None, (36, 36), (1, 0)),
    "stacked": Site(("m",), "kernel", 33, 2 * 40, 3, (3, 40, 33, 2), (1, 2, 0)),
    "vector": Site(("m",), "scale", 1, 40, None, (40,)),
    "vectors": Site(("m",), "scale", 1, 40, 36, (36, 40)),
}


@pytest.mark.parametrize("site", OWN_SHAPES.values(), ids=OWN_SHAPES)
@pytest.mark.parametrize(
    ("tx", "correction"),
    [
        (optax.scale_by_adam(b1=0.0, b2=0.9, eps=0.01), "adam"),
        (optax.scale_by_factored_rms(min_dim_size_to_factor=32), "factored"),
    ],
    ids=["adam", "adafactor"],
)
def test_the_scale_of_a_parameter_of_any_shape_is_a_matrix(site, tx, correction):
    """Guards: square matrices transposed; statistics of the wrong axes."""
    params = {"m": {site.parameter: jnp.zeros(site.shape)}}
    state = tx.init(params)
    for step in range(2):
        g = random((1, *site.shape), step)[0]
        update, state = tx.update({"m": {site.parameter: jnp.asarray(g)}}, state, params)
    described = {"name": "adam", "b2": 0.9, "eps": 0.01}
    moments = optimizer_state.open_state(state, **described).moments([site.path])[site.path]
    scale = second_moments.site_scale(site, moments, correction).dense()
    stack = () if site.stack is None else (site.stack,)
    assert scale.shape == (*stack, site.rows, site.columns)
    expected = site.matrix(update["m"][site.parameter])
    np.testing.assert_allclose(site.matrix(g) * scale, expected, rtol=1e-4)


def test_scales_that_are_not_finite_are_refused(adam_runs, tmp_path):
    """Guards: infinite scales from second moments of 0 where there is no epsilon."""
    model, state, _ = adam_runs[True]
    zeros = jax.tree.map(jnp.zeros_like, state["opt_state"])
    zeros = optax.tree.set(zeros, count=jnp.int32(3))
    none = CONSTANTS | {"eps": 0.0, "eps_root": 0.0}
    checkpoint.save(tmp_path, 1, state | {"opt_state": zeros}, {"optimizer": none})
    for correction in ("adam", "factored", "low_rank(2)"):
        with pytest.raises(SecondMomentError, match="1/√V of layers.* is not finite"):
            second_moments.read(tmp_path, find_sites(model, "down"), correction)


@pytest.mark.parametrize("optimizer", ["adam", "adafactor", "adafactor in full", "amsgrad"])
def test_weights_hardly_reached_have_a_bounded_scale(optimizer):
    """Guards: one token seen once scaled by 1e8, a factored crossing by 2e16."""
    site = Site(("m",), "kernel", 36, 40, 2, (2, 36, 40))
    tx = {
        "adam": optax.scale_by_adam(),
        "amsgrad": optax.scale_by_amsgrad(),
        "adafactor": optax.scale_by_factored_rms(min_dim_size_to_factor=32),
        "adafactor in full": optax.scale_by_factored_rms(min_dim_size_to_factor=99),
    }[optimizer]
    g = random((2, 36, 40), 0)
    g[0] *= 1e-3  # each layer has a floor of its own
    g[:, 3], g[:, :, 5] = 0, 0
    params = {"m": {"kernel": jnp.zeros(g.shape)}}
    _, state = tx.update({"m": {"kernel": jnp.asarray(g)}}, tx.init(params), params)
    described = {"name": optimizer, "b2": 0.999, "eps": 1e-8}
    moments = optimizer_state.open_state(state, **described).moments([site.path])[site.path]
    typical = 1 / np.sqrt(np.square(g).mean((-1, -2), keepdims=True))
    factored = np.asarray(second_moments.site_scale(site, moments, "factored").dense())
    assert np.isfinite(factored).all() and (factored <= 1.01e6 * typical).all()
    if "adafactor" not in optimizer:
        full = np.asarray(second_moments.site_scale(site, moments, "adam").full)
        np.testing.assert_allclose(full[:, 3], np.broadcast_to(1e3 * typical[:, 0], (2, 40)), 1e-2)
        reached = np.square(g) > 1e-5 * np.square(1 / typical)
        np.testing.assert_allclose(full[reached], 1 / (np.abs(g[reached]) + 1e-8), rtol=1e-3)


def test_a_state_before_the_first_step_is_refused(adam_runs, tmp_path):
    model, state, _ = adam_runs[True]
    fresh = optax.adam(1e-2).init(state["params"])
    checkpoint.save(tmp_path, 1, state | {"opt_state": fresh}, {"optimizer": CONSTANTS})
    with pytest.raises(SecondMomentError, match="no step with layers/mlp/down/kernel"):
        second_moments.read(tmp_path, find_sites(model, "down"), "adam")


def test_a_checkpoint_without_optimizer_state_is_refused(adam_runs, tmp_path):
    model, state, _ = adam_runs[True]
    checkpoint.save(tmp_path, 1, {"params": state["params"]}, {"optimizer": CONSTANTS})
    with pytest.raises(checkpoint.CheckpointError, match="no optimizer state"):
        second_moments.read(tmp_path, find_sites(model), "adam")


def test_an_optimizer_without_second_moments_is_refused(adam_runs, tmp_path):
    model, state, _ = adam_runs[True]
    momentum = optax.sgd(0.1, momentum=0.9).init(state["params"])
    checkpoint.save(tmp_path, 1, {"params": state["params"], "opt_state": momentum}, {})
    with pytest.raises(SecondMomentError, match="no second moments"):
        second_moments.read(tmp_path, find_sites(model), "factored")


def test_moments_of_another_model_are_refused(adam_runs, decoder):
    _, _, root = adam_runs[True]
    with pytest.raises(SecondMomentError, match=r"shape \(3, 16, 24\), the model \(3, 16, 32\)"):
        second_moments.read(root, find_sites(decoder(layers=3, ff_width=32), "up"), "adam")
    with pytest.raises(SecondMomentError, match="no second moments of layers/0/.*it has nothing"):
        second_moments.read(root, find_sites(decoder(layers=3, scan=False)), "adam")


def test_a_description_without_adams_constants_is_refused(adam_runs, tmp_path):
    model, state, _ = adam_runs[True]
    checkpoint.save(tmp_path, 1, state, {"optimizer": {"eps": 1e-8}})
    with pytest.raises(SecondMomentError, match="does not say its optimizer's name, b2, which"):
        second_moments.read(tmp_path, find_sites(model), "adam")


def test_the_step_that_is_asked_for_is_read(adam_runs, tmp_path):
    model, state, _ = adam_runs[True]
    tx = optax.chain(optax.clip_by_global_norm(1e9), optax.adam(1e-2))
    other = train(model, tx, steps=1)
    checkpoint.save(tmp_path, 1, other, {"optimizer": CONSTANTS})
    checkpoint.save(tmp_path, 3, state, {"optimizer": CONSTANTS})
    chosen = find_sites(model, "down")
    first, last, default = (
        second_moments.read(tmp_path, chosen, "adam", step)["layers/mlp/down/kernel"].full
        for step in (1, 3, None)
    )
    np.testing.assert_array_equal(last, default)
    assert np.abs(np.asarray(first) - np.asarray(last)).max() > 1e-2
    # Its description too: of the same state, other constants.
    checkpoint.save(tmp_path, 4, state, {"optimizer": CONSTANTS | {"eps": 0.5}})
    again = second_moments.read(tmp_path, chosen, "adam", 3)["layers/mlp/down/kernel"].full
    np.testing.assert_array_equal(again, last)
