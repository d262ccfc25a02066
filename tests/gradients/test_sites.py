"""Where weight matrices are found, and what they are called."""

import re

import jax
import jax.numpy as jnp
import pytest
from flax import nnx

from tda.gradients import kronecker, sites
from tda.gradients.sites import find_sites
from tda.model import functional
from tda.model.decoder import Decoder
from tda.model.settings import DecoderSettings
from tests.model.test_settings import FAMILIES, TINY

MLP = {"mlp/up/kernel", "mlp/gate/kernel", "mlp/down/kernel"}
ATTENTION = {f"attention/{n}/kernel" for n in ("query", "key", "value", "out")}


def names(chosen):
    return sorted(n for s in chosen for n in s.names())


def test_scanned_and_unrolled_models_agree_by_name_and_shape(decoder):
    """Guards: moments mapped to the wrong modules when parameters are indexed by number."""
    scanned = find_sites(decoder(layers=3), ".")
    unrolled = find_sites(decoder(layers=3, scan=False), ".")
    assert names(scanned) == names(unrolled)
    shapes = [
        {n: (s.rows, s.columns) for s in found for n in s.names()} for found in (scanned, unrolled)
    ]
    assert shapes[0] == shapes[1]
    assert shapes[0]["layers/2/mlp/down/kernel"] == (24, 16)
    assert shapes[0]["layers/0/attention/key/kernel"] == (16, 8)
    assert shapes[0]["embedding/embedding"] == (50, 16)


def test_the_default_is_every_matrix_of_the_layers(decoder):
    """Guards: matrices skipped in silence."""
    found = find_sites(decoder(tied=False))
    assert {s.path.removeprefix("layers/") for s in found} == MLP | ATTENTION
    assert all(s.stack == 2 for s in found)


@pytest.mark.parametrize("scan", [True, False])
def test_everything_is_found_when_asked_for(decoder, scan):
    """Guards: heads, embeddings and tied weights skipped in silence."""
    for tied in (True, False):
        model = decoder(tied=tied, scan=scan)
        _, params = functional.split(model)
        matrices = {n: x for n, x in functional.flat_parameters(params).items() if "norm" not in n}
        found = {s.path: s for s in find_sites(model, ".")}
        assert found.keys() == matrices.keys()
        assert ("head/kernel" in found) == (not tied)
        for path, site in found.items():
            stack = () if site.stack is None else (site.stack,)
            assert matrices[path].shape == (*stack, site.rows, site.columns)


def test_include_and_exclude_search_the_path(decoder):
    model = decoder(tied=False)
    assert [s.path for s in find_sites(model, "head|embed")] == [
        "embedding/embedding",
        "head/kernel",
    ]
    kept = find_sites(model, exclude="gate|attention")
    assert {s.path for s in kept} == {"layers/mlp/up/kernel", "layers/mlp/down/kernel"}
    assert [s.path for s in kept] == sorted(s.path for s in kept)


def test_nothing_found_is_refused_with_what_there_is(decoder):
    with pytest.raises(ValueError, match="(?s)include='experts'.*layers/mlp/up/kernel"):
        find_sites(decoder(), "experts")
    with pytest.raises(ValueError, match="no weight matrix matches"):
        find_sites(decoder(), exclude=".")
    for name in ("include", "exclude"):
        with pytest.raises(ValueError, match=rf"{name}='\(' is not a regular expression"):
            find_sites(decoder(), **{name: "("})


def test_any_models_layers_are_found():
    class Own(nnx.Linear):
        """A user's subclass."""

    class Model(nnx.Module):
        def __init__(self, rngs):
            self.mlp = Own(3, 4, rngs=rngs)
            self.blocks = nnx.List([nnx.Linear(4, 4, rngs=rngs) for _ in range(2)])

    model = Model(nnx.Rngs(0))
    found = {s.path: (s.rows, s.columns, s.group) for s in find_sites(model)}
    assert found["mlp/kernel"] == (3, 4, "mlp") and found["blocks/1/kernel"] == (4, 4, "other")
    assert names(find_sites(model, ".")) == ["blocks/0/kernel", "blocks/1/kernel", "mlp/kernel"]


def test_a_stack_is_told_from_a_single_matrix():
    site = sites.Site(("layers", "mlp", "up"), "kernel", 2, 3, stack=2)
    assert site.path == "layers/mlp/up/kernel"
    assert site.names() == ["layers/0/mlp/up/kernel", "layers/1/mlp/up/kernel"]
    assert sites.Site(("layers", 1, "up"), "kernel", 2, 3, None).names() == ["layers/1/up/kernel"]


@pytest.mark.parametrize(
    ("path", "second"),
    [
        ("layers/0/experts/kernel", "layers/0/experts/1/kernel"),
        ("encoder/0/experts/kernel", "encoder/0/experts/1/kernel"),
        ("blocks/0/kernel", "blocks/0/1/kernel"),
        ("layers/0/mlp/blocks/up/kernel", "layers/0/mlp/blocks/1/up/kernel"),
        ("stages/0/layers/up/kernel", "stages/0/layers/1/up/kernel"),
    ],
)
def test_a_stack_in_a_numbered_layer_is_of_that_layer(path, second):
    """Guards: the experts of all layers as layers, each with a block of the encoding."""
    *module, parameter = (int(p) if p.isdigit() else p for p in path.split("/"))
    found = sites.Site(tuple(module), parameter, 2, 3, stack=3).names()
    assert found[1] == second and len(set(found)) == 3
    assert {sites.layer_of(name) for name in found} == {0}


@pytest.mark.parametrize(
    ("path", "group", "layer"),
    [
        ("layers/11/attention/out/kernel", "attention", 11),
        ("layers/0/mlp/gate/kernel", "mlp", 0),
        ("model/layers/2/self_attn/q_proj/kernel", "attention", 2),
        ("h/3/feed_forward/w1/kernel", "mlp", 3),
        ("embedding/embedding", "embedding", None),
        ("lm_head/kernel", "head", None),
        ("final/kernel", "other", None),
        ("blocks/0/output/kernel", "other", 0),
        ("blocks/0/head/kernel", "other", 0),
        ("encoder/layer/0/output/dense/kernel", "other", 0),
        ("encoder/layer/0/attention/output/dense/kernel", "attention", 0),
        ("embedder/layers/3/project/kernel", "other", 3),
        ("bert/embeddings/word_embeddings/embedding", "embedding", None),
        ("output/kernel", "head", None),
        # Several of them: the number is not a layer's.
        ("lm_head/0/kernel", "head", 0),
        ("embed_tokens/1/embedding", "embedding", 1),
    ],
)
def test_groups_and_layers_by_name(path, group, layer):
    assert sites.group_of(path) == group
    assert sites.layer_of(path) == layer


class Block(nnx.Module):
    """A layer by BERT's names, with a table of its own."""

    def __init__(self, rngs):
        self.intermediate, self.output, self.head, self.embed = (
            nnx.Linear(4, 4, rngs=rngs) for _ in range(4)
        )
        self.depth_embed = nnx.Embed(3, 4, rngs=rngs)


class Encoder(nnx.Module):
    def __init__(self, scan, rngs):
        self.embeddings = nnx.Embed(5, 4, rngs=rngs)
        if scan:
            self.layer = nnx.vmap(Block)(rngs.split(2))
        else:
            self.layer = nnx.List([Block(rngs) for _ in range(2)])
        self.output = nnx.Linear(4, 5, rngs=rngs)


@pytest.mark.parametrize("scan", [True, False])
def test_layers_may_have_an_output_and_a_head(scan):
    """Guards: matrices of every layer left out by default, for what they are called."""
    model = Encoder(scan, nnx.Rngs(0))
    of_layers = ("intermediate", "output", "head", "embed")
    found = find_sites(model)
    assert names(found) == sorted(f"layer/{i}/{n}/kernel" for i in (0, 1) for n in of_layers)
    assert {s.group for s in found} == {"other"}
    assert kronecker.factored(find_sites(model, ".")) == found
    # What looks up rows is an embedding, in a layer too.
    groups = {n: s.group for s in find_sites(model, ".") for n in s.names()}
    others = {n: g for n, g in groups.items() if g != "other"}
    assert others == {
        "embeddings/embedding": "embedding",
        "layer/0/depth_embed/embedding": "embedding",
        "layer/1/depth_embed/embedding": "embedding",
        "output/kernel": "head",
    }
    assert {s.path: sites.Site(s.module, s.parameter, 4, 4, s.stack).group for s in found} == {
        s.path: "other" for s in found
    }


def test_the_head_of_a_model_in_stages_is_a_head():
    for path in ("stages/1/lm_head/kernel", "1/head/kernel", "towers/0/embed/embedding"):
        assert sites.group_of(path) in ("head", "embedding")
    assert sites.group_of("stages/1/blocks/0/output/kernel") == "other"


OLD_GROUPS = {
    "attention": r"attn|attention",
    "mlp": r"mlp|ffn|ffw|feed_?forward",
    "head": r"unembed|lm_head|(^|/)(head|output)(/|$)",
    "embedding": r"embed|(^|/)w[tp]e(/|$)",
}


@pytest.mark.parametrize("scan", [True, False])
@pytest.mark.parametrize("tied", [True, False])
@pytest.mark.parametrize("family", ["llama", *FAMILIES])
def test_the_decoders_groups_are_those_of_stores_made_before(family, tied, scan):
    """Blocks of a store are called by them: no other rule may move a matrix of this model."""
    shape = TINY | FAMILIES.get(family, {}) | dict(tied=tied, scan=scan)
    model = nnx.eval_shape(lambda: Decoder(DecoderSettings(**shape), rngs=nnx.Rngs(0)))
    found = find_sites(model, ".", untapped="reference")
    assert not sites.left_out(model, found) and len(found) > 9
    for site in found:
        by_name = (g for g, words in OLD_GROUPS.items() if re.search(words, site.path))
        assert site.group == next(by_name, "other")
    # By default the layers' matrices, as ever.
    parts = MLP | ATTENTION if shape.get("gated", True) else MLP - {"mlp/gate/kernel"} | ATTENTION
    expected = {f"layers/{i}/{part}" for i in range(shape["layers"]) for part in parts}
    assert {n for s in find_sites(model) for n in s.names()} == expected


def test_finding_allocates_nothing(decoder):
    """Large models' sites can be listed by shape alone."""
    abstract = nnx.eval_shape(lambda: decoder())
    assert names(find_sites(abstract, ".")) == names(find_sites(decoder(), "."))
    leaves = jax.tree.leaves(nnx.state(abstract, nnx.Param))
    assert all(isinstance(x, jax.ShapeDtypeStruct) for x in leaves)


@pytest.mark.parametrize("dtype", [jnp.int8, jnp.complex64])
@pytest.mark.parametrize("untapped", ["leave", "reference"])
def test_a_parameter_of_other_than_real_numbers_is_refused(dtype, untapped):
    """Guards: half of a complex gradient; jax's own message, which names no parameter."""
    model = nnx.Sequential(*(nnx.Linear(3, 3, rngs=nnx.Rngs(0)) for _ in range(2)))
    model.layers[1].kernel = nnx.Param(jnp.ones((3, 3), dtype))
    with pytest.raises(ValueError, match=rf"not of layers/1/kernel \({dtype.__name__}\); use excl"):
        find_sites(model, untapped=untapped)
    (site,) = find_sites(model, exclude="layers/1/kernel")
    assert site.path == "layers/0/kernel"
