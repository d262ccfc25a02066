"""Inner products from factors, against those of whole gradients, for every metric and form."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from tda.gradients import kronecker, pair_products, reference
from tda.gradients.factors import GradientFactors
from tda.gradients.moments.second_moments import Scale, adam_scale, factored_scale
from tda.gradients.pair_products import SiteMetric
from tda.gradients.sites import find_sites
from tda.runtime import sharding
from tests.gradients.test_layers import D, V

METRICS = ("identity", "low_rank", "adam", "ekfac", "factored, whitened")


class UserModel(nnx.Module):
    """Layers of several classes, one of them with heads of its own, in no particular order."""

    def __init__(self, rngs):
        self.embed = nnx.Embed(V, D, rngs=rngs)
        self.plain = nnx.Linear(D, D, rngs=rngs)
        self.general = nnx.LinearGeneral(D, (2, D // 2), rngs=rngs)
        self.equation = nnx.Einsum("...d,df->...f", (D, 2 * D), rngs=rngs)
        self.out = nnx.Linear(2 * D, V, rngs=rngs)

    def __call__(self, tokens):
        x = self.embed(tokens)
        x = x + jnp.tanh(self.plain(x))
        x = x + jnp.tanh(self.general(x)).reshape(x.shape)
        return self.out(jnp.tanh(self.equation(x)))


class Twice(UserModel):
    """Calls a layer two times, so that its gradient is a sum of two products."""

    def __call__(self, tokens):
        return self.out(
            jnp.tanh(self.equation(self.plain(jnp.tanh(self.plain(self.embed(tokens))))))
        )


def whole(model, sites, batch):
    """The gradients of a batch's examples, float64 [B, (L,) M, N] by path."""
    gradients = jax.jit(lambda b: reference.per_example_gradients(model, b))(batch)
    return {s.path: np.asarray(jax.vmap(s.matrix)(gradients[s.path]), np.float64) for s in sites}


def make_metric(name, sites, gradients):
    """The metric, and C^(1/2) as a function of whole gradients."""
    rng, metric, apply = np.random.default_rng(0), {}, {}
    for site in sites:
        shape = () if site.stack is None else (site.stack,)
        full = adam_scale(np.exp(rng.normal(size=(*shape, site.rows, site.columns))), 7, 0.9, 1e-3)
        scale = full if name == "adam" else factored_scale(full.full)
        if name == "low_rank":
            scale = Scale(*(np.exp(rng.normal(size=(*shape, 2, n))) for n in full.full.shape[-2:]))
        if name == "ekfac":
            left, right = (
                np.linalg.qr(rng.normal(size=(*shape, n, n)))[0].astype(np.float32)
                for n in (site.rows, site.columns)
            )
            values = np.exp(rng.normal(size=(*shape, site.rows, site.columns))).astype(np.float32)
            c = kronecker.Curvature(left, right, values)
            metric |= pair_products.ekfac([site], {site.path: c}, 0.1)
            weights = (values + 0.1 * values.mean(axis=(-1, -2), keepdims=True)) ** -0.5
            apply[site.path] = lambda G, A=left, B=right, w=weights: (
                np.swapaxes(A, -1, -2) @ G @ B * w
            )
        elif name in ("identity", "whitened"):
            metric[site.path], apply[site.path] = SiteMetric(), lambda G: G
        else:
            metric |= pair_products.corrected([site], {site.path: scale})
            dense = np.asarray(scale.dense(), np.float64)
            apply[site.path] = lambda G, s=dense: G * s
    if name.endswith("whitened"):
        return metric, {p: whitener(apply[p], gradients[p]) for p in apply}
    return metric, apply


def whitener(apply, gradients):
    """R^(−1/2) of gradients after `apply`, with R = E[G Gᵀ] ⊗ E[Gᵀ G] / E‖G‖², damped."""
    G = apply(gradients)
    T = np.swapaxes(G, -1, -2)
    roots = []
    for moment in ((G @ T).mean(0), (T @ G).mean(0)):
        n = moment.shape[-1]
        mean = np.trace(moment, axis1=-1, axis2=-2)[..., None, None] / n
        values, vectors = np.linalg.eigh(moment + pair_products.DAMPING * mean * np.eye(n))
        roots.append(vectors * values[..., None, :] ** -0.5 @ np.swapaxes(vectors, -1, -2))
    norm = (G**2).sum((-1, -2)).mean(0)[..., None, None] ** 0.5
    return lambda x: norm * (roots[0] @ apply(x) @ roots[1])


@pytest.fixture(scope="module", params=["scanned", "user's"])
def case(request, decoder, random_batch):
    """A model's sites, and factors and whole gradients of five passages and three queries."""
    if request.param == "user's":
        model = UserModel(nnx.Rngs(0))
    else:
        model = decoder()
    sites = find_sites(model)
    factors = GradientFactors(model, sites)
    batches = random_batch([6, 9, 3, 7, 9], 9, vocab_size=V), random_batch([4, 2, 4], 4, V, seed=1)
    return sites, [factors(b) for b in batches], [whole(model, sites, b) for b in batches]


@pytest.mark.parametrize("name", METRICS)
def test_products_are_those_of_whole_gradients(case, name):
    sites, (passages, queries), gradients = case
    metric, apply = make_metric(name, sites, gradients[0])
    if name.endswith("whitened"):
        sums = pair_products.zero_moments(sites)
        sums = pair_products.add_moments(sums, pair_products.transform(metric, passages))
        means = {p: tuple(np.asarray(x) / 5 for x in pair) for p, pair in sums.items()}
        metric = pair_products.whitened(metric, means)
    changed = [
        np.concatenate([apply[p](G).reshape(len(G), -1) for p, G in g.items()], axis=1)
        for g in gradients
    ]
    expected_BxQ = changed[0] @ changed[1].T
    passages, queries = (pair_products.transform(metric, x) for x in (passages, queries))
    norms_B = np.linalg.norm(changed[0], axis=1)
    tolerance = 1e-5 * norms_B.max() * np.linalg.norm(changed[1], axis=1).max()
    got = pair_products.all_products(metric, passages, queries)
    np.testing.assert_allclose(got, expected_BxQ, rtol=0, atol=tolerance)
    lists = np.array([[2, 0], [1, 1], [0, 2], [2, 1], [0, 0]])
    got = pair_products.listed_products(metric, passages, queries, lists)
    expected = np.take_along_axis(expected_BxQ, lists, 1)
    np.testing.assert_allclose(got, expected, rtol=0, atol=tolerance)
    # R of five passages is damped in most directions, which magnifies the rounding of its float32.
    rtol = 5e-5 if name.endswith("whitened") else 1e-5
    np.testing.assert_allclose(pair_products.norms(metric, passages), norms_B, rtol=rtol)


@pytest.mark.parametrize("S, T, Q, M, N", [(2, 2, 3, 9, 8), (9, 2, 3, 3, 2), (9, 9, 9, 3, 2)])
def test_every_form_gives_the_same(monkeypatch, S, T, Q, M, N):
    """Shapes for which the rule takes a ghost product, the passage's gradient, and both."""
    rng = np.random.default_rng(0)
    normal = lambda *shape: rng.normal(size=shape).astype(np.float32)  # noqa: E731
    passages, queries = (
        {"w": pair_products.Factors(normal(n, s, M), normal(n, s, N))} for n, s in ((8, S), (Q, T))
    )
    G, H = (np.einsum("bsm,bsn->bmn", *x["w"]) for x in (passages, queries))
    metric, expected = {"w": SiteMetric()}, np.einsum("bmn,qmn->bq", G, H)
    atol = 1e-5 * np.abs(expected).max()
    for form in ("_ghost", "_half", "whole"):
        with monkeypatch.context() as patch:
            for other in {"_ghost", "_half"} - {form}:
                patch.setattr(pair_products, other, lambda *_: np.inf)
            if form != "whole":
                patch.setattr(pair_products, form, lambda *_: 0)
            jax.clear_caches()
            got = pair_products.all_products(metric, passages, queries)
            np.testing.assert_allclose(got, expected, rtol=0, atol=atol)
    jax.clear_caches()


def test_products_are_the_same_on_a_mesh(case):
    sites, (passages, queries), _ = case
    metric = pair_products.identity(sites)
    mesh = sharding.make_mesh(data=5, devices=jax.devices()[:5])
    place = lambda x: jax.device_put(x, sharding.named(mesh, (None,) * (x.ndim - 3) + ("batch",)))  # noqa: E731
    alone = pair_products.all_products(metric, passages, queries)
    with jax.set_mesh(mesh):
        spread = pair_products.all_products(metric, jax.tree.map(place, passages), queries)
        np.testing.assert_allclose(spread, alone, rtol=1e-5, atol=1e-6 * np.abs(alone).max())


def test_exact_adam_and_r_are_refused(case):
    sites, _, gradients = case
    metric, _ = make_metric("adam", sites, gradients[0])
    with pytest.raises(ValueError, match="exact Adam correction"):
        pair_products.whitened(metric, {})


def test_a_layer_that_is_called_twice_is_refused(random_batch):
    """Guards: the product of sums taken for the sum of products."""
    model = Twice(nnx.Rngs(0))
    factors = GradientFactors(model, find_sites(model))
    with pytest.raises(ValueError, match="of plain/kernel do not give its gradient.*exclude="):
        factors(random_batch([5, 4], 5, vocab_size=V))


def test_tables_and_parameters_without_taps_are_refused(decoder):
    for scope, path in (
        (dict(include="embed"), "embed"),
        (
            dict(include="scale", untapped="reference"),
            "scale",
        ),
    ):
        with pytest.raises(ValueError, match=f"{path}.*multiply their input by a matrix"):
            GradientFactors(decoder(), find_sites(decoder(), **scope))
