"""Inner products from factors, against those of whole gradients, for every metric and form."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from tda import loss as losses
from tda.gradients import kronecker, layers, pair_metrics, pair_products, reference
from tda.gradients.factors import GradientFactors
from tda.gradients.moments.scales import Scale, factored_scale
from tda.gradients.pair_metrics import SiteMetric
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


class Tables(nnx.Module):
    """Tokens, positions, and one more table for each of two layers of a stack."""

    def __init__(self, rngs):
        self.embed = Scaled(V, D, rngs=rngs)
        self.position = nnx.Embed(9, D, rngs=rngs)
        self.layers = nnx.vmap(lambda keys: nnx.Embed(V, D, rngs=keys))(rngs.fork(split=2))
        self.out = nnx.Linear(D, V, rngs=rngs)

    def __call__(self, tokens):
        positions = jnp.broadcast_to(jnp.arange(tokens.shape[1]), tokens.shape)
        x = self.embed(tokens - V) + self.position(positions)  # negative numbers count from the end
        step = lambda x, table: jnp.cumsum(jnp.tanh(x + table(tokens)), axis=1)  # noqa: E731
        x = nnx.scan(step, in_axes=(nnx.Carry, 0), out_axes=nnx.Carry)(x, self.layers)
        return self.out(x)


class Scaled(nnx.Module):
    """A registered table that scales its rows."""

    def __init__(self, rows, width, rngs):
        self.table = nnx.Param(rngs.normal((rows, width)))

    def __call__(self, ids):
        return 3.0 * self.table[...][ids]


layers.register_embedding(Scaled, "table")


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
    for site in kronecker.factored(sites) if name == "ekfac" else sites:
        shape = () if site.stack is None else (site.stack,)
        full = jnp.exp(jnp.asarray(rng.normal(size=(*shape, site.rows, site.columns)), jnp.float32))
        scale = Scale(full=full) if name == "adam" else factored_scale(full)
        if name == "low_rank":
            scale = Scale(*(np.exp(rng.normal(size=(*shape, 2, n))) for n in full.shape[-2:]))
        if name == "ekfac":
            left, right = (
                np.linalg.qr(rng.normal(size=(*shape, n, n)))[0].astype(np.float32)
                for n in (site.rows, site.columns)
            )
            values = np.exp(rng.normal(size=(*shape, site.rows, site.columns))).astype(np.float32)
            c = kronecker.Curvature(left, right, values)
            metric |= pair_metrics.ekfac([site], {site.path: c}, 0.1)
            weights = (values + 0.1 * values.mean(axis=(-1, -2), keepdims=True)) ** -0.5
            apply[site.path] = lambda G, A=left, B=right, w=weights: (
                np.swapaxes(A, -1, -2) @ G @ B * w
            )
        elif name in ("identity", "whitened"):
            metric[site.path], apply[site.path] = SiteMetric(), lambda G: G
        else:
            metric |= pair_metrics.corrected([site], {site.path: scale})
            dense = np.asarray(scale.dense(), np.float64)
            apply[site.path] = lambda G, s=dense: G * s
    if name.endswith("whitened"):
        tables = {
            s.path for s in sites if s.group == "embedding" or s.path.startswith("layers/emb")
        }
        return metric, {p: whitener(apply[p], gradients[p], p in tables) for p in apply}
    return metric, apply


def whitener(
    apply, gradients, is_table=False, damping=pair_metrics.DAMPING, queries=None, weight=0.0
):
    """R^(−1/2) of gradients after `apply`, with R = E[G Gᵀ] ⊗ E[Gᵀ G] / E‖G‖², damped.

    Of a table E[G Gᵀ] counts as diagonal. Moments of queries, if given, are mixed in.
    """

    def moments(gradients):
        G = apply(gradients)
        T = np.swapaxes(G, -1, -2)
        rows = (G @ T).mean(0)
        rows = rows * np.eye(rows.shape[-1]) if is_table else rows
        return rows, (T @ G).mean(0), (G**2).sum((-1, -2)).mean(0)[..., None, None]

    mixture = moments(gradients)
    if queries is not None:
        pairs = zip(mixture, moments(queries), strict=True)
        mixture = [(1 - weight) * x + weight * y for x, y in pairs]
    roots = []
    for moment in mixture[:2]:
        n = moment.shape[-1]
        mean = np.trace(moment, axis1=-1, axis2=-2)[..., None, None] / n
        values, vectors = np.linalg.eigh(moment + damping * mean * np.eye(n))
        roots.append(vectors * values[..., None, :] ** -0.5 @ np.swapaxes(vectors, -1, -2))
    return lambda x: mixture[2] ** 0.5 * (roots[0] @ apply(x) @ roots[1])


def balance(sides, is_table):
    """Gradients of queries and of passages, a table's number of the mean size of the others'."""
    of_passages = sides[1]
    squares = {p: np.square(x).sum() / len(x) for p, x in of_passages.items()}
    numbers = {p: x[0].size for p, x in of_passages.items()}
    others = [p for p in squares if not is_table(p)]
    usual = sum(squares[p] for p in others) / sum(numbers[p] for p in others)
    scales = {p: (usual * numbers[p] / squares[p]) ** 0.5 if is_table(p) else 1.0 for p in squares}
    return [{p: scales[p] * x for p, x in side.items()} for side in sides]


MODELS = {
    "user's": lambda decoder: UserModel(nnx.Rngs(0)),
    "tables": lambda decoder: Tables(nnx.Rngs(0)),
    "tied, scanned": lambda decoder: decoder(vocab_size=V),
    "positions": lambda decoder: decoder(vocab_size=V, max_positions=9, tied=False, scan=False),
}


@pytest.fixture(scope="module", params=MODELS)
def case(request, decoder, random_batch):
    """A model's factors, and those and whole gradients of five passages and three queries.

    Eight tokens, so that passages and queries have many in common.
    """
    model = MODELS[request.param](decoder)
    sites = find_sites(model, ".")
    factors = GradientFactors(model, sites)
    batches = random_batch([6, 9, 3, 7, 9], 9, vocab_size=8), random_batch([4, 2, 4], 4, 8, seed=1)
    return factors, [factors(b) for b in batches], [whole(model, sites, b) for b in batches]


@pytest.mark.parametrize("name", METRICS)
def test_products_are_those_of_whole_gradients(case, name):
    factors, (passages, queries), gradients = case
    if name == "ekfac" and not any("layers" in p or "plain" in p for p in passages):
        pytest.skip("a model without a layer that has Kronecker factors")
    metric, apply = make_metric(name, factors.sites, gradients[0])
    if name.endswith("whitened"):
        sums = pair_products.zero_moments(factors)
        sums = pair_products.add_moments(sums, pair_products.transform(metric, passages))
        means = {p: tuple(np.asarray(x) / 5 for x in pair) for p, pair in sums.items()}
        metric = pair_metrics.whitened(metric, means)
    changed = [
        np.concatenate([f(g[p]).reshape(len(g[p]), -1) for p, f in apply.items()], axis=1)
        for g in gradients
    ]
    expected_BxQ = changed[0] @ changed[1].T
    passages, queries = (pair_products.transform(metric, x) for x in (passages, queries))
    norms_B = np.linalg.norm(changed[0], axis=1)
    # R of five passages is damped in most directions, which magnifies the rounding of its float32.
    rtol = 5e-5 if name.endswith("whitened") else 1e-5
    tolerance = rtol * norms_B.max() * np.linalg.norm(changed[1], axis=1).max()
    got = pair_products.all_products(metric, passages, queries)
    np.testing.assert_allclose(got, expected_BxQ, rtol=0, atol=tolerance)
    lists = np.array([[2, 0], [1, 1], [0, 2], [2, 1], [0, 0]])
    got = pair_products.listed_products(metric, passages, queries, lists)
    expected = np.take_along_axis(expected_BxQ, lists, 1)
    np.testing.assert_allclose(got, expected, rtol=0, atol=tolerance)
    np.testing.assert_allclose(pair_products.norms(metric, passages), norms_B, rtol=rtol)


@pytest.mark.parametrize("S, T, Q, M, N", [(2, 2, 3, 9, 8), (9, 2, 3, 3, 2), (9, 9, 9, 3, 2)])
def test_every_form_gives_the_same(monkeypatch, S, T, Q, M, N):
    """Shapes for which the rule takes a ghost product, the passage's gradient, and both."""
    rng = np.random.default_rng(0)
    normal = lambda *shape: rng.normal(size=shape).astype(np.float32)  # noqa: E731
    passages, queries = (
        {"w": (pair_products.Factors(normal(n, s, M), normal(n, s, N)),)}
        for n, s in ((8, S), (Q, T))
    )
    G, H = (np.einsum("bsm,bsn->bmn", *x["w"][0]) for x in (passages, queries))
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
    factors, (passages, queries), _ = case
    metric = pair_metrics.identity(factors.sites)
    mesh = sharding.make_mesh(data=5, devices=jax.devices()[:5])
    place = lambda x: jax.device_put(x, sharding.named(mesh, (None,) * (x.ndim - 3) + ("batch",)))  # noqa: E731
    alone = pair_products.all_products(metric, passages, queries)
    with jax.set_mesh(mesh):
        spread = pair_products.all_products(metric, jax.tree.map(place, passages), queries)
        np.testing.assert_allclose(spread, alone, rtol=1e-5, atol=1e-6 * np.abs(alone).max())


def test_exact_adam_and_r_are_refused(case):
    factors, _, gradients = case
    metric, _ = make_metric("adam", factors.sites, gradients[0])
    with pytest.raises(ValueError, match="exact Adam correction"):
        pair_metrics.whitened(metric, {})


@pytest.mark.parametrize("is_table", [False, True])
def test_without_damping_directions_that_no_gradient_has_are_left_out(is_table):
    """Mistake: their infinite root, which makes a NaN of every score."""
    G_RxMxN = np.random.default_rng(0).normal(size=(3, 4, 6))
    G_RxMxN[:, 2] = G_RxMxN[:, :, 5] = 0
    A, B = (np.einsum(f"rmn,{x}->{y}", G_RxMxN, G_RxMxN) for x, y in (("rkn", "mk"), ("rmk", "nk")))
    moments = {"w": (np.diag(A) if is_table else A, B)}
    bases = pair_metrics.whitened({"w": SiteMetric()}, moments, damping=0.0)["w"].bases
    for moment, root in zip(moments["w"], bases, strict=True):
        moment, root = (np.diag(x) if x.ndim == 1 else x for x in (moment, root))
        # R^(-1/2) R R^(-1/2) is a projection, up to a scale.
        projection = np.asarray(root, float) @ moment @ root
        projection *= (len(moment) - 1) / np.trace(projection)
        assert np.isfinite(projection).all()
        np.testing.assert_allclose(projection @ projection, projection, rtol=1e-4, atol=1e-5)


class TwoLookUps(UserModel):
    """Looks up the same number of rows two times."""

    def __call__(self, tokens):
        return self.out(jnp.tanh(self.equation(self.embed(tokens) + self.embed(tokens[:, ::-1]))))


@pytest.mark.parametrize(
    ("kind", "include", "path"),
    [(Twice, None, "plain/kernel"), (TwoLookUps, "embed", "embed/embedding")],
)
def test_a_layer_that_is_called_twice_is_refused(random_batch, kind, include, path):
    """Guards: the product of sums taken for the sum of products; sums of numbers, for a number."""
    model = kind(nnx.Rngs(0))
    factors = GradientFactors(model, find_sites(model, include))
    with pytest.raises(ValueError, match=f"of {path} do not give its gradient.*exclude="):
        factors(random_batch([5, 4], 5, vocab_size=V))


def test_numbers_beyond_the_table_have_no_gradient(random_batch):
    """Guards: the gradient of padding added to the table's last row, or to another of its rows."""
    model = Tables(nnx.Rngs(0))
    batch = random_batch([5, 4], 5, vocab_size=V)
    factors = GradientFactors(model, find_sites(model, "embed/table"))
    (ordinary,) = factors(batch)["embed/table"]
    batch["tokens"][1, 2] = 2 * V
    (rows,) = factors(batch)["embed/table"]
    assert np.abs(ordinary.deltas[1, 2]).max() > 0 and not np.any(rows.deltas[1, 2])
    assert (np.asarray(rows.inputs) < V).all()


def test_a_table_forms_nothing_as_wide_as_the_vocabulary(random_batch):
    """Guards: one-hot rows, or the gradient of a table, by the rule that forms cheap gradients."""
    model = UserModel(nnx.Rngs(0))
    factors = GradientFactors(model, find_sites(model, "embed"))
    many = random_batch([40] * 3, 40, vocab_size=V)
    for name in ("identity", "adam"):
        metric, _ = make_metric(name, factors.sites, {})
        changed = pair_products.transform(metric, factors(many))
        (term,) = changed["embed/embedding"]
        assert term.inputs.shape == (3, 40, 1) and term.deltas.shape == (3, 40, D)
        for traced in (
            jax.make_jaxpr(pair_products.all_products)(metric, changed, changed),
            jax.make_jaxpr(pair_products.norms)(metric, changed),
        ):
            # The weights alone, [V, D], have no axis in front.
            assert f",{V},{D}]" not in str(traced)
        costs = pair_products.operations(metric, changed, changed, each=2, tile=3)
        assert costs == (3 * 2 * 40 * 40 * D, 3 * 3 * 40 * 40 * D)


def test_a_tied_heads_factors_are_of_the_whole_sequence(decoder, random_batch, monkeypatch):
    """Guards: those of pieces of it, which serve other layers."""
    model, batch = decoder(), random_batch([5, 4], 5, vocab_size=V)
    whole = GradientFactors(model, find_sites(model, "embedding"))(batch)
    monkeypatch.setattr(losses, "_CHUNK", 2 * V)
    pieces = GradientFactors(model, find_sites(model, "embedding"))(batch)
    for x, y in zip(jax.tree.leaves(pieces), jax.tree.leaves(whole), strict=True):
        np.testing.assert_allclose(x, y, rtol=0, atol=1e-6)


def test_parameters_without_taps_are_refused(decoder):
    model = decoder()
    with pytest.raises(ValueError, match="scale.*multiply their input by a matrix, or look up"):
        GradientFactors(model, find_sites(model, "scale", untapped="reference"))


@pytest.mark.parametrize("k", [1, 7, 40, 100])
def test_lambda_by_the_rule_is_that_of_all_products(k):
    """Of the products of all eigenvalues, which are too many to be formed."""
    rng = np.random.default_rng(0)

    def moment(*shape):
        x = rng.normal(size=(*shape, shape[-1]))
        return x @ np.swapaxes(x, -1, -2)

    def make():
        table = rng.exponential(size=9), moment(4)
        return {"layers": (moment(3, 6), moment(3, 5)), "table": table}

    def products(moments):
        found = []
        for A, B in moments.values():
            A = A if A.ndim == B.ndim else A[..., None] * np.eye(len(A))
            for rows, columns in zip(
                A.reshape(-1, *A.shape[-2:]), B.reshape(-1, *B.shape[-2:]), strict=True
            ):
                found.append(np.kron(rows, columns) / np.trace(rows))
        return np.sort(np.concatenate([np.linalg.eigvalsh(x) for x in found]))[::-1]

    train, evaluation = make(), make()
    a, b = products(train)[k - 1], products(evaluation)[k - 1]
    assert pair_metrics.mixing_weight(train, evaluation, k) == pytest.approx(a / (a + b))
    few = {"one": (np.diag([1.0, 0, 0]), np.diag([1.0, 0]))}
    assert pair_metrics.mixing_weight(train, few, 1) > 0
    with pytest.raises(ValueError, match="R of the queries has no direction at component 2"):
        pair_metrics.mixing_weight(train, few, 2)
