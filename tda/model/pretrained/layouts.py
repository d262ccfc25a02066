"""The places of the decoder's parameters in published models: names of tensors, by path.

Each family has a function for one layer, which takes the decoder's settings and the prefix of the
layer's tensors, and one for the parameters outside of the layers.
"""

import dataclasses

import numpy as np

from tda.model.pretrained.tensors import Part
from tda.model.settings import DecoderSettings


def linear(path: str, tensor: str, bias: bool, take: np.ndarray | None = None) -> dict[str, Part]:
    """Returns the parts of a linear layer, whose matrix PyTorch keeps as [N, M].

    Args:
        path: path of the layer in the decoder.
        tensor: name of its tensors, without ".weight" and ".bias".
        bias: whether it has a bias.
        take: the rows that belong to this layer, as in `Part`.
    """
    parts = {f"{path}/kernel": Part(f"{tensor}.weight", transpose=True, take=take)}
    return parts | ({f"{path}/bias": Part(f"{tensor}.bias", take=take)} if bias else {})


_NORMS = {
    "before": ("attention_norm", "mlp_norm"),
    "after": ("attention_after_norm", "mlp_after_norm"),
    "both": ("attention_norm", "attention_after_norm", "mlp_norm", "mlp_after_norm"),
}
_LLAMA_NORMS = {
    "before": ("input_layernorm", "post_attention_layernorm"),
    "after": ("post_attention_layernorm", "post_feedforward_layernorm"),
    "both": (
        "input_layernorm",
        "post_attention_layernorm",
        "pre_feedforward_layernorm",
        "post_feedforward_layernorm",
    ),
}


def norm(settings: DecoderSettings, path: str, tensor: str) -> dict[str, Part]:
    """Returns the parts of a norm, whose tensors are called as `linear`'s are."""
    names = {"rms": ("weight",), "layer": ("weight", "bias"), "layer_plain": ()}[settings.norm]
    return {
        f"{path}/{parameter}": Part(f"{tensor}.{name}")
        for parameter, name in zip(("scale", "bias"), names, strict=False)
    }


def llama_layer(settings: DecoderSettings, prefix: str) -> dict[str, Part]:
    """Returns the parts of a layer by Llama's names, which most families use."""
    place, parts = settings.norm_place, {}
    for path, name in zip(_NORMS[place], _LLAMA_NORMS[place], strict=True):
        parts |= norm(settings, path, f"{prefix}{name}")
    attention = f"{prefix}self_attn"
    for path, name in (("query", "q_proj"), ("key", "k_proj"), ("value", "v_proj")):
        parts |= linear(f"attention/{path}", f"{attention}.{name}", settings.attention_bias)
    parts |= linear("attention/out", f"{attention}.o_proj", settings.out_bias)
    if settings.query_key_norm:
        parts["attention/query_norm/scale"] = Part(f"{attention}.q_norm.weight")
        parts["attention/key_norm/scale"] = Part(f"{attention}.k_norm.weight")
    for path in ("gate", "up", "down") if settings.gated else ("up", "down"):
        parts |= linear(f"mlp/{path}", f"{prefix}mlp.{path}_proj", settings.mlp_bias)
    return parts


def _outside(embedding: str, final_norm: str, positions: str = "", skipped=0, head="lm_head"):
    """Returns the function of embeddings, final norm and head, given the names of their modules.

    The first `skipped` rows of a table of positions are for padding, which has none here.
    """

    def outside(settings: DecoderSettings, prefix: str) -> dict[str, Part]:
        parts = {"embedding/embedding": Part(f"{prefix}{embedding}.weight")}
        if positions:
            rows = np.arange(skipped, settings.max_positions + skipped) if skipped else None
            table = Part(f"{prefix}{positions}.weight", take=rows)
            parts["position_embedding/embedding"] = table
        parts |= norm(settings, "final_norm", f"{prefix}{final_norm}")
        if not settings.tied:
            parts["head/kernel"] = Part(f"{head}.weight", transpose=True)
        return parts

    return outside


llama_outside = _outside("embed_tokens", "norm")
opt_outside = _outside("embed_tokens", "final_layer_norm", "embed_positions", skipped=2)
gpt2_outside = _outside("wte", "ln_f", "wpe")
neox_outside = _outside("embed_in", "final_layer_norm", head="embed_out")


# Names of modules in families that otherwise are like Llama.
_STARCODER2 = {"mlp.up_proj": "mlp.c_fc", "mlp.down_proj": "mlp.c_proj"}
_OPT = {
    "input_layernorm": "self_attn_layer_norm",
    "post_attention_layernorm": "final_layer_norm",
    "self_attn.o_proj": "self_attn.out_proj",
    "mlp.up_proj": "fc1",
    "mlp.down_proj": "fc2",
}
_GPT_NEO = {
    "input_layernorm": "ln_1",
    "post_attention_layernorm": "ln_2",
    "self_attn.q_proj": "attn.attention.q_proj",
    "self_attn.k_proj": "attn.attention.k_proj",
    "self_attn.v_proj": "attn.attention.v_proj",
    "self_attn.o_proj": "attn.attention.out_proj",
    "mlp.up_proj": "mlp.c_fc",
    "mlp.down_proj": "mlp.c_proj",
}


def _renamed(names: dict[str, str]):
    """Returns `llama_layer` for a family whose modules have other names."""

    def layer(settings: DecoderSettings, prefix: str) -> dict[str, Part]:
        parts = {}
        for path, part in llama_layer(settings, "").items():
            module, _, end = part.tensor.rpartition(".")
            tensor = f"{prefix}{names.get(module, module)}.{end}"
            parts[path] = dataclasses.replace(part, tensor=tensor)
        return parts

    return layer


starcoder2_layer, opt_layer, gpt_neo_layer = map(_renamed, (_STARCODER2, _OPT, _GPT_NEO))


def phi3_layer(settings: DecoderSettings, prefix: str) -> dict[str, Part]:
    """Returns the parts of a layer of Phi-3, whose matrices are stacked by rows."""
    parts = llama_layer(settings, prefix)
    K, F = settings.head_width, settings.ff_width
    rows = np.cumsum([0, *(K * n for n in (settings.heads, settings.kv_heads, settings.kv_heads))])
    for i, path in enumerate(("query", "key", "value")):
        take, fused = np.arange(rows[i], rows[i + 1]), f"{prefix}self_attn.qkv_proj"
        parts |= linear(f"attention/{path}", fused, False, take=take)
    for i, path in enumerate(("gate", "up")):
        take, fused = np.arange(i * F, (i + 1) * F), f"{prefix}mlp.gate_up_proj"
        parts |= linear(f"mlp/{path}", fused, False, take=take)
    return parts


def gpt2_layer(settings: DecoderSettings, prefix: str) -> dict[str, Part]:
    """Returns the parts of a layer of GPT-2."""
    # GPT-2 keeps its matrices as [M, N], and those of queries, keys and values side by side.
    parts = norm(settings, "attention_norm", f"{prefix}ln_1")
    parts |= norm(settings, "mlp_norm", f"{prefix}ln_2")
    D = settings.width
    for i, name in enumerate(("query", "key", "value")):
        take, fused = np.arange(i * D, (i + 1) * D), f"{prefix}attn.c_attn"
        parts[f"attention/{name}/kernel"] = Part(f"{fused}.weight", axis=1, take=take)
        parts[f"attention/{name}/bias"] = Part(f"{fused}.bias", take=take)
    pairs = (("attention/out", "attn.c_proj"), ("mlp/up", "mlp.c_fc"), ("mlp/down", "mlp.c_proj"))
    for path, name in pairs:
        parts[f"{path}/kernel"] = Part(f"{prefix}{name}.weight")
        parts[f"{path}/bias"] = Part(f"{prefix}{name}.bias")
    return parts


def neox_layer(settings: DecoderSettings, prefix: str) -> dict[str, Part]:
    """Returns the parts of a layer of GPT-NeoX."""
    # One matrix holds a head's queries, keys and values, then the next head's.
    H, K = settings.heads, settings.head_width
    rows_Hx3xK = np.arange(H * 3 * K).reshape(H, 3, K)
    parts = norm(settings, "attention_norm", f"{prefix}input_layernorm")
    parts |= norm(settings, "mlp_norm", f"{prefix}post_attention_layernorm")
    fused, bias = f"{prefix}attention.query_key_value", settings.attention_bias
    for i, name in enumerate(("query", "key", "value")):
        parts |= linear(f"attention/{name}", fused, bias, take=rows_Hx3xK[:, i].reshape(-1))
    parts |= linear("attention/out", f"{prefix}attention.dense", settings.out_bias)
    parts |= linear("mlp/up", f"{prefix}mlp.dense_h_to_4h", True)
    return parts | linear("mlp/down", f"{prefix}mlp.dense_4h_to_h", True)
