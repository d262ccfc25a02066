"""Encoding whole tables: order, padding, and stores that are filled again after a kill."""

import numpy as np
import pytest

from tda import encoding
from tda import store as stores
from tda.data import tokens
from tda.data.batches import materialise
from tda.data.tokenizer import Tokenizer
from tda.gradients.encoder import make_encoder
from tda.gradients.projection import Projection

TEXTS = ["Paris is in France.", "Oslo", "It rains in Rome all day and all night.", "Rome", "a b c"]
LAYOUT = dict(bucket_lengths=(8, 16, 32), tokens_per_batch=32, pad=0)


@pytest.fixture(scope="module")
def setup(decoder):
    tokenizer = Tokenizer.train(TEXTS, 300)
    documents = [(str(i), t) for i, t in enumerate(TEXTS)]
    table, _ = tokens.passages(documents, tokenizer, 32)
    model = decoder(vocab_size=tokenizer.vocab_size)
    return table, make_encoder(model, Projection(side=3, blocks=2))


# Row 2 is the longest: in the last case it comes last in the batch that it shares.
@pytest.mark.parametrize("rows", [[0, 1, 2, 3, 4], [4, 2], [3], [2, 0, 1]])
def test_rows_come_in_the_order_asked_for(setup, rows):
    """Mistakes: padding rows overwriting real ones; encodings that depend on batch mates."""
    table, encoder = setup
    layout = LAYOUT | {"tokens_per_batch": 128}
    found = encoding.encode_rows(encoder, table, np.array(rows), **layout)
    for i, row in enumerate(rows):
        alone = encoder(materialise(table, np.array([row]), 32, 1, 0).arrays())
        np.testing.assert_allclose(found[i], np.asarray(alone)[0], rtol=2e-4, atol=1e-6)


def test_a_store_that_was_begun_is_finished_and_nothing_is_encoded_twice(setup, tmp_path):
    table, encoder = setup
    blocks = dict.fromkeys(encoder.layout.blocks, 9)
    make = lambda name: stores.create(  # noqa: E731
        tmp_path / name, table.ids, blocks, {}, shard_bytes=2 * 4 * encoder.layout.width
    )
    whole = make("whole")
    encoding.fill(whole, encoder, table, **LAYOUT)
    begun = make("begun")
    assert begun.missing() == [0, 1, 2]
    begun.write(1, whole.read(slice(2, 4)))
    encoded = []
    counting = type(encoder)(
        encoder.layout, lambda batch: encoded.append(len(batch["tokens"])) or encoder.encode(batch)
    )
    encoding.fill(begun, counting, table, **LAYOUT)
    assert len(encoded) == 2  # a batch for each of the two shards that were missing
    np.testing.assert_array_equal(begun.read(slice(0, 5)), whole.read(slice(0, 5)))
    encoding.fill(begun, None, table, **LAYOUT)  # finished: the encoder is not called
