"""Meshes, axis rules, and a model on eight devices against the same on one."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from jax.sharding import PartitionSpec as P

from tda.model import functional
from tda.runtime import sharding
from tda.training import loop


@pytest.fixture(scope="module")
def mesh():
    return sharding.make_mesh(data=2, fsdp=2, tensor=2)


def test_there_are_eight_devices():
    assert jax.device_count() == 8


def test_mesh_takes_what_is_left_along_data():
    assert dict(sharding.make_mesh().shape) == {"data": 8, "fsdp": 1, "tensor": 1}
    assert dict(sharding.make_mesh(fsdp=2, tensor=2).shape) == {"data": 2, "fsdp": 2, "tensor": 2}
    one = sharding.make_mesh(devices=jax.devices()[3:4])
    assert one.devices.flat[0] == jax.devices()[3]
    assert set(one.axis_types) == {jax.sharding.AxisType.Auto}


@pytest.mark.parametrize(
    "sizes", [dict(data=3), dict(data=8, fsdp=2), dict(fsdp=3), dict(data=1, fsdp=1, tensor=4)]
)
def test_sizes_that_do_not_fit_the_devices_are_refused(sizes):
    with pytest.raises(ValueError, match=r"mesh data=.* needs \d+ devices, there are 8"):
        sharding.make_mesh(**sizes)


AUTO, EXPLICIT = jax.sharding.AxisType.Auto, jax.sharding.AxisType.Explicit


@pytest.mark.parametrize(
    ("names", "kind", "message"),
    [
        (("data", "model"), AUTO, "the axis 'model', and axes may be data, fsdp, tensor; give one"),
        (("data", "fsdp"), EXPLICIT, r"axes of the types \(.*Explicit.*\), not Auto; give one of"),
    ],
)
def test_meshes_that_no_rule_fits_are_refused(names, kind, message):
    mesh = jax.make_mesh((4, 2), names, axis_types=(kind, kind))
    with pytest.raises(ValueError, match=message):
        sharding.check_mesh(mesh)


def test_axis_rules(mesh):
    assert sharding.spec(("batch", None)) == P(("data", "fsdp"), None)
    assert sharding.spec(("embed", "heads")) == P(("fsdp",), ("tensor",))
    assert sharding.spec((None, "mlp", "embed")) == P(None, ("tensor",), ("fsdp",))
    # A mesh axis is used once: the batch took fsdp.
    assert sharding.spec(("batch", "embed")) == P(("data", "fsdp"), None)
    # A size that the mesh does not divide is replicated.
    assert sharding.spec(("embed", "heads"), (16, 7), mesh) == P(("fsdp",), None)
    assert sharding.spec(("batch",), (6,), mesh) == P(None)
    assert sharding.batch_devices(mesh) == 4


def test_constrain_without_a_mesh_is_the_identity():
    x = jnp.ones((4, 2))
    assert sharding.constrain(x, "batch", None) is x


def test_constrain_lays_an_array_out(mesh):
    with jax.set_mesh(mesh):
        y = jax.jit(lambda x: sharding.constrain(x * 2, "batch", "heads"))(jnp.ones((8, 6)))
    assert y.sharding.shard_shape(y.shape) == (2, 3)
    # `...` leaves an axis as it was; None would replicate it.
    for given, shape in ((..., (2, 3)), (None, (2, 6))):
        with jax.set_mesh(mesh):
            z = jax.jit(lambda x, a=given: sharding.constrain(x, "batch", a) + 0)(y)
        assert z.sharding.shard_shape(z.shape) == shape


@pytest.mark.parametrize("scan", [True, False])
def test_parameters_are_really_split(decoder, mesh, scan):
    fn, params = functional.split(decoder(scan=scan, tied=False))
    placed = functional.place(params, fn.axes, mesh)
    flat = functional.flat_parameters(placed)
    for name, x in flat.items():
        held = x.addressable_shards[0].data.size
        expected = 1 if name.endswith("scale") else 4
        assert x.size == held * expected, name
    for name, x in functional.flat_parameters(params).items():
        np.testing.assert_array_equal(x, flat[name])


@pytest.mark.parametrize("changes", [dict(scan=True, tied=True), dict(scan=False, tied=False)])
def test_a_train_step_on_eight_devices_equals_one(decoder, random_batch, mesh, one_device, changes):
    # Adam's epsilon is large, so that it does not turn the rounding of vanishing gradients into
    # whole steps.
    tx = optax.chain(optax.clip_by_global_norm(1.0), optax.adam(1e-2, eps=1e-3))
    batch = random_batch([8, 3, 6, 8, 2, 8, 5, 7], 8)

    def step(mesh):
        fn, state = loop.initial_state(decoder(**changes), tx, mesh)
        arrays = {
            k: jax.device_put(v, sharding.named(mesh, ("batch", None), v.shape))
            for k, v in batch.items()
        }
        run = jax.jit(lambda s, b: loop.train_step(fn.merge, tx, s, b))
        with jax.set_mesh(mesh):
            for _ in range(2):
                state, loss = run(state, arrays)
        return state, float(loss)

    (many, loss_many), (one, loss_one) = step(mesh), step(one_device)
    assert abs(loss_many - loss_one) < 1e-5 * loss_one
    assert int(many["step"]) == int(one["step"]) == 2
    one_params = functional.flat_parameters(one["params"])
    for name, x in functional.flat_parameters(many["params"]).items():
        expected = np.asarray(one_params[name])
        difference = np.linalg.norm(np.asarray(x) - expected)
        assert difference < 1e-5 * np.linalg.norm(expected), name
    # The optimizer's copies are split like the parameters that they belong to.
    nu = functional.flat_parameters(optax.tree.get(many["opt_state"], "nu"))
    for name, x in functional.flat_parameters(many["params"]).items():
        assert nu[name].sharding.shard_shape(x.shape) == x.sharding.shard_shape(x.shape), name
    kernel = many["params"]["embedding"]["embedding"]
    assert kernel.sharding.shard_shape(kernel.shape) == (25, 8)


@pytest.mark.parametrize(
    ("examples", "numbers", "together"),
    [(12, 1000, 1), (12, 25, 4), (12, 20, 4), (7, 50, 1), (6, 1, 6)],
)
def test_portions_are_as_large_as_may_be(examples, numbers, together):
    seen = []

    def work(batch):
        seen.append(batch["x"].shape)
        return {"twice": 2 * batch["x"], "sum": batch["x"].sum(2) + batch["y"]}

    x, y = np.arange(examples * 3.0).reshape(examples, 3), np.arange(examples)
    got = sharding.map_in_portions(work, {"x": x, "y": y}, numbers, 100)
    assert seen == [(1, together, 3)]
    np.testing.assert_array_equal(got["twice"], 2 * x)
    np.testing.assert_array_equal(got["sum"], x.sum(1) + y)


def test_devices_take_portions_of_their_own_examples(mesh):
    seen, x = [], np.arange(24.0).reshape(8, 3)

    def work(x_DxCx3):
        seen.append(x_DxCx3.shape)
        return x_DxCx3 + 1

    with jax.set_mesh(mesh):
        placed = sharding.put_batch(mesh, {"x": x})["x"]
        got = jax.jit(lambda x: sharding.map_in_portions(work, x, 100, 0))(placed)
    assert seen == [(4, 1, 3)]
    np.testing.assert_array_equal(got, x + 1)
