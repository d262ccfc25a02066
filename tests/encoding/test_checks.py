"""What cannot be traced is refused before anything is encoded, and the message says what to do."""

import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import linen, nnx

import tda
from tda.data.corpora import Corpus
from tda.data.rows import Query
from tda.data.tokenizer import Tokenizer
from tda.encoding import batch_inputs
from tda.encoding import table as encoding
from tda.gradients.moments import estimate
from tda.gradients.projection import Projection
from tests.test_api import QUERIES, TEXTS, Bigram

BATCH = {k: np.ones((8, 6), np.int32) for k in ("tokens", "targets")}
BATCH["weights"] = np.ones((8, 6), np.float32)


class Positions(nnx.Module):
    """A model with a table of 16 positions."""

    def __init__(self, vocab_size, max_positions):
        rngs = nnx.Rngs(0)
        self.embed = nnx.Embed(vocab_size, 8, rngs=rngs)
        self.positions = nnx.Embed(16, 8, rngs=rngs)
        self.out = nnx.Linear(8, vocab_size, rngs=rngs)
        self.max_positions = max_positions

    def __call__(self, tokens_BxT):
        x_TxD = self.positions(jnp.arange(tokens_BxT.shape[1]))
        return self.out(self.embed(tokens_BxT) + x_TxD)


class Net(linen.Module):
    @linen.compact
    def __call__(self, x):
        return linen.Dense(2)(x)


class Tensor:
    """An array of another library."""


Tensor.__module__ = "torch"


@pytest.fixture(scope="module")
def tokenizer():
    return Tokenizer.train(TEXTS, 300)


@pytest.fixture
def nothing_is_encoded(monkeypatch):
    def refuse(*arguments, **options):
        raise AssertionError("something was encoded or estimated")

    monkeypatch.setattr(encoding, "encode_kinds", refuse)
    monkeypatch.setattr(batch_inputs, "encode_each", refuse)
    monkeypatch.setattr(estimate, "estimate", refuse)


def call(trained, passages=TEXTS, queries=QUERIES, model=None, **options):
    model = Bigram(trained.vocab_size, nnx.Rngs(0)) if model is None else model
    options = dict(projection=Projection(side=4, pooling="matrix"), quiet=True) | options
    options = dict(tokenizer=trained) | options
    return tda.trace(model, passages, queries, **options)


def nats(model, batch):
    logits = model(batch["tokens"])
    return optax.softmax_cross_entropy_with_integer_labels(logits, batch["targets"])


SHAPE = r"the loss of \d examples has the shape"


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (dict(k=0), "k=0; give a whole number, 1 or more"),
        (dict(k=2.5), "k=2.5; give a whole"),
        (dict(k=True), "k=True; give a whole"),
        (dict(context=0), "context=0; give a whole"),
        (dict(tokens_per_batch=0), "tokens_per_batch=0; give a whole"),
        (dict(sample=0), "sample=0; give a whole"),
        (dict(damping=-0.5), "damping=-0.5; give 0 or more"),
        (dict(damping=float("nan")), "damping=nan; give 0 or more"),
        (dict(correction="x"), "unknown correction 'x'"),
        (dict(correction="x", method="grad_cos"), "unknown correction 'x'"),
        (dict(loss="nll"), "unknown output function 'nll'"),
        (dict(projection=8), "projection=8; give tda.Projection"),
        (dict(include="("), "include='\\(' is not a regular expression"),
        (dict(joiner=3), "joiner=3; give a string"),
        (dict(method="trackstar"), "R of 2 queries contains little.*use method='trackstar_train'"),
        (dict(loss=lambda m, b: nats(m, b).mean()), SHAPE + r" \(\), not \(2,\): it must be one"),
        (dict(loss=nats), SHAPE + r" \(2, 8\), not"),
        (dict(loss=lambda m, b: (nats(m, b).sum(-1), 1)), "the loss returns a tuple, not an array"),
        (dict(loss=lambda m, b: b["tokens"][:, 0]), "the loss has the dtype int32"),
        (dict(loss=lambda m, b: nats(m, b) * b["mask"]), "the loss reads 'mask', which a batch"),
        (dict(seed=-1), "seed=-1; give a whole number, 0 or more"),
        (dict(seed="x"), "seed='x'; give a whole number"),
        (dict(mesh=3), "mesh=3; give one of tda.runtime.sharding.make_mesh"),
        (dict(directory=5), "directory=5; give a string"),
        (dict(text_field=3), "text_field=3; give a string"),
        (dict(directory=""), "directory='' is empty; give a name"),
        (dict(id_field=""), "id_field='' is empty"),
        (dict(directory=__file__), "directory='.*test_checks.py' is a file; give a directory"),
        (dict(method=None), "method=None; give the name of one"),
        (dict(correction="none"), "correction 'none' is not made from second moments"),
    ],
)
def test_arguments_that_do_not_fit_are_refused_first(
    tokenizer, nothing_is_encoded, options, message
):
    with pytest.raises(ValueError, match=message):
        call(tokenizer, **options)


@pytest.mark.parametrize(
    ("model", "message"),
    [
        (Net(), "model is a Net, not an NNX module; wrap a Linen module"),
        (Tensor(), "model is a Tensor, not an NNX module; save its weights"),
        ("SmolLM2", "model is a str, not an NNX module; give a flax.nnx.Module"),
        (nnx.Linear(2, 2, rngs=nnx.Rngs(0)), "the model maps tokens|dot_general"),
        (Positions(300, 16), "context=512 is beyond the model's table of 16 positions; give cont"),
        (Positions(280, 0), "the tokenizer has 300 tokens, the model 280: give the model's own"),
    ],
)
def test_models_that_do_not_fit_are_refused_first(tokenizer, nothing_is_encoded, model, message):
    with pytest.raises((ValueError, TypeError), match=message):
        call(tokenizer, model=model)


def test_passages_beyond_a_table_that_a_model_does_not_tell_of_are_refused(tokenizer):
    """Guards: gradients that are NaN, so that long passages are never retrieved."""
    texts = [TEXTS[0], " ".join(TEXTS)]
    model, how = Positions(tokenizer.vocab_size, 0), dict(method="grad_cos")
    with pytest.raises(
        ValueError, match=r"a passage of 64 positions is not finite.*give its length as context="
    ):
        call(tokenizer, texts, [("The", "town")], model, context=64, **how)
    call(tokenizer, texts, [("The", "town")], model, context=16, **how)
    with pytest.raises(ValueError, match="the gradient of query '0' is not finite"):
        call(tokenizer, [TEXTS[0][:8]], [(" ".join(TEXTS), "Oslo")], model, **how)


@pytest.mark.parametrize(
    ("passages", "message"),
    [
        ("corpus.jsonl", "passages are a path; give the model's tokenizer"),
        (BATCH, r"passages is a single batch \(dict\); give \[batch\]"),
        (5, "passages is a int; give an iterable of batches"),
        ([], "there are no passages"),
        (iter([]), "there are no passages"),
        (TEXTS, "batch 0 of passages is the text 'The town.*give the model's tokenizer"),
        ([{"text": "a"}], r"at \['text'\], is the text 'a'; give the model's tokenizer"),
        ([BATCH | {"text": ["a"] * 8}], r"at \['text'\]\[0\], is the text 'a'"),
        (
            [BATCH | {"tokens": Tensor()}],
            r"is a torch.Tensor, not an array; convert it with x.nump",
        ),
        ([BATCH | {"tokens": [[1] * 6] * 8}], r"is a builtins.int, not an array"),
        ([BATCH | {"id": np.array(["a"] * 8)}], "is an array of <U1, not of numbers"),
        ([BATCH | {"id": np.array([None] * 8)}], "is an array of object, not of numbers"),
        ([{}], "batch 0 of passages has no array"),
        ([BATCH | {"n": np.zeros(3)}], "must have the examples as its first axis|one length"),
    ],
)
def test_batches_that_are_none_are_refused_first(tokenizer, nothing_is_encoded, passages, message):
    with pytest.raises(ValueError, match=message):
        call(tokenizer, passages, [BATCH], tokenizer=None)
    if isinstance(passages, list | dict):
        with pytest.raises(ValueError, match=message.replace("passages", "queries")):
            call(tokenizer, [BATCH], passages, tokenizer=None)


def test_losses_and_queries_of_batches_are_checked_first(tokenizer, nothing_is_encoded):
    how = dict(tokenizer=None)
    with pytest.raises(ValueError, match=SHAPE + r" \(\), not \(8,\)"):
        call(tokenizer, [BATCH], [BATCH], loss=lambda m, b: nats(m, b).mean(), **how)
    with pytest.raises(ValueError, match="R of 8 queries contains little"):
        call(tokenizer, [BATCH], [BATCH], method="trackstar", **how)
    with pytest.raises(ValueError, match="texts is a single string"):
        call(tokenizer, [BATCH], [BATCH], texts="abcdefgh", **how)


def scored(model, batch):
    return (nats(model, batch) * batch["weights"]).sum(-1)


UNWEIGHTED = {k: x for k, x in BATCH.items() if k != "weights"}
LACKING = (
    r"the loss reads 'weights', which batch 1 of %s does not have: it has \['targets'\] int32\["
)


@pytest.mark.parametrize("label", ["passages", "queries"])
@pytest.mark.parametrize(
    ("other", "message"),
    [
        (UNWEIGHTED, LACKING),
        (
            {k: x[:0] for k, x in BATCH.items()},
            "batch 1 of %s: a batch has no examples .*leave it out",
        ),
        (BATCH | {"tokens": BATCH["tokens"] * 1.0}, "must be an integer"),
        (BATCH | {"weights": BATCH["weights"][:, :4]}, "incompatible shapes"),
        (BATCH | {"weights": BATCH["weights"][:3]}, "batch 1 of %s: every array of a batch must"),
    ],
)
def test_a_later_batch_that_does_not_fit_is_named_first(
    tokenizer, nothing_is_encoded, label, other, message
):
    """Guards: a bare KeyError, or one after hours of the batches before."""
    batches = dict(passages=[BATCH], queries=[BATCH]) | {label: [BATCH, other]}
    with pytest.raises((ValueError, TypeError)) as refused:
        call(tokenizer, **batches, tokenizer=None, loss=scored)
    message = message.replace("%s", label)
    refused.match(message)
    notes = " ".join(getattr(refused.value, "__notes__", []))
    assert f"batch 1 of {label}" in str(refused.value) + notes


@pytest.mark.parametrize(
    ("method", "label"), [("grad_cos", "passages"), ("exp3", "the sample of passages")]
)
def test_a_batch_of_an_iterator_that_does_not_fit_is_named_when_it_comes(tokenizer, method, label):
    batches = iter([BATCH, BATCH, UNWEIGHTED])
    with pytest.raises(ValueError, match=f"the loss reads 'weights', which batch 2 of {label} do"):
        call(tokenizer, batches, [BATCH], tokenizer=None, loss=scored, method=method)


def test_batches_of_several_lengths_and_with_more_keys_fit(tokenizer):
    """Guards: refusing what the loss does not need."""
    shorter = {k: x[:3, :4] for k, x in BATCH.items()} | {"id": np.arange(3)}
    found = call(
        tokenizer, [BATCH, shorter], [shorter], tokenizer=None, loss=scored, method="grad_cos", k=11
    )
    assert len(found[0].proponents) == 11


OWN = [{"text": "The town of Norway is Oslo."}]
PATH = "nowhere.jsonl"


@pytest.mark.parametrize(
    ("options", "message"),
    [
        *(
            (dict(method="grad_cos") | option, "with method='grad_cos', whose gradients are not")
            for option in (dict(sample=16), dict(seed=0), dict(correction="factored"),
                           dict(scales={}), dict(scales=3))
        ),
        *(
            (dict(scales={}, method="exp3") | option, "beside scales=")
            for option in (dict(sample=16), dict(seed=0), dict(correction="factored"))
        ),
        (dict(method="exp3", damping=0.1), "damping=0.1 has no effect with method='exp3', which h"),
        (dict(texts=TEXTS), "texts= has no effect beside a tokenizer"),
        *(
            (dict(tokenizer=None, passages=[BATCH], queries=[BATCH]) | option, "it is for texts")
            for option in (dict(context=512), dict(tokens_per_batch=9), dict(text_field="text"),
                           dict(id_field="id"), dict(joiner=""), dict(directory=PATH))
        ),
        (dict(tokenizer=None, passages=iter([BATCH]), queries=[BATCH], seed=0), "seed=0 has no ef"),
        (dict(text_field="text"), "text_field='text' has no effect on passage 0, 'The town"),
        (dict(id_field="id"), "id_field='id' has no effect on passage 0"),
        (dict(passages=[*OWN, ("a", "b")], text_field="text"), "no effect on passage 1, .'a', 'b'"),
        (dict(exclude="lm_haed"), "exclude='lm_haed' has no effect: no parameter matches it; .*em"),
        (dict(projection=Projection(side=4, blocks=3, pooling="matrix")), "with pooling='matrix'"),
    ],
)  # fmt: skip
def test_arguments_without_effect_are_refused_first(
    tokenizer, nothing_is_encoded, options, message
):
    with pytest.raises(ValueError, match=message) as refused:
        call(tokenizer, **options)
    assert "has no effect" in str(refused.value)


def test_fields_beside_a_corpus_that_has_its_own_are_refused(tokenizer, tmp_path):
    (tmp_path / "a.jsonl").write_text('{"body": "Oslo", "key": 1}\n')
    corpus = Corpus(tmp_path / "a.jsonl", text_field="body")
    with pytest.raises(ValueError, match="id_field='key' has no effect on a Corpus, which has its"):
        call(tokenizer, corpus, id_field="key")


def test_passages_of_token_ids_that_an_own_model_lacks_are_refused(tokenizer, nothing_is_encoded):
    """A model without an attribute `vocab_size` has as many tokens as logits."""
    model = Bigram(300, nnx.Rngs(0))
    del model.vocab_size
    with pytest.raises(ValueError, match="the passages have token ids from 4 to 900, the model"):
        call(tokenizer, [[4, 5, 6], [7, 900, 8]], model=model)


@pytest.mark.parametrize("ids", [((5,), (5000,)), ((-1,), (5,))])
def test_queries_of_token_ids_that_the_model_lacks_are_refused(tokenizer, nothing_is_encoded, ids):
    """Guards: a look-up beyond the table of embeddings, which jax answers with another row."""
    with pytest.raises(
        ValueError, match=r"the queries have token ids from .*the model has 0 to 29"
    ):
        call(tokenizer, queries=[Query("q", "a", "b", ids)])


def test_a_joiner_of_queries_that_are_token_ids_is_refused(tokenizer, nothing_is_encoded):
    with pytest.raises(ValueError, match="joiner='' has no effect: every query has token ids"):
        call(tokenizer, queries=[Query("q", "a", "b", ((5,), (6,)))], joiner="")
