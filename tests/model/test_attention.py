"""Causal attention in blocks, against the plain formula, in values and gradients."""

import functools
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from tda.model.attention import causal_attention, fused_attention, plain_attention


def plain(q_BxTxHxK, k_BxTxGxK, v_BxTxGxK, scale=None, window=None, soft_cap=None):
    """Softmax of masked scores, in one piece."""
    H, G = q_BxTxHxK.shape[2], k_BxTxGxK.shape[2]
    k, v = (jnp.repeat(x, H // G, axis=2) for x in (k_BxTxGxK, v_BxTxGxK))
    scale = q_BxTxHxK.shape[-1] ** -0.5 if scale is None else scale
    scores = jnp.einsum("bthk,bshk->bhts", q_BxTxHxK, k) * scale
    if soft_cap is not None:
        scores = soft_cap * jnp.tanh(scores / soft_cap)
    T = scores.shape[-1]
    before = np.arange(T)[:, None] - np.arange(T)
    seen = (before >= 0) & (before < (T if window is None else window))
    scores = jnp.where(seen, scores, -jnp.inf)
    return jnp.einsum("bhts,bshk->bthk", jax.nn.softmax(scores, axis=-1), v)


def arrays(B, T, H, G, K, dtype="float32"):
    rng = np.random.default_rng(0)
    shapes = ((B, T, H, K), (B, T, G, K), (B, T, G, K), (B, T, H, K))
    return [jnp.asarray(2 * rng.normal(size=s), dtype) for s in shapes]


def value_and_gradients(attention, q, k, v, towards):
    def total(q, k, v):
        y = attention(q, k, v)
        return jnp.sum(y.astype(jnp.float32) * towards.astype(jnp.float32)), y

    (_, y), gradients = jax.value_and_grad(total, argnums=(0, 1, 2), has_aux=True)(q, k, v)
    return y, *gradients


@pytest.mark.parametrize(
    ("T", "H", "G"),
    [(1, 2, 2), (7, 4, 2), (64, 2, 1), (65, 6, 3), (150, 2, 2)]
    # Compiling seventeen blocks takes 20 s.
    + [pytest.param(2080, 2, 1, marks=pytest.mark.slow)],
    ids=str,
)
def test_values_and_gradients_are_the_plain_formulas(T, H, G):
    """One block, blocks that end short, more than 16 of 128; heads shared or not."""
    given = arrays(2 if T < 2000 else 1, T, H, G, 8)
    got = value_and_gradients(causal_attention, *given)
    expected = value_and_gradients(plain, *given)
    for a, b in zip(got, expected, strict=True):
        assert a.dtype == jnp.float32 and a.shape == b.shape
        np.testing.assert_allclose(a, b, rtol=0, atol=5e-6 * np.abs(b).max())


@pytest.mark.parametrize("T", [7, 150])
@pytest.mark.parametrize("window", [None, 1, 5, 100])
def test_windows_caps_and_scales_are_the_plain_formulas(T, window):
    """Guards: a window that is off by one, a cap that the backward pass forgets."""
    given = arrays(2, T, 4, 2, 8)
    how = dict(scale=0.7, soft_cap=2.0, window=window)
    expected = value_and_gradients(functools.partial(plain, **how), *given)
    # Of scanned layers the window is an array.
    traced = how | {"window": None if window is None else jnp.int32(window)}
    for settings in (how, traced):
        got = value_and_gradients(functools.partial(causal_attention, **settings), *given)
        # Of one position queries and keys change nothing: what they get is rounding of the others.
        size = max(np.abs(b).max() for b in expected)
        for a, b in zip(got, expected, strict=True):
            np.testing.assert_allclose(a, b, rtol=0, atol=5e-6 * (np.abs(b).max() or size))
    if window == 5 and T == 150:
        far = value_and_gradients(functools.partial(plain, **how | {"window": 6}), *given)
        assert np.abs(far[0] - expected[0]).max() > 0.1


def test_half_precision_keeps_scores_and_sums_in_float32():
    """Guards: half-precision softmax."""
    given = arrays(2, 150, 4, 2, 16, "bfloat16")
    got = value_and_gradients(causal_attention, *given)
    expected = value_and_gradients(plain, *(x.astype(jnp.float32) for x in given))
    for a, b in zip(got, expected, strict=True):
        assert a.dtype == jnp.bfloat16
        # Two roundings to 8 bits of mantissa: of the queries over √K and of the result.
        error = np.linalg.norm(a.astype(np.float32) - b) / np.linalg.norm(b)
        assert error < 0.01


def test_no_position_sees_a_later_one():
    q, k, v, _ = arrays(1, 130, 2, 1, 4)
    before = causal_attention(q, k, v)
    after = causal_attention(q, k.at[:, 100:].add(9.0), v.at[:, 100:].add(9.0))
    np.testing.assert_array_equal(after[:, :100], before[:, :100])
    assert not np.allclose(after[:, 100:], before[:, 100:])


def test_plain_attention_has_the_same_gradients_and_a_forward_mode():
    q, k, v, towards = arrays(2, 70, 4, 2, 8)
    settings = dict(window=50, soft_cap=3.0)
    blocked, unblocked = (
        functools.partial(f, **settings) for f in (causal_attention, plain_attention)
    )
    expected = value_and_gradients(blocked, q, k, v, towards)
    for a, b in zip(value_and_gradients(unblocked, q, k, v, towards), expected, strict=True):
        np.testing.assert_allclose(a, b, rtol=0, atol=5e-6 * np.abs(b).max())
    directions = tuple(x[::-1] for x in (q, k, v))
    slope = jnp.sum(jax.jvp(unblocked, (q, k, v), directions)[1] * towards)
    products = [jnp.sum(g * d) for g, d in zip(expected[1:], directions, strict=True)]
    np.testing.assert_allclose(slope, sum(products), rtol=1e-4)


def test_large_scores_do_not_overflow():
    q, k, v, towards = arrays(1, 70, 2, 2, 4)
    for x in value_and_gradients(causal_attention, 1e4 * q, k, v, towards):
        assert np.isfinite(x).all()


def test_the_fused_kernel_is_taken_where_there_is_one(monkeypatch):
    """As jax lowers it for a GPU, forward and backward; what it is asked for, against ours."""
    q, k, v, towards = (x.astype(jnp.bfloat16) for x in arrays(2, 70, 4, 2, 8))
    attend, asked = jax.nn.dot_product_attention, []

    def by_xla(*arrays, **how):
        asked.append(how.pop("implementation"))
        return attend(*arrays, **how, implementation="xla")

    expected = value_and_gradients(causal_attention, q, k, v, towards)
    for x, y in zip(value_and_gradients(fused_attention, q, k, v, towards), expected, strict=True):
        np.testing.assert_array_equal(x, y)  # on a CPU the same program
    monkeypatch.setattr(jax, "default_backend", lambda: "gpu")
    monkeypatch.setattr(jax.nn, "dot_product_attention", by_xla)
    got = value_and_gradients(functools.partial(fused_attention, scale=0.3), q, k, v, towards)
    expected = value_and_gradients(functools.partial(causal_attention, scale=0.3), q, k, v, towards)
    for x, y in zip(got, expected, strict=True):
        x, y = (np.asarray(a, np.float32) for a in (x, y))
        assert np.linalg.norm(x - y) < 0.01 * np.linalg.norm(y)
    assert set(asked) == {"cudnn"}
    asked.clear()
    for how in (dict(window=9), dict(soft_cap=3.0)):
        fused_attention(q, k, v, **how)
    fused_attention(*(x.astype(jnp.float32) for x in (q, k, v)))
    assert not asked
    # jax asks a device for cuDNN's version, and there is none here.
    kernel = pytest.importorskip("jax._src.cudnn.fused_attention_stablehlo")
    monkeypatch.setattr(jax.nn, "dot_product_attention", attend)
    for name in ("check_cudnn_version", "check_compute_capability"):
        monkeypatch.setattr(kernel, name, lambda *_: 91000)
    lowered = jax.jit(lambda *x: value_and_gradients(fused_attention, *x)).trace(q, k, v, towards)
    text = lowered.lower(lowering_platforms=("cuda",)).as_text()
    assert set(re.findall(r"__cudnn\$\w+", text)) == {
        "__cudnn$fmhaSoftmax",
        "__cudnn$fmhaSoftmaxBackward",
    }
    assert "dot_general" not in text
