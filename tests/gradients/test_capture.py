"""Encodings of a training step's examples, from the backward pass that trains on them."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import nnx
from jax.sharding import AxisType, NamedSharding, PartitionSpec

import tda
from tda import loss as losses
from tda.gradients import per_example
from tda.gradients.projection import Projection
from tda.model.decoder import Decoder
from tda.model.settings import DecoderSettings

PROJECTION = Projection(side=4, pooling="matrix")


class Classifier(nnx.Module):
    """Dropout and running statistics between two layers: the state that a training carries on."""

    def __init__(self, rngs):
        self.first, self.second = nnx.Linear(6, 8, rngs=rngs), nnx.Linear(8, 3, rngs=rngs)
        self.dropout = nnx.Dropout(0.5, rngs=rngs)
        self.calls = nnx.BatchStat(jnp.zeros(()))

    def __call__(self, x):
        self.calls[...] += 1
        return self.second(self.dropout(jnp.tanh(self.first(x))))


def nats(model, batch):
    return optax.softmax_cross_entropy_with_integer_labels(model(batch["x"]), batch["y"])


def mean_loss(model, batch):
    return nats(model, batch).mean()


def batch_of(seed, examples=5):
    rng = np.random.default_rng(seed)
    return {"x": rng.normal(size=(examples, 6)), "y": rng.integers(0, 3, examples)}


def test_a_training_is_the_same_and_its_examples_are_kept():
    projected = {}

    def train(captured: bool):
        model = Classifier(nnx.Rngs(0))
        optimizer = nnx.Optimizer(model, optax.adam(0.1), wrt=nnx.Param)
        capture = tda.Capture(model, PROJECTION, tell=False)

        @nnx.jit
        def step(model, optimizer, batch):
            if captured:
                loss, gradients, encodings = capture(mean_loss, model, batch)
            else:
                loss, gradients = nnx.value_and_grad(mean_loss)(model, batch)
                encodings = None
            optimizer.update(model, gradients)
            return loss, gradients, encodings

        losses_T = []
        for t in range(3):
            loss, gradients, encodings = step(model, optimizer, batch_of(t))
            losses_T.append(float(loss))
            if captured:
                capture.check(gradients, encodings)
                projected[t] = encodings
        return losses_T, nnx.to_pure_dict(nnx.state(model))

    (plain, plain_state), (captured, captured_state) = train(False), train(True)
    # Dropout draws the same masks, and the count of calls goes on: the search for unseen uses
    # and the taps leave no trace in the model.
    np.testing.assert_allclose(captured, plain, rtol=1e-6)
    assert float(captured_state["calls"]) == 3
    for one, other in zip(*map(jax.tree.leaves, (captured_state, plain_state)), strict=True):
        np.testing.assert_allclose(
            *(
                np.asarray(
                    jax.random.key_data(x) if jnp.issubdtype(x.dtype, jax.dtypes.prng_key) else x
                )
                for x in (one, other)
            ),
            rtol=1e-5,
            atol=1e-6,
        )
    assert projected[2].shape == (5, 2 * 16)


def test_encodings_are_those_of_the_encoder_over_the_size_of_the_batch():
    model = Classifier(nnx.Rngs(0))
    model.eval()
    batch = batch_of(0)
    capture = tda.Capture(model, PROJECTION, tell=False)
    (loss, per_row), gradients, encodings = capture(
        lambda m, b: (mean_loss(m, b), nats(m, b)), model, batch, has_aux=True
    )
    (expected,) = per_example(model, nats, [batch], PROJECTION, tell=False)
    np.testing.assert_allclose(encodings, expected / 5, atol=1e-6)
    assert float(loss) == pytest.approx(float(per_row.mean()))
    plain = nnx.grad(mean_loss)(model, batch)
    for one, other in zip(*map(jax.tree.leaves, (gradients, plain)), strict=True):
        np.testing.assert_allclose(one, other, atol=1e-6)


def test_layers_that_are_scanned():
    settings = DecoderSettings(
        vocab_size=20, width=8, layers=3, heads=2, kv_heads=2, head_width=4, ff_width=16
    )
    model = Decoder(settings, rngs=nnx.Rngs(0))
    rng = np.random.default_rng(0)
    tokens = rng.integers(0, 20, (4, 7))
    batch = {"tokens": tokens[:, :-1], "targets": tokens[:, 1:], "weights": np.ones((4, 6))}

    def loss(model, batch):
        return losses.total(model, batch, losses.cross_entropy) / batch["weights"].sum()

    capture = tda.Capture(model, Projection(side=4, blocks=1), tell=False)
    value, gradients, encodings = nnx.jit(lambda m, b: capture(loss, m, b))(model, batch)
    (expected,) = per_example(model, "loss", [batch], Projection(side=4, blocks=1), tell=False)
    np.testing.assert_allclose(encodings * 24, expected, atol=1e-5 * np.abs(expected).max())
    capture.check(gradients, encodings)
    assert np.isfinite(value)


def test_a_use_that_no_tap_sees_is_refused():
    model = Classifier(nnx.Rngs(0))
    model.eval()
    capture = tda.Capture(model, PROJECTION, tell=False)

    def with_decay(model, batch):
        return mean_loss(model, batch) + jnp.sum(jnp.square(model.first.kernel[...]))

    with pytest.raises(ValueError, match="first/kernel"):
        capture(with_decay, model, batch_of(0))


def test_parts_that_do_not_add_up_are_told():
    model = Classifier(nnx.Rngs(0))
    model.eval()
    capture = tda.Capture(model, PROJECTION, tell=False)

    def scaled(model, batch):
        graphdef, params, rest = nnx.split(model, nnx.Param, ...)
        twice = jax.tree.map(lambda x: 2 * x, params)
        return mean_loss(nnx.merge(graphdef, twice, rest), batch)

    _, gradients, encodings = capture(scaled, model, batch_of(0))
    with pytest.raises(ValueError, match="do not add up to the gradient of first/kernel, second/"):
        capture.check(gradients, encodings)


def float_batch(seed=0, examples=8):
    return jax.tree.map(lambda x: jnp.asarray(x, jnp.float32), batch_of(seed, examples))


def squares(model, batch):
    return jnp.square(model(batch["x"]) - batch["y"][:, None]).sum(-1)


def mean_squares(model, batch):
    return squares(model, batch).mean()


class OnMesh(nnx.Module):
    """Two layers, the width between them on the mesh's axis `model` if it has one."""

    def __init__(self, layout):
        rngs = nnx.Rngs(0)
        self.first, self.second = (
            nnx.Linear(*sides, use_bias=False, rngs=rngs) for sides in ((6, 8), (8, 3))
        )
        self.layout = layout

    def __call__(self, x):
        return self.second(jnp.tanh(self.first(x)), out_sharding=self.layout)


@pytest.mark.parametrize("axes", [("data",), ("data", "model")])
def test_a_mesh_with_explicit_axes(axes):
    """Guards: zeros on every device, which jax refuses beside a gradient shared by devices."""
    model, batch = OnMesh(None), float_batch()
    _, plain, expected = tda.Capture(model, PROJECTION, tell=False)(mean_squares, model, batch)
    kinds = (AxisType.Explicit,) * len(axes)
    mesh = jax.make_mesh((2,) * len(axes), axes, kinds, devices=jax.devices()[: 2 ** len(axes)])
    with jax.set_mesh(mesh):
        shared = OnMesh(PartitionSpec("data"))
        specs = {"first": PartitionSpec(None, *axes[1:]), "second": PartitionSpec(*axes[1:])}
        for name, spec in specs.items():
            kernel = getattr(model, name).kernel[...]
            kernel = jax.device_put(kernel, NamedSharding(mesh, spec))
            getattr(shared, name).kernel = nnx.Param(kernel)
        capture = tda.Capture(shared, PROJECTION, tell=False)
        batch = jax.device_put(batch, NamedSharding(mesh, PartitionSpec("data")))
        step = nnx.jit(lambda m, b: capture(mean_squares, m, b))
        _, gradients, encodings = step(shared, batch)
        capture.check(gradients, encodings)
    np.testing.assert_allclose(encodings, expected, atol=1e-5)
    for one, other in zip(*map(jax.tree.leaves, (gradients, plain)), strict=True):
        np.testing.assert_allclose(one, other, atol=1e-5)


@pytest.mark.parametrize("checks_types", [True, False])
def test_a_step_inside_of_shard_map(checks_types):
    model, batch = OnMesh(None), float_batch()
    capture = tda.Capture(model, PROJECTION, tell=False)
    _, _, expected = capture(mean_squares, model, batch)
    mesh = jax.make_mesh((2,), ("data",), (AxisType.Auto,), devices=jax.devices()[:2])
    graphdef, state = nnx.split(model)

    def step(state, batch):
        return capture(mean_squares, nnx.merge(graphdef, state), batch)[2]

    shared = PartitionSpec("data")
    layouts = dict(in_specs=(PartitionSpec(), shared), out_specs=shared, check_vma=checks_types)
    encodings = jax.jit(jax.shard_map(step, mesh=mesh, **layouts))(state, batch)
    # Each device has the mean of its own half.
    np.testing.assert_allclose(encodings / 2, expected, atol=1e-5)


def by_first_input(model, batch):
    order = jnp.argsort(batch["x"][:, 0])
    return squares(model, jax.tree.map(lambda x: x[order], batch)).mean()


def rolled(model, batch):
    return squares(model, jax.tree.map(lambda x: jnp.roll(x, 1, axis=0), batch)).mean()


def weighted(model, batch):
    """Its divisor, the sum of weights, depends on all examples; so does a centred loss."""
    weights, losses_B = jnp.abs(batch["x"][:, 1]), squares(model, batch)
    return (weights * (losses_B - losses_B.mean())).sum() / weights.sum() + losses_B.var()


def test_a_loss_that_reorders_its_examples_is_told():
    """Guards: the parts of other examples, which add up to the same gradient."""
    model, batch = OnMesh(None), float_batch()
    capture = tda.Capture(model, PROJECTION, tell=False)
    for reordering in (by_first_input, rolled):
        _, gradients, encodings = capture(reordering, model, batch)
        capture.check(gradients, encodings)
        with pytest.raises(ValueError, match=f"the loss '{reordering.__name__}' reorders its exam"):
            capture.check(gradients, encodings, reordering, model, batch)


@pytest.mark.parametrize("kind", [mean_squares, weighted])
def test_a_loss_whose_examples_stay_in_place_is_not_refused(kind):
    """Guards: a mean over tokens, or dropout, taken for another order."""
    model, batch = Classifier(nnx.Rngs(0)), float_batch()
    model.second = nnx.Linear(8, 1, rngs=nnx.Rngs(1))
    capture = tda.Capture(model, PROJECTION, tell=False)
    before = float(model.calls[...])
    _, gradients, encodings = capture(kind, model, batch)
    capture.check(gradients, encodings, kind, model, batch)
    assert float(model.calls[...]) == before + 1
    with pytest.raises(ValueError, match="a loss alone; give the model and the batch"):
        capture.check(gradients, encodings, kind)


@pytest.mark.parametrize(
    ("loss", "options", "message"),
    [
        (squares, {}, r"the loss is an array of the shape \(8,\); return one number"),
        (lambda m, b: (mean_squares(m, b), 1), {}, "several values; pass has_aux=True"),
        (
            mean_squares,
            {"has_aux": True},
            r"has_aux=True, but the loss returns an array of .* \(\)",
        ),
        (lambda m, b: None, {}, "the loss is a NoneType; return one number"),
    ],
)
def test_a_loss_that_is_no_scalar_is_named(loss, options, message):
    model = OnMesh(None)
    with pytest.raises(ValueError, match=message):
        tda.Capture(model, PROJECTION, tell=False)(loss, model, float_batch(), **options)


def test_another_model_and_exchanged_arguments_are_named():
    model, batch = OnMesh(None), float_batch()
    capture = tda.Capture(model, PROJECTION, tell=False)
    with pytest.raises(ValueError, match=r"first/kernel has the shape \(6, 8\), .* is missing"):
        capture(mean_squares, nnx.Linear(6, 3, rngs=nnx.Rngs(0)), batch)
    wider = OnMesh(None)
    wider.first = nnx.Linear(7, 8, use_bias=False, rngs=nnx.Rngs(0))
    with pytest.raises(ValueError, match=r"this model's is \(7, 8\); make a tda.Capture of"):
        capture(mean_squares, wider, batch)
    with pytest.raises(ValueError, match="model is a function, not an NNX module"):
        capture(model, mean_squares, batch)
    _, gradients, encodings = capture(mean_squares, model, batch)
    for wrong in ((encodings, gradients), (gradients, gradients), (gradients, encodings[:, 1:])):
        with pytest.raises(ValueError, match="give the gradients and then the encodings, as a"):
            capture.check(*wrong)
