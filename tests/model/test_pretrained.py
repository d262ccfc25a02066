"""Models of files: every tensor in its place, whatever it is split into, or an error naming it."""

import json

import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest
from safetensors.numpy import save_file

import tda
from tda.model import functional, pretrained
from tda.model.decoder import is_as_built
from tda.model.pretrained import PretrainedError, configurations, families, tensors
from tda.runtime import sharding
from tests.model import tiny_llama
from tests.model.tiny_llama import CONFIG, D, F, H, K, L


def parameters(model):
    return functional.flat_parameters(functional.split(model)[1])


@pytest.fixture(scope="module")
def directory(tmp_path_factory):
    return tiny_llama.write(tmp_path_factory.mktemp("model"))


def test_every_tensor_is_in_its_place(directory):
    """Guards: a model attributed by a part of its parameters."""
    found, there = parameters(pretrained.load(directory, quiet=True)), tiny_llama.tensors()
    assert sum(x.size for x in found.values()) == sum(x.size for x in there.values())
    np.testing.assert_array_equal(found["head/kernel"], there["lm_head.weight"].T)
    for i in range(L):
        at = f"model.layers.{i}."
        for ours, theirs in (
            ("attention/query/kernel", "self_attn.q_proj"),
            ("attention/key/kernel", "self_attn.k_proj"),
            ("attention/value/kernel", "self_attn.v_proj"),
            ("attention/out/kernel", "self_attn.o_proj"),
            ("mlp/gate/kernel", "mlp.gate_proj"),
            ("mlp/up/kernel", "mlp.up_proj"),
            ("mlp/down/kernel", "mlp.down_proj"),
            ("attention_norm/scale", "input_layernorm"),
            ("mlp_norm/scale", "post_attention_layernorm"),
        ):
            expected = there[f"{at}{theirs}.weight"].T
            np.testing.assert_array_equal(found[f"layers/{ours}"][i], expected, err_msg=ours)
    unstacked = parameters(pretrained.load(directory, quiet=True, scan=False))
    np.testing.assert_array_equal(
        unstacked["layers/2/mlp/up/kernel"], found["layers/mlp/up/kernel"][2]
    )


def test_many_files_and_half_precision_are_the_same_model(directory, tmp_path):
    split = tiny_llama.write(tmp_path / "split", shards=3)
    assert len(list(split.glob("*.safetensors"))) == 3
    whole = parameters(pretrained.load(directory, quiet=True))
    for name, x in parameters(pretrained.load(split, quiet=True)).items():
        np.testing.assert_array_equal(x, whole[name])
    low = {n: x.astype(ml_dtypes.bfloat16) for n, x in tiny_llama.tensors().items()}
    low = tiny_llama.write(tmp_path / "low", low)
    for name, x in parameters(pretrained.load(low, quiet=True)).items():
        assert x.dtype == jnp.float32
        rounded = np.asarray(whole[name]).astype(ml_dtypes.bfloat16).astype(np.float32)
        np.testing.assert_array_equal(x, rounded)


def test_accelerators_compute_in_bfloat16(directory, monkeypatch):
    def dtypes(**options):
        model = pretrained.load(directory, quiet=True, **options)
        return model.settings.dtype, {str(x.dtype) for x in parameters(model).values()}

    assert dtypes() == ("float32", {"float32"})
    monkeypatch.setattr(sharding, "is_accelerated", lambda: True)
    assert dtypes() == ("bfloat16", {"float32"})
    assert dtypes(dtype="float32") == ("float32", {"float32"})


@pytest.mark.parametrize("path", ["layers/mlp/up/kernel", "layers/attention/out/kernel"])
def test_devices_read_their_own_parts_and_no_more(directory, monkeypatch, path):
    """Guards: a model that is whole on a host before it is split."""
    read, largest = tensors.Safetensors.read, {}

    def watched(self, tensor, index):
        found = read(self, tensor, index)
        largest[tensor] = max(largest.get(tensor, 0), found.size)
        return found

    monkeypatch.setattr(tensors.Safetensors, "read", watched)
    mesh = sharding.make_mesh(data=1, fsdp=4, tensor=2)
    model = pretrained.load(directory, mesh=mesh, quiet=True)
    whole = parameters(pretrained.load(directory, quiet=True))
    for name, x in parameters(model).items():
        np.testing.assert_array_equal(np.asarray(x), whole[name])
    assert parameters(model)[path].sharding.num_devices == 8
    assert is_as_built(model) and is_as_built(pretrained.load(directory, quiet=True))
    largest.clear()
    pretrained.load(directory, mesh=mesh, quiet=True)
    # Split over fsdp (D) and tensor (heads, F): an eighth of each matrix at a time.
    assert largest["model.layers.0.mlp.up_proj.weight"] == D * F // 8
    assert largest["model.layers.0.self_attn.o_proj.weight"] == D * H * K // 8


def test_the_output_matrix_of_a_tied_model_may_be_there_twice(tmp_path):
    found = tiny_llama.tensors()
    del found["lm_head.weight"]
    tied = tiny_llama.write(tmp_path / "a", found, tie_word_embeddings=True)
    assert "head/kernel" not in parameters(pretrained.load(tied, quiet=True))
    found["lm_head.weight"] = found["model.embed_tokens.weight"].copy()
    again = tiny_llama.write(tmp_path / "b", found, tie_word_embeddings=True)
    assert "head/kernel" not in parameters(pretrained.load(again, quiet=True))
    found["lm_head.weight"] = found["lm_head.weight"] + 1
    other = tiny_llama.write(tmp_path / "c", found, tie_word_embeddings=True)
    with pytest.raises(PretrainedError, match=r"lm_head.weight differs from model.embed_tokens"):
        pretrained.load(other)


def test_one_file_comes_before_the_index_and_strays_are_ignored(directory, tmp_path):
    """Guards: another program's tensors in place of the model's, or a model refused for them."""
    model = tiny_llama.write(tmp_path / "model")
    identity = pretrained.state_of(model)
    other = {n: x + 1 for n, x in tiny_llama.tensors().items()}
    tiny_llama.write(tmp_path / "shards", other, shards=2)
    for file in (tmp_path / "shards").glob("model*"):
        file.rename(model / file.name)
    for name in ("optimizer", "consolidated", "adapter_model", "model.fp16"):
        save_file(other, model / f"{name}.safetensors")
    (model / "tiny.gguf").write_bytes(b"")
    (model / "pytorch_model.bin").write_bytes(b"")
    expected = parameters(pretrained.load(directory, quiet=True))
    for name, x in parameters(pretrained.load(model, quiet=True)).items():
        np.testing.assert_array_equal(x, expected[name])
    assert pretrained.state_of(model) == identity
    (model / "model.safetensors").unlink()
    found = parameters(pretrained.load(model, quiet=True))
    np.testing.assert_array_equal(found["final_norm/scale"], other["model.norm.weight"])
    (model / "adapter_config.json").write_text("{}")
    with pytest.warns(UserWarning, match="holds an adapter, which is not applied"):
        pretrained.load(model, quiet=True)


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("pytorch_model.bin", "are pickled .* convert them: python -c .*save_pretrained"),
        ("pytorch_model-00001-of-00002.bin", "are pickled"),
        ("tiny.gguf", "give the .gguf file itself"),
        ("adapter_model.safetensors", "an adapter alone is not a model"),
        ("model-00001-of-00002.safetensors", "fetch the index of the shards"),
        ("README.md", r"\(it has README.md, config.json\); fetch the model again"),
    ],
)
def test_a_directory_without_weights_says_what_to_do(tmp_path, name, message):
    model = tiny_llama.write(tmp_path / "model")
    (model / "model.safetensors").rename(model / name)
    with pytest.raises(PretrainedError, match=f"neither model.safetensors nor .*{message}"):
        pretrained.load(model)


def test_a_tied_matrix_may_have_the_name_of_the_head_alone(tmp_path):
    found = tiny_llama.tensors()
    table = found["lm_head.weight"]
    del found["model.embed_tokens.weight"]
    tied = tiny_llama.write(tmp_path / "a", found, tie_word_embeddings=True)
    loaded = parameters(pretrained.load(tied, quiet=True))
    np.testing.assert_array_equal(loaded["embedding/embedding"], table)
    untied = tiny_llama.write(tmp_path / "b", found)
    with pytest.raises(PretrainedError, match=r"lacks model.embed_tokens.weight"):
        pretrained.load(untied)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        (dict(transformers_weights="other.safetensors"), "transformers_weights='other"),
        (
            dict(architectures=["MambaForCausalLM"]),
            "MambaForCausalLM is not supported.*state spaces",
        ),
        (dict(architectures=["OtherForCausalLM"]), "OtherForCausalLM is not known.*Olmo2"),
        (dict(architectures=None), "is not named; it is not known"),
        (dict(hidden_act="xielu"), "hidden_act='xielu' is not supported"),
        (dict(rope_scaling={"type": "proportional"}), "type 'proportional' is not"),
        (
            dict(architectures=["MixtralForCausalLM"], num_local_experts=8),
            r"MixtralForCausalLM has 8 experts in a layer \(num_local_experts\); .* left out",
        ),
        (dict(architectures=["StableLmForCausalLM"], qk_layernorm=True), "qk_layernorm=True is"),
        (dict(rope_scaling={"rope_type": "llama3", "factor": 2.0}), "needs factor, high_freq"),
        (dict(quantization_config={"bits": 4}), "quantization_config=.* is not supported"),
        (dict(hidden_size=None), "lacks 'hidden_size'"),
        (dict(num_hidden_layers="3"), "num_hidden_layers='3'; it must be a number from 1 on"),
        (dict(num_attention_heads=0), "num_attention_heads=0; it must be a number"),
        (dict(partial_rotary_factor=0.5), "partial_rotary_factor=0.5 is not supported: transf"),
        (dict(architectures="Other"), "the architecture Other is not known"),
        (dict(attention_bias=True), r"lacks model.layers.0.self_attn.k_proj.bias.* and \d+ more"),
        (dict(num_hidden_layers=4), "lacks model.layers.3.input_layernorm.weight"),
        (dict(num_hidden_layers=2), "9 tensors have no place.*model.layers.2.input_layernorm"),
        (dict(intermediate_size=16), r"down_proj.weight has the shape \(8, 12\)"),
        (dict(vocab_size=30), "embed_tokens.weight has the shape"),
    ],
)
def test_what_does_not_fit_is_named(tmp_path, changes, message):
    model = tiny_llama.write(tmp_path / "model", **changes)
    with pytest.raises(PretrainedError, match=message):
        pretrained.load(model)


@pytest.mark.parametrize("family", ["Gemma3", "Olmo3"])
def test_a_scaling_of_window_layers_is_refused(tmp_path, family):
    """Guards: layers with a window whose positions are not stretched as they were in training."""
    stated = dict(rope_type="linear", rope_theta=100.0, factor=8.0)
    full = dict(rope_type="default", rope_theta=1000.0)
    model = tiny_llama.write(
        tmp_path / "model",
        architectures=[f"{family}ForCausalLM"],
        sliding_window=4,
        rope_parameters=dict(sliding_attention=stated, full_attention=full),
    )
    with pytest.raises(PretrainedError, match=r"rope_parameters\['sliding_attention'\].*'linear'"):
        pretrained.inspect(model)


def settings_of(architecture, **values):
    config = configurations.Config(CONFIG | values, "config.json")
    return families.FAMILIES[architecture].arguments(config)


@pytest.mark.parametrize("older", [{}, dict(rope_local_base_freq=300.0)])
@pytest.mark.parametrize("window", [{}, dict(sliding_attention=None)])
def test_the_base_of_window_layers_is_not_that_of_the_others(older, window):
    """Guards: Gemma 3's window layers with the base 1,000,000, where their own is not repeated."""
    full = dict(full_attention=dict(rope_type="linear", rope_theta=2e6, factor=8.0))
    values = dict(sliding_window=4, rope_parameters=full | window) | older
    settings = settings_of("Gemma3ForCausalLM", **values)
    expected = older.get("rope_local_base_freq", 10_000.0)
    assert (settings["rope_base"], settings["window_rope_base"]) == (2e6, expected)


def test_gpt2_may_state_its_sizes_by_the_usual_names():
    """Guards: 12 heads, the default, where the file says another number, as transformers reads."""
    usual = dict(hidden_size=24, num_hidden_layers=2, num_attention_heads=6)
    settings = settings_of("GPT2LMHeadModel", **usual, max_position_embeddings=32)
    names = ("width", "layers", "heads", "head_width", "max_positions")
    assert [settings[name] for name in names] == [24, 2, 6, 4, 32]
    settings = settings_of("GPT2LMHeadModel", **usual, n_head=3)
    assert settings["heads"] == 3


@pytest.mark.parametrize("dtype", ["int8", "uint8", "int32", "float8_e4m3fn"])
def test_quantised_weights_are_refused_by_name(tmp_path, dtype):
    """Guards: integers taken for weights where no configuration says that they are quantised."""
    name = "model.layers.1.mlp.up_proj.weight"
    weights = tiny_llama.tensors()
    weights[name] = weights[name].astype(dtype)
    with pytest.raises(PretrainedError, match=rf"{name} has the dtype \w+, not one of F32, BF16"):
        pretrained.load(tiny_llama.write(tmp_path / "a", weights))


def test_of_two_forms_of_rotary_settings_the_older_counts(tmp_path):
    """As in transformers (`convert_rope_params_to_dict`)."""
    newer, older = {"rope_type": "default", "rope_theta": 500.0}, {"type": "linear", "factor": 2.0}
    model = tiny_llama.write(tmp_path, rope_parameters=newer, rope_scaling=older)
    settings = pretrained.load(model, quiet=True).settings
    assert (settings.rope_base, settings.rope_scaling["kind"]) == (100.0, "linear")
    settings = pretrained.load(
        tiny_llama.write(tmp_path, rope_parameters=newer), quiet=True
    ).settings
    assert (settings.rope_base, settings.rope_scaling) == (500.0, None)


def test_a_tokenizer_that_is_missing_is_told_before_the_model_is_loaded(directory, monkeypatch):
    monkeypatch.setattr(pretrained, "load", None)
    with pytest.raises(FileNotFoundError, match=r"tokenizer.json: no such file; convert"):
        tda.load(directory)
    with pytest.raises(PretrainedError, match="is neither a directory nor a .gguf file"):
        tda.load(directory / "config.json")


def test_left_over_and_damaged_files_are_named(tmp_path):
    found = tiny_llama.tensors() | {"model.layers.0.self_attn.rotary_emb.inv_freq": np.ones(3)}
    pretrained.load(tiny_llama.write(tmp_path / "a", found), quiet=True)
    found["model.layers.1.lora_A.weight"] = np.ones((2, 2), np.float32)
    with pytest.raises(PretrainedError, match=r"1 tensors have no place.*layers.1.lora_A.weight"):
        pretrained.load(tiny_llama.write(tmp_path / "a", found))

    split = tiny_llama.write(tmp_path / "b", shards=2)
    (split / "model-00002-of-00002.safetensors").unlink()
    with pytest.raises(PretrainedError, match="names model-00002-of-00002.safetensors, which"):
        pretrained.load(split)
    index = split / "model.safetensors.index.json"
    listed = json.loads(index.read_text())
    listed["weight_map"]["lm_head.weight"] = "../elsewhere.safetensors"
    index.write_text(json.dumps(listed))
    with pytest.raises(PretrainedError, match="is not a file beside it"):
        pretrained.load(split)

    whole = tiny_llama.write(tmp_path / "c")
    file = whole / "model.safetensors"
    file.write_bytes(file.read_bytes()[:-9])
    with pytest.raises(PretrainedError, match="model.safetensors cannot be read"):
        pretrained.load(whole)
    (whole / "config.json").unlink()
    with pytest.raises(PretrainedError, match="has no config.json"):
        pretrained.load(whole)
    with pytest.raises(FileNotFoundError, match="no such model"):
        pretrained.load(tmp_path / "nowhere")


@pytest.mark.parametrize(
    ("changes", "window"),
    [(dict(), 4096), (dict(sliding_window=None), None), (dict(sliding_window=7), 7)],
)
def test_mistrals_window_is_transformers_own_where_nothing_is_said(tmp_path, changes, window):
    model = tiny_llama.write(tmp_path / "model", architectures=["MistralForCausalLM"], **changes)
    assert pretrained.inspect(model).arguments.get("window") == window


def test_a_model_that_was_trained_further_is_another(directory, tmp_path):
    """Guards: a run that goes on with the gradients of another model of the same size."""
    again = tiny_llama.write(tmp_path / "again")
    found = tiny_llama.tensors()
    other = tiny_llama.write(tmp_path / "other", {n: x * 1.001 for n, x in found.items()})
    assert pretrained.state_of(again) == pretrained.state_of(directory)
    for a, b in zip(pretrained.state_of(other), pretrained.state_of(directory), strict=True):
        assert a[:2] == b[:2] and (a[2] == b[2]) == (a[0] == "config.json")


def test_a_name_is_found_in_the_hubs_cache(directory, tmp_path, monkeypatch):
    """A cache as the hub's programs lay it out: refs name a snapshot, whose files are links."""
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path))
    with pytest.raises(FileNotFoundError, match="no such model.*by: hf download org/tiny$"):
        pretrained.load("org/tiny")
    cache = tmp_path / "models--org--tiny"
    snapshot = cache / "snapshots" / ("ab" * 20)
    for folder in (snapshot, cache / "refs", cache / "blobs"):
        folder.mkdir(parents=True)
    (cache / "refs" / "main").write_text(snapshot.name)
    for i, file in enumerate(directory.iterdir()):
        (cache / "blobs" / str(i)).write_bytes(file.read_bytes())
        (snapshot / file.name).symlink_to(cache / "blobs" / str(i))
    assert pretrained.locate("org/tiny") == snapshot
    expected = parameters(pretrained.load(directory, quiet=True))
    found = parameters(pretrained.load("org/tiny", quiet=True))
    assert all(np.array_equal(x, expected[name]) for name, x in found.items())
    assert pretrained.state_of("org/tiny") == pretrained.state_of(directory)


def test_arguments_are_plain_values(directory):
    """Guards: a model that cannot be described beside its checkpoint."""
    arguments = pretrained.loading.inspect(directory).arguments
    assert json.loads(json.dumps(arguments)) == arguments
    assert arguments["rope_base"] == CONFIG["rope_theta"] and arguments["head_width"] == K


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (dict(dtype="fp16"), "dtype='fp16'; use float32, bfloat16 or float16"),
        (dict(param_dtype="int8"), "param_dtype='int8'; use float32"),
        (dict(mesh=3), "mesh=3; give one of tda.runtime.sharding.make_mesh"),
    ],
)
def test_arguments_that_do_not_fit_are_named(directory, options, message):
    with pytest.raises(ValueError, match=message):
        pretrained.load(directory, quiet=True, **options)


def test_a_configuration_that_is_no_object_is_refused(tmp_path):
    tiny_llama.write(tmp_path)
    (tmp_path / "config.json").write_text("[]")
    with pytest.raises(PretrainedError, match="config.json is a list, not an object of settings"):
        pretrained.load(tmp_path, quiet=True)
