"""Hidden states of models that have few positions, or one layer."""

import numpy as np
import pytest
from flax import nnx

from tda.data.batches import BatchLayout, buckets
from tda.model.decoder import Decoder
from tda.model.settings import DecoderSettings
from tda.retrieval.hidden import Pooler
from tests.data.test_batches import table_of

SIZES = dict(vocab_size=40, width=8, heads=2, kv_heads=2, head_width=4, ff_width=16, scan=False)


def table(*lengths):
    rng = np.random.default_rng(0)
    return table_of([rng.integers(1, 40, n) for n in lengths])


@pytest.mark.parametrize("positions", [0, 16])
def test_a_passage_has_a_token_more_than_the_model_positions(positions):
    model = Decoder(DecoderSettings(**SIZES, layers=2, max_positions=positions), rngs=nnx.Rngs(0))
    pooled = Pooler(model, "last", without=(0,)).rows(
        passages := table(17, 5, 16), np.array([2, 0, 1]), BatchLayout(buckets(16), 64, pad=0)
    )
    for row, h_D in zip([2, 0, 1], pooled, strict=True):
        read = passages.tokens[passages.starts[row] : passages.starts[row + 1]]
        read = read[: positions or None]
        np.testing.assert_allclose(h_D, model.hidden(read[None])[0].mean(0), rtol=1e-4, atol=1e-5)


def test_the_middle_of_one_layer_is_behind_it():
    model = Decoder(DecoderSettings(**SIZES, layers=1), rngs=nnx.Rngs(0))
    passages = table(8)
    (pooled,) = Pooler(model, "middle", without=(0,)).rows(
        passages, [0], BatchLayout((8,), 64, pad=0)
    )
    expected = model.residual_stream(passages.tokens[None], 1)[0].mean(0)
    np.testing.assert_allclose(pooled, expected, rtol=1e-4, atol=1e-5)
