"""Second moments that other programs left: by name, of the right parameter, turned as it is."""

import dataclasses
import json
import re
import sys
import types

import numpy as np
import pytest
from safetensors.numpy import save_file

from tda.gradients.moments import imported_moments
from tda.gradients.moments.optimizer_state import SecondMomentError
from tda.gradients.moments.scales import from_full
from tda.gradients.sites import find_sites
from tda.model import pretrained
from tda.model.pretrained import loading
from tests.model import tiny_llama
from tests.model.tiny_llama import L

ADAM = dict(b2=0.95, eps=1e-6, step=7)


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    directory = tiny_llama.write(tmp_path_factory.mktemp("model"))
    found = loading.inspect(directory)
    return found, find_sites(pretrained.load(directory, quiet=True), include="kernel|embedding")


def moments():
    """ν of every parameter, in its own shape: all numbers are different."""
    shapes = {n: x.shape for n, x in tiny_llama.tensors().items()}
    rng = np.random.default_rng(3)
    return {n: rng.uniform(0.1, 2.0, s).astype(np.float32) for n, s in shapes.items()}


def expected(nu, b2, eps, step):
    return 1 / (np.sqrt(nu / (1 - b2**step)) + eps)


THEIRS = {"query": "self_attn.q_proj", "out": "self_attn.o_proj", "down": "mlp.down_proj"}


def check(scales, nu, **adam):
    for ours, theirs in THEIRS.items():
        (path,) = (p for p in scales if f"/{ours}/" in p)
        for i in range(L):
            wanted = expected(nu[f"model.layers.{i}.{theirs}.weight"].T, **adam)
            np.testing.assert_allclose(scales[path].full[i], wanted, rtol=2e-6)
    wanted = expected(nu["model.embed_tokens.weight"], **adam)
    np.testing.assert_allclose(scales["embedding/embedding"].full, wanted, rtol=2e-6)


@pytest.mark.parametrize("form", ["optimizer.state.exp_avg_sq.{}", "{}.exp_avg_sq"])
def test_safetensors_by_name(model, tmp_path, form):
    """Guards: moments transposed, or mapped to the wrong modules."""
    found, chosen = model
    nu = moments()
    named = {form.format(n): x for n, x in nu.items()}
    named |= {n.replace("exp_avg_sq", "exp_avg"): x + 9 for n, x in named.items()}
    half = sorted(named)[::2]
    save_file({n: named[n] for n in half}, tmp_path / "rank0.safetensors")
    save_file({n: x for n, x in named.items() if n not in half}, tmp_path / "rank1.safetensors")
    check(imported_moments.read(tmp_path, found, chosen, "adam", **ADAM), nu, **ADAM)
    factored = imported_moments.read(tmp_path, found, chosen, "factored", **ADAM)
    for path, scale in factored.items():
        full = imported_moments.read(tmp_path, found, chosen, "adam", **ADAM)[path].full
        np.testing.assert_allclose(scale.dense(), from_full(full, "factored").dense(), rtol=1e-5)


def test_moments_hardly_reached_have_a_bounded_scale(model, tmp_path):
    """Guards: one token seen once scaled by 1/eps."""
    found, chosen = model
    nu = moments()
    nu["model.embed_tokens.weight"][2] = 0
    save_file({f"{n}.exp_avg_sq": x for n, x in nu.items()}, tmp_path / "state.safetensors")
    scales = imported_moments.read(tmp_path, found, chosen, "adam", **ADAM | {"eps": 1e-12})
    table = nu["model.embed_tokens.weight"]
    bound = 1e3 / np.sqrt(table.mean() / (1 - 0.95**7))
    np.testing.assert_allclose(scales["embedding/embedding"].full[2], bound, rtol=1e-5)


def test_small_moments_of_norms_that_are_stored_with_1_added(model, tmp_path):
    """Guards: second moments of a GGUF file's Gemma that vanish beside the 1."""
    found, _ = model
    shifted = {
        path: dataclasses.replace(part, plus=-1.0) if path.endswith("scale") else part
        for path, part in found.parts.items()
    }
    found = dataclasses.replace(found, parts=shifted)
    loaded = pretrained.load(found.path, quiet=True)
    sites = find_sites(loaded, include="norm", untapped="reference")
    nu = {n: x * 1e-10 for n, x in moments().items()}
    save_file({f"{n}.exp_avg_sq": x for n, x in nu.items()}, tmp_path / "state.safetensors")
    scales = imported_moments.read(tmp_path, found, sites, "adam", b2=0.95, eps=1e-8, step=7)
    assert scales.keys() >= {"final_norm/scale", "layers/attention_norm/scale"}
    wanted = expected(nu["model.norm.weight"], b2=0.95, eps=1e-8, step=7)
    full = np.asarray(scales["final_norm/scale"].full).reshape(-1)
    np.testing.assert_allclose(full, wanted, rtol=2e-6)


def test_what_is_lacking_is_named(model, tmp_path):
    found, chosen = model
    named = {f"{n}.exp_avg_sq": x for n, x in moments().items()}
    file = tmp_path / "state.safetensors"
    read = imported_moments.read
    save_file(named, file)
    with pytest.raises(SecondMomentError, match="does not say Adam's b2, eps, step for"):
        read(file, found, chosen, "adam")
    save_file(named | {"step": np.asarray([7])}, file)
    with pytest.raises(SecondMomentError, match="does not say Adam's b2 for"):
        read(file, found, chosen, "adam", eps=1e-6)
    check(read(file, found, chosen, "adam", b2=0.95, eps=1e-6), moments(), **ADAM)
    name = "model.layers.1.self_attn.q_proj.weight"
    save_file({n: x for n, x in named.items() if name not in n}, file)
    with pytest.raises(SecondMomentError, match=f"of {re.escape(name)} not at all"):
        read(file, found, chosen, "adam", **ADAM)
    save_file(named | {f"ema.{name}.exp_avg_sq": named[f"{name}.exp_avg_sq"]}, file)
    with pytest.raises(SecondMomentError, match=f"of {re.escape(name)} more than once"):
        read(file, found, chosen, "adam", **ADAM)
    save_file(named | {f"{name}.exp_avg_sq": np.ones((3, 3), np.float32)}, file)
    with pytest.raises(SecondMomentError, match=rf"{re.escape(name)} have the shape \(3, 3\)"):
        read(file, found, chosen, "adam", **ADAM)
    renamed = {n.replace("model.", "decoder."): x for n, x in named.items()}
    save_file(renamed, file)
    how = dict(rename=lambda n: n.replace("model.", "decoder."), **ADAM)
    check(read(file, found, chosen, "adam", **how), moments(), **ADAM)
    save_file({"model.norm.weight": np.ones(3)}, file)
    with pytest.raises(SecondMomentError, match="no tensor with 'exp_avg_sq' in its name"):
        read(file, found, chosen, "adam", **ADAM)


def test_pytorchs_format_takes_a_flag(model, tmp_path):
    found, chosen = model
    (tmp_path / "optimizer.pt").write_bytes(b"")
    with pytest.raises(SecondMomentError, match="a pickle; allow_torch=True reads it"):
        imported_moments.read(tmp_path / "optimizer.pt", found, chosen, "adam")


@pytest.mark.slow
def test_pytorchs_numbers_go_by_names(model, tmp_path):
    """Guards: parameters that are indexed by number when groups are in another order."""
    torch = pytest.importorskip("torch", reason="needs torch==2.13.0")
    found, chosen = model
    parameters = {n: torch.nn.Parameter(torch.tensor(x)) for n, x in tiny_llama.tensors().items()}
    # As the Trainer of transformers does it: those that decay first.
    names = [[n for n in parameters if "norm" not in n], [n for n in parameters if "norm" in n]]
    groups = [{"params": [parameters[n] for n in own]} for own in names]
    groups[0]["params"].reverse()
    names[0].reverse()
    optimizer = torch.optim.AdamW(groups, betas=(0.9, 0.95), eps=1e-6)
    generator = torch.Generator().manual_seed(0)
    for _ in range(3):
        for p in parameters.values():
            p.grad = torch.randn(p.shape, generator=generator)
        optimizer.step()
    file = tmp_path / "optimizer.pt"
    torch.save(optimizer.state_dict(), file)
    read = imported_moments.read
    with pytest.raises(SecondMomentError, match="numbers its parameters and does not name them"):
        read(file, found, chosen, "adam", allow_torch=True)
    (tmp_path / "names.json").write_text(json.dumps(names))
    nu = {n: optimizer.state[p]["exp_avg_sq"].numpy() for n, p in parameters.items()}
    for how in (names, tmp_path / "names.json"):
        scales = read(file, found, chosen, "adam", names=how, allow_torch=True)
        check(scales, nu, b2=0.95, eps=1e-6, step=3)
    with pytest.raises(SecondMomentError, match="has groups of"):
        read(file, found, chosen, "adam", names=names[:1], allow_torch=True)
    torch.save({"weights": torch.ones(2)}, file)
    with pytest.raises(SecondMomentError, match="is not an optimizer's state_dict"):
        read(file, found, chosen, "adam", names=names, allow_torch=True)


class _Tensor(np.ndarray):
    """As much of PyTorch's tensor as is read."""

    def float(self):
        return self

    def numpy(self):
        return np.asarray(self)


def test_pytorchs_step_may_be_of_the_group_or_an_argument(model, tmp_path, monkeypatch):
    """Guards: a KeyError for a file of Apex's or DeepSpeed's FusedAdam, though step= is given."""
    found, chosen = model
    nu = moments()
    state = {i: {"exp_avg_sq": x.view(_Tensor)} for i, x in enumerate(nu.values())}
    group = {"params": list(state), "param_names": list(nu), "betas": (0.9, 0.95), "eps": 1e-6}
    file = tmp_path / "optimizer.pt"
    file.write_bytes(b"")

    def read(group, **constants):
        loaded = {"state": state, "param_groups": [group]}
        monkeypatch.setitem(
            sys.modules, "torch", types.SimpleNamespace(load=lambda *_, **__: loaded)
        )
        options = dict(allow_torch=True, **constants)
        return imported_moments.read(file, found, chosen, "adam", **options)

    check(read(group | {"step": 7}), nu, **ADAM)
    check(read(group, step=7), nu, **ADAM)
    bare = {"params": group["params"], "param_names": group["param_names"]}
    check(read(bare, **ADAM), nu, **ADAM)
    with pytest.raises(
        SecondMomentError, match="does not say Adam's b2, eps, step for .*; pass b2="
    ):
        read(bare)
