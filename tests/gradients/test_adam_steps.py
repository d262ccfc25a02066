"""Adam's step on every example, against what optax itself makes of the example's gradient."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import nnx

from tda.gradients import adam_steps, reference
from tda.gradients.moments.optimizer_state import SecondMomentError
from tda.gradients.projection import Projection
from tda.gradients.sites import find_sites
from tda.model import functional
from tda.runtime import sharding
from tda.training import checkpoint

P = Projection(side=4, blocks=2)
ADAM = {"b1": 0.8, "b2": 0.9, "eps": 1e-3, "eps_root": 1e-5}
DESCRIBED = {"optimizer": {"name": "adamw", **ADAM}}
LENGTHS = [7, 3, 5, 2, 6, 1, 4, 7]


def mean_losses(model, batch):
    """The mean cross-entropy of each example's tokens, float32 [B]."""
    nats = optax.softmax_cross_entropy_with_integer_labels(model(batch["tokens"]), batch["targets"])
    return (nats * batch["weights"]).sum(1) / batch["weights"].sum(1)


# Untied, every test compiles again for the sake of a head, which other tests cover.
TIED = [pytest.param(True, id="tied"), pytest.param(False, id="untied", marks=pytest.mark.slow)]


@pytest.fixture(scope="module", params=TIED)
def trained(request, decoder, random_batch, tmp_path_factory):
    """A model after three of Adam's steps, its checkpoint, and what optax steps by."""
    root = tmp_path_factory.mktemp("adam")
    model = decoder(tied=request.param)
    model_fn, params = functional.split(model)
    tx = optax.chain(optax.clip_by_global_norm(1e3), optax.adam(1.0, **ADAM))

    @jax.jit
    def step(params, state, batch):
        gradients = jax.grad(lambda p: mean_losses(model_fn.merge(p), batch).sum())(params)
        updates, state = tx.update(gradients, state, params)
        return jax.tree.map(lambda p, u: p + 1e-2 * u, params, updates), state

    state = tx.init(params)
    for seed in range(3):
        params, state = step(params, state, random_batch([7, 7], 7, seed=seed))
    saved = {"params": params, "opt_state": state, "step": jnp.int32(3)}
    checkpoint.save(root / "c", 3, saved, DESCRIBED)
    return model_fn.merge(params), root / "c", lambda g: tx.update(g, state, params)[0]


def per_example_gradients(model, batch):
    """The reference's, compiled as one program."""
    return jax.jit(lambda b: reference.per_example_gradients(model, b, mean_losses))(batch)


def expected(model, chosen, batch, update):
    """P of what optax subtracts at a learning rate of one, example by example."""
    whole = per_example_gradients(model, batch)
    _, params = functional.split(model)
    paths, structure = jax.tree_util.tree_flatten_with_path(params)
    order = [functional.path_name(p) for p, _ in paths]

    def stepped(*leaves):
        return update(jax.tree.unflatten(structure, leaves))

    updates = jax.jit(jax.vmap(stepped))(*[whole[p] for p in order])
    steps = {p: -u for p, u in functional.flat_parameters(updates).items()}
    return np.asarray(reference.project(chosen, steps, P))


def test_equals_optax(trained, random_batch, monkeypatch):
    """Embeddings, tied or not, and norms among the parameters; in portions of any size."""
    model, root, update = trained
    batch, chosen = random_batch(LENGTHS, 8), find_sites(model, ".")
    want = expected(model, chosen, batch, update)
    states = adam_steps.read(root, chosen)
    for at_once in (1, 10_000, 2**26):
        monkeypatch.setattr(adam_steps, "_AT_ONCE", at_once)
        got = np.asarray(adam_steps.make_encoder(model, chosen, P, states)(batch))
        np.testing.assert_allclose(got, want, rtol=1e-4, atol=1e-4 * np.abs(want).max())
    # The square of the example's own gradient is no small part of it.
    plain = reference.project(chosen, _linear(model, batch, states), P)
    assert np.abs(np.asarray(plain) - want).max() > 0.05 * np.abs(want).max()


def _linear(model, batch, states):
    whole = per_example_gradients(model, batch)
    return {
        p: (s.b1 * s.mu + (1 - s.b1) * whole[p])
        / (1 - s.b1**4)
        / (jnp.sqrt(s.nu / (1 - s.b2**3) + s.eps_root) + s.eps)
        for p, s in states.items()
    }


def test_logits_of_scored_positions_alone_are_enough(trained, random_batch):
    model, root, update = trained
    batch, chosen = random_batch([2, 3, 1], 8), find_sites(model, "kernel")
    encoder = adam_steps.make_encoder(model, chosen, P, adam_steps.read(root, chosen))
    whole = np.asarray(encoder(batch))
    np.testing.assert_allclose(encoder(batch, 4), whole, rtol=1e-4, atol=1e-5)
    # A row that only fills a batch is finite.
    batch = jax.tree.map(lambda x: np.concatenate([x, np.zeros_like(x[:1])]), batch)
    assert np.isfinite(np.asarray(encoder(batch))).all()


def test_on_a_mesh(trained, random_batch):
    """Parameters and moments split over devices, examples too."""
    model, root, update = trained
    batch, chosen = random_batch(LENGTHS, 8), find_sites(model, ".")
    states = adam_steps.read(root, chosen)
    want = np.asarray(adam_steps.make_encoder(model, chosen, P, states)(batch))
    mesh = sharding.make_mesh(data=2, fsdp=2, tensor=2)
    with jax.set_mesh(mesh):
        model_fn, params = functional.split(model)
        split = model_fn.merge(functional.place(params, model_fn.axes, mesh))
        encoder = adam_steps.make_encoder(split, chosen, P, states, mesh=mesh)
        got = np.asarray(encoder(sharding.put_batch(mesh, batch)))
    np.testing.assert_allclose(got, want, rtol=1e-4, atol=1e-4 * np.abs(want).max())
    variables, _ = encoder.arrays
    (path,) = [p for p in variables["moments"] if p.endswith("mlp/down/kernel")]
    mu, _ = variables["moments"][path]
    assert len({str(s.index) for s in mu.addressable_shards}) > 1


@pytest.mark.parametrize(
    ("tx", "described", "told"),
    [
        (optax.adam(1.0), {"name": "nadam", **ADAM}, "trained with 'nadam'"),
        (optax.adam(1.0), {"name": "adam", "b2": 0.9, "eps": 1e-3}, "lacks optimizer.b1"),
        (optax.adam(1.0), {}, "trained with None"),
        (optax.scale_by_rms(), DESCRIBED["optimizer"], "no mu and no count of layers/attention"),
    ],
)
def test_what_is_not_adams_is_told(decoder, tmp_path, tx, described, told):
    _save(decoder(), tx, tmp_path / "c", described)
    with pytest.raises(SecondMomentError, match=told):
        adam_steps.read(tmp_path / "c", find_sites(decoder()))


def test_moments_of_another_shape_are_told(decoder, tmp_path):
    _save(decoder(), optax.adam(1.0), tmp_path / "c", DESCRIBED["optimizer"])
    chosen = [dataclasses.replace(s, shape=(1, *s.shape)) for s in find_sites(decoder())]
    with pytest.raises(SecondMomentError, match="mu of layers/.* has shape"):
        adam_steps.read(tmp_path / "c", chosen)


def _save(model, tx, root, described):
    params = nnx.to_pure_dict(nnx.state(model, nnx.Param))
    state = {"params": params, "opt_state": tx.init(params), "step": jnp.int32(0)}
    checkpoint.save(root, 1, state, {"optimizer": described})
