"""Tail-patch and target statistics against direct computations on a tiny model."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import nnx

from tda import loss as losses
from tda.data import tokenised, tokens
from tda.data.batches import BatchLayout, materialise
from tda.data.documents import Document
from tda.data.tokenizer import Tokenizer
from tda.evaluation import tail_patch
from tda.evaluation.likelihood import Likelihood, target_statistics
from tda.evaluation.tail_patch import TailPatch, change, log_change
from tda.model import functional
from tda.model.decoder import Decoder
from tda.model.settings import DecoderSettings
from tda.training import loop, optimizer

BUCKETS = (8, 16, 32)


@pytest.fixture(scope="module")
def setup():
    texts = ["Paris is in France.", "Oslo is in Norway and it is cold there.", "Rome is in Italy."]
    tokenizer = Tokenizer.train(texts, 300)
    documents = [Document(str(i), t) for i, t in enumerate(texts)]
    table, _ = tokenised.tokenise_in_memory(documents, tokenizer, 32)
    questions = [("a", "Paris is in", "France"), ("b", "Oslo is", "in Norway")]
    queries = tokens.tokenise_queries(questions, tokenizer, 32)
    settings = DecoderSettings(
        vocab_size=tokenizer.vocab_size, width=16, layers=2, heads=2, kv_heads=1, head_width=8,
        ff_width=24,
    )  # fmt: skip
    model = Decoder(settings, rngs=nnx.Rngs(0))
    return tokenizer, table, queries, model


@pytest.fixture(scope="module")
def summed_nats(setup):
    """A compiled function: −log p of one sequence of a table under some parameters."""
    tokenizer, _, _, model = setup
    model_fn, params = functional.split(model)

    @jax.jit
    def nats(params, batch):
        logits = model_fn.apply(params, batch["tokens"])
        return losses.cross_entropy(logits, batch["targets"], batch["weights"])[0]

    gradient = jax.jit(jax.grad(nats))

    def one(table, row, params=params, gradients=False):
        batch = materialise(table, np.array([row]), 32, 1, tokenizer.pad).arrays()
        return (gradient if gradients else nats)(params, batch)

    return one


def test_target_statistics_are_those_of_the_models_logits(setup, summed_nats):
    tokenizer, _, queries, model = setup
    likelihood = Likelihood(model, BatchLayout(BUCKETS, 64, tokenizer.pad))
    targets = likelihood(queries)
    last_alone = likelihood(queries, [1])
    assert last_alone.nats == pytest.approx(targets.nats[1:], rel=1e-6)
    assert last_alone.ranks.tolist() == targets.ranks[1:].tolist()
    for row in range(2):
        assert targets.nats[row] == pytest.approx(float(summed_nats(queries, row)), rel=1e-5)
        ids = queries.tokens[queries.starts[row] : queries.starts[row + 1]]
        is_target = queries.scored[queries.starts[row] : queries.starts[row + 1]]
        logits = np.asarray(model(jnp.asarray(ids[None, :-1])))[0]
        ranks = [
            1 + int((logits[t - 1] > logits[t - 1, ids[t]]).sum())
            for t in range(1, len(ids))
            if is_target[t]
        ]
        assert targets.ranks[row] == max(ranks)


@pytest.mark.parametrize(
    "logits, target, rank",
    [
        ([0.0, 1.0, 1.0], 1, 1),  # greedy decoding takes the first of equal logits
        ([0.0, 1.0, 1.0], 2, 2),
        ([0.0, 1.0, 1.0], 0, 3),
        ([0.0, np.nan, 1.0], 2, 2),
        ([0.0, np.nan, 1.0], 1, 4),  # nothing is known of the target: behind all
    ],
)
def test_rank_one_is_the_token_that_greedy_decoding_takes(logits, target, rank):
    logits_1x1xV, targets_1x1 = jnp.asarray([[logits]]), jnp.asarray([[target]])
    _, ranks = target_statistics(logits_1x1xV, targets_1x1, jnp.ones((1, 1)))
    assert ranks.tolist() == [rank]


@pytest.mark.parametrize("name", ["adam", "adafactor"])
def test_tail_patch_is_one_restored_step_on_each_passage_alone(
    setup, summed_nats, name, monkeypatch
):
    tokenizer, table, queries, model = setup
    tx = optimizer.make_optimizer(name, optax.constant_schedule(1e-2))
    model_fn, params = functional.split(model)
    opt_state = tx.init(params)
    # An optimizer state that is not fresh: momentum and second moments of another step.
    noise = jax.tree.map(lambda p: 0.01 * jnp.cos(jnp.arange(p.size)).reshape(p.shape), params)
    _, opt_state = jax.jit(tx.update)(noise, opt_state, params)
    state = {"params": params, "opt_state": opt_state, "step": jnp.int32(1)}
    pairs = [(0, -1), (0, 0), (1, 0), (0, 2), (1, 1)]
    monkeypatch.setattr(tail_patch, "_PAIRS_PER_CALL", 2)
    layout = BatchLayout(BUCKETS, 64, tokenizer.pad)
    log_p = TailPatch(model_fn, state, tx, layout)(table, queries, pairs)
    changes, logs = change(log_p), log_change(log_p)
    update = jax.jit(tx.update)
    for i, (q, p) in enumerate(pairs):
        gradient = jax.tree.map(jnp.zeros_like, params)
        if p >= 0:
            count = table.scored[table.starts[p] : table.starts[p + 1]].sum()
            summed = summed_nats(table, p, params, gradients=True)
            gradient = jax.tree.map(lambda g, count=count: g / count, summed)
        updates, _ = update(gradient, opt_state, params)
        patched = optax.apply_updates(params, updates)
        before = -float(summed_nats(queries, q))
        after = -float(summed_nats(queries, q, patched))
        assert log_p[i] == pytest.approx([before, after], rel=1e-5)
        assert changes[i] == pytest.approx(np.exp(after) - np.exp(before), rel=1e-3, abs=1e-8)
        assert logs[i] == pytest.approx(after - before, rel=1e-3, abs=1e-5)
    assert changes[1] > changes[0]  # stating the fact helps more than momentum alone


def test_one_step_on_a_passage_serves_all_of_its_queries(setup, monkeypatch):
    tokenizer, table, queries, model = setup
    tx, steps = optimizer.make_optimizer("adam", optax.constant_schedule(1e-2)), []

    def counted(*args):
        jax.debug.callback(lambda: steps.append(1))
        return loop.train_step(*args)

    monkeypatch.setattr(tail_patch, "train_step", counted)
    model_fn, params = functional.split(model)
    state = {"params": params, "opt_state": tx.init(params), "step": jnp.int32(0)}
    patch = TailPatch(model_fn, state, tx, BatchLayout((32,), 64, tokenizer.pad))
    log_p = patch(table, queries, [(0, 2), (1, 0), (1, 2), (0, 0), (0, -1), (1, -1)])
    jax.effects_barrier()
    assert len(steps) == 3
    # The bits do not depend on what else is measured.
    alone = np.concatenate([patch(table, queries, [pair]) for pair in [(1, 2), (0, 0), (1, -1)]])
    np.testing.assert_array_equal(log_p[[2, 3, 5]], alone)


def test_changes_of_improbable_targets_do_not_cancel():
    log_p = np.array([[-40.0, -40.0 + 1e-9], [np.log(0.25), np.log(0.75)], [-1.0, -1.0]])
    assert change(log_p) == pytest.approx([np.exp(-40.0) * 1e-9, 0.5, 0.0], rel=1e-5, abs=0)
    assert log_change(log_p) == pytest.approx([1e-9, np.log(3.0), 0.0], rel=1e-5)
