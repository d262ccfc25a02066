"""The tables of a run, from metrics made by hand."""

import numpy as np
import pytest

from tda.evaluation import summary
from tda.reports import tables


def kind(share, interval, tail_patch=None, count=0):
    """What is told of a kind of passages."""
    told = {"share": share, "interval": interval, "tail_patch": tail_patch, "by_rank": [share]}
    told["by_prior"] = {"knows": share, "guesses": share and share / 2}
    return told | {"n_tail_patches": count}


CONTENT = {
    "bm25": {"states it": kind(0.75, [0.5, 1.0], 0.0012, 150), "other": kind(0.25, [0.0, 0.5])},
    "trackstar": {"states it": kind(1.0, [1.0, 1.0], -0.0003, 200), "other": kind(0.0, [0.0, 0.0])},
    "grad_cos": {"states it": kind(None, [None, None]), "other": kind(0.5, [None, None])},
}


@pytest.fixture
def metrics():
    """Metrics of three methods as an evaluation writes them; one read the labels."""
    rng = np.random.default_rng(0)
    steps = np.full((3, 30, 10, 2), -2.0)
    steps[..., 1] += rng.normal(0.1, 0.1, steps.shape[:3])
    steps[:, 20:] = np.nan  # not in the sample
    steps[2, :, 3:] = np.nan  # as many annotated sentences
    values = {}
    for i, name in enumerate(("bm25", "trackstar", "grad_cos")):
        ranks = {"all": rng.integers(1, 40, 30), "strict": rng.integers(0, 40, 30)}
        found = summary.rank_values(ranks) if name != "grad_cos" else {}
        found |= summary.restricted(found, np.arange(30) < 9)
        values[name] = found | summary.patch_values(steps[i], steps[0, :, 0])
    how = dict(resamples=200, seed=0)
    relations = summary.grouped(values, np.arange(30) // 10, ["r0", "r1", "r2"], **how)
    compared = summary.compared(values, **how)
    rule = {
        "optimizer": "adam",
        "optimizer_state": "restored",
        "learning_rate": 3e-4,
        "batch": "one passage alone",
    }
    shared = {"n_queries": 30, "n_known": 9, "n_tail_patch_queries": 20, "tail_patch_control": 1e-4}
    return {
        name: dict.fromkeys(["mrr", "mrr_known"])
        | summary.as_json(found)
        | shared
        | {"tail_patch_rule": rule, "differences": compared[name]}
        | {key: relations[name] for key in ("by_relation", "by_frequency", "by_stated")}
        | {"by_content": CONTENT[name]}
        for name, found in summary.intervals(values, **how).items()
    }


def rows(text, title):
    """The cells of the table under a title, by the first of each row."""
    part = text.split(f"## {title}")[1].split("\n## ")[0]
    lines = [line for line in part.splitlines() if line.startswith("|")]
    cells = [[c.strip() for c in line.strip("|").split("|")] for line in lines]
    assert {len(c) for c in cells} == {len(cells[0])}
    return {c[0]: c[1:] for c in cells if not set(c[0]) <= set("-")}


def test_the_main_table(metrics):
    text = tables.run_table(metrics)
    m = metrics["trackstar"]
    assert f"| TrackStar | {m['mrr']:.3f} | {m['recall_at_10']:.3f} |" in text
    assert f"| {100 * m['tail_patch']:+.2f}% |" in text
    # What ranks nothing has no figure.
    assert "| gradient cosine | – | – |" in text
    assert "30 queries, 9 of them known" in text and "of 20 queries" in text
    assert "changes it by +0.01%" in text
    assert "adam, its state restored, learning rate 0.0003, one passage alone" in text
    for m in metrics.values():
        m |= {"n_tail_patch_queries": 0, "tail_patch": None, "tail_patch_rule": None}
    assert "optimizer step" not in tables.run_table(metrics)


def test_the_tables_of_details(metrics):
    text = tables.run_details(metrics)
    m, d = metrics["trackstar"], metrics["bm25"]["differences"]["trackstar"]
    low, high = m["intervals"]["mrr"]
    assert rows(text, "95% intervals")["TrackStar"][0] == f"{m['mrr']:.3f} [{low:.3f}, {high:.3f}]"
    assert rows(text, "Conventions of MRR")["BM25"][1] == f"{metrics['bm25']['mrr_at_10']:.3f}"
    said = rows(text, "What the proponents say")
    assert said["BM25"] == ["75.0% [50.0%, 100.0%]", "25.0% [0.0%, 50.0%]"]
    assert said["gradient cosine"] == ["–", "50.0%"]  # of one query: no interval
    assert (
        rows(text, "What the proponents say, of facts that the model knows")["BM25"][0] == "75.0%"
    )
    guessed = rows(text, "What the proponents say, of facts that the model guesses")
    assert guessed["BM25"] == ["37.5%", "12.5%"] and guessed["gradient cosine"] == ["–", "25.0%"]
    stepped = rows(text, "Tail-patch by what the proponents say")
    assert stepped["BM25"] == ["+0.12% (150)", ""] and stepped["TrackStar"][0] == "-0.03% (200)"
    apart = rows(text, "Difference to TrackStar")
    assert set(apart) == {"method", "BM25", "gradient cosine"}
    assert apart["BM25"][0] == (
        f"{d['mrr']['difference']:+.3f} [{d['mrr']['low']:+.3f}, {d['mrr']['high']:+.3f}], "
        f"p {d['mrr']['p']:.2g}"
    )
    assert apart["gradient cosine"][0] == "" and apart["gradient cosine"][-1].count("%") == 3
    depth = rows(text, "Tail-patch by depth")
    assert depth["method"][:2] == ["p k = 1", "p k = 3"] and len(depth["method"]) == 8
    assert depth["TrackStar"][4] == f"{m['tail_patch_log_at_1']:+.4f}"
    assert rows(text, "MRR by relation")["method"] == ["r0 (10)", "r1 (10)", "r2 (10)"]
    # No query of the third group is in the sample.
    patched = rows(text, "tail-patch by relation")
    assert patched["method"] == ["r0 (10)", "r1 (10)"]
    assert patched["BM25"][1] == f"{100 * metrics['bm25']['by_relation']['r1']['tail_patch']:+.2f}%"


def test_one_method_is_compared_with_none(metrics):
    text = tables.run_details({"bm25": metrics["bm25"] | {"differences": {}}})
    assert "Difference" not in text and "## 95% intervals" in text
