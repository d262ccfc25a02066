"""Encoding whole tables: order, padding, and stores that are filled again after a kill."""

import dataclasses
import functools

import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from tda import hessian
from tda import loss as losses
from tda import store as stores
from tda.data import tokenised, tokens
from tda.data.batches import BatchLayout, materialise
from tda.data.documents import Document
from tda.data.tokenizer import Tokenizer
from tda.encoding import table as encoding
from tda.gradients.encoder import build_encoder, make_encoder, make_taps, scored_positions
from tda.gradients.projection import Projection
from tda.gradients.sites import find_sites
from tda.retrieval import exact
from tda.retrieval.scorer import Scorer
from tda.runtime import code_version, preemption
from tda.store import codec

TEXTS = ["Paris is in France.", "Oslo", "It rains in Rome all day and all night.", "Rome", "a b c"]
LAYOUT = BatchLayout((8, 16, 32), tokens_per_batch=32, pad=0)


@pytest.fixture(scope="module")
def setup(decoder):
    tokenizer = Tokenizer.train(TEXTS, 300)
    documents = [Document(str(i), t) for i, t in enumerate(TEXTS)]
    table, _ = tokenised.tokenise_in_memory(documents, tokenizer, 32)
    model = decoder(vocab_size=tokenizer.vocab_size)
    return table, make_encoder(model, Projection(side=3, blocks=2))


def make_store(path, table, layout, dtype="float32", shard_rows=2, rank=0, **made_from):
    blocks = dict.fromkeys(layout.blocks, 9)
    shard_bytes = shard_rows * stores.Form(dtype, tuple(blocks.values()), rank).row_bytes
    return stores.create(
        path, table.ids, blocks, made_from, dtype, shard_bytes=shard_bytes, rank=rank
    )


# Row 2 is the longest: in the last case it comes last in the batch that it shares.
@pytest.mark.parametrize("rows", [[0, 1, 2, 3, 4], [4, 2], [3], [2, 0, 1]])
def test_rows_come_in_the_order_asked_for(setup, rows):
    """Mistakes: padding rows overwriting real ones; encodings that depend on batch mates."""
    table, encoder = setup
    layout = dataclasses.replace(LAYOUT, tokens_per_batch=128)
    found = encoding.encode_rows(encoder, table, np.array(rows), layout)
    for i, row in enumerate(rows):
        alone = encoder(materialise(table, np.array([row]), 32, 1, 0).arrays())
        np.testing.assert_allclose(found[i], np.asarray(alone)[0], rtol=2e-4, atol=1e-6)


def counted(encoder):
    """The encoder, and a list to which every batch that it encodes adds its size."""
    encoded = []

    def count(arrays, batch, scored, forms):
        encoded.append(len(batch["tokens"]))
        return encoder.compiled(arrays, batch, scored, forms)

    return dataclasses.replace(encoder, compiled=count), encoded


def test_a_store_that_was_begun_is_finished_and_nothing_is_encoded_twice(setup, tmp_path):
    table, encoder = setup
    whole, begun = (make_store(tmp_path / n, table, encoder.layout) for n in ("whole", "begun"))
    encoding.fill_stores([whole], encoder, table, LAYOUT)
    assert begun.missing() == [0, 1, 2]
    begun.write(1, whole.read(slice(2, 4)))
    counting, encoded = counted(encoder)
    encoding.fill_stores([begun], counting, table, LAYOUT)
    assert len(encoded) == 2  # a batch for each of the two shards that were missing
    np.testing.assert_array_equal(begun.read(slice(0, 5)), whole.read(slice(0, 5)))
    encoding.fill_stores([begun], None, table, LAYOUT)  # finished: the encoder is not called


def test_a_notice_ends_encoding_and_search_at_a_shard(setup, tmp_path, monkeypatch):
    monkeypatch.setattr(preemption, "_watch", preemption._Watch())
    table, encoder = setup
    store = make_store(tmp_path, table, encoder.layout)
    preemption._watch.noticed.set()
    for missing in ([1, 2], [2], []):  # a shard each time, written whole
        with pytest.raises(preemption.Preempted):
            encoding.fill_stores([store], encoder, table, LAYOUT)
        assert store.missing() == missing
    for source in (store, encoding.OnTheFly(encoder, table, LAYOUT)):
        with pytest.raises(preemption.Preempted):
            list(source.scan(2))
    preemption._watch.noticed.clear()
    assert sum(map(len, store.scan(2))) == 5


@pytest.mark.parametrize(("dtype", "rank"), [("float32", 0), ("int8", 0), ("2bit", 0), ("2bit", 1)])
def test_other_code_adds_rows_only_if_it_gives_those_that_are_stored(
    setup, decoder, tmp_path, monkeypatch, dtype, rank
):
    """Guards: two checkouts that fill one store by turns, and nobody is told."""
    table, encoder = setup
    make = functools.partial(make_store, tmp_path, table, encoder.layout, dtype, rank=rank)
    begun = make()
    stored_RxE = encoding.encode_rows(encoder, table, np.array([2, 3]), LAYOUT)
    stored_RxE[0] = np.nan  # a row without a gradient says nothing
    begun.write(1, stored_RxE)
    monkeypatch.setattr(code_version, "describe", lambda: {"tda": "other", "jax": "0.0"})
    other = make_encoder(decoder(vocab_size=300), Projection(side=3, blocks=2, seed=1))
    for _ in range(2):  # and nothing is written that would make the second call pass
        with pytest.raises(stores.StoreError) as refused:
            encoding.fill_stores([make()], other, table, LAYOUT)
    for text in ("tda: ", "jax: ", "→ 0.0", "gradient of passage '3' is off by", "remove the"):
        assert text in str(refused.value)
    assert begun.missing() == [0, 2]
    encoding.fill_stores([make()], encoder, table, LAYOUT)  # other code, the same rows
    assert begun.missing() == []


@pytest.mark.parametrize(
    ("loss", "dtype", "rank"),
    [("loss", "3bit", 0), ("loss", "4bit", 1), ("one of the user's", "int8", 0)],
)
def test_rows_are_quantised_on_the_device(setup, decoder, tmp_path, loss, dtype, rank):
    """What leaves the device is what is stored; a loss that is checked first gives the same."""
    table, encoder = setup
    if loss != "loss":
        model = decoder(vocab_size=int(table.tokens.max()) + 1)
        own = losses.of_examples("loss")
        encoder = make_encoder(model, Projection(side=3, blocks=2), output=own)
    left = []

    class Watching(type(encoder)):
        def encode_all(self, *arguments):
            left.extend(encodings := super().encode_all(*arguments))
            return encodings

    fields = {f.name: getattr(encoder, f.name) for f in dataclasses.fields(encoder)}
    store = make_store(tmp_path, table, encoder.layout, dtype, shard_rows=5, rank=rank)
    encoding.fill_stores([store], Watching(**fields), table, LAYOUT)
    assert {(x.dtype.name, x.shape[1]) for x in left} == {("uint8", store.form.columns)}
    rows = encoding.encode_rows(encoder, table, np.arange(5), LAYOUT)
    expected = codec.decode_on_host(codec.encode_on_host(rows, store.form), store.form)
    np.testing.assert_array_equal(store.read(slice(0, 5)), expected)


def test_several_stores_are_filled_in_one_pass(setup, decoder, tmp_path):
    """What a kill left undone in some is encoded for all, and written where it is lacking."""
    table, _ = setup
    model = decoder(vocab_size=int(table.tokens.max()) + 1)
    kinds = []
    for projection in (Projection(side=3, blocks=2), Projection(side=3, blocks=2, seed=1)):
        chosen = find_sites(model)
        kinds.append((projection, make_taps(chosen, projection, None)))
    made = build_encoder(model, kinds)
    layout = made.layouts[0]
    found = [make_store(tmp_path / name, table, layout, seed=i) for i, name in enumerate("ab")]
    mark = np.ones((2, layout.width), np.float32)
    found[0].write(0, mark)
    found[1].write(0, 2 * mark)
    found[0].write(1, mark)
    counting, encoded = counted(made)
    encoding.fill_stores(found, counting, table, LAYOUT)
    assert len(encoded) == 2  # shards 1 and 2; none lacks shard 0
    for i, (store, (projection, _)) in enumerate(zip(found, kinds, strict=True)):
        assert not store.missing()
        encoder = make_encoder(model, projection)
        expected = encoding.encode_rows(encoder, table, np.arange(5), LAYOUT)
        kept = slice(0, 4) if i == 0 else slice(0, 2)
        expected[kept] = i + 1
        np.testing.assert_allclose(store.read(slice(0, 5)), expected, rtol=2e-4, atol=1e-5)
    encoding.fill_stores(found, None, table, LAYOUT)  # finished: the encoder is not called
    other = make_store(tmp_path / "c", table, layout, shard_rows=9)
    with pytest.raises(stores.StoreError, match="shards of .*c are not those of .*a"):
        encoding.fill_stores([found[0], other], made, table, LAYOUT)


def test_a_gradient_that_is_not_finite_is_told_and_spares_its_batch_mates(
    decoder, tmp_path, capsys
):
    """Guards: one bad example that spoils a batch, or ends the run."""
    tokenizer = Tokenizer.train(TEXTS, 300)
    documents = [Document(f"p{i}", t) for i, t in enumerate(TEXTS)]
    table, _ = tokenised.tokenise_in_memory(documents, tokenizer, 32)
    sound = decoder(vocab_size=tokenizer.vocab_size, tied=False)
    broken = nnx.clone(sound)
    # A token that only the second passage reads.
    token = next(t for t in tokenizer.encode(["Oslo"])[0] if (table.tokens == t).sum() == 1)
    broken.embedding.embedding[...] = sound.embedding.embedding[...].at[token].set(jnp.nan)
    found = {}
    for name, model in (("sound", sound), ("broken", broken)):
        encoder = make_encoder(model, Projection(side=3, blocks=2))
        store = make_store(tmp_path / name, table, encoder.layout, shard_rows=5)
        encoding.fill_stores(
            [store], encoder, table, dataclasses.replace(LAYOUT, tokens_per_batch=256)
        )
        found[name] = store.read(slice(0, 5))
    told = "".join(capsys.readouterr())
    message = "the gradients of 1 passages are not finite, so they are never retrieved: p1"
    assert message in told
    np.testing.assert_array_equal(stores.valid(found["broken"]), [True, False, True, True, True])
    others = [0, 2, 3, 4]
    np.testing.assert_array_equal(found["broken"][others], found["sound"][others])
    with pytest.warns(UserWarning, match=message):  # without a store too
        read = encoding.OnTheFly(encoder, table, LAYOUT).read(np.arange(5))
    np.testing.assert_array_equal(stores.valid(read), [True, False, True, True, True])


def test_logits_are_computed_only_where_a_loss_is(decoder):
    """A query's target is a few of its positions."""
    tokenizer = Tokenizer.train(TEXTS, 300)
    asked = [
        ("a", "Paris is in", "France in Rome"),
        ("b", "It rains in Rome all day and all", "night"),
    ]
    table = tokens.tokenise_queries(asked, tokenizer, 32)
    batch = materialise(table, np.array([0, 1]), 32, 3, 0)
    scored = scored_positions(batch.weights)
    assert scored == 1 << (int(batch.weights.sum(1).max()) - 1).bit_length() and 2 < scored < 16
    encoder = make_encoder(
        decoder(vocab_size=tokenizer.vocab_size), Projection(side=3, blocks=2), include="."
    )
    whole, few = (np.asarray(encoder(batch.arrays(), s)) for s in (None, scored))
    np.testing.assert_allclose(few, whole, rtol=1e-4, atol=1e-6 * np.abs(whole).max())
    assert scored_positions(np.ones((2, 8))) is None
    assert scored_positions(np.zeros((2, 8))) == 1


def test_searched_as_it_is_encoded_it_finds_what_a_store_gives(setup, tmp_path, monkeypatch):
    """No store at all: the same ranking, ranks and scores, whatever the spans are."""
    table, encoder = setup
    store = make_store(tmp_path / "s", table, encoder.layout, shard_rows=5)
    encoding.fill_stores([store], encoder, table, LAYOUT)
    queries = encoding.encode_rows(encoder, table, np.array([1, 3]), LAYOUT)
    R = hessian.autocorrelation_of_source(store).blocks
    scorers = {"dot": Scorer(None, False), "whitened": Scorer(hessian.inverse_root(R), True)}
    correct = {"all": [np.array([1, 4]), np.array([0])]}
    expected = exact.search(queries, store, scorers, 3, correct)
    for span_bytes in (256 << 20, 2 * 4 * 36):  # all rows at a time; two
        read: list[int] = []

        def encode_rows(encoder, table, rows, layout, read=read):
            read += rows.tolist()
            return encoding.encode_kinds(encoder, table, rows, layout)[0]

        monkeypatch.setattr(encoding, "_SPAN_BYTES", span_bytes)
        monkeypatch.setattr(encoding, "encode_rows", encode_rows)
        source = encoding.OnTheFly(encoder, table, LAYOUT)
        assert source.rows == 5 and source.form.widths == (9,) * 4
        found = exact.search(queries, source, scorers, 3, correct)
        assert read == [0, 1, 4, 0, 1, 2, 3, 4]  # the correct rows, then one pass over all
        for name in scorers:
            a, b = found[name], expected[name]
            np.testing.assert_array_equal(a.proponents, b.proponents)
            np.testing.assert_array_equal(a.opponents, b.opponents)
            np.testing.assert_allclose(a.proponent_scores, b.proponent_scores, rtol=2e-4, atol=1e-5)
            np.testing.assert_array_equal(a.first_ranks["all"], b.first_ranks["all"])


def test_a_table_that_is_not_the_stores_is_refused(setup, tmp_path):
    table, encoder = setup
    store = stores.create(tmp_path / "s", ["a", "b"], dict.fromkeys(encoder.layout.blocks, 9), {})
    with pytest.raises(stores.StoreError, match="has 2 rows, the corpus 5"):
        encoding.fill_stores([store], encoder, table, LAYOUT)


def test_a_shard_that_cannot_be_written_ends_the_run(setup, tmp_path, monkeypatch):
    """Guards: an error in the thread that writes, which nobody hears."""
    table, encoder = setup
    store = make_store(tmp_path / "s", table, encoder.layout)

    def full(self, shard, rows):
        raise stores.StoreError("No space left")

    monkeypatch.setattr(stores.GradientStore, "write", full)
    with pytest.raises(stores.StoreError, match="No space left"):
        encoding.fill_stores([store], encoder, table, LAYOUT)
