"""What `tda.trace` computes, and what a kill costs it."""

import types

import numpy as np
import pytest
from flax import nnx

import tda
from tda import store as stores
from tda.data import batches as batching
from tda.data.tokenizer import Tokenizer
from tda.data.tokens import TokenTable
from tda.encoding import inputs
from tda.encoding import table as encoding
from tda.gradients.projection import Projection
from tests.test_api import Bigram

TEXTS = [f"The town number {i} is the seat of county number {i % 7}." for i in range(4000)]
QUERY = ("The town number 3 is", "the seat")


@pytest.fixture(scope="module")
def tokenizer():
    return Tokenizer.train(TEXTS, 300)


def call(tokenizer, texts=TEXTS, **how):
    model = Bigram(tokenizer.vocab_size, nnx.Rngs(0))
    how = dict(projection=Projection(side=4, pooling="matrix"), k=3, sample=2, quiet=True) | how
    return tda.trace(model, texts, [QUERY], tokenizer=tokenizer, **how)


def test_a_kill_loses_some_minutes_and_not_the_corpus(tokenizer, tmp_path, monkeypatch, capsys):
    """Guards: small gradients of a large model, all of which fit one shard of many bytes."""
    write = stores.GradientStore.write

    def killed(store, shard, encoded):
        if shard:
            raise KeyboardInterrupt
        return write(store, shard, encoded)

    monkeypatch.setattr(stores.GradientStore, "write", killed)
    with pytest.raises(KeyboardInterrupt):
        call(tokenizer, directory=tmp_path)
    monkeypatch.undo()
    (path,) = tmp_path.glob("factored_*/gradients")
    store = stores.open_store(path)
    tokens = sum(map(len, tokenizer.encode(TEXTS)))
    assert tokens > 2**15 and len(store.missing()) == len(store.shards()) - 1 > 0
    encoded, encode_rows = [], encoding.encode_kinds

    def watched(encoder, table, rows, *arguments):
        encoded.append(rows)
        return encode_rows(encoder, table, rows, *arguments)

    monkeypatch.setattr(encoding, "encode_kinds", watched)
    capsys.readouterr()
    found = call(tokenizer, directory=tmp_path)
    assert capsys.readouterr() == ("", "")  # it was told to be quiet
    first = store.shards()[0].stop
    assert np.concatenate(encoded[1:]).tolist() == list(range(first, len(TEXTS)))
    for one, other in zip(found[0].proponents, call(tokenizer)[0].proponents, strict=True):
        assert one.id == other.id and one.score == pytest.approx(other.score, abs=1e-5)


@pytest.fixture
def shapes(monkeypatch):
    """The shapes (size, length) of the batches that are made."""
    found, materialise = [], batching.materialise

    def watched(table, rows, length, size, *arguments):
        found.append((size, length))
        return materialise(table, rows, length, size, *arguments)

    monkeypatch.setattr(batching, "materialise", watched)
    return found


def test_a_prompt_is_not_padded_to_a_batch_of_passages(tokenizer, shapes):
    call(tokenizer, method="grad_cos")
    sizes = [size for size, _ in shapes]
    assert sizes[0] == 1 and max(sizes) > 50


def shapes_of(lengths, tokens_per_batch=4096):
    """The shapes of the batches that passages of these numbers of tokens are cut into."""
    starts = np.append(0, np.cumsum(lengths)).astype(np.int64)
    names = [str(i) for i in range(len(lengths))]
    tokens = np.ones(starts[-1], np.int32)
    table = TokenTable(names, names, tokens, starts, tokens > 0)
    settings = types.SimpleNamespace(tokens_per_batch=tokens_per_batch, mesh=None)
    return [b.tokens.shape for b in inputs.make_layout(settings, table, pad=0).batches(table)]


def test_a_small_corpus_fills_some_small_batches_of_one_length():
    lengths = np.random.default_rng(0).integers(30, 65, 60)
    shapes = shapes_of(lengths)
    assert len(set(shapes)) == 1 and len(shapes) >= 4
    assert np.prod(shapes[0]) <= lengths.sum() / 4
    # Fewer positions stay fewer, and a large corpus fills whole batches of several lengths.
    assert max(map(np.prod, shapes_of(lengths, tokens_per_batch=200))) <= 200
    large = shapes_of(np.tile(lengths, 10))
    assert len({length for _, length in large}) > 1 and max(map(np.prod, large)) > 4000


def test_one_long_passage_does_not_pad_the_others():
    shapes = shapes_of([20] * 100 + [400])
    assert sum(map(np.prod, shapes)) < 2 * (100 * 20 + 400) < 100 * 400


def test_few_tokens_are_compiled_for_few_lengths(tokenizer, shapes, monkeypatch):
    texts = ["number " * n for n in range(1, 200)] * 2
    call(tokenizer, texts, method="grad_cos", tokens_per_batch=512)
    few = {length for _, length in shapes}
    shapes.clear()
    monkeypatch.setattr(inputs, "_FEW_TOKENS", 0)
    call(tokenizer, texts, method="grad_cos", tokens_per_batch=512)
    assert len(few) <= 10 < len({length for _, length in shapes})
