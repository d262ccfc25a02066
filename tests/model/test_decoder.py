"""The decoder against a plain numpy transformer, and what must not change its outputs."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from tda import loss
from tda.model import functional, sizes
from tda.model.decoder import Decoder, abstract_decoder
from tda.model.positions import rotary, rotation
from tda.model.settings import DecoderSettings

GROUPED = dict(heads=4, kv_heads=2, head_width=6)


def logits_of(model, tokens):
    fn, params = functional.split(model)
    return np.asarray(jax.jit(fn.apply)(params, tokens))


def tokens_of(batch, length, seed=0):
    return np.random.default_rng(seed).integers(0, 50, (batch, length)).astype(np.int32)


def parameter_count(settings):
    params = nnx.state(abstract_decoder(settings), nnx.Param)
    return sum(p.size for p in jax.tree.leaves(params))


def close(a, b, tolerance=1e-5):
    np.testing.assert_allclose(a, b, rtol=0, atol=tolerance * np.abs(b).max())


def rotate(x_TxHxK, base):
    """Rotary encoding as multiplication by e^(i t θ) of pairs (k, k + K/2)."""
    T, _, K = x_TxHxK.shape
    theta = base ** (-2 * np.arange(K // 2) / K)
    turn = np.exp(1j * np.arange(T)[:, None] * theta)[:, None]
    z = (x_TxHxK[..., : K // 2] + 1j * x_TxHxK[..., K // 2 :]) * turn
    return np.concatenate([z.real, z.imag], -1)


def naive(params, tokens_T, *, layers, heads, kv_heads, head_width, gated, tied, base, act, eps):
    """The decoder's definition for one sequence, in float64, with loops."""
    p = {k: np.asarray(v, np.float64) for k, v in functional.flat_parameters(params).items()}

    def norm(x, scale):
        return x / np.sqrt(np.mean(x**2, -1, keepdims=True) + eps) * scale

    x = p["embedding/embedding"][tokens_T]
    T, K = len(tokens_T), head_width
    for i in range(layers):
        w = {k.removeprefix("layers/"): v[i] for k, v in p.items() if k.startswith("layers/")}
        h = norm(x, w["attention_norm/scale"])
        q = rotate((h @ w["attention/query/kernel"]).reshape(T, heads, K), base)
        k = rotate((h @ w["attention/key/kernel"]).reshape(T, kv_heads, K), base)
        v = (h @ w["attention/value/kernel"]).reshape(T, kv_heads, K)
        y = np.zeros((T, heads, K))
        for head in range(heads):
            group = head // (heads // kv_heads)
            for t in range(T):
                score = k[: t + 1, group] @ q[t, head] / np.sqrt(K)
                a = np.exp(score - score.max())
                y[t, head] = (a / a.sum()) @ v[: t + 1, group]
        x = x + y.reshape(T, heads * K) @ w["attention/out/kernel"]
        h = norm(x, w["mlp_norm/scale"])
        up = h @ w["mlp/up/kernel"]
        up = act(h @ w["mlp/gate/kernel"]) * up if gated else act(up)
        x = x + up @ w["mlp/down/kernel"]
    x = norm(x, p["final_norm/scale"])
    return x @ (p["embedding/embedding"].T if tied else p["head/kernel"])


@pytest.mark.parametrize(
    ("changes", "act"),
    [
        (dict(tied=True, gated=True), lambda z: z / (1 + np.exp(-z))),
        (dict(tied=False, gated=False, activation="relu", rope_base=100.0), lambda z: z * (z > 0)),
        (dict(tied=False, kv_heads=4, norm_eps=0.1), lambda z: z / (1 + np.exp(-z))),
        (dict(tied=True, kv_heads=1), lambda z: z / (1 + np.exp(-z))),
    ],
    ids=["grouped", "plain-relu", "all-heads", "multi-query"],
)
def test_equal_to_a_naive_transformer(decoder, changes, act):
    changes = GROUPED | changes
    model = decoder(**changes)
    _, params = functional.split(model)
    tokens = tokens_of(2, 9)
    expected = [
        naive(
            params,
            row,
            layers=2,
            heads=changes["heads"],
            kv_heads=changes["kv_heads"],
            head_width=changes["head_width"],
            gated=changes.get("gated", True),
            tied=changes["tied"],
            base=changes.get("rope_base", 10_000.0),
            act=act,
            eps=changes.get("norm_eps", 1e-6),
        )
        for row in tokens
    ]
    got = logits_of(model, tokens)
    assert got.shape == (2, 9, 50) and got.dtype == np.float32
    close(got, np.stack(expected))


def test_rotary_depends_on_distance_alone():
    rng = np.random.default_rng(0)
    q, k = rng.normal(size=(2, 8)).astype(np.float32)
    q_TxK, k_TxK = (jnp.tile(x, (1, 12, 1, 1)).reshape(1, 12, 1, 8) for x in (q, k))
    rotated_q, rotated_k = (np.asarray(rotary(x, rotation(8)))[0, :, 0] for x in (q_TxK, k_TxK))
    scores = rotated_q @ rotated_k.T
    for distance in range(-4, 5):
        line = np.diagonal(scores, distance)
        close(line, np.full_like(line, line[0]))
    assert abs(scores[0, 0] - scores[0, 3]) > 1e-2
    np.testing.assert_allclose(rotated_q[0], q, rtol=1e-6)


@pytest.mark.parametrize("t", [0, 3, 7])
def test_a_token_changes_no_logits_before_it(decoder, t):
    model = decoder(**GROUPED)
    tokens = tokens_of(2, 8)
    changed = tokens.copy()
    changed[:, t] = (changed[:, t] + 1) % 50
    before, after = logits_of(model, tokens), logits_of(model, changed)
    np.testing.assert_array_equal(before[:, :t], after[:, :t])
    # And every logit from it on does depend on it.
    assert np.all(np.abs(before[:, t:] - after[:, t:]).max(-1) > 1e-5)


def test_padding_to_the_right_changes_nothing(decoder):
    """Guards: outputs that depend on padding."""
    model = decoder()
    tokens = tokens_of(2, 6)
    padded = np.concatenate([tokens, np.zeros((2, 10), np.int32)], 1)
    close(logits_of(model, padded)[:, :6], logits_of(model, tokens))


def test_batch_mates_change_nothing(decoder):
    """Guards: outputs that depend on batch mates."""
    model = decoder()
    tokens = tokens_of(4, 6)
    close(logits_of(model, tokens)[2:3], logits_of(model, tokens[2:3]))


@pytest.mark.parametrize("tied", [True, False])
def test_scanned_layers_equal_a_list_of_layers(decoder, tied):
    tokens = tokens_of(2, 6)
    scanned, unrolled = decoder(tied=tied, layers=3), decoder(tied=tied, layers=3, scan=False)
    close(logits_of(unrolled, tokens), logits_of(scanned, tokens))
    # The layers are not copies of one another.
    kernel = scanned.layers.mlp.up.kernel[...]
    assert float(jnp.abs(kernel[0] - kernel[1]).max()) > 0.1


@pytest.mark.parametrize("scan", [True, False])
def test_remat_changes_no_gradient(decoder, random_batch, scan):
    batch = random_batch([6, 4], 6)

    def gradient(remat):
        fn, params = functional.split(decoder(remat=remat, scan=scan))

        def total(p):
            out = loss.cross_entropy(
                fn.apply(p, batch["tokens"]), batch["targets"], batch["weights"]
            )
            return out.sum()

        compiled = jax.jit(jax.grad(total)).lower(params).compile()
        work = compiled.cost_analysis()["flops"]
        return functional.flat_parameters(compiled(params)), work

    (plain, work), (again, more) = gradient(False), gradient(True)
    assert plain.keys() == again.keys() and more > 1.1 * work
    for name, g in plain.items():
        close(again[name], g)
        assert float(jnp.abs(g).max()) > 0, name


def test_tied_models_have_no_head(decoder):
    _, tied = functional.split(decoder(tied=True))
    _, untied = functional.split(decoder(tied=False))
    assert "head" not in tied and untied["head"]["kernel"].shape == (16, 50)


def test_bfloat16_computation_keeps_parameters_and_logits_in_float32(decoder):
    model, plain = decoder(dtype="bfloat16"), decoder()
    tokens = tokens_of(2, 6)
    low, full = logits_of(model, tokens), logits_of(plain, tokens)
    assert low.dtype == np.float32
    _, params = functional.split(model)
    assert {x.dtype for x in jax.tree.leaves(params)} == {jnp.dtype("float32")}
    # bfloat16 has 8 bits: near, and yet not the float32 result.
    close(low, full, 5e-2)
    assert np.abs(low - full).max() > 1e-4 * np.abs(full).max()


def test_parameters_can_be_bfloat16(decoder):
    _, params = functional.split(decoder(param_dtype="bfloat16"))
    assert {x.dtype for x in jax.tree.leaves(params)} == {jnp.dtype("bfloat16")}


@pytest.mark.parametrize(
    ("name", "vocab_size", "expected", "tolerance"),
    [("154m", 32_768, 154e6, 0.01), ("1b", 32_768, 1.0e9, 0.02), ("8b", 128_256, 8.03e9, 0.01)],
)
def test_parameter_counts_of_the_large_sizes(name, vocab_size, expected, tolerance):
    count = parameter_count(DecoderSettings(vocab_size=vocab_size, **sizes.size(name)))
    assert abs(count - expected) <= tolerance * expected


def test_parameter_count_is_the_allocated_one(decoder):
    shape = dict(vocab_size=50, width=16, layers=2, heads=2, kv_heads=1, head_width=8, ff_width=24)
    for changes in (dict(tied=True), dict(tied=False, gated=False, scan=False)):
        _, params = functional.split(decoder(**changes))
        count = parameter_count(DecoderSettings(**shape, **changes))
        assert count == sum(x.size for x in jax.tree.leaves(params))


def test_sizes_are_copies_and_unknown_ones_refused():
    sizes.size("tiny")["width"] = 1
    assert sizes.size("tiny")["width"] == 128
    with pytest.raises(
        ValueError, match="unknown model size 'huge'; there are micro, tiny, mini, small, 154m"
    ):
        sizes.size("huge")


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        (dict(heads=3, kv_heads=2), "heads=3 is not a multiple of kv_heads=2"),
        (dict(head_width=7), "head_width=7 is odd"),
        (dict(activation="tanh"), "unknown activation 'tanh'; use silu, gelu, gelu_exact, relu"),
        (dict(kv_heads=0), "kv_heads=0 must be 1 or more"),
        (dict(heads=0), "heads=0 must be 1 or more"),
        (dict(layers=0), "layers=0 must be 1 or more"),
        (dict(rope_fraction=1.5), "rope_fraction=1.5 must be from 0 to 1"),
        (dict(rope_base=0.0), "rope_base=0.0 must be above 0"),
        (dict(dtype="bf16"), "dtype='bf16' is no type of.* use 'float32' or 'bfloat16'"),
        (dict(param_dtype="int8"), "param_dtype='int8' is no type of"),
    ],
)
def test_impossible_shapes_are_refused(decoder, changes, message):
    with pytest.raises(ValueError, match=message):
        decoder(**changes)


def test_split_and_merge_give_the_model_back(decoder):
    model = decoder(tied=False)
    fn, params = functional.split(model)
    tokens = tokens_of(1, 5)
    assert isinstance(fn.merge(params), Decoder)
    close(np.asarray(fn.apply(params, tokens)), np.asarray(model(tokens)))
    # The parameters that are handed in are those that are used.
    zeros = jax.tree.map(jnp.zeros_like, params)
    assert not np.asarray(fn.apply(zeros, tokens)).any()


@pytest.mark.parametrize("scan", [True, False])
def test_every_matrix_carries_its_axes(decoder, scan):
    fn, params = functional.split(decoder(tied=False, scan=scan))
    expected = {
        "embedding/embedding": ("vocab", "embed"),
        "head/kernel": ("embed", "vocab"),
        "query/kernel": ("embed", "heads"),
        "key/kernel": ("embed", "heads"),
        "value/kernel": ("embed", "heads"),
        "out/kernel": ("heads", "embed"),
        "up/kernel": ("embed", "mlp"),
        "gate/kernel": ("embed", "mlp"),
        "down/kernel": ("mlp", "embed"),
    }
    assert fn.axes.keys() == functional.flat_parameters(params).keys()
    for name, axes in fn.axes.items():
        stacked = (None,) if scan and name.startswith("layers") else ()
        own = expected.get("/".join(name.split("/")[-2:]), (None,))
        assert axes == stacked + own, name
