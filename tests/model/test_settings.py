"""The decoder's settings of other families: layers in any form agree, and gradients are right."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from tda.gradients import reference, sites
from tda.gradients.encoder import make_encoder
from tda.gradients.projection import Projection
from tda.gradients.sites import find_sites
from tda.model import functional
from tda.model.decoder import Decoder, abstract_decoder, is_as_built
from tda.model.settings import DecoderSettings
from tda.runtime import sharding

TINY = dict(vocab_size=50, width=16, layers=3, heads=2, kv_heads=1, head_width=8, ff_width=24)
FAMILIES = {
    "gpt2": dict(
        max_positions=12,
        gated=False,
        activation="gelu",
        norm="layer",
        attention_bias=True,
        out_bias=True,
        mlp_bias=True,
    ),
    "neox": dict(
        parallel=True,
        norm="layer",
        gated=False,
        activation="gelu_exact",
        rope_fraction=0.25,
        tied=False,
        attention_bias=True,
    ),
    "gemma3": dict(
        norm_place="both",
        norm_offset=1.0,
        query_key_norm="head",
        window=3,
        window_layers=[True, False, True],
        window_rope_base=100.0,
        rope_scaling={"kind": "linear", "factor": 8.0},
        attention_scale=0.3,
        attention_soft_cap=4.0,
        logit_soft_cap=6.0,
        embedding_scale=4.0,
    ),
    "olmo2": dict(norm_place="after", query_key_norm="all", window=3, rope_layout="interleaved"),
}


@functools.cache
def make(name, **changes):
    """A model all of whose vectors are random too: ones and zeros would hide much."""
    model = Decoder(DecoderSettings(**TINY | FAMILIES[name] | changes), rngs=nnx.Rngs(0))
    for path, variable in nnx.to_flat_state(nnx.state(model, nnx.Param)):
        if path[-1] in ("scale", "bias"):
            whole = "/".join(str(p) for p in path if not isinstance(p, int))
            rng = np.random.default_rng(list(whole.encode()))
            layers = TINY["layers"] if "layers" in path else 1
            noise = rng.uniform(-0.5, 0.5, (layers, variable.shape[-1])).astype(np.float32)
            at = next((p for p in path if isinstance(p, int)), slice(None))
            noise = noise[at] if "layers" in path else noise[0]
            variable[...] = variable[...] + jnp.asarray(noise, variable.dtype)
    return model


@pytest.mark.parametrize("scan", [True, False])
@pytest.mark.parametrize("name", FAMILIES)
def test_a_decoder_is_as_built_wherever_it_comes_from(name, scan):
    """Guards: decoders of runs and files checked as models of unknown structure are, at a cost."""
    dtypes = dict(dtype="bfloat16", param_dtype="bfloat16") if name == "gpt2" else {}
    model = make(name, scan=scan, remat=scan, attention="fused", **dtypes)
    assert is_as_built(model) and is_as_built(nnx.clone(model))
    # As checkpoints and files are loaded: arrays put into an abstract decoder, on a mesh.
    abstract = functional.split(abstract_decoder(model.settings))[0]
    params = functional.split(model)[1]
    mesh = sharding.make_mesh(data=2, fsdp=2, tensor=2)
    assert is_as_built(abstract.merge(functional.place(params, abstract.axes, mesh)))


@pytest.mark.parametrize("name", FAMILIES)
def test_a_list_of_abstract_layers_is_that_of_a_traced_decoder(name):
    settings = DecoderSettings(**TINY | FAMILIES[name], scan=False)
    traced = nnx.eval_shape(lambda: Decoder(settings, rngs=nnx.Rngs(0)))
    (graphdef, state), (expected_graphdef, expected) = map(
        nnx.split, (abstract_decoder(settings), traced)
    )
    assert graphdef == expected_graphdef
    assert nnx.to_pure_dict(state) == nnx.to_pure_dict(expected)


def share_layer(model):
    model.layers[1] = model.layers[0]


def share_parameter(model):
    model.layers[1].mlp.up.kernel = model.layers[0].mlp.up.kernel


def replace_product(model):
    model.layers[0].mlp.up.dot_general = jax.lax.dot_general


def replace_layer(model):
    class Own(nnx.Linear):
        pass

    model.layers[0].mlp.up = Own(16, 24, use_bias=False, rngs=nnx.Rngs(0))


def replace_settings(model):
    model.settings = dataclasses.replace(model.settings, layers=2)


@pytest.mark.parametrize(
    "change", [share_layer, share_parameter, replace_product, replace_layer, replace_settings]
)
def test_a_changed_decoder_is_not_as_built(change):
    model = Decoder(DecoderSettings(**TINY, scan=False), rngs=nnx.Rngs(0))
    change(model)
    assert not is_as_built(model)


def test_a_subclass_of_the_decoder_is_not_as_built():
    class Own(Decoder):
        pass

    assert not is_as_built(Own(DecoderSettings(**TINY), rngs=nnx.Rngs(0)))


def logits(model, tokens):
    fn, params = functional.split(model)
    return np.asarray(jax.jit(fn.apply)(params, tokens))


def tokens_of(batch, length):
    return np.random.default_rng(0).integers(0, 50, (batch, length)).astype(np.int32)


@pytest.mark.parametrize("name", FAMILIES)
def test_layers_in_any_form_agree_and_see_no_later_token(name):
    tokens = tokens_of(2, 9)
    expected = logits(make(name), tokens)
    for changes in (dict(scan=False), dict(remat=True)):
        got = logits(make(name, **changes), tokens)
        np.testing.assert_allclose(got, expected, rtol=0, atol=1e-5 * np.abs(expected).max())
    changed = tokens.copy()
    changed[:, 5] = (changed[:, 5] + 1) % 50
    after = logits(make(name), changed)
    np.testing.assert_array_equal(after[:, :5], expected[:, :5])
    assert np.abs(after[:, 5:] - expected[:, 5:]).max(-1).min() > 1e-6


# Each takes 14 s, nearly all of it compiling; the others are compared with the slow tests.
@pytest.mark.parametrize(
    "name", [pytest.param(n, marks=() if n == "gemma3" else pytest.mark.slow) for n in FAMILIES]
)
def test_encodings_equal_the_reference_in_every_parameter(name, random_batch):
    """Guards: gradients that a bias, a cap, a window or a second norm takes another way."""
    model, batch = make(name), random_batch([6, 4, 2], 6)
    projection = Projection(side=4, pooling="matrix")
    scope = dict(include=".", untapped="reference")
    assert not sites.left_out(model, find_sites(model, **scope))
    tapped = [s.path for s in find_sites(model, include=".")]
    assert sum("kernel" in p for p in tapped) == (6 if "gated" in FAMILIES[name] else 7) + (
        name == "neox"
    )
    for untapped in ("leave", "reference"):
        scope = dict(include=".", untapped=untapped)
        encoder = make_encoder(model, projection, **scope)
        expected = np.asarray(reference.encode(model, batch, projection, **scope))
        got, blocks = np.asarray(encoder(batch)), len(encoder.layout.blocks)
        error = np.linalg.norm((got - expected).reshape(3, blocks, 16), axis=-1)
        # Against the largest block: that of a key's bias is 0 where positions are learned.
        norms = np.linalg.norm(expected.reshape(3, blocks, 16), axis=-1)
        assert error.max() < 1e-5 * norms.max()
        assert (norms.min(axis=0) > 1e-6 * norms.max()).mean() > 0.9


def test_windows_reach_as_far_as_layers_together():
    """A token that no window of three layers reaches changes nothing; a nearer one does."""
    windows = dict(window=2, window_layers=None, window_rope_base=None)
    model = make("gemma3", **windows)
    tokens = tokens_of(1, 9)
    changed = tokens.copy()
    changed[0, 2] = (changed[0, 2] + 1) % 50
    before, after = logits(model, tokens), logits(model, changed)
    # Each layer sees one position back: three layers reach from 2 to 5.
    np.testing.assert_array_equal(before[0, 6:], after[0, 6:])
    assert np.abs(before[0, 2:6] - after[0, 2:6]).max(-1).min() > 1e-6


def test_a_layer_without_the_window_sees_everything():
    model = make("gemma3", window=2, window_layers=(False, True, True), window_rope_base=50.0)
    tokens = tokens_of(1, 9)
    changed = tokens.copy()
    changed[0, 0] = (changed[0, 0] + 1) % 50
    assert np.abs(logits(model, tokens) - logits(model, changed))[0, 8].max() > 1e-6


def test_more_positions_than_are_learned_are_refused():
    with pytest.raises(ValueError, match="13 positions are more than max_positions=12"):
        logits(make("gpt2"), tokens_of(1, 13))


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        (dict(norm="batch"), "unknown norm 'batch'; use rms, layer"),
        (dict(norm_place="within"), "unknown norm_place 'within'; use before, after, both"),
        (dict(query_key_norm="key"), "unknown query_key_norm 'key'; use head, all"),
        (dict(rope_layout="mixed"), "unknown rope_layout 'mixed'; use half, interleaved"),
        (dict(norm="layer", norm_offset=1.0), "norm_offset=1.0 is for norm='rms'"),
        (dict(window=0), "window=0 must be positive"),
        (dict(window_layers=[True] * 3), "need a window"),
        (dict(window=2, window_layers=[True]), "1 entries for 3 layers"),
        (dict(rope_layers=[True] * 2), "rope_layers has 2 entries for 3 layers"),
        (dict(rope_fraction=0.4), "3 features of a head are rotated"),
        (dict(rope_scaling={"kind": "long"}), "unknown rope_scaling kind 'long'"),
    ],
)
def test_settings_that_do_not_fit_are_refused(changes, message):
    with pytest.raises(ValueError, match=message):
        DecoderSettings(**TINY | changes)
