"""The encoder against the slow reference, against numbers made by hand, and against itself.

Results agree to 1e-5 of a block's norm. In bfloat16 too an encoding is the same alone, padded and
in any batch; how far it is from that of float32: `test_numerics`.
"""

import dataclasses
import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from tda.data import batches, tokens
from tda.data.tokenizer import Tokenizer
from tda.gradients import projection as projections
from tda.gradients import reference, sites
from tda.gradients.encoder import make_encoder
from tda.gradients.moments.scales import Scale, factored_scale
from tda.gradients.projection import Projection
from tda.gradients.sites import find_sites
from tda.model import functional
from tda.runtime import sharding

P = Projection(side=4, blocks=2)


def scales_of(model, correction="adam", include=None, **scope):
    """Scales of very different size for every weight, the same for scanned and unrolled models."""
    if correction == "none":
        return None
    scales = {}
    for site in find_sites(model, include, **scope):
        seeds = [list(name.encode()) for name in site.names()]
        layers = [np.random.default_rng(s).normal(size=(site.rows, site.columns)) for s in seeds]
        full = jnp.exp(jnp.asarray(layers if site.stack else layers[0], jnp.float32))
        scales[site.path] = Scale(full=full) if correction == "adam" else factored_scale(full)
    return scales


def assert_same_encodings(got, expected, tolerance=1e-5, side=P.side):
    """Every example's every block agrees, relative to that block's own norm."""
    got, expected = (np.asarray(x, np.float64) for x in (got, expected))
    assert got.shape == expected.shape and np.isfinite(got).all()
    blocks = got.shape[-1] // side**2
    difference = (got - expected).reshape(-1, blocks, side**2)
    norms = np.linalg.norm(expected.reshape(-1, blocks, side**2), axis=-1)
    assert np.all(norms > 0)
    assert (np.linalg.norm(difference, axis=-1) / norms).max() < tolerance


COMBINATIONS = list(
    itertools.product(
        (True, False),
        (True, False),
        (None, "."),
        ("none", "factored", "adam"),
        ("loss", "margin", "logit"),
    )
)


OUTPUTS = ("loss", "margin", "logit")
# Every pair of options, and tied embeddings (tapped at both ends) with every correction.
FAST = {
    *((True, True, ".", c, OUTPUTS[i]) for i, c in enumerate(("none", "factored", "adam"))),
    *((False, True, ".", c, OUTPUTS[i]) for i, c in enumerate(("adam", "none", "factored"))),
    *((True, False, None, c, OUTPUTS[i]) for i, c in enumerate(("factored", "adam", "none"))),
    *((False, False, ".", c, OUTPUTS[i]) for i, c in enumerate(("none", "factored", "adam"))),
    (False, True, None, "factored", "loss"),
}


def combination_cases():
    for case in COMBINATIONS:
        yield pytest.param(*case, marks=() if case in FAST else pytest.mark.slow)


def test_the_fast_combinations_hold_every_pair():
    assert set(COMBINATIONS) > FAST
    for i, j in itertools.combinations(range(5), 2):
        assert {(c[i], c[j]) for c in FAST} == {(c[i], c[j]) for c in COMBINATIONS}


@pytest.mark.parametrize(("scan", "tied", "include", "correction", "output"), combination_cases())
def test_equal_to_the_reference(decoder, random_batch, scan, tied, include, correction, output):
    """Guards: tied weights, heads and embeddings attributed wrongly; a correction dropped."""
    model = decoder(scan=scan, tied=tied)
    batch = random_batch([6, 4, 1], 6)
    scales = scales_of(model, correction, include)
    encoder = make_encoder(model, P, scales, output, include)
    got = encoder(batch)
    expected = reference.encode(model, batch, P, scales, output, include)
    assert got.shape == (3, encoder.layout.width) and got.dtype == jnp.float32
    assert_same_encodings(got, expected)


@pytest.mark.parametrize(
    "changes",
    [
        pytest.param(dict(remat=True, gated=False), marks=pytest.mark.slow),
        dict(layers=3, heads=4, kv_heads=4, head_width=4),
    ],
    ids=str,
)
def test_other_models_equal_the_reference(decoder, random_batch, changes):
    model = decoder(**changes)
    batch = random_batch([5, 2], 5)
    scales = scales_of(model, "adam")
    assert_same_encodings(
        make_encoder(model, P, scales)(batch), reference.encode(model, batch, P, scales)
    )


def test_one_example_by_hand(decoder, random_batch):
    """Guards: a scale transposed, dropped or applied after projection; left and right exchanged."""
    model = decoder(tied=False)
    batch = random_batch([5], 5)
    fn, params = functional.split(model)

    def total(p):
        logits = fn.apply(p, batch["tokens"])
        log_p = jax.nn.log_softmax(logits)
        picked = jnp.take_along_axis(log_p, jnp.asarray(batch["targets"])[..., None], -1)[..., 0]
        return -(picked * batch["weights"]).sum()

    gradient = functional.flat_parameters(jax.jit(jax.grad(total))(params))
    include = "mlp/(up|down)|head"

    def projected(path, G, scale):
        """AᵀGB, weight by weight scaled before."""
        A = projections.random_matrix(P.seed, path, "left", G.shape[0], P.side, P.family)
        B = projections.random_matrix(P.seed, path, "right", G.shape[1], P.side, P.family)
        return A.T @ (np.asarray(G, np.float64) * np.asarray(scale)) @ B

    for correction in ("none", "factored", "adam"):
        scales = scales_of(model, correction, include)
        dense = {p: s.dense() for p, s in scales.items()} if scales else gradient.fromkeys(gradient)
        expected = {"0/mlp": 0.0, "1/mlp": 0.0}
        for name, layer in itertools.product(("up", "down"), (0, 1)):
            path = f"layers/mlp/{name}/kernel"
            expected[f"{layer}/mlp"] = expected[f"{layer}/mlp"] + projected(
                f"layers/{layer}/mlp/{name}/kernel",
                gradient[path][layer],
                1.0 if dense[path] is None else dense[path][layer],
            )
        path = "head/kernel"
        expected["head"] = projected(
            path, gradient[path], 1.0 if dense[path] is None else dense[path]
        )
        encoder = make_encoder(model, P, scales, include=include)
        assert encoder.layout.blocks == ("head", "0/mlp", "1/mlp")
        by_hand = np.concatenate([expected[b].reshape(-1) for b in encoder.layout.blocks])
        assert_same_encodings(encoder(batch), by_hand[None])


def rows_of(batch, rows, length):
    """Some rows of a batch, cut or padded to another length."""
    out = {}
    for name, x in batch.items():
        x = x[np.asarray(rows)][:, :length]
        out[name] = np.pad(x, [(0, 0), (0, length - x.shape[1])])
    return out


@pytest.mark.parametrize(
    ("correction", "dtype"),
    [
        ("none", "float32"),
        ("factored", "float32"),
        pytest.param("adam", "float32", marks=pytest.mark.slow),
        ("none", "bfloat16"),
        pytest.param("adam", "bfloat16", marks=pytest.mark.slow),
    ],
)
def test_an_encoding_is_the_same_alone_padded_and_in_any_batch(
    decoder, random_batch, correction, dtype
):
    """Guards: encodings that depend on batch mates, on padding, or on the position in the batch."""
    model = decoder(dtype=dtype)
    encode = make_encoder(model, P, scales_of(model, correction))
    batch = random_batch([4, 9, 1, 7, 3], 9)
    alone = encode(rows_of(batch, [0], 4))
    for rows, length in (([0], 12), ([0, 1, 2], 9), ([3, 4, 0], 9), ([0, 0, 0], 9)):
        got = encode(rows_of(batch, rows, length))
        for i, row in enumerate(rows):
            if row == 0:
                assert_same_encodings(got[i : i + 1], alone)
    # And other examples have other encodings.
    others = np.asarray(encode(rows_of(batch, [1, 2, 3], 9)))
    difference = np.linalg.norm(others - np.asarray(alone), axis=-1)
    assert np.all(difference > 0.1 * np.linalg.norm(alone))


@pytest.mark.parametrize("correction", ["none", "adam"])
def test_rows_of_padding_have_an_encoding_of_zeros(decoder, random_batch, correction):
    """Guards: padding rows that leak into real ones, or NaN from an example without tokens."""
    model = decoder(tied=True)
    encode = make_encoder(model, P, scales_of(model, correction, "."), include=".")
    got = np.asarray(encode(random_batch([0, 5, 0], 5)))
    assert not got[[0, 2]].any() and got[1].any() and np.isfinite(got).all()


@pytest.mark.parametrize("output", ["loss", "margin"])
def test_an_encoding_is_of_the_sum_over_tokens_not_their_mean(decoder, random_batch, output):
    """Guards: `sum` meant `mean`; the gradient is additive in the weights of positions."""
    encode = make_encoder(decoder(), P, output=output)
    batch = random_batch([6], 6)
    first = batch | {"weights": np.asarray([[1, 1, 0, 0, 0, 0]], np.float32)}
    second = batch | {"weights": np.asarray([[0, 0, 1, 1, 1, 1]], np.float32)}
    assert_same_encodings(np.asarray(encode(first)) + np.asarray(encode(second)), encode(batch))


@pytest.mark.parametrize("correction", ["none", "adam"])
def test_scanned_and_unrolled_models_have_equal_encodings(decoder, random_batch, correction):
    """Guards: encodings that depend on how the layers are stored."""
    scanned, unrolled = decoder(layers=3), decoder(layers=3, scan=False)
    batch = random_batch([6, 4], 6)
    a, b = (
        make_encoder(m, P, scales_of(m, correction, "."), include=".") for m in (scanned, unrolled)
    )
    assert a.layout.blocks == b.layout.blocks
    assert_same_encodings(b(batch), a(batch))


@pytest.mark.parametrize(
    ("scan", "correction", "split"),
    [
        (True, "factored", dict(data=2, fsdp=2, tensor=2)),
        (False, "adam", dict(data=2, fsdp=2, tensor=2)),
        pytest.param(True, "adam", dict(data=8), marks=pytest.mark.slow),
        (True, "adam", dict(fsdp=8)),
        (True, "adam", dict(tensor=8)),
    ],
    ids=str,
)
def test_eight_devices_encode_as_one_does(decoder, random_batch, scan, correction, split):
    """Guards: encodings that depend on the worker's number."""
    model = decoder(scan=scan)
    scales = scales_of(model, correction, ".")
    batch = random_batch([6, 4, 2, 6, 5, 1, 3, 6], 6)
    expected = make_encoder(model, P, scales, include=".")(batch)
    mesh = sharding.make_mesh(**split)
    fn, params = functional.split(model)
    placed = functional.place(params, fn.axes, mesh)
    up = next(x for n, x in functional.flat_parameters(placed).items() if "mlp/up" in n)
    parts = split.get("fsdp", 1) * split.get("tensor", 1)
    assert up.addressable_shards[0].data.size * parts == up.size
    arrays = {
        k: jax.device_put(v, sharding.named(mesh, ("batch", None), v.shape))
        for k, v in batch.items()
    }
    with jax.set_mesh(mesh):
        got = make_encoder(fn.merge(placed), P, scales, include=".")(arrays)
    assert_same_encodings(got, expected)


def test_a_querys_gradient_is_of_its_target_tokens_only(decoder):
    """Guards: query gradients over the prompt too."""
    tokenizer = Tokenizer.train(["Oslo lies in Norway."], 280)
    table = tokens.tokenise_queries([("q", "Oslo lies in", "New Norway")], tokenizer, 32)
    length = int(table.lengths[0]) + 2
    batch = batches.materialise(table, np.asarray([0]), length, 1, tokenizer.pad).arrays()
    model = decoder(vocab_size=tokenizer.vocab_size)
    fn, params = functional.split(model)
    ids, is_target = tokenizer.encode_query("Oslo lies in", "New Norway")

    def surprise(p):
        """−log p(target | prompt), token after token."""
        log_p = jax.nn.log_softmax(fn.apply(p, ids[None]))[0]
        return -sum(log_p[t - 1, ids[t]] for t in np.flatnonzero(is_target))

    gradient = functional.flat_parameters(jax.grad(surprise)(params))
    assert 1 < is_target.sum() < len(ids) - 1
    projected = 0.0
    for layer in (0, 1):
        path = f"layers/{layer}/mlp/up/kernel"
        A = projections.random_matrix(P.seed, path, "left", 16, P.side, P.family)
        B = projections.random_matrix(P.seed, path, "right", 24, P.side, P.family)
        projected = projected + A.T @ np.asarray(gradient["layers/mlp/up/kernel"][layer]) @ B
    one_block = Projection(side=4, blocks=1)
    got = make_encoder(model, one_block, include="mlp/up")(batch)
    assert_same_encodings(got, projected.reshape(1, -1))


def test_the_encoders_model_is_left_as_it_was(decoder, random_batch):
    model = decoder()
    before = str(nnx.graphdef(model))
    batch = random_batch([4], 4)
    logits = np.asarray(model(batch["tokens"]))
    make_encoder(model, P)(batch)
    assert str(nnx.graphdef(model)) == before
    np.testing.assert_array_equal(np.asarray(model(batch["tokens"])), logits)


def test_encoders_of_other_arrays_share_what_is_compiled(decoder, random_batch):
    """Guards: a second call that compiles anew; arrays of the first call left in its program."""
    model, batch = decoder(), random_batch([6, 4, 1], 6)
    first = make_encoder(model, P)
    first(batch)
    other = nnx.clone(model)
    for path, variable in nnx.to_flat_state(nnx.state(other, nnx.Param)):
        noise = np.random.default_rng(list(str(path).encode())).normal(size=variable.shape)
        variable[...] += 0.1 * noise.astype(np.float32)
    second = make_encoder(other, P)
    assert second.compiled is first.compiled
    compiled = first.compiled._cache_size()
    assert_same_encodings(second(batch), reference.encode(other, batch, P))
    assert first.compiled._cache_size() == compiled
    # What the program itself depends on makes another one.
    scales = scales_of(model, "factored")
    for options in (dict(output="margin"), dict(include="mlp/up"), dict(untapped="reference")):
        assert make_encoder(model, P, **options).compiled is not first.compiled
    assert make_encoder(decoder(tied=False), P).compiled is not first.compiled
    assert make_encoder(model, dataclasses.replace(P, side=3)).compiled is not first.compiled
    exact = make_encoder(model, P, scales_of(model, "adam"))
    assert exact.compiled is not make_encoder(model, P, scales).compiled


def test_a_users_own_model_is_encoded(random_batch):
    """A model of shared layers, biases and more axes, which the package has never seen."""

    class Own(nnx.Module):
        def __init__(self, rngs):
            self.embed = nnx.Embed(50, 6, rngs=rngs)
            self.mlp = nnx.Linear(6, 6, rngs=rngs)
            self.lm_head = nnx.Linear(6, 50, rngs=rngs)

        def __call__(self, tokens):
            x = self.embed(tokens)
            x = x + jnp.tanh(self.mlp(x))
            # Used twice, and once with an axis more than batch, positions and features.
            x = x + jnp.tanh(self.mlp(x[:, :, None]))[:, :, 0]
            return self.lm_head(x)

    model, batch = Own(nnx.Rngs(0)), random_batch([5, 3], 5)
    p = Projection(side=3, blocks=1)
    for correction in ("none", "factored", "adam"):
        scales = scales_of(model, correction, ".")
        got = make_encoder(model, p, scales, include=".")(batch)
        expected = reference.encode(model, batch, p, scales, include=".")
        assert_same_encodings(got, expected, side=3)


def test_a_layer_whose_first_axis_is_not_the_batch_is_refused():
    class Turned(nnx.Module):
        def __init__(self, rngs):
            self.mlp = nnx.Linear(4, 50, rngs=rngs)

        def __call__(self, tokens):
            x = jnp.zeros((tokens.shape[1], tokens.shape[0], 4))
            return jnp.swapaxes(self.mlp(x), 0, 1)

    batch = {k: np.zeros((2, 3), np.int32) for k in ("tokens", "targets")}
    encode = make_encoder(Turned(nnx.Rngs(0)), Projection(side=2))
    with pytest.raises(
        ValueError, match="mlp/kernel: its layer is called with inputs whose first axis is not"
    ):
        encode(batch | {"weights": np.ones((2, 3), np.float32)})


def test_errors(decoder):
    model = decoder()
    with pytest.raises(ValueError, match="unknown output function 'nll'"):
        make_encoder(model, P, output="nll")
    with pytest.raises(ValueError, match="no weight matrix matches"):
        make_encoder(model, P, include="experts")
    with pytest.raises(ValueError, match="blocks=3 exceeds"):
        make_encoder(model, Projection(blocks=3))
    some = {"layers/mlp/up/kernel": Scale(full=jnp.ones((2, 16, 24)))}
    for scales in (some, {}):  # an empty one is not the same as none
        with pytest.raises(KeyError, match="scales has no 1/√V of layers/attention/key/kernel"):
            make_encoder(model, P, scales)
    name, stack = "layers/mlp/up/kernel", dict(include="mlp/up")
    for scale, message in (
        (3.0, rf"scales\['{name}'\] is of type float; give a Scale"),
        # The same number of weights, or a shape that broadcasts.
        (Scale(full=jnp.ones((2, 24, 16))), r"shapes \[None, None, \(2, 24, 16\)\]; give full"),
        (Scale(full=jnp.ones((1, 24))), r"of the shape \(2, 16, 24\), or left and right"),
        (Scale(jnp.ones((2, 1, 16)), jnp.ones((2, 2, 24))), "left, right and full of the shapes"),
    ):
        with pytest.raises(ValueError, match=message):
            make_encoder(model, P, {name: scale}, **stack)
    make_encoder(model, P, {name: Scale(jnp.ones((2, 3, 16)), jnp.ones((2, 3, 24)))}, **stack)


def test_pooling_adds_up_the_layers_of_a_block():
    stacked = sites.Site(("layers", "mlp", "up"), "kernel", 2, 2, stack=4)
    single = sites.Site(("layers", "mlp", "down"), "kernel", 2, 2, stack=4)
    plan = projections.layout([stacked, single], Projection(side=1, blocks=2))
    x = jnp.arange(8.0).reshape(4, 2, 1, 1)
    y = 100 * x
    got = projections.pool(plan, {stacked: x, single: y})
    np.testing.assert_array_equal(got, [[202.0, 1010.0], [404.0, 1212.0]])


def test_every_matrix_has_a_part_in_the_encoding(decoder, random_batch):
    """Guards: a model attributed by a part of its parameters."""
    model = decoder(tied=False)
    gradients = reference.per_example_gradients(model, random_batch([5], 5))
    everything = {n for n in gradients if not n.endswith("scale")}
    assert make_encoder(model, P, include=".").layout.members.keys() == everything
    assert all(np.linalg.norm(gradients[n]) > 0 for n in everything)
