"""Kronecker factors, EK-FAC and LoGra against whole per-example gradients and dense matrices."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from tda import loss as losses
from tda.data.batches import BatchLayout
from tda.gradients import kronecker, reference, sampled_labels
from tda.gradients.encoder import build_encoder, make_encoder
from tda.gradients.factors import GradientFactors
from tda.gradients.projection import Projection
from tda.gradients.sites import find_sites
from tda.model import functional
from tda.runtime import sharding
from tests.data.test_batches import table_of

P = Projection(side=4, pooling="matrix")
LAYOUT = BatchLayout((4, 8), tokens_per_batch=24, pad=0)


def table(lengths=(5, 8, 2, 6, 3, 7), seed=0):
    """Sequences of random tokens, all but the first token of each scored."""
    rng = np.random.default_rng(seed)
    return table_of([rng.integers(1, 50, n + 1) for n in lengths])


def batches(labels, rows=range(6), **changes):
    layout = dataclasses.replace(LAYOUT, **changes)
    return list(sampled_labels.batches(table(), np.asarray(rows), labels=labels, layout=layout))


def whole_gradients(model, batch):
    return jax.jit(lambda b: reference.per_example_gradients(model, b))(batch)


def examples(model, labels):
    """The whole gradient of each example, float64 [N, (L,) M, N] by site."""
    chosen = kronecker.factored(find_sites(model))
    output = losses.cross_entropy if labels == "data" else sampled_labels.sampled_loss
    loss = lambda model, b: output(model(b["tokens"]), b["targets"], b["weights"])  # noqa: E731
    (batch,) = batches(labels, bucket_lengths=(8,), tokens_per_batch=48)
    whole = jax.jit(lambda b: reference.per_example_gradients(model, b, loss))(batch)
    return {s: np.asarray(jax.vmap(s.matrix)(whole[s.path]), np.float64) for s in chosen}


@pytest.mark.parametrize("scan", [True, False])
def test_sampled_labels_do_not_depend_on_the_batch(decoder, scan):
    """Guards: labels, and so curvature, that depend on batch mates."""
    model = decoder(scan=scan)
    chosen = kronecker.factored(find_sites(model))
    one, other = (
        kronecker.covariances(model, chosen, batches("sampled", rows, **c), "sampled")
        for rows, c in ((range(6), {}), ([3, 1, 5, 0, 4, 2], dict(tokens_per_batch=8)))
    )
    for path, (A, S) in one.items():
        np.testing.assert_allclose(A, other[path][0], rtol=2e-4, atol=1e-6)
        np.testing.assert_allclose(S, other[path][1], rtol=2e-4, atol=1e-8)


def test_labels_are_drawn_from_the_models_predictions():
    rng = np.random.default_rng(0)
    logits = np.tile(rng.normal(size=(1, 1, 5)), (1, 20_000, 1)).astype(np.float32)
    uniform = rng.random((1, 20_000)).astype(np.float32)
    # The gradient of cross-entropy is p − onehot: its mean over draws is zero.
    gradient = jax.grad(
        lambda x: sampled_labels.sampled_loss(x, uniform, jnp.ones_like(uniform)).sum()
    )
    p = jax.nn.softmax(logits[0, 0])
    shares = p - np.asarray(gradient(logits))[0].mean(0)
    np.testing.assert_allclose(shares, p, atol=0.01)


def test_covariances_are_the_means_over_positions(decoder):
    """By hand, of the layers whose inputs and outputs are at hand: A of the first layer's query."""
    model = decoder(tied=False)
    chosen = kronecker.factored(find_sites(model))
    assert all("embedding" not in s.path and "head" not in s.path for s in chosen)
    found = kronecker.covariances(model, chosen, batches("data"), "data")
    fn, _ = functional.split(model)
    first = nnx_first_layer(model)
    xs = [np.asarray(first(table().tokens[a : b - 1][None]))[0] for a, b in pairs()]
    A = sum(x.T @ x for x in xs) / sum(map(len, xs))
    for name in ("query", "key", "value"):
        path = f"layers/attention/{name}/kernel"
        np.testing.assert_allclose(found[path][0][0], A, rtol=1e-4, atol=1e-5)
    for s in chosen:
        left, right = found[s.path]
        assert left.shape == (2, s.rows, s.rows) and right.shape == (2, s.columns, s.columns)
        np.testing.assert_allclose(left, np.swapaxes(left, 1, 2), atol=1e-6)
    # S by gradients: a layer whose input is one feature has δ for its gradient.
    bias = jnp.zeros((16,))
    for layer in (1,):
        expected = 0.0
        for a, b in pairs():
            row = table().tokens[a:b]
            delta = jax.grad(lambda z, row=row: loss_with(model, row, z))(
                jnp.zeros((b - a - 1, 16)) + bias
            )
            expected = expected + np.asarray(delta).T @ np.asarray(delta)
        S = found["layers/mlp/down/kernel"][1][layer]
        np.testing.assert_allclose(S, expected / table().scored.sum(), rtol=1e-4, atol=1e-7)


def test_covariances_are_of_scored_positions_alone(decoder, random_batch):
    """Guards: δ of positions of weight 0, which attention gives to them, counted in S."""
    model = decoder()
    (site,) = find_sites(model, "mlp/up")
    batch = random_batch([6, 6], 6)
    batch["weights"][0, ::2] = batch["weights"][1, :4] = 0
    scored = batch["weights"] > 0
    A, S = kronecker.covariances(model, [site], [batch], "data")[site.path]
    watched = {}

    def loss(added_LxBxTxN):
        """The loss with something added to each layer's product x W."""
        blocks, x = nnx.clone(model), model.embedding(batch["tokens"])
        sight, _ = model._sights(6)
        graphdef, state = nnx.split(blocks.layers)
        for i in range(2):
            block = nnx.merge(graphdef, jax.tree.map(lambda p, i=i: p[i], state))
            up = block.mlp.up

            def product(inputs, i=i, up=up):
                watched[i] = inputs
                return up(inputs) + added_LxBxTxN[i]

            object.__setattr__(block.mlp, "up", product)
            x = block(x, sight)
        logits = model.logits(model.final_norm(x))
        return losses.cross_entropy(logits, batch["targets"], batch["weights"]).sum()

    added = jnp.zeros((2, 2, 6, site.columns))
    loss(added)
    xs = [np.asarray(watched[i]) for i in range(2)]
    deltas = np.asarray(jax.grad(loss)(added))
    for i in range(2):
        assert np.abs(deltas[i][~scored]).max() > 0 or i == 1
        for got, rows in ((A[i], xs[i][scored]), (S[i], deltas[i][scored])):
            np.testing.assert_allclose(got, rows.T @ rows / scored.sum(), rtol=1e-4, atol=1e-6)


def pairs():
    starts = table().starts
    return list(zip(starts[:-1], starts[1:], strict=True))


def nnx_first_layer(model):
    """Tokens to the first layer's normalised input."""
    graphdef, state = nnx.split(model.layers)
    block = nnx.merge(graphdef, jax.tree.map(lambda x: x[0], state))
    return lambda ids: block.attention_norm(model.embedding(ids))


def loss_with(model, row, added_TxD):
    """A passage's loss with something added to the last layer's output, which is mlp/down's."""
    stream = model.residual_stream(row[:-1][None], 2) + added_TxD[None]
    logits = model.logits(model.final_norm(stream))
    return losses.cross_entropy(logits, row[1:][None], jnp.ones((1, len(row) - 1)))[0]


@pytest.mark.parametrize("scan", [True, pytest.param(False, marks=pytest.mark.slow)])
@pytest.mark.parametrize("labels", ["sampled", "data"])
def test_eigenvalues_are_the_mean_squares_of_turned_gradients(decoder, scan, labels):
    """Guards: K-FAC's eigenvalues instead of the corrected ones; padding counted as an example."""
    model = decoder(scan=scan)
    whole = examples(model, labels)
    chosen = list(whole)
    A_and_S = kronecker.covariances(model, chosen, batches(labels), labels)
    bases = kronecker.eigenvectors(A_and_S)
    found = kronecker.corrected(model, chosen, batches(labels), labels, bases)
    for s in chosen:
        Q = bases[s.path]
        for ends, X in zip((Q.left, Q.right), A_and_S[s.path], strict=True):
            turned = np.swapaxes(ends, -1, -2) @ np.asarray(X) @ ends
            values = np.diagonal(turned, axis1=-1, axis2=-2)
            off = turned - np.eye(ends.shape[-1]) * values[..., None, :]
            assert np.abs(off).max() < 1e-4 * values.max()
            assert (np.diff(values, axis=-1) < 1e-4 * values.max()).all()
        turned = np.swapaxes(Q.left, -1, -2) @ whole[s] @ Q.right
        np.testing.assert_allclose(
            found[s.path].values,
            np.square(turned).mean(0),
            rtol=1e-3,
            atol=1e-5 * np.square(turned).max(),
        )


class Recurrent(nnx.Module):
    """A layer called once, twice, or `calls` times by a scan."""

    def __init__(self, calls, by_scan=False):
        rngs = nnx.Rngs(0)
        self.embed, self.inner = nnx.Embed(50, 4, rngs=rngs), nnx.Linear(4, 4, rngs=rngs)
        self.out, self.calls, self.by_scan = nnx.Linear(4, 50, rngs=rngs), calls, by_scan

    def __call__(self, tokens):
        def step(x, _):
            return jnp.tanh(self.inner(x)), None

        x = self.embed(tokens)
        if self.by_scan:
            return self.out(jax.lax.scan(step, x, None, length=self.calls)[0])
        for _ in range(self.calls):
            x, _ = step(x, None)
        return self.out(x)


def eigenvalues_and_mean_squares(model):
    """Λ of the inner layer, and the same by numpy from whole gradients."""
    chosen = find_sites(model, include="inner/kernel")
    bases = {chosen[0].path: kronecker.Curvature(*(np.linalg.qr(Z)[0] for Z in noise(2)))}
    (batch,) = batches("data", bucket_lengths=(8,), tokens_per_batch=48)
    G = np.asarray(whole_gradients(model, batch)[chosen[0].path], np.float64)
    Q = bases[chosen[0].path]
    mean_squares = np.square(Q.left.T @ G @ Q.right).mean(0)
    curvature = kronecker.corrected(model, chosen, batches("data"), "data", bases)
    return curvature[chosen[0].path].values, mean_squares


def noise(count):
    return np.random.default_rng(3).normal(size=(count, 4, 4)).astype(np.float32)


def test_eigenvalues_of_a_layer_that_is_called_once_are_mean_squares():
    values, mean_squares = eigenvalues_and_mean_squares(Recurrent(1))
    np.testing.assert_allclose(values, mean_squares, rtol=1e-4)


@pytest.mark.parametrize("by_scan", [False, True])
def test_layer_that_is_called_several_times_is_refused(by_scan):
    """Guards: squares that are added call by call, without the products of two calls."""
    with pytest.raises(ValueError, match="inner/kernel is called several times"):
        eigenvalues_and_mean_squares(Recurrent(3, by_scan))


class Scaled(nnx.Linear):
    """A layer with an attribute, whose name the class attribute `name` gives, that it reads."""

    name = ""

    def __call__(self, x):
        return super().__call__(x) * getattr(self, self.name)


@pytest.mark.parametrize("name", ["taps", "axes_seen", "watch", "factors", "watched_path"])
@pytest.mark.parametrize("kind", [int, nnx.Param])
def test_layers_may_have_attributes_of_any_name(name, kind):
    """Guards: names of the package's own on a user's layer that replace the layer's."""
    model, named = Recurrent(1), Recurrent(1)
    named.inner = type("Named", (Scaled,), {"name": name})(4, 4, rngs=nnx.Rngs(1))
    named.inner.kernel = nnx.Param(model.inner.kernel[...])
    setattr(named.inner, name, 1 if kind is int else nnx.Param(jnp.ones(4)))
    (batch,) = batches("data", bucket_lengths=(8,), tokens_per_batch=48)
    results = []
    for m in (model, named):
        chosen = find_sites(m, include="inner/kernel")
        (whole,) = GradientFactors(m, chosen)(batch)["inner/kernel"]
        encodings = make_encoder(m, P, include="inner/kernel")(batch)
        results.append((eigenvalues_and_mean_squares(m)[0], encodings, *whole))
    for plain, of_named in zip(*results, strict=True):
        np.testing.assert_allclose(of_named, plain, rtol=1e-4, atol=1e-6)


def fitted(model):
    chosen = kronecker.factored(find_sites(model))
    of = kronecker.covariances(model, chosen, batches("sampled"), "sampled")
    bases = kronecker.eigenvectors(of)
    return chosen, kronecker.corrected(model, chosen, batches("sampled"), "sampled", bases)


def dense_root(c, layer, damping, power):
    """(F + λ)^power as a matrix on flattened gradients, from Q_A ⊗ Q_S and Λ."""
    Q = np.kron(np.asarray(c.left[layer], np.float64), np.asarray(c.right[layer], np.float64))
    values = c.values[layer].reshape(-1).astype(np.float64)
    return (Q * (values + damping * values.mean()) ** power) @ Q.T


@pytest.mark.slow
@pytest.mark.parametrize("scan", [True, False])
def test_influence_is_that_of_the_dense_inverse(decoder, random_batch, scan):
    """The whole inverse of F, as a matrix, between whole gradients; and its root, projected."""
    model = decoder()
    chosen, curvature = fitted(model)
    if not scan:
        stacked, model = curvature, decoder(scan=False)
        chosen, curvature = fitted(model)
        for s in chosen:
            layer = int(s.path.split("/")[1])
            path = s.path.replace(f"layers/{layer}", "layers")
            np.testing.assert_allclose(
                curvature[s.path].values.sum(), stacked[path].values[layer].sum(), rtol=1e-3
            )
    batch = random_batch([6, 4, 3], 6)
    whole = whole_gradients(model, batch)
    ends = kronecker.ekfac_taps(chosen, P, curvature)
    encoder = build_encoder(model, [(P, ends)])
    got = np.asarray(encoder(batch), np.float64)
    expected = np.zeros_like(got)
    for s in chosen:
        G = np.asarray(jax.vmap(s.matrix)(whole[s.path]), np.float64)
        c = curvature[s.path]
        if s.stack is None:
            G, c = G[:, None], kronecker.Curvature(*(x[None] for x in dataclasses.astuple(c)))
        A, B = projections_of(s)
        for layer, block in enumerate(encoder.layout.members[s.path]):
            root = dense_root(c, layer, kronecker.DAMPING, -0.5)
            turned = (G[:, layer].reshape(3, -1) @ root).reshape(3, s.rows, s.columns)
            at = encoder.layout.slices[block]
            expected[:, at] += (A[layer].T @ turned @ B[layer]).reshape(3, -1)
            # The influence itself: the root, twice, is the inverse.
            flat = G[:, layer].reshape(3, -1)
            inverse = dense_root(c, layer, kronecker.DAMPING, -1.0)
            np.testing.assert_allclose(root @ root, inverse, rtol=1e-6, atol=1e-6 * inverse.max())
            assert np.linalg.norm(flat @ inverse @ flat.T) > 0
    np.testing.assert_allclose(got, expected, rtol=2e-3, atol=2e-4 * np.abs(expected).max())


def projections_of(site):
    from tda.gradients import projection as projections

    A, B = projections.matrices(site, P)
    return (A[None], B[None]) if site.stack is None else (A, B)


@pytest.mark.slow
def test_projected_influence_tends_to_the_dense_one(decoder, random_batch):
    """With as many dimensions as there are weights and more, cosines come near."""
    model = decoder()
    chosen, curvature = fitted(model)
    batch = random_batch([6, 4, 3, 5], 6)
    whole = whole_gradients(model, batch)
    dense = np.zeros((4, 4))
    for s in chosen:
        G = np.asarray(jax.vmap(s.matrix)(whole[s.path]), np.float64)
        for layer in range(2):
            flat = G[:, layer].reshape(4, -1)
            dense += flat @ dense_root(curvature[s.path], layer, kronecker.DAMPING, -1.0) @ flat.T
    wide = Projection(side=96, pooling="matrix")
    encoder = build_encoder(model, [(wide, kronecker.ekfac_taps(chosen, wide, curvature))])
    x = np.asarray(encoder(batch), np.float64)
    assert np.linalg.norm(x @ x.T - dense) < 0.1 * np.linalg.norm(dense)


def test_without_turning_and_damping_it_is_the_plain_encoder(decoder, random_batch):
    """Bases of unit vectors and Λ = 1 leave the gradient as it is, but for the damping's root."""
    model, batch = decoder(), random_batch([6, 4], 6)
    chosen = kronecker.factored(find_sites(model))

    def unit(s):
        eye = [np.tile(np.eye(n, dtype=np.float32), (2, 1, 1)) for n in (s.rows, s.columns)]
        return kronecker.Curvature(*eye, np.ones((2, s.rows, s.columns), np.float32))

    ends = kronecker.ekfac_taps(chosen, P, {s.path: unit(s) for s in chosen}, damping=3.0)
    got = build_encoder(model, [(P, ends)])(batch)
    expected = make_encoder(model, P)(batch)
    np.testing.assert_allclose(np.asarray(got) * 2, expected, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("damping", [0.0, -0.1, float("nan")])
def test_ekfac_without_damping_is_refused(damping):
    """Guards: directions scaled without bound."""
    with pytest.raises(ValueError, match="damping=.* of EK-FAC must be above 0, such as 0.1"):
        kronecker.inverse_root_values(None, None, damping)


def test_logra_projects_on_the_leading_eigenvectors(decoder, random_batch):
    model, batch = decoder(), random_batch([6, 4], 6)
    chosen = kronecker.factored(find_sites(model))
    of = kronecker.covariances(model, chosen, batches("data"), "data")
    curvature = kronecker.eigenvectors(of, keep=P.side)
    encoder = build_encoder(model, [(P, kronecker.logra_taps(chosen, P.side, curvature))])
    got = np.asarray(encoder(batch))
    whole = whole_gradients(model, batch)
    for s in chosen:
        G = np.asarray(jax.vmap(s.matrix)(whole[s.path]))
        for layer, block in enumerate(encoder.layout.members[s.path]):
            U = [np.linalg.eigh(np.asarray(x[layer], np.float64))[1][:, ::-1] for x in of[s.path]]
            expected = U[0][:, :4].T @ G[:, layer] @ U[1][:, :4]
            found = got[:, encoder.layout.slices[block]].reshape(2, 4, 4)
            # An eigenvector's sign is free.
            np.testing.assert_allclose(
                np.abs(found), np.abs(expected), rtol=1e-2, atol=1e-3 * np.abs(expected).max()
            )


def test_few_rows_leave_zeros_behind(decoder):
    model = decoder()
    chosen = kronecker.factored(find_sites(model, include="key"))
    of = kronecker.covariances(model, chosen, batches("data"), "data")
    ends = kronecker.logra_taps(chosen, 12, kronecker.eigenvectors(of, keep=12))
    (end,) = ends.values()
    assert end.right.shape == (2, 8, 12) and not np.asarray(end.right)[..., 8:].any()
    assert np.asarray(end.left).any(axis=1).all()


def test_what_cannot_be_factored_is_told(decoder):
    with pytest.raises(ValueError, match="no linear layer is among embedding/embedding"):
        kronecker.factored(find_sites(decoder(), include="embedding"))
    chosen = kronecker.factored(find_sites(decoder()))
    with pytest.raises(ValueError, match="no position"):
        kronecker.covariances(decoder(), chosen, [], "data")


@pytest.mark.slow
def test_eight_devices_factor_as_one_does(decoder, random_batch):
    """Guards: sums over a batch's positions that stop at a device's own."""
    model = decoder()
    chosen, expected = fitted(model)
    mesh = sharding.make_mesh(data=2, fsdp=2, tensor=2)
    fn, params = functional.split(model)
    spread = fn.merge(functional.place(params, fn.axes, mesh))
    some = batches("sampled", mesh=mesh)
    bases = kronecker.eigenvectors(kronecker.covariances(spread, chosen, some, "sampled"))
    found = kronecker.corrected(spread, chosen, some, "sampled", bases)
    for path, c in found.items():
        # An eigenvector's sign is free, and so is not in Λ.
        largest = expected[path].values.max()
        np.testing.assert_allclose(
            c.values.sum((-1, -2)), expected[path].values.sum((-1, -2)), rtol=1e-3
        )
        assert c.values.max() == pytest.approx(largest, rel=1e-2)
    batch = random_batch([6, 4, 2, 6, 5, 1, 3, 6], 6)
    encoder = build_encoder(spread, [(P, kronecker.ekfac_taps(chosen, P, expected))])
    placed = encoder.place(mesh)
    alone = build_encoder(model, [(P, kronecker.ekfac_taps(chosen, P, expected))])
    with jax.set_mesh(mesh):
        got = placed(sharding.put_batch(mesh, batch))
    wanted = np.asarray(alone(batch))
    np.testing.assert_allclose(got, wanted, rtol=1e-3, atol=1e-4 * np.abs(wanted).max())
