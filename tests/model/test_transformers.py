"""Every family against `transformers`: a small random model, saved there, loaded here."""

import copy
import json

import jax
import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

from tda.gradients import reference
from tda.model import functional, pretrained
from tda.model.pretrained import families, loading

# Importing torch and transformers alone takes longer than all fast tests of a file.
pytestmark = pytest.mark.slow

V, T = 61, 12
SMALL = dict(
    vocab_size=V,
    hidden_size=24,
    intermediate_size=40,
    num_hidden_layers=3,
    num_attention_heads=4,
    num_key_value_heads=2,
    max_position_embeddings=64,
    initializer_range=0.3,
    bos_token_id=1,
    eos_token_id=2,
    pad_token_id=0,
)
LLAMA3 = dict(
    rope_type="llama3",
    rope_theta=500.0,
    factor=8.0,
    low_freq_factor=1.0,
    high_freq_factor=4.0,
    original_max_position_embeddings=16,
)
YARN = dict(rope_type="yarn", rope_theta=1000.0, factor=4.0, original_max_position_embeddings=16)
NEAR_AND_FAR = dict(
    sliding_attention=dict(rope_type="default", rope_theta=100.0),
    full_attention=dict(rope_type="linear", rope_theta=10_000.0, factor=8.0),
)
SLIDING, FULL = "sliding_attention", "full_attention"

LONG = dict(
    rope_type="longrope",
    rope_theta=1000.0,
    short_factor=[1.0, 1.1, 1.2],
    long_factor=[2.0, 3.0, 5.0],
)
DYNAMIC = dict(rope_type="dynamic", rope_theta=1000.0, factor=3.0)
DEEPSEEK = dict(YARN, mscale=1.0, mscale_all_dim=0.5, beta_fast=4, beta_slow=2)
YARN_FAR = dict(
    sliding_attention=dict(rope_type="default", rope_theta=500.0),
    full_attention=dict(YARN, rope_theta=500.0),
)

CASES = {
    "llama2": ("Llama", dict(num_key_value_heads=4)),
    "llama3": ("Llama", dict(rope_parameters=LLAMA3)),
    "llama-yarn": ("Llama", dict(rope_parameters=YARN, num_hidden_layers=2)),
    "llama-biases": ("Llama", dict(attention_bias=True, mlp_bias=True, head_dim=8)),
    "smollm2": ("Llama", dict(tie_word_embeddings=True, num_key_value_heads=1)),
    "llama-deepseek": ("Llama", dict(rope_parameters=DEEPSEEK, num_hidden_layers=2)),
    "llama-dynamic": ("Llama", dict(rope_parameters=DYNAMIC, max_position_embeddings=8)),
    "llama-dynamic-short": ("Llama", dict(rope_parameters=DYNAMIC)),
    "mistral": ("Mistral", dict(sliding_window=5)),
    "qwen2": ("Qwen2", dict()),
    "qwen2-windows": (
        "Qwen2",
        dict(use_sliding_window=True, sliding_window=4, max_window_layers=1),
    ),
    "qwen3": ("Qwen3", dict(head_dim=8, tie_word_embeddings=True)),
    "smollm3": ("SmolLM3", dict(no_rope_layers=[1, 0, 1])),
    "smollm3-windows": (
        "SmolLM3",
        dict(
            no_rope_layer_interval=2,
            use_sliding_window=True,
            sliding_window=4,
            rope_parameters=YARN,
        ),
    ),
    "stablelm": ("StableLm", dict(hidden_size=32)),
    "stablelm-biases": (
        "StableLm",
        dict(
            use_qkv_bias=True,
            num_key_value_heads=4,
            rope_parameters=dict(rope_type="default", rope_theta=100.0, partial_rotary_factor=0.67),
        ),
    ),
    "phi3": ("Phi3", dict(sliding_window=5)),
    "phi4-mini": (
        "Phi3",
        dict(
            tie_word_embeddings=True,
            hidden_size=32,
            partial_rotary_factor=0.75,
            original_max_position_embeddings=16,
            rope_parameters=LONG,
        ),
    ),
    "phi3-long": ("Phi3", dict(original_max_position_embeddings=8, rope_parameters=LONG)),
    "olmo": ("Olmo", dict()),
    "olmo-clipped": ("Olmo", dict(clip_qkv=0.8)),
    "olmo2": ("Olmo2", dict()),
    "olmo3": ("Olmo3", dict(sliding_window=4, rope_parameters=YARN_FAR, num_hidden_layers=4)),
    "olmo3-defaults": ("Olmo3", dict(sliding_window=4, num_hidden_layers=4)),
    "gemma": ("Gemma", dict(head_dim=8)),
    "gemma2": ("Gemma2", dict(head_dim=8, sliding_window=4, query_pre_attn_scalar=20)),
    "gemma2-caps": (
        "Gemma2",
        dict(head_dim=8, attn_logit_softcapping=2.0, final_logit_softcapping=3.0),
    ),
    "gpt2": ("GPT2", dict(n_inner=None)),
    "starcoder2": ("Starcoder2", dict(sliding_window=5)),
    "starcoder2-no-bias": ("Starcoder2", dict(use_bias=False, tie_word_embeddings=False)),
    "opt": ("OPT", dict(ffn_dim=40)),
    "gpt-neo": ("GPTNeo", dict(attention_types=[[["global", "local"], 2]], window_size=4)),
    "gpt-neox": ("GPTNeoX", dict(rotary_pct=0.5, use_parallel_residual=True)),
    "gpt-neox-in-turn": (
        "GPTNeoX",
        dict(use_parallel_residual=False, hidden_act="gelu_fast", attention_bias=False),
    ),
    "gemma3": (
        "Gemma3",
        dict(
            head_dim=8,
            sliding_window=4,
            layer_types=[SLIDING, SLIDING, FULL],
            rope_parameters=NEAR_AND_FAR,
            query_pre_attn_scalar=20,
        ),
    ),
    "gemma3-caps": (
        "Gemma3",
        dict(head_dim=6, sliding_window=64, final_logit_softcapping=3.0, num_hidden_layers=6),
    ),
}


def make(name):
    """A random model of transformers: every parameter random, norms and biases too."""
    torch = pytest.importorskip("torch", reason="needs torch==2.13.0")
    transformers = pytest.importorskip("transformers", reason="needs transformers")
    family, changes = CASES[name]
    prefix = {"Gemma3": "Gemma3Text"}.get(family, family)
    head = {"GPT2": "GPT2LMHeadModel"}.get(family, f"{family}ForCausalLM")
    shape = dict(SMALL)
    if family == "GPT2":
        shape = dict(
            vocab_size=V, n_embd=24, n_layer=3, n_head=4, n_positions=32, initializer_range=0.3
        )
    if family == "GPTNeo":
        shape = dict(vocab_size=V, hidden_size=24, num_layers=4, num_heads=4)
        shape |= dict(max_position_embeddings=32, initializer_range=0.3)
    if family == "OPT":
        shape |= dict(init_std=0.3)
    if family == "GPTNeoX":
        del shape["num_key_value_heads"]
        shape["hidden_size"] = 32
    config = getattr(transformers, f"{prefix}Config")(**copy.deepcopy(shape | changes))
    config._attn_implementation = "eager"
    torch.manual_seed(0)
    model = getattr(transformers, head)(config).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.ndim == 1:
                parameter.add_(0.3 * torch.randn_like(parameter))
    return torch, model


class Gradients:
    """Gradients of PyTorch's parameters, read as a file's tensors are."""

    def __init__(self, found):
        self.found = found

    def read(self, tensor, index):
        return self.found[tensor][index]


@pytest.mark.parametrize("name", CASES)
def test_logits_and_gradients_agree(name, tmp_path):
    torch, theirs = make(name)
    family, _ = CASES[name]
    theirs.save_pretrained(tmp_path, max_shard_size="20KB" if name == "llama3" else "1GB")
    if name == "llama3":
        assert len(list(tmp_path.glob("*.safetensors"))) > 1
    ours = pretrained.load(tmp_path, quiet=True)
    tokens = np.random.default_rng(0).integers(0, V, (3, T + 1)).astype(np.int32)
    with torch.no_grad():
        expected = theirs(torch.tensor(tokens[:, :-1]).long()).logits.numpy()
    model_fn, params = functional.split(ours)
    got = np.asarray(jax.jit(model_fn.apply)(params, tokens[:, :-1]))
    assert got.dtype == np.float32
    # In float32 the two round differently by a few units of 1e-6 of the largest logit.
    np.testing.assert_allclose(got, expected, rtol=0, atol=1e-4 * max(1, np.abs(expected).max()))
    assert np.abs(expected).max() > 0.5

    weights = np.ones((3, T), np.float32)
    weights[1, 7:] = 0
    batch = {"tokens": tokens[:, :-1], "targets": tokens[:, 1:], "weights": weights}
    gradients = jax.jit(lambda batch: reference.per_example_gradients(ours, batch))(batch)
    found = loading.inspect(tmp_path)
    for i in range(3):
        theirs.zero_grad()
        logits = theirs(torch.tensor(tokens[i : i + 1, :-1]).long()).logits[0].float()
        nats = torch.nn.functional.cross_entropy(
            logits, torch.tensor(tokens[i, 1:]).long(), reduction="none"
        )
        (nats * torch.tensor(weights[i])).sum().backward()
        found_here = {n: p.grad.numpy() for n, p in theirs.named_parameters()}
        if family == "GPTNeoX":  # saved under another name than it has in memory
            found_here["embed_out.weight"] = found_here.pop("lm_head.weight")
        source = Gradients(found_here)
        for path, part in found.parts.items():
            layer = path.split("/")
            stacked = layer[0] == "layers"
            own = "/".join(["layers", *layer[2:]]) if stacked else path
            got = np.asarray(gradients[own][i])
            got = got[int(layer[1])] if stacked else got
            wanted = part.read(source, tuple(slice(0, n) for n in got.shape))
            if path.endswith("key/bias") and name in ("gpt2", "opt"):
                # It adds the same to all scores of a query: its gradient is 0 but for rounding.
                assert max(np.abs(got).max(), np.abs(wanted).max()) < 1e-5
                continue
            assert np.abs(wanted).max() > 1e-3, path
            assert np.abs(got - wanted).max() < 2e-4 * np.abs(wanted).max(), path


@pytest.mark.parametrize("name", ["gpt2", "olmo2"])
def test_a_model_saved_without_its_head_is_read_where_that_is_tied(name, tmp_path):
    _, theirs = make(name)
    body = theirs.base_model
    body.save_pretrained(tmp_path)
    config = json.loads((tmp_path / "config.json").read_text())
    config["architectures"] = [type(theirs).__name__]
    (tmp_path / "config.json").write_text(json.dumps(config))
    if name == "olmo2":
        with pytest.raises(pretrained.PretrainedError, match="lacks lm_head.weight"):
            pretrained.load(tmp_path)
        return
    model = pretrained.load(tmp_path, quiet=True)
    expected = body.get_input_embeddings().weight.detach().numpy()
    np.testing.assert_array_equal(np.asarray(model.embedding.embedding[...]), expected)


def test_every_known_family_is_compared():
    tested = {{"GPT2": "GPT2LMHeadModel"}.get(f, f"{f}ForCausalLM") for f, _ in CASES.values()}
    assert tested | {"Gemma3ForConditionalGeneration"} == set(families.FAMILIES)


@pytest.mark.parametrize("form", ["saved", "hub"])
def test_the_text_part_of_a_model_of_pictures(form, tmp_path):
    transformers = pytest.importorskip("transformers", reason="needs transformers")
    torch = pytest.importorskip("torch", reason="needs torch==2.13.0")
    text = dict(SMALL, head_dim=8, sliding_window=4, num_hidden_layers=6)
    vision = dict(hidden_size=16, intermediate_size=16, num_hidden_layers=1, num_attention_heads=2)
    config = transformers.Gemma3Config(
        text_config=text, vision_config=dict(vision, image_size=28, patch_size=14)
    )
    torch.manual_seed(0)
    theirs = transformers.Gemma3ForConditionalGeneration(config).eval()
    theirs.save_pretrained(tmp_path)
    if form == "hub":  # the names of the published files
        file = tmp_path / "model.safetensors"
        found = {
            n.replace("model.language_model.", "language_model.model.")
            .replace("model.vision_tower.", "vision_tower.")
            .replace("model.multi_modal_projector.", "multi_modal_projector."): x
            for n, x in load_file(file).items()
        }
        assert any(n.startswith("vision_tower.") for n in found)
        save_file(found, file)
    ours = pretrained.load(tmp_path, quiet=True)
    tokens = np.random.default_rng(0).integers(3, V, (3, T)).astype(np.int32)
    with torch.no_grad():
        expected = theirs(torch.tensor(tokens).long()).logits.numpy()
    np.testing.assert_allclose(ours(tokens), expected, rtol=0, atol=1e-4)
    assert np.abs(expected).max() > 0.5
