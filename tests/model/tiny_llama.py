"""A tiny Llama as Hugging Face keeps it, written without torch."""

import json

import numpy as np
from safetensors.numpy import save_file

V, D, F, H, G, K, L = 29, 8, 12, 4, 2, 6, 3
CONFIG = dict(
    architectures=["LlamaForCausalLM"],
    vocab_size=V,
    hidden_size=D,
    intermediate_size=F,
    num_hidden_layers=L,
    num_attention_heads=H,
    num_key_value_heads=G,
    head_dim=K,
    hidden_act="silu",
    rms_norm_eps=1e-5,
    rope_theta=100.0,
    tie_word_embeddings=False,
)


def tensors(vocab_size: int = V, layers: int = L) -> dict[str, np.ndarray]:
    """Random numbers by the names that transformers gives them."""
    shapes = {"model.embed_tokens.weight": (vocab_size, D), "model.norm.weight": (D,)}
    shapes["lm_head.weight"] = (vocab_size, D)
    for i in range(layers):
        at = f"model.layers.{i}."
        shapes |= {
            f"{at}input_layernorm.weight": (D,),
            f"{at}post_attention_layernorm.weight": (D,),
            f"{at}self_attn.q_proj.weight": (H * K, D),
            f"{at}self_attn.k_proj.weight": (G * K, D),
            f"{at}self_attn.v_proj.weight": (G * K, D),
            f"{at}self_attn.o_proj.weight": (D, H * K),
            f"{at}mlp.gate_proj.weight": (F, D),
            f"{at}mlp.up_proj.weight": (F, D),
            f"{at}mlp.down_proj.weight": (D, F),
        }
    rng = np.random.default_rng(0)
    return {
        n: (rng.normal(size=s) * 0.4 + (len(s) == 1)).astype(np.float32) for n, s in shapes.items()
    }


def write(directory, found=None, shards: int = 1, **changes):
    """Writes a model's directory, its tensors dealt to so many files; returns the directory."""
    directory.mkdir(exist_ok=True)
    found = tensors() if found is None else found
    (directory / "config.json").write_text(json.dumps(CONFIG | changes))
    if shards == 1:
        save_file(found, directory / "model.safetensors")
        return directory
    where = {
        name: f"model-{i % shards + 1:05}-of-{shards:05}.safetensors"
        for i, name in enumerate(found)
    }
    for file in set(where.values()):
        save_file({n: x for n, x in found.items() if where[n] == file}, directory / file)
    index = {"metadata": {}, "weight_map": where}
    (directory / "model.safetensors.index.json").write_text(json.dumps(index))
    return directory
