"""Gradients of examples of any model, by any loss, from batches of any form."""

import warnings

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import nnx
from jax.sharding import AxisType, NamedSharding, PartitionSpec

import tda
from tda.gradients import Projection, left_out, per_example, projection, reference
from tda.gradients.encoder import make_encoder
from tda.gradients.moments import estimate
from tda.gradients.moments.scales import Scale, low_rank_scale
from tda.gradients.sites import find_sites

P = Projection(side=3, blocks=1)


class Classifier(nnx.Module):
    """A model of pictures and words: nothing in it is called tokens."""

    def __init__(self, rngs):
        self.pixels = nnx.Linear(4, 5, rngs=rngs)
        self.words = nnx.Embed(20, 5, rngs=rngs)
        self.mlp = nnx.Linear(5, 3, rngs=rngs)

    def __call__(self, pixels, words):
        return self.mlp(jnp.tanh(self.pixels(pixels).mean((1, 2)) + self.words(words).sum(1)))


def loss(model, batch):
    (pixels, words), labels = batch["given"], batch["label"]
    log_p = jax.nn.log_softmax(model(pixels, words))
    return -log_p[jnp.arange(len(labels)), labels]


def make_batch(count, seed=0):
    rng = np.random.default_rng(seed)
    pixels = rng.normal(size=(count, 2, 3, 4)).astype(np.float32)
    words = rng.integers(0, 20, (count, 6))
    return {"given": (pixels, words), "label": rng.integers(0, 3, count)}


def close(got, expected):
    np.testing.assert_allclose(got, expected, rtol=0, atol=1e-5 * np.abs(expected).max())


@pytest.mark.parametrize("untapped", ["leave", "reference"])
def test_batches_of_any_keys_and_sizes(untapped):
    model, scope = Classifier(nnx.Rngs(0)), dict(include=".", untapped=untapped)
    batches = [make_batch(3), make_batch(2, seed=1)]
    found = list(per_example(model, loss, iter(batches), P, **scope))
    assert [x.shape[0] for x in found] == [3, 2]
    for got, batch in zip(found, batches, strict=True):
        assert isinstance(got, np.ndarray) and got.dtype == np.float32
        close(got, reference.encode(model, batch, P, output=loss, **scope))


def test_an_example_by_hand():
    """Guards: gradients summed over the batch; an example's place in the batch."""
    model, batch = Classifier(nnx.Rngs(0)), make_batch(4)
    site = next(s for s in find_sites(model, ".") if s.path == "mlp/kernel")
    A, B = projection.matrices(site, P)
    pixels, words = batch["given"]
    (got,) = per_example(model, loss, [batch], P, include="mlp")
    kernel, bias = np.asarray(model.mlp.kernel[...]), np.asarray(model.mlp.bias[...])
    for i in range(4):
        x = np.asarray(jnp.tanh(model.pixels(pixels).mean((1, 2)) + model.words(words).sum(1)))[i]
        p = np.exp(x @ kernel + bias)
        delta = p / p.sum() - np.eye(3)[batch["label"][i]]
        close(got[i], (A.T @ np.outer(x, delta) @ B).reshape(-1))


def test_scales_are_those_of_the_encoder(decoder, random_batch):
    """Guards: a correction silently dropped."""
    model, batch, p = decoder(), random_batch([5, 3], 5), Projection(side=3, blocks=2)

    def nats(model, batch):
        log_p = jax.nn.log_softmax(model(batch["tokens"]))
        picked = jnp.take_along_axis(log_p, batch["targets"][..., None], axis=-1)[..., 0]
        return -jnp.sum(picked * batch["weights"], axis=-1)

    scales = estimate.estimate(model, nats, [batch], find_sites(model), "adam")
    (got,) = per_example(model, nats, [batch], p, scales)
    close(got, np.asarray(make_encoder(model, p, scales)(batch)))
    (plain,) = per_example(model, nats, [batch], p)
    assert np.linalg.norm(got) > 10 * np.linalg.norm(plain)


def test_batches_are_read_as_they_are_needed():
    """Guards: a corpus that must fit in memory."""
    read = []

    def stream():
        for i in range(5):
            read.append(i)
            yield make_batch(2, seed=i)

    found = per_example(Classifier(nnx.Rngs(0)), loss, stream(), P)
    assert not read
    next(found)
    assert len(read) == 2
    assert len(list(found)) == 4 and len(read) == 5
    assert not list(per_example(Classifier(nnx.Rngs(0)), loss, [], P))


def test_errors():
    model = Classifier(nnx.Rngs(0))
    with pytest.raises(ValueError, match="no weight matrix matches"):
        per_example(model, loss, [], P, include="experts")
    # Guards: `sum` meant `mean`: it would depend on the size of the batch.
    for reduce in (jnp.mean, jnp.sum):
        with pytest.raises(ValueError, match="neither summed nor averaged over the batch"):
            list(per_example(model, lambda m, b, r=reduce: r(loss(m, b)), [make_batch(2)], P))
    with pytest.raises(ValueError, match="examples as its first axis; got shapes"):
        list(per_example(model, loss, [make_batch(2) | {"temperature": np.array(0.7)}], P))
    with pytest.raises(ValueError, match="examples as its first axis; got shapes"):
        list(per_example(model, loss, [make_batch(2) | {"label": np.zeros(3, np.int32)}], P))


class Pictures(nnx.Module):
    """Convolutions, which have no taps, hold most of the parameters."""

    def __init__(self, rngs):
        self.first = nnx.Conv(1, 8, (3, 3), rngs=rngs)
        self.norm = nnx.LayerNorm(8, rngs=rngs)
        self.last = nnx.Linear(8, 2, rngs=rngs)


def test_coverage_is_told_and_warned_of_below_a_half(capsys):
    """Guards: 16 of 114 parameters without a word."""
    model = Pictures(nnx.Rngs(0))
    told = "gradients of 16 of 114 parameters (14%); left out: first/bias, first/kernel, last/bias"
    for use in (make_encoder, lambda m, p, **kw: per_example(m, loss, [], p, **kw)):
        with pytest.warns(UserWarning, match=r"16 of 114 parameters \(14%\).*less than half"):
            use(model, P)
        assert told in capsys.readouterr().out
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        make_encoder(model, P, include="last")
        assert capsys.readouterr().out.startswith("gradients of 16 of 114")
        make_encoder(model, P, include=".", untapped="reference")
        assert "114 of 114 parameters (100%); left out: none" in capsys.readouterr().out
        make_encoder(model, P, tell=False)
        make_encoder(Classifier(nnx.Rngs(0)), P, tell=False)
    assert not capsys.readouterr().out


def test_all_that_is_left_out_is_named_on_request():
    model = Pictures(nnx.Rngs(0))
    sizes = {"first/bias": 8, "first/kernel": 72, "last/bias": 2, "norm/bias": 8, "norm/scale": 8}
    assert left_out(model) == sizes
    assert not left_out(model, ".", untapped="reference")


def test_blocks_without_effect_are_refused():
    model = Classifier(nnx.Rngs(0))
    with pytest.raises(ValueError, match="blocks=3 has no effect: no parameter"):
        make_encoder(model, Projection(side=3, blocks=3))
    deep = nnx.Sequential(*(nnx.Linear(2, 2, rngs=nnx.Rngs(0)) for _ in range(3)))
    assert make_encoder(deep, Projection(side=3, blocks=3)).layout.blocks[0] == "0/other"


class Recurrent(nnx.Module):
    """A language model of a recurrent cell, whose layers are called once for each position."""

    def __init__(self, cell):
        rngs = nnx.Rngs(0)
        self.embedding = nnx.Embed(9, 4, rngs=rngs)
        self.recurrent = nnx.RNN(cell(4, 6, rngs=rngs))
        self.head = nnx.Linear(6, 9, rngs=rngs)

    def __call__(self, tokens_BxT):
        return self.head(self.recurrent(self.embedding(tokens_BxT)))


@pytest.mark.parametrize("cell", [nnx.GRUCell, nnx.OptimizedLSTMCell])
def test_a_named_loss_of_a_recurrent_model_equals_the_reference(cell):
    """Guards: a step of a recurrence that no tap sees; a name that is called as a function."""
    tokens = np.random.default_rng(0).integers(0, 9, (3, 6))
    batch = {"tokens": tokens[:, :-1], "targets": tokens[:, 1:], "weights": np.ones((3, 5))}
    model, projection = Recurrent(cell), Projection(side=2, pooling="matrix")
    got = next(per_example(model, "margin", [batch], projection, include=".", tell=False))
    expected = reference.encode(model, batch, projection, output="margin", include=".")
    close(got, expected)


@pytest.mark.parametrize(
    ("loss", "message"),
    [(None, "loss=None; give a function"), ("nats", "unknown output function 'nats'; use loss")],
)
def test_a_loss_that_is_none_is_told(decoder, loss, message):
    with pytest.raises(ValueError, match=message):
        per_example(decoder(), loss, [], Projection(side=2))


class Tagger(nnx.Module):
    """Logits of every position; on a mesh, rows of a table need a layout."""

    def __init__(self, layout=None):
        rngs = nnx.Rngs(0)
        self.words, self.head = nnx.Embed(20, 5, rngs=rngs), nnx.Linear(5, 3, rngs=rngs)
        self.layout = layout

    def __call__(self, words):
        return self.head(jnp.tanh(self.words(words, out_sharding=self.layout)))


def loss_of_tags(model, batch):
    return optax.softmax_cross_entropy_with_integer_labels(model(batch["x"]), batch["y"]).sum(-1)


def on_explicit_mesh(batch):
    """A batch of arrays shared by two devices, and the layout of its examples."""
    kinds = (AxisType.Explicit,)
    mesh = jax.make_mesh((2,), ("batch",), kinds, devices=jax.devices()[:2])
    layout = NamedSharding(mesh, PartitionSpec("batch"))
    return mesh, jax.device_put(batch, layout), layout.spec


@pytest.mark.parametrize("form", ["none", "full", "low rank"])
def test_a_mesh_with_explicit_axes(form):
    """Guards: zeros on every device, which jax refuses beside a gradient shared by devices."""
    model, rng = Tagger(), np.random.default_rng(0)
    batch = {"x": rng.integers(0, 20, (8, 6)), "y": rng.integers(0, 3, (8, 6))}
    full = {s.path: rng.uniform(0.5, 2, (s.rows, s.columns)) for s in find_sites(model, ".")}
    scales = {
        "none": None,
        "full": {path: Scale(full=jnp.asarray(x, jnp.float32)) for path, x in full.items()},
        "low rank": {path: low_rank_scale(x, 2) for path, x in full.items()},
    }[form]
    scope = dict(scales=scales, include=".", tell=False)
    (expected,) = per_example(model, loss_of_tags, [batch], P, **scope)
    mesh, shared, spec = on_explicit_mesh(batch)
    with jax.set_mesh(mesh):
        copies = jax.device_put(nnx.state(model), NamedSharding(mesh, PartitionSpec()))
        model = Tagger(spec)
        nnx.update(model, copies)
        # The loss of one example by itself cannot be shared by two devices.
        with pytest.raises(ValueError, match="one example by itself cannot, .* layouts in it, for"):
            list(per_example(model, loss_of_tags, [shared], P, **scope))
        model.layout = None

        def loss(model, batch):
            sharing = jax.typeof(batch["x"]).sharding.spec
            model.layout = PartitionSpec(sharing[0])
            return loss_of_tags(model, batch)

        (got,) = per_example(model, loss, [shared], P, **scope)
    close(got, expected)


def noisy_loss(model, batch):
    noise = jax.vmap(lambda key: jax.random.normal(key, (5,)))(batch["key"])
    return jnp.square(model.mlp(jnp.tanh(model.pixels(batch["x"])) + noise)).sum(-1)


def test_a_batch_may_have_typed_keys():
    """Guards: the checks of the first batch, which copied keys as if they were numbers."""
    model, rng = Classifier(nnx.Rngs(0)), np.random.default_rng(0)
    x, keys = rng.normal(size=(6, 4)).astype(np.float32), jax.random.split(jax.random.key(0), 6)
    (got,) = per_example(model, noisy_loss, [{"x": x, "key": keys}], P, tell=False)
    for i in range(6):
        alone = {"x": x[i : i + 1], "key": keys[i : i + 1]}
        (expected,) = per_example(model, noisy_loss, [alone], P, tell=False)
        close(got[i], expected[0])


def test_scales_may_be_an_optimizers_second_moments():
    model, batch = Classifier(nnx.Rngs(0)), make_batch(3)
    optimizer = nnx.Optimizer(model, optax.adam(0.1), wrt=nnx.Param)
    optimizer.update(model, nnx.grad(lambda m: loss(m, batch).mean())(model))
    moments = tda.second_moments(optimizer, optimizer="adam", b2=0.999, eps=1e-8)
    (got,) = per_example(model, loss, [batch], P, moments, tell=False)
    scales = moments.scales(find_sites(model))
    (expected,) = per_example(model, loss, [batch], P, scales, tell=False)
    np.testing.assert_array_equal(got, expected)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"model": Classifier}, "model is the class Classifier; give an instance"),
        ({"projection": None}, "projection=None; give tda.Projection"),
        ({"scales": [1.0]}, "scales is of type list, not 1/√V by path"),
        ({"batches": make_batch(2)}, r"batches is a single batch \(dict\); give \[batch\]"),
        ({"batches": None}, "batches is a NoneType; give an iterable of batches"),
        (
            {"batches": [make_batch(2) | {"id": np.array(["a", "b"])}]},
            r"batch 0, at \['id'\], is an array of <U1, not of numbers; leave it out",
        ),
    ],
)
def test_arguments_of_another_kind_are_named(changes, message):
    arguments = dict(
        model=Classifier(nnx.Rngs(0)), loss=loss, batches=[make_batch(2)], projection=P
    )
    with pytest.raises(ValueError, match=message):
        list(per_example(**arguments | changes, tell=False))
