"""What low precision may cost an encoding, and what it may not.

Measured in bfloat16, relative to a block's norm (of 16 numbers): the model's own rounding 2e-2 to
4e-2; A and B rounded to its 8 bits 5e-3, and nothing where they are powers of 2; the sums nothing;
another batch, padding or split of the batch over devices nothing. Splitting a matrix over devices
sums in another order, as far off as the model's own rounding.
"""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from tda import loss as losses
from tda.gradients import projection, reference
from tda.gradients.encoder import make_encoder
from tda.gradients.moments.scales import Scale, factored_scale
from tda.gradients.projection import Projection
from tda.gradients.sites import find_sites
from tda.model import functional
from tda.runtime import sharding
from tests.gradients.test_encoder import scales_of

P = Projection(side=4, blocks=1)


class Layer(nnx.Module):
    """One matrix, whose input and output's cotangent a batch gives as they are."""

    def __init__(self, dtype):
        self.mlp = nnx.Linear(8, 12, use_bias=False, dtype=dtype, rngs=nnx.Rngs(0))


def times(model, batch):
    y = model.mlp(batch["x"].astype(model.mlp.dtype))
    return jnp.sum(y.astype(jnp.float32) * batch["d"], axis=(1, 2))


def scale_of(correction):
    if correction == "none":
        return None
    full = jnp.exp(jnp.asarray(np.random.default_rng(1).normal(size=(8, 12)), jnp.float32))
    return Scale(full=full) if correction == "adam" else factored_scale(full)


def exactly(batch, scale):
    """Aᵀ((Σ_t x_t δ_tᵀ) ∘ scale)B in float64."""
    (site,) = find_sites(Layer("float32"))
    A, B = projection.matrices(site, P)
    G = np.einsum("btm,btn->bmn", *(np.asarray(batch[k], np.float64) for k in ("x", "d")))
    G = G if scale is None else G * np.asarray(scale.dense(), np.float64)
    return np.einsum("bmn,mp,nq->bpq", G, A, B).reshape(len(G), -1)


def relative(got, expected):
    return np.linalg.norm(got - expected, axis=-1) / np.linalg.norm(expected, axis=-1)


@pytest.mark.parametrize("correction", ["none", "factored", "adam"])
@pytest.mark.parametrize(("dtype", "largest"), [("float16", 300.0), ("bfloat16", 1e18)])
def test_products_of_half_precision_do_not_overflow(dtype, largest, correction):
    """Guards: float16 overflow: x and δ fit into the layer's dtype, their product does not."""
    rng = np.random.default_rng(0)
    # Whole numbers of 64, so that nothing is rounded before it is multiplied.
    x, d = (largest / 64 * rng.integers(-64, 65, (3, 40, n)) for n in (8, 12))
    batch = {k: np.asarray(jnp.asarray(v, dtype), np.float32) for k, v in (("x", x), ("d", d))}
    scale = scale_of(correction)
    got = make_encoder(
        Layer(dtype), P, scale and {"mlp/kernel": scale}, output=times, include="mlp"
    )(batch)
    tolerance = 2e-6 if correction == "adam" else {"float16": 1e-3, "bfloat16": 8e-3}[dtype]
    assert relative(np.asarray(got, np.float64), exactly(batch, scale)).max() < tolerance


@pytest.mark.parametrize("rank", [1, 3])
@pytest.mark.parametrize("size", [1e-12, 1e8])
@pytest.mark.parametrize("dtype", ["float16", "bfloat16"])
def test_scales_beyond_float16_encode_exactly(dtype, size, rank):
    """Guards: NaN where factors of 1/√V exceed 65,504, and zeros or few digits below 6e-5."""
    rng = np.random.default_rng(0)
    x, d = (rng.integers(-64, 65, (3, 5, n)) / 64 for n in (8, 12))
    batch = {"x": x.astype(np.float32), "d": d.astype(np.float32)}
    # Both factors are extreme, and their rows differ by 1e6.
    left = size * np.exp(rng.uniform(-7, 7, (rank, 8)))
    scale = Scale(*(jnp.asarray(v, jnp.float32) for v in (left, rng.uniform(1, 2, (rank, 12)))))
    flipped = Scale(jnp.ones((rank, 8)), size * jnp.exp(rng.uniform(-7, 7, (rank, 12))))
    for own in (scale, flipped):
        got = make_encoder(Layer(dtype), P, {"mlp/kernel": own}, output=times, include="mlp")(batch)
        error = relative(np.asarray(got, np.float64), exactly(batch, own)).max()
        assert error < {"float16": 1e-5, "bfloat16": 2e-2}[dtype]


@pytest.mark.parametrize("correction", ["none", "adam"])
def test_a_long_passage_is_summed_in_float32(correction):
    """Guards: half precision before projection: sums over positions that stand still."""
    T = 2001  # in bfloat16, 2000
    one = {"x": np.ones((1, T, 8), np.float32), "d": np.ones((1, T, 12), np.float32)}
    scale = scale_of(correction)
    encode = make_encoder(
        Layer("bfloat16"), P, scale and {"mlp/kernel": scale}, output=times, include="mlp"
    )
    short = np.asarray(encode(jax.tree.map(lambda x: x[:, :1], one)))
    np.testing.assert_allclose(encode(one), T * short, rtol=1e-5)


@pytest.mark.parametrize("scan", [True, False])
@pytest.mark.parametrize("correction", ["none", "adam"])
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_every_matrix_gives_something_for_every_example(
    decoder, random_batch, dtype, correction, scan
):
    """Guards: kernels that return zeros."""
    model, p = decoder(dtype=dtype, scan=scan, tied=False), Projection(side=4, pooling="matrix")
    chosen = find_sites(model, ".")
    scales = ones(model, ".") if correction == "adam" else None
    encoder = make_encoder(model, p, scales, include=".")
    got = np.asarray(encoder(random_batch([6, 4, 3], 6))).reshape(3, -1, 16)
    assert got.shape[1] == sum(s.stack or 1 for s in chosen) == 2 + 2 * 7
    assert np.isfinite(got).all() and np.linalg.norm(got, axis=-1).min() > 0


def off(got, expected, side=4):
    """The largest error of a block, relative to its norm."""
    got, expected = (np.asarray(x, np.float64).reshape(-1, side**2) for x in (got, expected))
    return relative(got, expected).max()


def ones(model, include=None):
    """A scale of 1 for every weight: products are then taken in float32, weight by weight."""
    chosen = find_sites(model, include)
    return {s.path: Scale(full=jnp.ones((*s.stack_shape, s.rows, s.columns))) for s in chosen}


@pytest.mark.parametrize(("family", "tolerance"), [("gaussian", 1e-2), ("rademacher", 1e-5)])
def test_bfloat16_loses_nothing_but_the_digits_of_a_and_b(decoder, random_batch, family, tolerance):
    """Guards: half precision before projection: of x, δ and their products nothing is lost."""
    model, batch = decoder(dtype="bfloat16"), random_batch([6, 4], 6)
    p = Projection(side=4, blocks=2, family=family)
    got = make_encoder(model, p)(batch)
    assert got.dtype == jnp.float32
    assert off(got, make_encoder(model, p, ones(model))(batch)) < tolerance


@pytest.mark.parametrize("correction", [pytest.param("none", marks=pytest.mark.slow), "adam"])
def test_bfloat16_is_near_the_reference(decoder, random_batch, correction):
    """Guards: half precision before projection."""
    low, full = decoder(dtype="bfloat16"), decoder()
    batch, p = random_batch([6, 4], 6), Projection(side=4, blocks=2)
    scales = scales_of(full, correction)
    got = make_encoder(low, p, scales)(batch)
    # The same model, each weight's gradient rounded to bfloat16; and one that never rounds.
    assert off(got, reference.encode(low, batch, p, scales)) < 1e-2
    assert off(got, reference.encode(full, batch, p, scales)) < 6e-2


def test_devices_that_share_a_batch_encode_as_one_does_in_bfloat16(decoder, random_batch):
    """Guards: encodings that depend on the worker's number."""
    model, p = decoder(dtype="bfloat16"), Projection(side=4, blocks=2)
    batch = random_batch([6, 4, 2, 6, 5, 1, 3, 6], 6)
    expected = make_encoder(model, p)(batch)
    model_fn, params = functional.split(model)
    for data, fsdp in ((8, 1), (1, 2)):
        mesh = sharding.make_mesh(data=data, fsdp=fsdp, devices=jax.devices()[: data * fsdp])
        placed = functional.place(params, model_fn.axes, mesh)
        with jax.set_mesh(mesh):
            encode = make_encoder(model_fn.merge(placed), p)
            assert off(encode(sharding.put_batch(mesh, batch)), expected) < 1e-5


def precisions(trace):
    """The precision of every matrix product in a jaxpr and in those that it calls."""
    for equation in trace.eqns:
        if equation.primitive.name == "dot_general":
            yield equation.params["precision"]
        parts = jax.tree.leaves(
            list(equation.params.values()), is_leaf=lambda x: hasattr(x, "eqns")
        )
        for part in parts:
            inner = getattr(part, "jaxpr", part)
            if hasattr(inner, "eqns"):
                yield from precisions(inner)


@pytest.mark.parametrize("correction", ["none", "factored", "adam"])
@pytest.mark.parametrize("tied", [False, True])
def test_no_product_has_the_devices_own_precision(decoder, random_batch, correction, tied):
    """Guards: a float32 model whose products an accelerator rounds to TF32 or bfloat16."""
    model, batch = decoder(tied=tied), random_batch([6, 4], 6)
    scales = None if correction == "none" else scales_of(model, correction)
    encode = make_encoder(model, Projection(side=4, blocks=2), scales)
    model_fn, params = functional.split(model)

    def training_loss(params):
        own_model = model_fn.merge(params)
        return losses.total(own_model, batch, losses.cross_entropy)

    for trace in (jax.make_jaxpr(encode)(batch), jax.make_jaxpr(jax.grad(training_loss))(params)):
        found = list(precisions(trace.jaxpr))
        assert len(found) > 10
        assert {p for pair in found for p in (pair or [None])} == {jax.lax.Precision.HIGHEST}
