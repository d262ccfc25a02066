"""Tables of methods: switches, intervals, marks, and what their formats demand."""

import csv
import io

import pytest

from tda.methods import METHODS
from tda.reports import formats, tables

ROWS = ("annotated", "bm25", "trackstar", "exp5", "exp1", "random", "length")


def metrics_of(mrr, tail_patch, differences=None):
    shared = {"n_queries": 50, "n_tail_patch_queries": 10, "tail_patch_rule": {"clip": 1.0}}
    m = shared | {"mrr": mrr, "tail_patch": tail_patch, "intervals": {}, "new_figure": 7}
    if mrr is not None:
        m["intervals"]["mrr"] = [mrr - 0.1, mrr + 0.1]
    return m | {"differences": differences or {}}


def above(*controls, low=0.01):
    return {c: {"mrr": {"difference": 0.2, "low": low, "high": 0.3}} for c in controls}


@pytest.fixture
def metrics():
    return {
        "annotated": metrics_of(None, 0.02),
        "bm25": metrics_of(0.9, 0.01, above("random", "length")),
        "trackstar": metrics_of(0.5, 0.03, above("random", "length")),
        "exp5": metrics_of(0.3, None, above("random") | above("length", low=-0.05)),
        "exp1": metrics_of(0.05, -0.01),
        "random": metrics_of(0.1, 0.0),
        "length": metrics_of(0.02, 0.005),
    }


def rows_of(text):
    lines = [x for x in text.splitlines() if x.startswith("|")]
    return {cells[0]: cells for x in lines for cells in [[c.strip() for c in x.split("|")[1:-1]]]}


def test_a_figure_that_is_not_above_the_controls_is_marked(metrics):
    chosen = {n: METHODS[n] for n in ROWS}
    rows = rows_of(tables.markdown(chosen, metrics, {"trackstar": "λ = 0.5"}))
    assert rows["TrackStar"][1:5] == ["yes", "mixed", "yes", "0.500 [0.400, 0.600]"]
    assert rows["BM25"][1:4] == ["", "", ""]
    assert rows["annotated sentences"][4] == "" and rows["annotated sentences"][8] == "+2.00%"
    # Its interval to one control holds 0.
    assert rows[METHODS["exp5"].title][4].endswith("†")
    # Without intervals the figures decide, for each metric by itself.
    assert rows[METHODS["exp1"].title][4].endswith("†")
    assert rows[METHODS["exp1"].title][8] == "-1.00% †"
    assert rows["TrackStar"][8] == "+3.00%"
    assert "†" not in "".join(rows["random"] + rows["passage length"])
    assert tables.below_controls("exp5", "mrr", metrics) == ["length"]
    assert tables.below_controls("exp1", "mrr", metrics) == ["random"]
    text = tables.markdown(chosen, metrics, {"trackstar": "λ = 0.5"})
    assert "not above a control, which ignores the query (random, passage length)" in text
    assert "- TrackStar: λ = 0.5" in text


def test_a_small_change_of_probability_is_not_shown_as_none():
    changes = {0.0248: "+2.48%", 0.0001: "+0.01%", 0.0000126: "+0.0013%", -3e-8: "-3.0e-06%"}
    assert {x: formats.figure("tail_patch", x) for x in changes} == changes
    assert formats.figure("tail_patch", 0.0) == "+0.00%"


def test_comma_separated_values_hold_every_figure(metrics):
    chosen = {n: METHODS[n] for n in ROWS}
    read = list(csv.DictReader(io.StringIO(tables.comma_separated(chosen, metrics))))
    assert [r["method"] for r in read] == list(ROWS)
    star = next(r for r in read if r["method"] == "trackstar")
    assert float(star["mrr"]) == 0.5 and float(star["mrr_low"]) == 0.4
    assert star["new_figure"] == "7" and "tail_patch_rule" not in star
    assert read[0]["mrr"] == "" and read[3]["mrr_not_above"] == "length"


def test_latex_is_a_whole_table(metrics):
    chosen = {n: METHODS[n] for n in ROWS}
    text = tables.latex(chosen, metrics)
    body = [x for x in text.splitlines() if x.endswith(r"\\")]
    assert len(body) == 1 + len(ROWS)
    assert {x.count("&") for x in body} == {3 + len(tables.COLUMNS)}
    assert r"\textbf{0.900}" in text and r"0.300$^\dagger$" in text and r"+3.00\%" in text
    assert "%" not in text.replace(r"\%", "") and "#" not in text


def test_a_name_with_a_bar_begins_no_column():
    text = formats.markdown(["method", "a|b"], [["x|y", "0.5"]], "lr")
    assert text.splitlines() == ["| method | a\\|b |", "|---|---:|", "| x\\|y | 0.5 |"]
