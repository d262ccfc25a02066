"""LDS, MRR and tail-patch against quanda's and dattri's, on the same scores and the same model.

Both are from PyPI, and are no dependency of the project: quanda 0.5 needs captum, which asks for a
numpy below 2. The tests run where the two can be imported.
"""

import numpy as np
import optax
import pytest

from tda.counterfactual import figures
from tda.counterfactual.bank import Bank
from tda.data.batches import BatchLayout
from tda.data.tokens import TokenTable
from tda.evaluation.ranking import reciprocal_ranks
from tda.evaluation.tail_patch import TailPatch, change
from tda.model import functional, pretrained
from tda.retrieval import by_score
from tests.model import tiny_llama

pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def scored():
    """Scores of 7 queries and 30 passages that tell a part of 40 retrainings without 6 each."""
    rng = np.random.default_rng(0)
    scores = rng.normal(size=(7, 30))
    removed = np.zeros((40, 30), bool)
    for row in removed:
        row[rng.choice(30, 6, replace=False)] = True
    losses = 3 + removed @ scores.T + 2 * rng.normal(size=(40, 7))
    return scores, Bank(removed, losses.astype(np.float32), np.full(7, 3, np.float32))


def test_lds_is_that_of_dattri_and_quanda(scored):
    """They sum over what is kept, and correlate with an output that falls as the loss rises."""
    metric = pytest.importorskip("dattri.metric")
    truth = pytest.importorskip("quanda.metrics.ground_truth")
    import torch

    scores, bank = scored
    ours = figures.lds({"m": scores}, bank, resamples=2).by_query["m"]
    assert 0.5 < ours.mean() < 0.95
    kept = np.stack([np.flatnonzero(~row) for row in bank.removed_MxU])
    output = torch.tensor(-bank.losses_MxQ)
    theirs, _ = metric.lds(torch.tensor(scores.T), (output, torch.tensor(kept)))
    np.testing.assert_allclose(ours, theirs, atol=1e-6)
    quandas = truth.LinearDatamodelingMetric(
        torch.nn.Linear(1, 1),
        torch.utils.data.TensorDataset(torch.zeros(30)),
        m=len(kept),
        subset_ids=kept.tolist(),
        subset_ckpt_filenames=[""] * len(kept),
    )
    nothing, logits = torch.zeros(7, dtype=torch.int64), dict(enumerate(output[..., None]))
    quandas.update(torch.tensor(scores), nothing, nothing, subset_logits=logits)
    np.testing.assert_allclose(ours, quandas.results["scores"][0], atol=1e-5)


def test_mrr_is_quandas(scored):
    """A query without a correct passage counts 0 there; here it is no part of the mean."""
    downstream = pytest.importorskip("quanda.metrics.downstream_eval")
    import torch

    scores, _ = scored
    rng = np.random.default_rng(1)
    labels = rng.random(scores.shape) < 0.1
    labels[:, 0] |= ~labels.any(axis=1)
    labels[6] = False
    correct = {"fact": [np.flatnonzero(row) for row in labels]}
    ranks = by_score.rank(scores, len(scores), correct=correct).first_ranks["fact"]
    metric = downstream.MRRMetric(
        torch.nn.Linear(1, 1), torch.utils.data.TensorDataset(torch.zeros(30))
    )
    metric.update(torch.tensor(scores), torch.tensor(labels))
    theirs = metric._per_sample_scores().numpy()
    np.testing.assert_allclose(np.nan_to_num(reciprocal_ranks(ranks)), theirs, atol=1e-6)
    assert np.isnan(reciprocal_ranks(ranks)[6]) and len(set(theirs)) > 3


def test_tail_patch_with_a_fresh_optimizer_is_quandas(tmp_path):
    """Theirs always starts a new optimizer; a run restores its own unless it is told `fresh`."""
    downstream = pytest.importorskip("quanda.metrics.downstream_eval")
    import tokenizers
    import torch
    import transformers

    path = tiny_llama.write(tmp_path / "model")
    vocabulary = tokenizers.models.WordLevel({str(i): i for i in range(tiny_llama.V)}, "0")
    transformers.PreTrainedTokenizerFast(
        tokenizer_object=tokenizers.Tokenizer(vocabulary), pad_token="0"
    ).save_pretrained(tmp_path / "tokenizer")
    rng = np.random.default_rng(0)
    passages, queries = rng.integers(1, tiny_llama.V, (6, 9)), rng.integers(1, tiny_llama.V, (3, 6))
    scores = rng.normal(size=(3, 6))
    labels = torch.full((3, 6), -100)
    labels[:, 4:] = torch.tensor(queries[:, 4:])
    metric = downstream.TailPatchMetric(
        transformers.LlamaForCausalLM.from_pretrained(path, dtype=torch.float32),
        [{"input_ids": torch.tensor(p), "labels": torch.tensor(p)} for p in passages],
        k=2,
        learning_rate=1e-2,
        optimizer_class=torch.optim.Adam,
        tokenizer_name=str(tmp_path / "tokenizer"),
    )
    inputs = {"input_ids": torch.tensor(queries), "attention_mask": torch.ones(3, 6)}
    metric.update(torch.tensor(scores), inputs, labels)

    def table(sequences, targets):
        names = [str(i) for i in range(len(sequences))]
        length = sequences.shape[1]
        scored = np.tile(np.arange(length) >= length - targets, len(sequences))
        starts = np.arange(len(sequences) + 1) * length
        return TokenTable(names, names, sequences.astype(np.int32).ravel(), starts, scored)

    model_fn, params = functional.split(pretrained.load(path, quiet=True))
    tx = optax.adam(1e-2)
    state = {"params": params, "opt_state": tx.init(params), "step": np.int32(0)}
    best = by_score.rank(scores, 3, k=2).proponents
    pairs = [(q, p) for q in range(3) for p in best[q]]
    patch = TailPatch(model_fn, state, tx, BatchLayout((8,), 64, pad=0))
    ours = change(patch(table(passages, 8), table(queries, 2), pairs)).reshape(3, 2).mean(axis=1)
    assert np.abs(ours).max() > 1e-4
    np.testing.assert_allclose(ours, metric.scores, rtol=2e-3, atol=1e-6)
