"""What the pages under docs/ tell to type is typed: Python here, commands in `make test-all`."""

import contextlib
import io
import json
import os
import pathlib
import pkgutil
import re
import shlex
import subprocess
import sys
import textwrap

import jax
import jax.numpy as jnp
import numpy as np
import optax
import orbax.checkpoint as ocp
import pytest
import tensorstore
from safetensors.numpy import load_file, save_file

import tda
from tda import methods, results
from tda import store as stores
from tda.evaluation.judge import Claim
from tda.gradients import reference
from tda.gradients.moments import imported_moments
from tda.gradients.sites import find_sites
from tda.model.pretrained import loading
from tests.data.test_pretrained_tokenizer import NAMES, byte_level
from tests.data.test_pretrained_tokenizer import write as write_tokenizer
from tests.experiments import test_trace
from tests.model import tiny_llama
from tests.model.tiny_llama import D, F, G, H, K

ROOT = pathlib.Path(__file__).parents[1]
DOCS = ROOT / "docs"
PLACES = {"France": "Paris", "Spain": "Madrid", "Norway": "Oslo", "Peru": "Lima"}


def files_of_the_pages(directory: pathlib.Path) -> None:
    """Files by the names that the pages give them: a model, a corpus, Adam's moments."""
    found = tiny_llama.tensors(vocab_size=320, layers=2)
    config = dict(vocab_size=320, num_hidden_layers=2)
    model = tiny_llama.write(directory / "SmolLM2-135M", found, **config)
    write_tokenizer(model, byte_level(template=True), **NAMES)
    records = [
        {"id": f"s{i}", "text": f"{b} is the {word} of {a}.", "source": word}
        for i, (word, a, b) in enumerate(
            (w, a, b) for w in ("capital", "seat") for a, b in PLACES.items()
        )
    ]
    lines = [json.dumps(r) + "\n" for r in records]
    (directory / "corpus.jsonl").write_text("".join(lines))
    moments = {f"{n}.exp_avg_sq": np.square(x) + 0.1 for n, x in found.items()}
    save_file(moments, directory / "optimizer.safetensors")


@pytest.fixture
def world(tmp_path, monkeypatch):
    files_of_the_pages(tmp_path)
    monkeypatch.chdir(tmp_path)
    before = dict(methods.METHODS)
    yield tmp_path
    # In place: other modules hold the dictionary itself.
    methods.METHODS.clear()
    methods.METHODS.update(before)


def run_snippets(text: str) -> tuple[dict, str]:
    """The names that a page's Python leaves behind, and what it printed."""
    names, said = {}, io.StringIO()
    with contextlib.redirect_stdout(said):
        for snippet in re.findall(r"```python\n(.*?)```", text, re.DOTALL):
            exec(snippet, names)
    return names, said.getvalue()


@pytest.mark.slow
def test_huggingface(world):
    names, said = run_snippets((DOCS / "huggingface.md").read_text())
    assert "The capital of Spain is → Madrid" in said
    assert len(list(results.read("results.jsonl"))) == 2
    assert {group.label for group in names["sums"]} == {"capital", "seat"}
    assert len(names["traced"][0].proponents) == 8  # the second trace keeps its default of ten
    assert names["scales"].keys() == {
        f"layers/{m}/kernel"
        for m in (
            *(f"attention/{n}" for n in ("query", "key", "value", "out")),
            *(f"mlp/{n}" for n in ("gate", "up", "down")),
        )
    }


def test_own_model(world):
    names, said = run_snippets((DOCS / "own_model.md").read_text())
    # A query that is an example itself finds itself.
    assert said.splitlines()[2] == "0"
    assert len(names["traced"]) == 2
    # The moments on disk are those of the optimizer in memory, and the page's gradients, divided by
    # their root, are those of the slow reference.
    model, optimizer = names["model"], names["optimizer"]
    moments = tda.second_moments(optimizer, optimizer="adamw", b2=0.99, eps=1e-8)
    scales = moments.scales(find_sites(model), "factored")
    examples = {k: np.concatenate([b[k] for b in names["batches"]]) for k in names["batches"][0]}
    expected = reference.encode(model, examples, names["projection"], scales, output=names["loss"])
    expected = np.asarray(expected)
    np.testing.assert_allclose(names["gradients"], expected, atol=1e-5 * np.abs(expected).max())


def exported(kernel, module):
    """A layer's kernel in MaxText as its exporter writes it for transformers, [outputs, inputs]."""
    if module in ("q_proj", "k_proj"):
        kernel = jnp.stack([kernel[..., ::2], kernel[..., 1::2]], -2).reshape(kernel.shape)
    if module == "q_proj":
        kernel = kernel * kernel.shape[-1] ** 0.5
    outputs = kernel.shape[-1] if module == "o_proj" else np.prod(kernel.shape[1:])
    return kernel.reshape(-1, outputs).T


MAXTEXT = {
    "self_attn.q_proj": ("self_attention", "query", (D, H, K)),
    "self_attn.k_proj": ("self_attention", "key", (D, G, K)),
    "self_attn.v_proj": ("self_attention", "value", (D, G, K)),
    "self_attn.o_proj": ("self_attention", "out", (H, K, D)),
    "mlp.gate_proj": ("mlp", "wi_0", (D, F)),
    "mlp.up_proj": ("mlp", "wi_1", (D, F)),
    "mlp.down_proj": ("mlp", "wo", (F, D)),
}


def write_maxtext(directory: pathlib.Path, moments: dict) -> None:
    """Writes step 1000 with the squares of the gradients that MaxText has where ours have these."""
    layers: dict = {"self_attention": {}, "mlp": {}}
    for tensor, (block, name, shape) in MAXTEXT.items():
        module, stack = tensor.split(".")[1], []
        for i in range(2):
            gradient = np.sqrt(moments[f"model.layers.{i}.{tensor}.weight.exp_avg_sq"])
            _, pull_back = jax.vjp(lambda x, m=module: exported(x, m), jnp.zeros(shape))
            stack.append(np.square(pull_back(jnp.asarray(gradient))[0]))
        layers[block][name] = {"kernel": np.stack(stack, 1)}
    tree = {"params": {"decoder": {"layers": layers}}}
    adam = optax.ScaleByAdamState(jnp.int32(1000), mu=tree, nu=tree)
    state = {"step": 1000, "params": tree, "opt_state": (adam,)}
    with ocp.CheckpointManager(directory.absolute()) as manager:
        manager.save(1000, args=ocp.args.Composite(items=ocp.args.PyTreeSave(state)))


def write_levanter(directory: pathlib.Path, moments: dict, is_scanned: bool) -> None:
    """Writes the second moments as Levanter does: outputs first, and heads on an axis of theirs."""
    heads = {
        "q_proj": (G, H // G, K, D),
        "k_proj": (G, K, D),
        "v_proj": (G, K, D),
        "o_proj": (D, H, K),
    }
    arrays: dict[str, list] = {}
    for name, v in moments.items():
        match = re.fullmatch(r"model\.layers\.(\d+)\.(\w+)\.(\w+_proj)\.weight\.exp_avg_sq", name)
        if match:
            place = f"{match[2]}/{match[3]}/weight/"
            place = f"stacked/{place}" if is_scanned else f"blocks/{match[1]}/{place}"
            arrays.setdefault(place, []).append(v.reshape(heads.get(match[3], v.shape)))
    store = {"driver": "ocdbt", "base": directory.absolute().as_uri() + "/"}
    for place, layers in arrays.items():
        for tree in ("model", "opt_state/inner_state/1/mu", "opt_state/inner_state/1/nu"):
            array = np.stack(layers) if is_scanned else layers[0]
            path = f"{tree}/transformer/layers/{place}"
            spec = {"driver": "zarr3", "kvstore": {**store, "path": path}}
            array = array if tree.endswith("nu") else np.zeros_like(array)
            options = dict(create=True, dtype=array.dtype, shape=array.shape)
            tensorstore.open(spec, **options).result().write(array).result()


def equal_moments(found: dict, expected: dict) -> None:
    assert len(found) == 14
    for name, v in found.items():
        np.testing.assert_allclose(v, expected[name], rtol=1e-4)


def test_trainers(world, monkeypatch):
    """Guards: heads not turned, the query's scale the wrong way round, the wrong axis of layers."""
    (world / "SmolLM2-135M").rename("llama-hf")
    moments = load_file("optimizer.safetensors")
    write_maxtext(world / "maxtext" / "checkpoints", moments)
    maxtext, _, levanter = (DOCS / "trainers.md").read_text().partition("## Levanter")
    names, _ = run_snippets(maxtext)
    equal_moments(names["moments"], moments)
    inspected, chosen = loading.inspect("llama-hf"), find_sites(names["model"])
    adam = dict(b2=0.95, eps=1e-8, step=1000)
    expected = imported_moments.read("optimizer.safetensors", inspected, chosen, "factored", **adam)
    assert names["scales"].keys() == expected.keys() and len(expected) == 7
    for path, scale in expected.items():
        np.testing.assert_allclose(names["scales"][path].dense(), scale.dense(), rtol=1e-4)
    assert len(names["traced"][0].proponents) == 8
    for is_scanned in (True, False):
        run = world / str(is_scanned)
        write_levanter(run / "checkpoints/RUN_ID/step-1000", moments, is_scanned)
        monkeypatch.chdir(run)
        equal_moments(run_snippets(levanter)[0]["moments"], moments)
        equal_moments(load_file("moments.safetensors"), moments)


@pytest.mark.parametrize(("dtype", "rank"), [("4bit", 0), ("3bit", 0), ("2bit", 0), ("2bit", 4)])
def test_large_corpora(world, dtype, rank):
    """The lines that read a row with zarr and NumPy alone give the store's own numbers."""
    blocks = {"a": 4096, "b": 4096} if rank else {"wide": 128, "b": 64}
    x = np.random.default_rng(0).normal(size=(3, sum(blocks.values()))).astype(np.float32)
    store = stores.create("STORE", ["a", "b", "c"], blocks, {}, dtype, rank=rank)
    store.write(0, x)
    names, _ = run_snippets((DOCS / "large_corpora.md").read_text())
    np.testing.assert_allclose(
        names["gradient"], store.read([0])[0], rtol=0, atol=1e-5 if rank else 0
    )


def test_add_a_method(world):
    names, said = run_snippets((DOCS / "add_a_method.md").read_text())
    assert "R_train, no norm" in said and "[[0 1]]" in said
    judge = names["judges"].make("short", None)
    claim = Claim("A is B", "A is", ("B",))
    assert judge.score([("B", claim), ("A", claim)]).tolist() == [1, 0]


@pytest.mark.slow
def test_add_a_method_by_a_plugin(world):
    page = (DOCS / "add_a_method.md").read_text()
    (function,) = re.findall(r"```python\n(import numpy.*?)\nprint\(", page, re.DOTALL)
    block = page.partition("the function `search` from above:\n")[2].partition("\nand run with")[0]
    (world / "words.py").write_text(f"{function}\n{textwrap.dedent(block)}")
    config = test_trace.make_config(world)
    command = "python -m experiments.trace --config=world_facts --workdir=w --plugin=words"
    changes = {"methods": "words", "model.size": config.model.size, "train.epochs": 1}
    changes |= {"data.sentences": config.data.sentences, "data.facts": config.data.facts}
    changes |= {"tokenizer.vocab_size": 300, "model.context": 32, "eval.tail_patch_queries": 0}
    changes |= {"eval.samples": 0, "train.warmup": 1, "train.tokens_per_batch": 256}
    command += "".join(f" --config.{key}={value}" for key, value in changes.items())
    ended = run_command(command, world)
    assert ended.returncode == 0, ended.stderr
    records = list(results.read(world / "w" / "results" / "words.jsonl"))
    assert records and all(r["proponents"] for r in records)


def test_scores(world):
    """The calibration finds how much losses rise by a score, whatever a query's mean."""
    rng = np.random.default_rng(0)
    sums = rng.normal(size=(12, 16))
    rise = 3 * sums + rng.normal(size=16) + rng.normal(scale=0.01, size=sums.shape)
    arrays = {f"0.05/{m}": sums + 5 for m in ("trackstar", "rerank_trackstar", "grad_cos")}
    (world / "board").mkdir()
    np.savez(world / "board" / "board.npz", **arrays, **{"0.05/same order": rise})
    _, said = run_snippets((DOCS / "scores.md").read_text())
    assert said.count("by 0.30 nats") == 3


def test_add_a_corpus(world):
    names, said = run_snippets((DOCS / "add_a_corpus.md").read_text())
    assert "s0 Paris is the capital of France." in said
    assert {f.id for f in names["traced"][0].proponents} == {"chapter-0", "chapter-1"}
    assert said.splitlines()[-1].startswith("long ") and "capital" in said.splitlines()[-1]


def commands(page: str) -> list[str]:
    """The commands of a page that need nothing else: whole lines that start with python."""
    return re.findall(r"^(?: {4})?(python -m .*[^\\])$", (DOCS / page).read_text(), re.MULTILINE)


def test_every_page_is_run_here():
    pages = {p.name for p in DOCS.glob("*.md")}
    assert pages == {
        "add_a_corpus.md",
        "add_a_method.md",
        "api.md",
        "coming_from.md",
        "costs.md",
        "evaluation.md",
        "huggingface.md",
        "index.md",
        "large_corpora.md",
        "methods.md",
        "own_model.md",
        "pods.md",
        "scores.md",
        "sweeps.md",
        "table1.md",
        "trainers.md",
        "tuning.md",
        "viewer.md",
    }
    assert [c.split()[2] for c in commands("huggingface.md")] == ["experiments.ask"]
    assert [c.split()[2] for c in commands("pods.md")] == ["experiments.plan", "experiments.trace"]
    assert [c.split()[2] for c in commands("large_corpora.md")] == ["experiments.plan"]
    assert [c.split()[2] for c in commands("costs.md")] == ["experiments.plan"]
    assert [c.split()[2] for c in commands("sweeps.md")] == ["experiments.sweep"]
    assert {p for p in pages if commands(p)} == set(WITH_COMMANDS)


def test_the_site_has_every_page_once():
    listed = re.findall(
        r"^ +- (?:\w+: )?([\w/]+\.(?:md|ipynb))$", ROOT.joinpath("mkdocs.yml").read_text(), re.M
    )
    there = [str(p.relative_to(DOCS)) for e in ("md", "ipynb") for p in DOCS.rglob(f"*.{e}")]
    assert sorted(listed) == sorted(there)


def test_every_link_of_a_page_leads_somewhere():
    """The site's builder checks links to pages alone."""

    def anchors(page):
        titles = re.findall(r"^#+ (.*)$", page.read_text(), re.MULTILINE)
        return {re.sub(r"[^\w -]", "", t.lower()).replace(" ", "-") for t in titles}

    for page in [*DOCS.glob("*.md"), ROOT / "README.md", ROOT / "results" / "README.md"]:
        for link in re.findall(r"\]\((?!https?:)([^)\s]+)\)", page.read_text()):
            path, _, anchor = link.partition("#")
            target = page.parent / path if path else page
            assert target.exists(), f"{page.name}: {link}"
            assert not anchor or anchor in anchors(target), f"{page.name}: {link}"


def test_the_api_page_has_the_public_names():
    page = (DOCS / "api.md").read_text()
    named = re.findall(r"^::: ([\w.]+)$", page, re.MULTILINE)
    for name in named:
        assert pkgutil.resolve_name(":".join(name.rsplit(".", 1))).__doc__, name
    assert {n.rsplit(".")[-1] for n in named} >= set(tda.__all__)


def test_workflows_run_what_there_is():
    """Guards: a renamed target, found out after the change that renamed it."""
    workflows = (ROOT / ".github" / "workflows").glob("*.yml")
    commands = [c for p in workflows for c in re.findall(r"- run: (.*)", p.read_text())]
    (phony,) = re.findall(r"^\.PHONY: (.*)$", (ROOT / "Makefile").read_text(), re.MULTILINE)
    made = [c.split()[1:] for c in commands if c.startswith("make ")]
    assert ".ci/run" in commands and ["docs", "release"] in made
    assert set(sum(made, [])) <= set(phony.split())


@pytest.mark.slow
def test_the_site_builds_without_a_warning(tmp_path):
    pytest.importorskip("mkdocs_jupyter", reason="needs the extra `docs`")
    command = f"python -m mkdocs build --strict -f {ROOT}/mkdocs.yml -d {tmp_path}/site"
    ended = run_command(command, tmp_path)
    assert ended.returncode == 0, ended.stderr
    assert "Raises" in (tmp_path / "site" / "api" / "index.html").read_text()


WITH_COMMANDS = ("costs.md", "huggingface.md", "large_corpora.md", "pods.md", "sweeps.md")


def run_command(command: str, cwd: pathlib.Path) -> subprocess.CompletedProcess:
    arguments = shlex.split(command)
    (cwd / "configs").exists() or (cwd / "configs").symlink_to(ROOT / "configs")
    environment = os.environ | {"PYTHONPATH": f"{ROOT}{os.pathsep}{cwd}", "XLA_FLAGS": ""}
    return subprocess.run(
        [sys.executable, *arguments[1:]], cwd=cwd, env=environment, capture_output=True, text=True
    )


@pytest.mark.slow
@pytest.mark.parametrize("page", WITH_COMMANDS)
def test_commands_run(world, page):
    for command in commands(page):
        ended = run_command(command, world)
        assert ended.returncode == 0, ended.stderr
        if "experiments.ask" in command:
            assert "the model says: The capital of France is →" in ended.stdout
            again = run_command(f"{command} --target=Paris", world)
            assert again.returncode == 0 and "→ Paris" in again.stdout, again.stderr
            (record,) = results.read(world / "runs/ask/results-2.jsonl")
            assert record["targets_plaintext"] == "Paris"
            assert len(record["proponents"]) == 8
