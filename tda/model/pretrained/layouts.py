"""Where published models keep each parameter of the decoder: names of tensors, by path.

A function a family for one layer (its arguments, and what its tensors' names begin with), and one
for what is outside of the layers.
"""

import numpy as np

from tda.model.pretrained.tensors import Part


def linear(ours: str, theirs: str, bias: bool, **how) -> dict[str, Part]:
    """The parts of a linear layer that PyTorch keeps as [N, M]."""
    out = {f"{ours}/kernel": Part(f"{theirs}.weight", transpose=True, **how)}
    return out | ({f"{ours}/bias": Part(f"{theirs}.bias", **how)} if bias else {})


_NORMS = {
    "before": ("attention_norm", "mlp_norm"),
    "after": ("attention_after_norm", "mlp_after_norm"),
    "both": ("attention_norm", "attention_after_norm", "mlp_norm", "mlp_after_norm"),
}


def llama_layer(a: dict, at: str) -> dict[str, Part]:
    """A layer by Llama's names, which most families use."""
    place = a.get("norm_place", "before")
    theirs = {
        "before": ("input_layernorm", "post_attention_layernorm"),
        "after": ("post_attention_layernorm", "post_feedforward_layernorm"),
        "both": (
            "input_layernorm",
            "post_attention_layernorm",
            "pre_feedforward_layernorm",
            "post_feedforward_layernorm",
        ),
    }[place]
    parts = {
        f"{ours}/scale": Part(f"{at}{name}.weight")
        for ours, name in zip(_NORMS[place], theirs, strict=True)
    }
    for ours, name in (("query", "q_proj"), ("key", "k_proj"), ("value", "v_proj")):
        bias = a.get("attention_bias", False)
        parts |= linear(f"attention/{ours}", f"{at}self_attn.{name}", bias)
    parts |= linear("attention/out", f"{at}self_attn.o_proj", a.get("out_bias", False))
    if a.get("query_key_norm"):
        parts["attention/query_norm/scale"] = Part(f"{at}self_attn.q_norm.weight")
        parts["attention/key_norm/scale"] = Part(f"{at}self_attn.k_norm.weight")
    for ours in ("gate", "up", "down"):
        parts |= linear(f"mlp/{ours}", f"{at}mlp.{ours}_proj", a.get("mlp_bias", False))
    return parts


def _head(a: dict, name: str) -> dict[str, Part]:
    return {} if a["tied"] else {"head/kernel": Part(name, transpose=True)}


def llama_outside(a: dict, base: str) -> dict[str, Part]:
    """Embedding, final norm and head by Llama's names."""
    return {
        "embedding/embedding": Part(f"{base}embed_tokens.weight"),
        "final_norm/scale": Part(f"{base}norm.weight"),
    } | _head(a, "lm_head.weight")


def _norm_with_bias(ours: str, theirs: str) -> dict[str, Part]:
    return {f"{ours}/scale": Part(f"{theirs}.weight"), f"{ours}/bias": Part(f"{theirs}.bias")}


def gpt2_layer(a: dict, at: str) -> dict[str, Part]:
    """A layer of GPT-2."""
    # GPT-2 keeps its matrices as [M, N], and those of queries, keys and values side by side.
    parts = _norm_with_bias("attention_norm", f"{at}ln_1")
    parts |= _norm_with_bias("mlp_norm", f"{at}ln_2")
    D = a["width"]
    for i, ours in enumerate(("query", "key", "value")):
        take = np.arange(i * D, (i + 1) * D)
        parts[f"attention/{ours}/kernel"] = Part(f"{at}attn.c_attn.weight", axis=1, take=take)
        parts[f"attention/{ours}/bias"] = Part(f"{at}attn.c_attn.bias", take=take)
    pairs = (("attention/out", "attn.c_proj"), ("mlp/up", "mlp.c_fc"), ("mlp/down", "mlp.c_proj"))
    for ours, theirs in pairs:
        parts[f"{ours}/kernel"] = Part(f"{at}{theirs}.weight")
        parts[f"{ours}/bias"] = Part(f"{at}{theirs}.bias")
    return parts


def gpt2_outside(a: dict, base: str) -> dict[str, Part]:
    """Embeddings, final norm and head of GPT-2."""
    return {
        "embedding/embedding": Part(f"{base}wte.weight"),
        "position_embedding/embedding": Part(f"{base}wpe.weight"),
    } | (_norm_with_bias("final_norm", f"{base}ln_f") | _head(a, "lm_head.weight"))


def neox_layer(a: dict, at: str) -> dict[str, Part]:
    """A layer of GPT-NeoX."""
    # Rows of queries, keys and values take turns, a head at a time.
    H, K = a["heads"], a["head_width"]
    rows_Hx3xK = np.arange(H * 3 * K).reshape(H, 3, K)
    parts = _norm_with_bias("attention_norm", f"{at}input_layernorm")
    parts |= _norm_with_bias("mlp_norm", f"{at}post_attention_layernorm")
    for i, ours in enumerate(("query", "key", "value")):
        take, bias = rows_Hx3xK[:, i].reshape(-1), a["attention_bias"]
        fused = f"{at}attention.query_key_value"
        parts |= linear(f"attention/{ours}", fused, bias, take=take)
    parts |= linear("attention/out", f"{at}attention.dense", a["out_bias"])
    parts |= linear("mlp/up", f"{at}mlp.dense_h_to_4h", True)
    return parts | linear("mlp/down", f"{at}mlp.dense_4h_to_h", True)


def neox_outside(a: dict, base: str) -> dict[str, Part]:
    """Embedding, final norm and head of GPT-NeoX."""
    return {"embedding/embedding": Part(f"{base}embed_in.weight")} | (
        _norm_with_bias("final_norm", f"{base}final_layer_norm") | _head(a, "embed_out.weight")
    )
