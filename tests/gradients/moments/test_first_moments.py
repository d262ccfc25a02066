"""The optimizer's momentum, projected as a gradient would be."""

import jax.numpy as jnp
import numpy as np
import pytest

from tda.gradients import sites
from tda.gradients.encoder import make_encoder
from tda.gradients.moments import first_moments, optimizer_state, second_moments
from tda.gradients.moments.optimizer_state import SecondMomentError
from tda.gradients.projection import Projection
from tda.model import functional
from tda.training import checkpoint, loop
from tda.training.optimizer import make_optimizer

P = Projection(side=4, blocks=2)


def stepped(model, batch, name, directory):
    """A checkpoint after one step on a batch; nothing is clipped."""
    tx = make_optimizer(name, 1e-3, b1=0.9, b2=0.99, eps=1e-4, clip=None)
    model_fn, params = functional.split(model)
    state = {"params": params, "opt_state": tx.init(params), "step": jnp.int32(0)}
    state, _ = loop.train_step(model_fn.merge, tx, state, batch)
    described = {"optimizer": {"name": name, "b1": 0.9, "b2": 0.99, "eps": 1e-4, "eps_root": 0.0}}
    checkpoint.save(directory, 1, state, described)


@pytest.mark.parametrize("correction", ["factored", "adam"])
def test_after_one_step_it_is_a_tenth_of_the_gradient(decoder, random_batch, tmp_path, correction):
    """Embeddings tied and stacked layers among them; the batch's loss is a mean over tokens."""
    model, batch = decoder(), random_batch([7], 7)
    stepped(model, batch, "adam", tmp_path / "c")
    chosen = sites.find(model, ".")
    scales = second_moments.read(tmp_path / "c", chosen, correction)
    got = first_moments.projected(tmp_path / "c", chosen, P, scales)
    # The parameters before the step are the model's: their gradient is what was averaged.
    gradient = np.asarray(make_encoder(model, P, scales, include=".")(batch))[0]
    np.testing.assert_allclose(got, 0.1 * gradient / 7, rtol=1e-3, atol=1e-4 * np.abs(got).max())
    assert np.abs(got).max() > 0


def test_an_optimizer_without_momentum_is_told(decoder, random_batch, tmp_path):
    stepped(decoder(), random_batch([7], 7), "adafactor", tmp_path / "c")
    with pytest.raises(SecondMomentError, match="no first moments .mu. of layers/attention"):
        first_moments.read(tmp_path / "c", sites.find(decoder()))


def test_nothing_else_of_the_state_is_read(decoder, random_batch, tmp_path):
    stepped(decoder(), random_batch([7], 7), "adam", tmp_path / "c")
    chosen = sites.find(decoder())
    flat = optimizer_state.load(tmp_path / "c", {s.path for s in chosen}, None, ("mu",))
    for site in chosen:
        (mu,), (nu,) = (
            [x for name, x in flat.items() if name.endswith(f"{field}/{site.path}")]
            for field in ("mu", "nu")
        )
        assert mu.shape == site.shape and nu is ...
