"""Several kinds of gradients in one pass: each equal to its own encoder's."""

import jax
import numpy as np
import pytest

from tda.gradients import kronecker
from tda.gradients.encoder import build_encoder, make_encoder, make_taps
from tda.gradients.projection import Projection
from tda.gradients.sites import find_sites
from tda.runtime import sharding
from tests.gradients.test_encoder import assert_same_encodings, scales_of

P = Projection(side=4, blocks=2)
WIDER = Projection(side=6, pooling="matrix", seed=3)


def kind_of(model, correction, projection=P, include=None, untapped="leave"):
    chosen = find_sites(model, include, None, untapped)
    return projection, make_taps(chosen, projection, scales_of(model, correction, include))


def rotated(model):
    """EK-FAC's, of curvature made up: any basis, any eigenvalues."""
    chosen, rng, curvature = kronecker.factored(find_sites(model)), np.random.default_rng(0), {}
    for site in chosen:
        stack = () if site.stack is None else (site.stack,)
        left, right = (
            np.linalg.qr(rng.normal(size=(*stack, n, n)))[0].astype(np.float32)
            for n in (site.rows, site.columns)
        )
        values = rng.uniform(0.5, 2, (*stack, site.rows, site.columns)).astype(np.float32)
        curvature[site.path] = kronecker.Curvature(left, right, values)
    return P, kronecker.ekfac_taps(chosen, P, curvature, 0.1)


def alone(model, kind, output="loss"):
    return build_encoder(model, [kind], output)


@pytest.mark.parametrize(
    ("scan", "tied", "output"),
    [(True, True, "loss"), pytest.param(False, False, "margin", marks=pytest.mark.slow)],
)
def test_each_kind_is_its_own_encoders(decoder, random_batch, scan, tied, output):
    """Corrections, projections and sites that differ, at layers that all or some of them take."""
    model, batch = decoder(scan=scan, tied=tied), random_batch([6, 4, 2], 6)
    kinds = [
        kind_of(model, "none", include="."),
        kind_of(model, "adam", WIDER),
        kind_of(model, "factored", include="."),
        rotated(model),
    ]
    encoder = build_encoder(model, kinds, output)
    got = encoder.encode_all(batch)
    assert len(got) == len(encoder.layouts) == 4
    for kind, x, layout, side in zip(kinds, got, encoder.layouts, (4, 6, 4, 4), strict=True):
        single = alone(model, kind, output)
        assert single.layout == layout
        assert_same_encodings(x, single(batch), 2e-6, side)
    # They are not the same to begin with.
    assert not np.allclose(got[0], got[2], rtol=0.1)


def test_parameters_without_taps_are_taken_for_each(decoder, random_batch):
    """Norms by the reference path, in one kind with exact scales and in another without."""
    model, batch = decoder(), random_batch([5, 2], 5)
    kinds = [
        kind_of(model, "none", WIDER, ".", "reference"),
        kind_of(model, "factored", P),
        kind_of(model, "none", P, "norm", "reference"),
    ]
    got = build_encoder(model, kinds).encode_all(batch)
    for kind, x in zip(kinds, got, strict=True):
        assert_same_encodings(x, alone(model, kind)(batch), 5e-6, kind[0].side)


def test_one_encoder_is_a_case_of_it(decoder, random_batch):
    model, batch = decoder(), random_batch([5, 2], 5)
    encoder = make_encoder(model, P)
    (got,) = encoder.encode_all(batch)
    np.testing.assert_array_equal(got, encoder(batch))
    assert encoder.layouts == (encoder.layout,)


def test_split_over_a_mesh_it_is_the_same(decoder, random_batch):
    mesh = sharding.make_mesh(data=2, fsdp=4)
    model, batch = decoder(), random_batch([6, 4, 1, 5], 6)
    kinds = [kind_of(model, "none", include="."), kind_of(model, "factored", include=".")]
    expected = build_encoder(model, kinds).encode_all(batch)
    encoder = build_encoder(model, kinds, mesh=mesh)
    with jax.set_mesh(mesh):
        got = encoder.encode_all(sharding.put_batch(mesh, batch))
    for x, y in zip(got, expected, strict=True):
        assert_same_encodings(x, y, 1e-5)
