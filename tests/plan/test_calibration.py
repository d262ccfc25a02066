"""Measured rates: what is measured, and that they say how long real work takes."""

import numpy as np
import pytest
from flax import nnx

from tda.gradients import encoder as encoders
from tda.gradients.projection import Projection
from tda.gradients.sites import find_sites
from tda.model.decoder import Decoder
from tda.model.settings import DecoderSettings
from tda.plan import calibration
from tda.plan.calibration import EncoderTimes


def test_seconds_add_up_over_batches_and_each_shape_is_compiled_once():
    times = EncoderTimes(compile=2.0, position={8: 0.5, 16: 0.25}, memory=0)
    # 3 batches of 4 × 8 positions and one of 2 × 16.
    assert times.seconds({(4, 8): 3, (2, 16): 1}) == 3 * 32 * 0.5 + 32 * 0.25 + 2 * 2.0
    # A length between those measured has a rate between theirs; beyond them, the nearest's.
    assert times.seconds({(1, 12): 1}) == 12 * 0.375 + 2.0
    assert times.seconds({(1, 32): 1}) == 32 * 0.25 + 2.0
    assert times.seconds({}) == 0


def test_of_many_shapes_some_are_measured_and_the_longest_and_shortest_among_them():
    shapes = {(512 // T, T): 1 for T in range(8, 128, 8)}
    found = calibration.measured_shapes(shapes, most=4)
    assert len(found) == 4 and [T for _, T in found] == sorted({T for _, T in found})
    assert found[0] == (64, 8) and found[-1] == (4, 120)
    assert calibration.measured_shapes({(1, 16): 1, (2, 8): 9}) == [(2, 8), (1, 16)]


@pytest.mark.parametrize("correction", ["none", "factored", "low_rank(3)", "adam"])
def test_scales_of_ones_change_nothing_but_the_work(decoder, random_batch, correction):
    """They have a correction's own form: its encoder is what is timed."""
    model, projection = decoder(), Projection(side=3, blocks=2)
    scales = calibration.ones(find_sites(model), correction)
    batch = random_batch([5, 8], length=8)
    found = encoders.make_encoder(model, projection, scales)(batch)
    plain = np.asarray(encoders.make_encoder(model, projection)(batch))
    times = 3 if correction == "low_rank(3)" else 1  # each of three outer products is one
    np.testing.assert_allclose(found, times * plain, rtol=1e-3, atol=1e-4 * np.abs(plain).max())
    full = [s.full is not None for s in (scales or {}).values()]
    assert all(full) if correction == "adam" else not any(full)


def test_each_shape_is_compiled_once_and_timed(decoder, one_device):
    encoder = encoders.make_encoder(decoder(), Projection(side=3, blocks=2), mesh=one_device)
    found = calibration.encoder_times(encoder, {(4, 8): 5, (2, 16): 1}, 50, one_device, rounds=2)
    assert list(found.position) == [8, 16]
    assert all(0 < x < 0.1 for x in found.position.values())
    # Compiling takes far longer than a batch does; the parameters alone take memory.
    assert found.compile > 10 * max(8 * 4 * found.position[8], 16 * 2 * found.position[16])
    parameters = sum(p.size for p in nnx.state(decoder(), nnx.Param).flat_state().leaves)
    assert found.memory > 4 * parameters


@pytest.mark.slow
def test_time_grows_with_the_work(one_device):
    """A model that does sixteen times the work takes several times as long."""
    seconds = {}
    for width in (64, 256):
        shape = dict(layers=1, heads=2, kv_heads=2, head_width=32, ff_width=4 * width)
        model = Decoder(DecoderSettings(vocab_size=64, width=width, **shape), rngs=nnx.Rngs(0))
        encoder = encoders.make_encoder(model, Projection(side=4, blocks=1), mesh=one_device)
        times = calibration.encoder_times(encoder, {(32, 64): 1}, 64, one_device, rounds=2)
        seconds[width] = times.seconds({(32, 64): 100}) - times.compile
    assert seconds[256] > 2 * seconds[64]


def test_products_are_timed():
    found = calibration.product_times(width=2048, block=256, queries=64)
    for rate in (found.gram, found.scores, found.eigen):
        assert 1e7 < rate < 1e14
    # An eigendecomposition reaches a fraction of a product's rate.
    assert found.eigen < found.gram
