"""The README's snippets are run, not trusted."""

import json
import pathlib
import re

import numpy as np
import pytest
from flax import nnx

from tda.data import jsonl
from tda.gradients.encoder import make_encoder
from tda.model.decoder import Decoder
from tda.model.sizes import size

README = pathlib.Path(__file__).parents[1].joinpath("README.md").read_text(encoding="utf-8")


def test_the_gradients_snippet_runs():
    (snippet,) = re.findall(r"```python\n(.*?)```", README, re.DOTALL)
    model = Decoder(vocab_size=1000, **size("tiny"), rngs=nnx.Rngs(0))
    ids, mask = np.arange(18).reshape(3, 6), np.tri(3, 6, 3, np.float32)
    one = {"ids": ids, "labels": ids + 1, "mask": mask}
    names = {"model": model, "batches": [one, {k: x[:2] for k, x in one.items()}]}
    exec(snippet, names)
    assert names["gradients"].shape == (5, 2 * 4 * 16**2)
    same = {"tokens": ids, "targets": ids + 1, "weights": mask}
    expected = np.asarray(make_encoder(model, names["projection"])(same))
    for got, rows in ((names["gradients"][:3], expected), (names["gradients"][3:], expected[:2])):
        np.testing.assert_allclose(got, rows, rtol=0, atol=1e-5 * np.abs(expected).max())


def test_the_example_records_are_read(tmp_path):
    passage, fact = re.findall(r"^    (\{.*\})$", README, re.MULTILINE)
    (tmp_path / "p.jsonl").write_text(passage + "\n")
    (tmp_path / "f.jsonl").write_text(fact + "\n")
    assert jsonl.read_sentences(tmp_path / "p.jsonl")[0].fact_triples[0].fact_id == "f1"
    assert jsonl.read_facts(tmp_path / "f.jsonl")[0].prompt(0) == json.loads(fact)["prompt0"]


@pytest.mark.parametrize("name", ["tda/gradients/reference.py", "configs/world_facts.py"])
def test_files_that_it_names_are_there(name):
    assert name in README and pathlib.Path(__file__).parents[1].joinpath(name).exists()
