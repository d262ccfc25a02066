"""What `tda.trace` computes, and what a kill costs it."""

import itertools
import types

import numpy as np
import pytest
from flax import nnx

import tda
from tda import store as stores
from tda.data import batches as batching
from tda.data.tokenizer import Tokenizer
from tda.data.tokens import TokenTable
from tda.encoding import inputs, layouts
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
    how = dict(projection=Projection(side=4, pooling="matrix"), k=3, quiet=True) | how
    if how.get("method") != "grad_cos":
        how = dict(sample=2) | how
    return tda.trace(model, texts, [QUERY], tokenizer=tokenizer, **how)


def test_many_prompts_are_not_encoded_one_by_one_after_a_single_one(tokenizer, monkeypatch):
    model = Bigram(tokenizer.vocab_size, nnx.Rngs(0))
    how = dict(projection=Projection(side=4, pooling="matrix"), method="grad_cos", quiet=True)
    index = tda.encode(model, TEXTS[:20], tokenizer=tokenizer, **how)
    batches, encode_rows = [], encoding.encode_rows

    def counted(encoder, table, rows, layout):
        batches.append(len(layout.batches(table, rows)))
        return encode_rows(encoder, table, rows, layout)

    monkeypatch.setattr(encoding, "encode_rows", counted)
    for count in (1, 4, 200, 100):
        prompts = ["The one town whose number is large", "The town number 3 is"][:count]
        index.query([(prompts[i % len(prompts)], "the seat") for i in range(count)], k=1)
    assert batches[0] == 1 and all(n <= 8 for n in batches), batches


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


def table_of(lengths):
    """A table of sequences of these numbers of tokens."""
    starts = np.append(0, np.cumsum(lengths)).astype(np.int64)
    names = [str(i) for i in range(len(lengths))]
    tokens = np.ones(starts[-1], np.int32)
    return TokenTable(names, names, tokens, starts, tokens > 0)


def settings_of(parameters, tokens_per_batch=4096):
    moments = types.SimpleNamespace(sample=16, seed=0)
    return types.SimpleNamespace(
        tokens_per_batch=tokens_per_batch, mesh=None, parameter_count=parameters, moments=moments
    )


def shapes_of(lengths, tokens_per_batch=4096, parameters=10**6):
    """The shapes of the batches that passages of these numbers of tokens are cut into."""
    table, settings = table_of(lengths), settings_of(parameters, tokens_per_batch)
    return [b.tokens.shape for b in layouts.make_layout(settings, table, pad=0).batches(table)]


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


def test_a_large_model_pads_a_small_corpus_less():
    lengths = np.random.default_rng(0).integers(10, 80, 60)
    small, large = (shapes_of(lengths, parameters=n) for n in (10**6, 135 * 10**6))
    assert len({length for _, length in small}) == 1 < len({length for _, length in large}) <= 3
    assert sum(map(np.prod, large)) < 0.85 * sum(map(np.prod, small))


def test_a_few_prompts_have_one_length():
    assert len(shapes_of([6, 9, 14], parameters=135 * 10**6)) == 1


def test_lengths_are_the_cheapest_of_all():
    rng = np.random.default_rng(0)
    for price in (0, 10, 40, 1000):
        positions = rng.integers(1, 12, 20)
        *options, longest = map(int, np.unique(positions))

        def cost(lengths, positions=positions, price=price):
            padded = np.array(lengths)[np.searchsorted(lengths, positions)]
            return padded.sum() + price * len(lengths)

        subsets = (
            (*subset, longest)
            for n in range(len(options) + 1)
            for subset in itertools.combinations(options, n)
        )
        chosen = layouts.cheapest_lengths(positions, price)
        assert cost(chosen) == min(map(cost, subsets))


@pytest.mark.parametrize("parameters", [10**6, 135 * 10**6])
def test_the_sample_of_a_small_corpus_has_one_shape_and_some_batches(parameters):
    table, settings = table_of(np.arange(10, 80)), settings_of(parameters)
    layout = layouts.make_layout(settings, table, pad=0)
    batches = list(layouts.sample_passages(settings, table, layout))
    assert len({b["tokens"].shape for b in batches}) == 1 and len(batches) >= 4
    if parameters > 10**8:
        assert len(batches) == 4 < len(layout.batches(table))
        assert max(b["tokens"].size for b in batches) <= 128


def test_a_small_corpus_in_memory_is_encoded_once(tokenizer, shapes, tmp_path):
    texts = [*TEXTS[:40], "A much longer text of the county, " * 8]
    in_memory = call(tokenizer, texts, method="grad_cos")
    passes = len(shapes)
    shapes.clear()
    # In a directory the longest passage is encoded before the others, to check that it can be.
    assert (
        call(tokenizer, texts, method="grad_cos", directory=tmp_path).answers == in_memory.answers
    )
    assert len(shapes) == passes + 1


def test_few_tokens_are_compiled_for_few_lengths(tokenizer, shapes, monkeypatch):
    texts = ["number " * n for n in range(1, 200)] * 2
    call(tokenizer, texts, method="grad_cos", tokens_per_batch=512)
    few = {length for _, length in shapes}
    shapes.clear()
    monkeypatch.setattr(layouts, "_FEW_TOKENS", 0)
    call(tokenizer, texts, method="grad_cos", tokens_per_batch=512)
    assert len(few) <= 10 < len({length for _, length in shapes})


def test_a_large_corpus_has_few_shards():
    """Guards: millions of files in one folder, and shards of one batch, mostly padding."""
    sizes = (
        (1 << 20, 32, 2048, 1 << 10),
        (1 << 20, 32, 4096, 1 << 9),
        (1 << 28, 32, 4096, 1 << 16),
    )
    for rows, length, tokens_per_batch, shards in sizes:
        table = type("Table", (), {"token_count": rows * length, "__len__": lambda _, n=rows: n})()
        assert inputs._shard_bytes(table, 256, tokens_per_batch) * shards == 4 * 256 * rows
