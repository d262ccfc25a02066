"""The README's snippets are run, not trusted."""

import json
import pathlib
import re

import numpy as np
import pytest

from tda.data import jsonl

README = pathlib.Path(__file__).parents[1].joinpath("README.md").read_text(encoding="utf-8")


def test_the_encoder_snippet_runs():
    (snippet,) = re.findall(r"```python\n(.*?)```", README, re.DOTALL)
    tokens = np.arange(12).reshape(2, 6)
    names = {"tokens": tokens, "targets": tokens + 1, "weights": np.ones((2, 6), np.float32)}
    exec(snippet, names)
    assert names["gradients"].shape == (2, 2 * 4 * 16**2)
    assert np.isfinite(names["gradients"]).all() and np.asarray(names["gradients"]).any()


def test_the_example_records_are_read(tmp_path):
    passage, fact = re.findall(r"^    (\{.*\})$", README, re.MULTILINE)
    (tmp_path / "p.jsonl").write_text(passage + "\n")
    (tmp_path / "f.jsonl").write_text(fact + "\n")
    assert jsonl.read_sentences(tmp_path / "p.jsonl")[0].fact_triples[0].fact_id == "f1"
    assert jsonl.read_facts(tmp_path / "f.jsonl")[0].prompt(0) == json.loads(fact)["prompt0"]


@pytest.mark.parametrize("name", ["tda/gradients/reference.py", "configs/world_facts.py"])
def test_files_that_it_names_are_there(name):
    assert name in README and pathlib.Path(__file__).parents[1].joinpath(name).exists()
