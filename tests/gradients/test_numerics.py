"""What low precision may cost an encoding, and what it may not."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from tda.gradients import projection, sites
from tda.gradients.encoder import make_encoder
from tda.gradients.projection import Projection
from tda.gradients.second_moments import adam_scale, factored_scale

P = Projection(side=4, blocks=1)


class Layer(nnx.Module):
    """One matrix, whose input and output's cotangent a batch gives as they are."""

    def __init__(self, dtype):
        self.mlp = nnx.Linear(8, 12, use_bias=False, dtype=dtype, rngs=nnx.Rngs(0))


def times(model, batch):
    return jnp.sum(model.mlp(batch["x"]).astype(jnp.float32) * batch["d"], axis=(1, 2))


def scale_of(correction):
    if correction == "none":
        return None
    full = adam_scale(np.exp(np.random.default_rng(1).normal(size=(8, 12))), 7, 0.9, 1e-3)
    return full if correction == "adam" else factored_scale(full.full)


def exactly(batch, scale):
    """Aᵀ((Σ_t x_t δ_tᵀ) ∘ scale)B in float64."""
    (site,) = sites.find(Layer("float32"))
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


@pytest.mark.parametrize("correction", ["none", "adam"])
def test_a_long_passage_is_summed_in_float32(correction):
    """Guards: half precision before projection: sums over positions that stand still."""
    T = 2000
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
    chosen = sites.find(model, ".")
    scales = None
    if correction == "adam":
        ones = {
            s.path: np.ones(((s.stack,) if s.stack else ()) + (s.rows, s.columns)) for s in chosen
        }
        scales = {path: adam_scale(x, 1, 0.0, 1.0) for path, x in ones.items()}
    encoder = make_encoder(model, p, scales, include=".")
    got = np.asarray(encoder(random_batch([6, 4, 3], 6))).reshape(3, -1, 16)
    assert got.shape[1] == sum(s.stack or 1 for s in chosen) == 2 + 2 * 7
    assert np.isfinite(got).all() and np.linalg.norm(got, axis=-1).min() > 0
