"""The arithmetic of what tracing costs, against numbers counted by hand."""

import numpy as np
import pytest

from tda import store as stores
from tda.data import batches
from tda.plan import cost
from tda.plan.cost import Matrix, Model, Taps

LAYER = Matrix(3, 5, count=2)  # 30 numbers
HEAD = Matrix(3, 7)  # 21 numbers
TABLE = Matrix(7, 3, looked_up=True)


def test_products_count_two_operations_a_number_and_none_for_a_look_up():
    assert cost.products([LAYER]) == 60
    assert cost.products([LAYER, HEAD, TABLE]) == 102


def test_a_model_takes_four_operations_a_number_and_those_of_attention():
    model = Model((LAYER,), (HEAD,), attention=10)
    # 7 products of 10 numbers with 4 keys, 2 operations each.
    assert cost.attention_operations(model, 4.0) == 7 * 2 * 10 * 4
    assert cost.model_operations(model, 4.0) == 4 * (30 + 21) + 560
    # Recomputed layers run forward twice: 6 operations a number, and 9 products; not the head.
    again = Model((LAYER,), (HEAD,), attention=10, recomputed=True)
    assert cost.model_operations(again, 4.0) == 6 * 30 + 4 * 21 + 9 * 2 * 10 * 4


def test_training_takes_two_operations_a_number_more_for_the_weight_gradient():
    model = Model((Matrix(3, 5, 2), Matrix(9, 9, looked_up=True)), (Matrix(7, 11),), attention=4)
    more = cost.training_operations(model, 8.0) - cost.model_operations(model, 8.0)
    assert more == 2 * (2 * 3 * 5 + 7 * 11)


def test_taps_take_two_projections_and_an_outer_product():
    # k = 2: 2·2·(3 + 5) + 2·2² = 40 for each of two matrices.
    assert cost.tap_operations(Taps((LAYER,), side=2)) == 80
    # Three copies of A and B: 2·(2·3)·8 + 2·2·(2·3) = 120.
    assert cost.tap_operations(Taps((LAYER,), side=2, rank=3)) == 240
    # Looked up: only the output is multiplied, 2·2·3 + 2·2².
    assert cost.tap_operations(Taps((TABLE,), side=2)) == 20


def test_exact_scales_take_the_weight_gradient_and_its_projection():
    taps = Taps((LAYER, TABLE), side=2, exact=True)
    # 2·M·N a position for each of two matrices; looked-up rows need none of it.
    assert cost.tap_operations(taps) == 2 * 30 + 20
    # AᵀGB of an example: G B is 2·3·5·2, Aᵀ(G B) is 2·2·3·2; two matrices.
    assert cost.example_operations(taps) == 2 * (60 + 24)
    assert cost.example_operations(Taps((LAYER,), side=2)) == 0


def test_encoding_counts_every_position_of_every_batch():
    model, taps = Model((LAYER,), (HEAD,), attention=10), Taps((LAYER,), side=2, exact=True)
    # T = 3: 2 keys on average; 204 + 280 + 60 a position, 168 an example.
    one = 3 * (204 + 280 + 60) + 168
    assert cost.encoding_operations(model, [taps], {(4, 3): 2.5}) == 2.5 * 4 * one
    # T = 7: 4 keys on average.
    other = 7 * (204 + 560 + 60) + 168
    both = {(4, 3): 2.5, (1, 7): 1}
    assert cost.encoding_operations(model, [taps], both) == 2.5 * 4 * one + other


def test_an_8b_model_takes_four_operations_a_parameter_and_token():
    """The usual count, 4·N a token without weight gradients, is that of the sum of its parts."""
    layers = (Matrix(4096, 4096, 64), Matrix(4096, 1024, 64), Matrix(4096, 14336, 96))
    model = Model(layers, (Matrix(4096, 128256),), attention=32 * 32 * 128)
    taps = Taps(layers, side=64)
    count = cost.encoding_operations(model, [taps], {(1, 438): 1}) / 438
    assert count == pytest.approx(4 * 7.5e9, rel=0.03)


def test_batches_are_counted_by_shard():
    positions = np.array([3, 8, 8, 2, 9, 16, 1])
    # Shards of 4 and 3 rows, batches of 16 positions: (2, 8) twice; then one short passage alone
    # rolls over to the batches of 16, of which there are 3.
    found = cost.batch_shapes(positions, (8, 16), 16, 1, shard_rows=4)
    assert found == {(2, 8): 2, (1, 16): 3}
    assert cost.batch_shapes(positions, (8, 16), 16, 4, shard_rows=7) == {(4, 8): 1, (4, 16): 1}
    whole = batches.plan(positions, (8, 16), 16)
    assert sum(cost.batch_shapes(positions, (8, 16), 16, 1, 7).values()) == len(whole)


def test_the_papers_store_takes_87_tebibytes():
    whole = 365_000_000 * stores.Form("float32", (4096,) * 16).row_bytes
    assert whole == 95_682_560_000_000
    assert cost.as_bytes(whole) == "87.0 TiB"


def test_codes_take_a_quarter_byte_a_dimension():
    assert cost.code_bytes(65_536) == 16_384
    assert cost.code_bytes(5) == 2  # three pairs, 12 bits


def test_products_of_a_store():
    assert cost.gram_operations([(3,), (2,)]) == 2 * (9 + 4)
    assert cost.gram_operations([(2, 3)]) == 2 * (2 * 2 * 3 + 2 * 3 * 3)
    assert cost.score_operations(5, 10, 7) == 2 * 5 * 10 * 7
    assert cost.eigen_operations([(3,), (2,)]) == cost.eigen_operations([(3, 2)]) == 9 * (27 + 8)


def test_memory_of_r():
    # A block of side 128 has 16,384 dimensions: 2 GiB in float64, and there may be 86 of them.
    assert cost.r_bytes([(128**2,)]) == 2 * 2**30
    assert cost.r_bytes([(128**2,)] * 86) == 172 * 2**30
    assert cost.r_bytes([(128, 128)] * 86) == 86 * 2**18
    assert cost.eigen_bytes(10) == 2800
    # R of passages and of queries, float64; one root, float32; the largest block's work.
    assert cost.hessian_bytes([(10,), (4,)], 2, 1) == 2 * 8 * 116 + 4 * 116 + 2800
    assert cost.hessian_bytes([(10, 4)], 2, 1) == 2 * 8 * 116 + 4 * (116 + 40) + 2800


def test_what_encoding_holds():
    # 100 parameters; A and B of two matrices, 6 columns wide; a scale for each of 30 weights.
    assert cost.held_bytes(100, [LAYER], 6, False) == 4 * (100 + 6 * 8 * 2)
    assert cost.held_bytes(100, [LAYER], 6, True) == 4 * (100 + 6 * 8 * 2 + 30)


def test_what_does_not_fit_is_told_and_what_is_not_known_is_not():
    needs = {"R": (3 * 2**30, 2 * 2**30), "stores": (5.0, 5.0), "host": (2**60, None)}
    assert cost.lacking(needs) == ["R: 3.0 GiB needed, 2.0 GiB available"]


@pytest.mark.parametrize(
    ("count", "text"),
    [(0, "0 B"), (1023, "1023 B"), (1024, "1.0 KiB"), (1.5 * 2**40, "1.5 TiB")]
    + [(2000 * 2**50, "2,000.0 PiB")],
)
def test_bytes_to_read(count, text):
    assert cost.as_bytes(count) == text


@pytest.mark.parametrize("dtype", stores.DTYPES)
def test_a_real_store_takes_the_bytes_that_were_reckoned(tmp_path, dtype):
    """Within 1%, for checksums; passages' texts and ids come on top, and a last chunk is filled."""
    widths, rows = [576] * 4, 4096
    ids = [f"passage {i}" for i in range(rows)]
    blocks = {str(i): w for i, w in enumerate(widths)}
    store = stores.create(tmp_path / "store", ids, blocks, {}, dtype, shard_bytes=4 << 20)
    rng = np.random.default_rng(0)
    for i, shard in enumerate(store.shards()):
        found = rng.normal(size=(shard.stop - shard.start, sum(widths))).astype(np.float32)
        store.write(i, found)
    real = sum(f.stat().st_size for f in (tmp_path / "store").rglob("gradients/c.*"))
    assert real == pytest.approx(rows * stores.Form(dtype, tuple(widths)).row_bytes, rel=0.01)
