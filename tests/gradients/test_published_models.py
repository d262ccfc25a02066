"""Models of a published package, tapped from outside, against the reference.

Tunix's Llama 3, Gemma and Qwen 3 have an einsum class of their own and an embedding whose methods
have other names (Gemma's scales the rows). Their norms go by the slow path.
"""

import importlib

import flax
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from tda.gradients import layers, reference, sites
from tda.gradients.encoder import make_encoder
from tda.gradients.projection import Projection
from tda.gradients.sites import find_sites
from tests.gradients.test_encoder import assert_same_encodings, scales_of

# Compiling three families takes a minute, and the package is not small.
pytestmark = pytest.mark.slow

V, D = 50, 8
SHAPE = dict(num_layers=2, embed_dim=D, hidden_dim=12, num_heads=2, head_dim=4)


@pytest.fixture(scope="module")
def tunix():
    """The modules of the three families; what their import sets in Flax is set back."""
    before = flax.config.flax_always_shard_variable
    names = ("llama3", "gemma", "qwen3")
    try:
        found = {n: importlib.import_module(f"tunix.models.{n}.model") for n in names}
    except ImportError as error:
        pytest.skip(f"{error}: `make test-all` installs tunix and what it imports")
    for family in found.values():
        layers.register_einsum(family.Einsum, "w", "einsum_str")
        layers.register_embedding(family.Embedder, "input_embedding", "encode", "decode")
    yield found
    flax.config.update("flax_always_shard_variable", before)


def make(tunix, name):
    family, rngs = tunix[name], nnx.Rngs(0)
    if name == "gemma":
        # Version 2's: windows, soft caps, norms after each part.
        kinds = family.AttentionType.LOCAL_SLIDING, family.AttentionType.GLOBAL
        config = family.ModelConfig(
            **SHAPE, num_embed=V, num_kv_heads=1, attention_types=kinds, sliding_window_size=3,
            final_logit_softcap=30.0, attn_logits_soft_cap=50.0,
            use_post_attn_norm=True, use_post_ffw_norm=True,
        )  # fmt: skip
        model = family.Gemma(config, rngs=rngs)
    else:
        shape = SHAPE | dict(vocab_size=V, num_kv_heads=1, rope_theta=10_000, norm_eps=1e-5)
        if name == "llama3":
            model = family.Llama3(family.ModelConfig(**shape), rngs=rngs)
        else:
            model = family.Qwen3(family.ModelConfig(**shape, use_tied_embedding=True), rngs=rngs)
    rng = np.random.default_rng(0)
    # The package starts MLPs at zero and norms at one, which would hide much.
    for _, variable in nnx.to_flat_state(nnx.state(model, nnx.Param)):
        random = 0.5 * rng.normal(size=variable.shape) + (variable.ndim == 1)
        variable[...] = jnp.asarray(random, jnp.float32)
    return model


def loss(model, batch):
    """−Σ log p: these models take positions and a mask, and give a cache too."""
    B, T = batch["tokens"].shape
    positions = jnp.broadcast_to(jnp.arange(T), (B, T))
    mask = jnp.broadcast_to(jnp.tril(jnp.ones((T, T), bool)), (B, T, T))
    logits, _ = model(batch["tokens"], positions, None, mask)
    log_p = jax.nn.log_softmax(logits)
    picked = jnp.take_along_axis(log_p, batch["targets"][..., None], axis=-1)[..., 0]
    return -jnp.sum(picked * batch["weights"], axis=-1)


@pytest.mark.parametrize("correction", ["none", "factored", "adam"])
@pytest.mark.parametrize("name", ["llama3", "gemma", "qwen3"])
def test_every_parameter_equals_the_reference(tunix, random_batch, name, correction):
    """Guards: a model attributed by a part of its parameters, on a model made by others."""
    model, batch = make(tunix, name), random_batch([6, 4, 3], 6, V)
    projection = Projection(side=4, pooling="matrix")
    chosen = find_sites(model, ".", untapped="reference")
    assert not sites.left_out(model, chosen)
    assert all(s.tapped for s in chosen if s.rows > 1)
    scales = scales_of(model, correction, ".", untapped="reference")
    for untapped in ("leave", "reference"):
        scope = dict(output=loss, include=".", untapped=untapped)
        encoder = make_encoder(model, projection, scales, **scope)
        expected = reference.encode(model, batch, projection, scales, **scope)
        assert_same_encodings(encoder(batch), expected)
