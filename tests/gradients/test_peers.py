"""EK-FAC, TRAK and LoGra against outside implementations, the same tiny model in PyTorch.

Each runs where its package is installed, PyTorch for a CPU being enough: `pip install kronfluence
traker dattri`, in an environment of its own: kronfluence brings a package named `tests`, which
hides this one.
"""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from tda import hessian
from tda.data import tokens
from tda.data.batches import BatchLayout
from tda.evaluation.likelihood import Likelihood
from tda.gradients import kronecker, reference, sampled_labels, taps
from tda.gradients.encoder import build_encoder
from tda.gradients.projection import Projection
from tda.gradients.sites import find_sites
from tda.retrieval.sources import InMemory

pytestmark = pytest.mark.slow

V, D, T, PASSAGES, QUERIES = 30, 8, 5, 200, 6
TRACKED = ("up", "down")


class Tiny(nnx.Module):
    """An embedding, two layers over running means of positions, and an output matrix."""

    def __init__(self, rngs):
        self.embedding = nnx.Embed(V, D, rngs=rngs)
        self.up, self.down, self.out = (
            nnx.Linear(D, n, use_bias=False, rngs=rngs) for n in (D, D, V)
        )

    def __call__(self, ids):
        h = self.embedding(ids)
        h = jnp.cumsum(h, axis=1) / jnp.arange(1, ids.shape[1] + 1)[:, None]
        return self.out(h + self.down(jnp.tanh(self.up(h))))


def in_torch(model):
    """The same model with the same weights."""
    torch = pytest.importorskip("torch")

    class Same(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.embedding = torch.nn.Embedding(V, D)
            self.up, self.down = (torch.nn.Linear(D, D, bias=False) for _ in TRACKED)
            self.out = torch.nn.Linear(D, V, bias=False)

        def forward(self, ids):
            ids = ids if ids.ndim == 2 else ids[None]  # dattri looks at one example first
            h = self.embedding(ids)
            h = h.cumsum(1) / torch.arange(1, ids.shape[1] + 1)[:, None]
            return self.out(h + self.down(torch.tanh(self.up(h))))

    same = Same()
    weights = {f"{n}.weight": getattr(model, n).kernel[...].T for n in (*TRACKED, "out")}
    weights["embedding.weight"] = model.embedding.embedding[...]
    same.load_state_dict({n: torch.tensor(np.array(x)) for n, x in weights.items()})
    return torch, same.eval()


def table(count, seed, scored_from=1):
    """Random sequences of T + 1 tokens, scored from a position on."""
    starts = np.arange(count + 1) * (T + 1)
    scored = np.tile(np.arange(T + 1) >= scored_from, count)
    drawn = np.random.default_rng(seed).integers(0, V, starts[-1]).astype(np.int32)
    names = [f"p{i}" for i in range(count)]
    return tokens.TokenTable(names, names, drawn, starts, scored)


def batch_of(rows):
    ids = rows.tokens.reshape(-1, T + 1)
    weights = rows.scored.reshape(-1, T + 1)[:, 1:].astype(np.float32)
    return {"tokens": ids[:, :-1], "targets": ids[:, 1:], "weights": weights}


@pytest.fixture(scope="module")
def setting():
    """A model that fits its passages somewhat, and its sites."""
    model = Tiny(nnx.Rngs(0))
    for name in ("up", "down", "out"):
        kernel = getattr(model, name).kernel
        kernel[...] = 2.0 * kernel[...]
    return model, find_sites(model, include="up|down")


def spearman(a, b):
    ranks = [np.argsort(np.argsort(x.ravel())) for x in (a, b)]
    return np.corrcoef(*ranks)[0, 1]


def dataset(torch, rows):
    ids = torch.tensor(rows.tokens.reshape(-1, T + 1).astype(np.int64))
    return torch.utils.data.TensorDataset(ids[:, :-1], ids[:, 1:])


def test_ekfac_is_kronfluences(setting, tmp_path):
    """Labels of the data on both sides: those that are drawn differ by generator."""
    pytest.importorskip("kronfluence")
    from kronfluence.analyzer import Analyzer, prepare_model
    from kronfluence.arguments import FactorArguments, ScoreArguments
    from kronfluence.task import Task

    model, chosen = setting
    torch, same = in_torch(model)

    class NextToken(Task):
        def compute_train_loss(self, batch, model, sample=False):
            logits = model(batch[0]).reshape(-1, V)
            return torch.nn.functional.cross_entropy(logits, batch[1].reshape(-1), reduction="sum")

        def compute_measurement(self, batch, model):
            return self.compute_train_loss(batch, model)

        def get_influence_tracked_modules(self):
            return list(TRACKED)

    passages, queries = table(PASSAGES, 1), table(QUERIES, 2)
    task = NextToken()
    analyzer = Analyzer("tiny", prepare_model(same, task), task, cpu=True, output_dir=str(tmp_path))
    analyzer.fit_all_factors(
        "f",
        dataset(torch, passages),
        per_device_batch_size=20,
        factor_args=FactorArguments(
            strategy="ekfac", use_empirical_fisher=True, eigendecomposition_dtype=torch.float64
        ),
    )
    analyzer.compute_pairwise_scores(
        "s",
        "f",
        dataset(torch, queries),
        dataset(torch, passages),
        per_device_query_batch_size=QUERIES,
        per_device_train_batch_size=20,
        score_args=ScoreArguments(damping_factor=None),
    )
    theirs = analyzer.load_pairwise_scores("s")["all_modules"].numpy()

    def batches():
        layout = BatchLayout((T,), tokens_per_batch=20 * T, pad=0)
        return sampled_labels.batches(passages, np.arange(PASSAGES), labels="data", layout=layout)

    bases = kronecker.eigenvectors(kronecker.covariances(model, chosen, batches(), "data"))
    curvature = kronecker.corrected(model, chosen, batches(), "data", bases)
    whole = [
        jax.jit(lambda b: reference.per_example_gradients(model, b))(batch_of(rows))
        for rows in (queries, passages)
    ]
    exact = np.zeros((QUERIES, PASSAGES))
    for s in chosen:
        c = curvature[s.path]
        q, p = (c.left.T @ np.asarray(w[s.path], np.float64) @ c.right for w in whole)
        damped = c.values + kronecker.DAMPING * c.values.mean()
        exact += np.einsum("qmn,pmn->qp", q / damped, p)
    np.testing.assert_allclose(exact, theirs, rtol=2e-3, atol=2e-3 * np.abs(theirs).std())
    # And the encodings that are compared in a table: the same on average over projections.
    projection = Projection(side=256, pooling="matrix")
    ends = kronecker.ekfac_taps(chosen, projection, curvature)
    encoder = build_encoder(model, [(projection, ends)])
    q, p = (np.asarray(encoder(batch_of(rows))) for rows in (queries, passages))
    assert spearman(q @ p.T, theirs) > 0.95
    # Orthogonal matrices in the projection's place keep every inner product: the scores are equal.
    turned = {
        s: taps.Tap(jnp.eye(D), jnp.eye(D), D, end.scale, bases=end.bases)
        for s, end in ends.items()
    }
    unprojected = build_encoder(model, [(Projection(side=D, pooling="matrix"), turned)])
    q, p = (np.asarray(unprojected(batch_of(rows))) for rows in (queries, passages))
    np.testing.assert_allclose(q @ p.T, theirs, rtol=2e-3, atol=2e-3 * np.abs(theirs).std())
    assert spearman(q @ p.T, theirs) > 0.999


def full(model, chosen, output):
    """The encoder without a projection: identities in its place."""
    ends = {s: taps.Tap(jnp.eye(D), jnp.eye(D), D) for s in chosen}
    return build_encoder(model, [(Projection(side=D, pooling="matrix"), ends)], output)


def test_trak_is_trakers(setting, tmp_path):
    """One layer, so that both have one R; one token is scored, so that 1 − p is the same number."""
    pytest.importorskip("trak")
    from trak import TRAKer
    from trak.modelout_functions import AbstractModelOutput
    from trak.projectors import NoOpProjector

    model, chosen = setting
    chosen = [s for s in chosen if s.path == "up/kernel"]
    torch, same = in_torch(model)

    class Margin(AbstractModelOutput):
        def __init__(self):
            self.partition_fn = None

        @staticmethod
        def get_output(model, weights, buffers, ids, target):
            logits = torch.func.functional_call(model, (weights, buffers), ids[None])[0, -1]
            hit = torch.arange(V) == target
            picked, others = (logits * hit).sum(), logits.where(~hit, -torch.inf)
            return (picked - others.logsumexp(0)).sum()

        def get_out_to_loss_grad(self, model, weights, buffers, batch):
            logits = torch.func.functional_call(model, (weights, buffers), batch[0])[:, -1]
            p = logits.softmax(-1)[torch.arange(len(logits)), batch[1]]
            return (1 - p).clone().detach().unsqueeze(-1)

    passages, queries = table(PASSAGES, 1, scored_from=T), table(QUERIES, 2, scored_from=T)

    def batches(rows, size):
        ids, targets = dataset(torch, rows).tensors
        for i in range(0, len(ids), size):
            yield ids[i : i + size], targets[i : i + size, -1]

    traker = TRAKer(
        same,
        Margin(),
        train_set_size=PASSAGES,
        save_dir=str(tmp_path),
        device="cpu",
        projector=NoOpProjector(D * D, D * D, 0, None, "cpu"),
        proj_dim=D * D,
        use_half_precision=False,
        grad_wrt=["up.weight"],
    )
    traker.load_checkpoint(same.state_dict(), model_id=0)
    for batch in batches(passages, 20):
        traker.featurize(batch, num_samples=len(batch[0]))
    traker.finalize_features()
    traker.start_scoring_checkpoint("q", same.state_dict(), model_id=0, num_targets=QUERIES)
    for batch in batches(queries, QUERIES):
        traker.score(batch, num_samples=QUERIES)
    theirs = np.array(traker.finalize_scores("q")).T

    encoder = full(model, chosen, "margin")
    q, p = (np.asarray(encoder(batch_of(rows))) for rows in (queries, passages))
    whole = [slice(0, D * D)]
    roots = hessian.inverse_root(hessian.autocorrelation_of_source(InMemory(p, whole)).blocks, 1e-7)
    nats = Likelihood(model, BatchLayout((T,), 100, pad=0))(passages).nats
    kernel = (
        np.asarray(hessian.whiten(q, roots, whole)) @ np.asarray(hessian.whiten(p, roots, whole)).T
    )
    ours = kernel * (1 - np.exp(-nats))
    assert spearman(ours, theirs) > 0.99
    scale = (ours * theirs).sum() / (theirs * theirs).sum()
    np.testing.assert_allclose(ours, scale * theirs, rtol=0, atol=0.02 * np.abs(ours).max())


def test_logra_is_dattris(setting, tmp_path, monkeypatch):
    """With as many components as a layer has, R⁻¹ undoes any projection: theirs is random."""
    pytest.importorskip("dattri")
    monkeypatch.chdir(tmp_path)  # It leaves a file where it is run.
    from dattri.algorithm.logra import LoGraAttributor
    from dattri.task import AttributionTask

    model, chosen = setting
    torch, same = in_torch(model)
    passages, queries = table(PASSAGES, 1), table(QUERIES, 2)
    # It takes the cross-entropy of what the model returns itself: classes are the second axis.
    same.register_forward_hook(lambda module, ids, logits: logits.transpose(1, 2))

    def loss(model, batch, device):
        return torch.nn.functional.cross_entropy(model(batch[0]), batch[1])

    torch.manual_seed(0)
    task = AttributionTask(loss_func=loss, model=same, checkpoints=[same.state_dict()])
    attributor = LoGraAttributor(task, list(TRACKED), hessian="eFIM", damping=1e-7, proj_dim=D * D)
    load = lambda rows, size: torch.utils.data.DataLoader(  # noqa: E731
        dataset(torch, rows), batch_size=size, shuffle=False
    )
    attributor.cache(load(passages, 20))
    theirs = attributor.attribute(load(passages, 20), load(queries, QUERIES)).numpy().T

    def batches():
        layout = BatchLayout((T,), tokens_per_batch=20 * T, pad=0)
        return sampled_labels.batches(passages, np.arange(PASSAGES), labels="data", layout=layout)

    of = kronecker.covariances(model, chosen, batches(), "data")
    ends = kronecker.logra_taps(chosen, D, kronecker.eigenvectors(of, keep=D))
    encoder = build_encoder(model, [(Projection(side=D, pooling="matrix"), ends)])
    q, p = (np.asarray(encoder(batch_of(rows))) for rows in (queries, passages))
    slices = [slice(0, D * D), slice(D * D, 2 * D * D)]
    roots = hessian.inverse_root(
        hessian.autocorrelation_of_source(InMemory(p, slices)).blocks, 1e-7
    )
    ours = (
        np.asarray(hessian.whiten(q, roots, slices))
        @ np.asarray(hessian.whiten(p, roots, slices)).T
    )
    assert spearman(ours, theirs) > 0.99
    scale = (ours * theirs).sum() / (theirs * theirs).sum()
    np.testing.assert_allclose(ours, scale * theirs, rtol=0, atol=0.03 * np.abs(ours).max())
