"""GGUF files of every known architecture against the same model as Hugging Face keeps it.

The files are written as llama.cpp's converter writes them: names, the order of rows, norms.
"""

import json

import numpy as np
import pytest
from safetensors.numpy import save_file

from tda.model import functional, pretrained
from tests.model.tiny_llama import CONFIG, D, F, G, H, K, V, tensors

gguf = pytest.importorskip("gguf", reason="needs the extra `gguf`")

L = 7  # a whole period of Gemma 3's windows and one more layer
OUTSIDE = {"model.embed_tokens": "token_embd", "model.norm": "output_norm", "lm_head": "output"}
INSIDE = {
    "self_attn.q_proj": "attn_q",
    "self_attn.k_proj": "attn_k",
    "self_attn.v_proj": "attn_v",
    "self_attn.o_proj": "attn_output",
    "self_attn.q_norm": "attn_q_norm",
    "self_attn.k_norm": "attn_k_norm",
    "mlp.gate_proj": "ffn_gate",
    "mlp.up_proj": "ffn_up",
    "mlp.down_proj": "ffn_down",
    "input_layernorm": "attn_norm",
    "post_attention_layernorm": "ffn_norm",
    "pre_feedforward_layernorm": "ffn_norm",
    "post_feedforward_layernorm": "post_ffw_norm",
}
AFTER = INSIDE | {"post_attention_layernorm": "post_attention_norm"}
CASES = {
    "llama": ("LlamaForCausalLM", {}, INSIDE),
    "qwen2": ("Qwen2ForCausalLM", {}, INSIDE),
    "qwen3": ("Qwen3ForCausalLM", {}, INSIDE),
    "smollm3": ("SmolLM3ForCausalLM", {}, INSIDE),
    "olmo2": ("Olmo2ForCausalLM", {}, AFTER),
    "olmo3": ("Olmo3ForCausalLM", dict(sliding_window=3, rope_theta=500_000.0), AFTER),
    "gemma": ("GemmaForCausalLM", dict(tie_word_embeddings=True, hidden_act="gelu"), INSIDE),
    "gemma2": (
        "Gemma2ForCausalLM",
        dict(tie_word_embeddings=True, sliding_window=3, query_pre_attn_scalar=K),
        AFTER,
    ),
    "gemma3": (
        "Gemma3ForCausalLM",
        dict(
            tie_word_embeddings=True,
            hidden_activation="gelu_pytorch_tanh",
            sliding_window=3,
            rope_local_base_freq=10_000.0,
            rope_scaling={"rope_type": "linear", "factor": 8.0},
            query_pre_attn_scalar=K,
        ),
        AFTER,
    ),
}


def numbers(kind):
    """The model's tensors by their names in a Hugging Face directory."""
    found, rng = tensors(layers=L), np.random.default_rng(5)

    def vector(n):
        return rng.normal(size=n).astype(np.float32)

    for i in range(L):
        at = f"model.layers.{i}."
        if kind == "qwen2":
            for name, n in (("q", H * K), ("k", G * K), ("v", G * K)):
                found[f"{at}self_attn.{name}_proj.bias"] = vector(n)
        if kind in ("qwen3", "gemma3", "olmo2", "olmo3"):
            q, k = (H * K, G * K) if kind.startswith("olmo") else (K, K)
            found[f"{at}self_attn.q_norm.weight"] = vector(q)
            found[f"{at}self_attn.k_norm.weight"] = vector(k)
        if kind in ("olmo2", "olmo3", "gemma2", "gemma3"):
            found[f"{at}post_feedforward_layernorm.weight"] = vector(D)
        if kind in ("gemma2", "gemma3"):
            found[f"{at}pre_feedforward_layernorm.weight"] = vector(D)
        if kind.startswith("olmo"):
            del found[f"{at}input_layernorm.weight"]
    if kind.startswith("gemma"):
        del found["lm_head.weight"]
    return found


def write_directory(path, kind, found, **more):
    architecture, changes, _ = CASES[kind]
    config = CONFIG | dict(architectures=[architecture], num_hidden_layers=L) | changes | more
    path.mkdir()
    (path / "config.json").write_text(json.dumps(config))
    save_file(found, path / "model.safetensors")
    return path


def write_gguf(path, kind, found, metadata=lambda writer: None, **options):
    # llama.cpp has one architecture for OLMo 2 and 3, of which only the latter has windows.
    writer = gguf.GGUFWriter(path, {"olmo3": "olmo2"}.get(kind, kind), **options)
    metadata(writer)
    writer.add_embedding_length(D)
    writer.add_block_count(L)
    writer.add_feed_forward_length(F)
    writer.add_head_count(H)
    writer.add_head_count_kv(G)
    writer.add_key_length(K)
    writer.add_layer_norm_rms_eps(CONFIG["rms_norm_eps"])
    writer.add_rope_freq_base((CONFIG | CASES[kind][1])["rope_theta"])
    if kind in ("olmo3", "gemma2", "gemma3"):
        writer.add_sliding_window(3)
    if kind == "gemma3":
        writer.add_rope_scaling_type(gguf.RopeScalingType.LINEAR)
        writer.add_rope_scaling_factor(8.0)
    names = CASES[kind][2]
    for name, x in found.items():
        stem, _, end = name.rpartition(".")
        if ".layers." in name:
            layer = name.split(".")[2]
            own = stem.removeprefix(f"model.layers.{layer}.")
            theirs = f"blk.{layer}.{names[own]}.{end}"
        else:
            own, theirs = stem, f"{OUTSIDE[stem]}.{end}"
        if kind in ("llama", "smollm3") and own in ("self_attn.q_proj", "self_attn.k_proj"):
            # Pairs half a head apart come to lie side by side.
            x = x.reshape(-1, 2, K // 2, D).swapaxes(1, 2).reshape(x.shape)
        if kind.startswith("gemma") and own.endswith("norm"):
            x = x + 1
        writer.add_tensor(theirs, np.ascontiguousarray(x))
    finish(writer)
    return path


def finish(writer):
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


def parameters(path):
    return functional.flat_parameters(functional.split(pretrained.load(path, quiet=True))[1])


@pytest.mark.parametrize("kind", CASES)
def test_the_same_model_in_both_forms(tmp_path, kind):
    """Guards: norms with a 1 too many, windows on the wrong layers, pairs of rotary rows mixed."""
    found = numbers(kind)
    theirs = write_directory(tmp_path / "model", kind, found)
    ours = write_gguf(tmp_path / "model.gguf", kind, found)
    one, other = (pretrained.inspect(p) for p in (theirs, ours))
    # What both leave at the decoder's defaults may be said or not.
    silent = dict(attention_bias=False, out_bias=False, mlp_bias=False, rope_fraction=1.0)
    silent |= dict(activation="silu", attention_soft_cap=None, logit_soft_cap=None)
    silent |= dict(attention_scale=K**-0.5)
    one, other = (silent | p.arguments for p in (one, other))
    for x in (one, other):
        x["norm_eps"] = pytest.approx(x["norm_eps"], rel=1e-6)
    assert {k: v for k, v in one.items() if k != "norm_eps"} == {
        k: v for k, v in other.items() if k != "norm_eps"
    }
    if kind == "gemma3":
        assert one["window_layers"] == [True] * 5 + [False, True] and one["vocab_size"] == V
    expected, got = parameters(theirs), parameters(ours)
    assert got.keys() == expected.keys()
    for name, x in got.items():
        # A 1 that was added and taken away again rounds the last digit.
        atol = 3e-7 if kind.startswith("gemma") else 0
        np.testing.assert_allclose(x, expected[name], rtol=0, atol=atol, err_msg=name)


def test_quantised_blocks_are_read_row_by_row(tmp_path):
    """Q4_1, as SmolLM2's package has it: any rows are the same as those of the whole."""
    from tda.model.pretrained.gguf_file import Gguf

    rng = np.random.default_rng(0)
    x = rng.normal(size=(12, 64)).astype(np.float32)
    kind = gguf.GGMLQuantizationType.Q4_1
    writer = gguf.GGUFWriter(tmp_path / "a.gguf", "llama")
    writer.add_tensor("m", gguf.quants.quantize(x, kind), raw_dtype=kind)
    finish(writer)
    source = Gguf(tmp_path / "a.gguf")
    assert source.shapes() == {"m": (12, 64)}
    whole = source.read("m", (slice(0, 12), slice(0, 64)))
    # 15 steps between the least and the largest of 32 numbers: half a step at most is lost.
    steps = np.ptp(x.reshape(12, 2, 32), axis=-1) / 15
    assert (np.abs(whole - x).reshape(12, 2, 32).max(-1) <= steps * 0.51 + 2e-3).all()
    part = source.read("m", (slice(3, 7), slice(10, 50)))
    np.testing.assert_array_equal(part, whole[3:7, 10:50])


def test_a_slice_of_a_vector_is_one_of_its_numbers(tmp_path):
    """Guards: half of a vector of bfloat16, whose file holds two bytes a number."""
    from tda.model.pretrained.gguf_file import Gguf

    x = np.arange(8, dtype=np.float32)
    kind = gguf.GGMLQuantizationType.BF16
    writer = gguf.GGUFWriter(tmp_path / "a.gguf", "llama")
    writer.add_tensor("v", gguf.quants.quantize(x, kind), raw_dtype=kind)
    finish(writer)
    source = Gguf(tmp_path / "a.gguf")
    assert source.shapes() == {"v": (8,)}
    np.testing.assert_array_equal(source.read("v", (slice(0, 8),)), x)
    np.testing.assert_array_equal(source.read("v", (slice(3, 6),)), x[3:6])


def test_a_split_model_is_read_from_any_of_its_parts(tmp_path):
    found = numbers("llama")
    whole = write_gguf(tmp_path / "whole.gguf", "llama", found)
    write_gguf(tmp_path / "split.gguf", "llama", found, split_max_tensors=30)
    parts = sorted(tmp_path.glob("split-*.gguf"))
    assert len(parts) == 3
    expected = parameters(whole)
    for part in parts[::2]:
        for name, x in parameters(part).items():
            np.testing.assert_array_equal(x, expected[name])
        assert len(pretrained.state_of(part)) == 3
    other = tmp_path / "part.gguf"
    parts[0].rename(other)
    with pytest.raises(pretrained.PretrainedError, match=r"lacks split-00001-of-00003.gguf"):
        pretrained.load(parts[1])
    with pytest.raises(pretrained.PretrainedError, match=r"a part of 3; name them"):
        pretrained.load(other)


def test_bytes_in_the_other_order_are_refused(tmp_path):
    """Guards: numbers that the package gguf reads with their bytes swapped."""
    order = gguf.GGUFEndian.BIG
    file = write_gguf(tmp_path / "big.gguf", "llama", numbers("llama"), endianess=order)
    with pytest.raises(pretrained.PretrainedError, match="gguf-convert-endian .*big.gguf native"):
        pretrained.load(file)


def test_yarn_is_that_of_the_same_model(tmp_path):
    yarn = dict(rope_type="yarn", factor=4.0, original_max_position_embeddings=64, beta_fast=4)
    theirs = write_directory(tmp_path / "model", "llama", numbers("llama"), rope_scaling=yarn)

    def scaled(writer, **more):
        writer.add_rope_scaling_type(gguf.RopeScalingType.YARN)
        writer.add_rope_scaling_factor(4.0)
        writer.add_rope_scaling_orig_ctx_len(64)
        for key, value in (dict(yarn_beta_fast=4.0) | more).items():
            writer.add_float32(f"llama.rope.scaling.{key}", value)

    ours = write_gguf(tmp_path / "a.gguf", "llama", numbers("llama"), scaled)
    tokens = np.arange(20)[None] % V
    expected = pretrained.load(theirs, quiet=True)(tokens)
    np.testing.assert_allclose(pretrained.load(ours, quiet=True)(tokens), expected, atol=1e-5)
    twice = write_gguf(
        tmp_path / "b.gguf", "llama", numbers("llama"), lambda w: scaled(w, attn_factor=2.0)
    )
    scaling = [pretrained.inspect(file).arguments["rope_scaling"] for file in (ours, twice)]
    assert scaling[1]["attention_factor"] == 2 * scaling[0]["attention_factor"]
    other = write_gguf(
        tmp_path / "c.gguf", "llama", numbers("llama"), lambda w: scaled(w, yarn_ext_factor=0.5)
    )
    with pytest.raises(pretrained.PretrainedError, match="yarn_ext_factor=0.5 is not supported"):
        pretrained.load(other)


def arguments_of(path, kind, metadata):
    return pretrained.inspect(write_gguf(path, kind, numbers(kind), metadata)).arguments


def llama_with(path, keys):
    """The arguments of a Llama whose file has these keys too."""

    def metadata(writer):
        adds = {str: writer.add_string, bool: writer.add_bool, float: writer.add_float32}
        for key, value in keys.items():
            adds[type(value)](f"llama.{key}", value)

    return arguments_of(path, "llama", metadata)


def test_errors_name_the_file(tmp_path):
    with pytest.raises(pretrained.PretrainedError, match=r"rope.scaling.type 'longrope' .* is not"):
        llama_with(tmp_path / "b.gguf", {"rope.scaling.type": "longrope"})
    damaged = tmp_path / "c.gguf"
    damaged.write_bytes(b"GGUF" + bytes(3))
    with pytest.raises(pretrained.PretrainedError, match=r"c.gguf cannot be read as GGUF"):
        pretrained.load(damaged)
    other = tmp_path / "d.bin"
    other.write_bytes(b"")
    with pytest.raises(pretrained.PretrainedError, match=r"neither a directory nor a .gguf file"):
        pretrained.load(other)


def test_gemma_2_has_windows_where_its_file_does_not_say_it(tmp_path, monkeypatch):
    """Guards: every layer attending to everything; llama.cpp has 4,096 for such files."""
    monkeypatch.setattr(gguf.GGUFWriter, "add_sliding_window", lambda *_: None)
    found = arguments_of(tmp_path / "a.gguf", "gemma2", lambda writer: None)
    assert found["window"] == 4096
    assert found["window_layers"] == [True, False] * 3 + [True]
    assert "window" not in arguments_of(tmp_path / "b.gguf", "llama", lambda writer: None)


@pytest.mark.parametrize(
    ("keys", "expected"),
    [
        ({"rope.scaling.factor": 4.0}, {"kind": "linear", "factor": 4.0}),
        ({"rope.scale_linear": 2.0}, {"kind": "linear", "factor": 2.0}),
        ({"rope.scale_linear": 1.0}, None),
        ({"rope.scaling.type": "none", "rope.scaling.factor": 4.0}, None),
        ({"rope.scaling.type": "linear", "rope.scaling.factor": 1.0}, None),
        ({"rope.scaling.type": "linear"}, None),
    ],
)
def test_a_factor_without_a_type_is_linear(tmp_path, keys, expected):
    """Guards: a stretched model read as if it were not, since its type is not written."""
    assert llama_with(tmp_path / "a.gguf", keys)["rope_scaling"] == expected


@pytest.mark.parametrize(
    ("key", "value"),
    [("attention.scale", 0.5), ("logit_scale", 8.0), ("embedding_scale", 12.0),
     ("residual_scale", 0.2), ("attention.causal", False), ("attention.clamp_kqv", 8.0),
     ("expert_count", "8")],
)  # fmt: skip
def test_settings_that_change_what_is_computed_are_refused(tmp_path, key, value):
    with pytest.raises(pretrained.PretrainedError, match=f"llama.{key}={value}"):
        llama_with(tmp_path / "a.gguf", {key: value})
