"""The filter's parser and the metrics, run in the browser that runs them for users."""

import numpy as np
import pytest

from tda import results
from tda.viewer.collection import Collection
from tests.viewer.big_file import records
from tests.viewer.browser import serving

ROWS = [
    {"prompt": "The capital of France is", "target": "Paris", "rank": 1, "found": True,
     "relation": "capital", "top": 0.5, "frequency": 12000, "bm25.rank": 2},
    {"prompt": "Émile was born in", "target": "Paris", "rank": None, "found": False,
     "relation": 'place "of" birth', "top": -0.25, "frequency": 7, "bm25.rank": None},
    {"prompt": "Water is (chemically)", "target": "H2O", "rank": 4, "found": True,
     "relation": None, "top": 1601.0, "frequency": None, "bm25.rank": 1},
]  # fmt: skip

CASES = [
    ("", [0, 1, 2]),
    ("   ", [0, 1, 2]),
    ("paris", [0, 1]),
    ("PARIS born", [1]),
    ('"born in"', [1]),
    ("émile", [1]),
    ("e\u0301mile", [1]),
    ("found", [0, 2]),
    ("not found", [1]),
    ("not not found", [0, 2]),
    ("rank = 1", [0]),
    ("rank=1", [0]),
    ("rank != 1", [1, 2]),
    ("rank <= 4", [0, 2]),
    ("rank > 1", [2]),
    ("rank < 1e1 top >= .5", [0, 2]),
    ("top < 0", [1]),
    ("top = -0.25", [1]),
    ("top > -25%", [0, 2]),
    ("frequency >= 1_000", [0]),
    ("relation = capital", [0]),
    ("relation = CAPITAL", [0]),
    ("relation != capital", [1, 2]),
    (r'relation = "place \"of\" birth"', [1]),
    ("relation ~ of", [1]),
    ("relation !~ of", [0, 2]),
    ("prompt ~ \"(chem\"", [2]),
    ("found = true", [0, 2]),
    ("found = no", [1]),
    ("paris or h2o", [0, 1, 2]),
    ("paris and rank = 1 or h2o", [0, 2]),
    ("paris and (rank = 1 or h2o)", [0]),
    ("not (paris or h2o)", []),
    ("not paris found", [2]),
    ("bm25.rank > 1", [0]),
    ("constructor", []),
    ("__proto__", []),
    ("rank < abc", []),
    ("alert(1)", []),
    ("(paris", None),
    ("paris)", None),
    ("rank =", None),
    ("rank = = 1", None),
    ("and paris", None),
    ("paris or", None),
    ('"open', None),
    ("nofield = 1", None),
    ("__proto__ = 1", None),
    ("constructor.constructor = 1", None),
    ("(" * 60 + "paris" + ")" * 60, None),
    ("not " * 60 + "paris", None),
    ("x" * 3000, None),
]  # fmt: skip

RUN = """async ({ rows, cases }) => {
  const { parse, FilterError } = await import("./static/filter.js");
  const known = Object.keys(rows[0]);
  return cases.map((text) => {
    try {
      const { test } = parse(text, (f) => known.includes(f) || ["id"].includes(f));
      return rows.map((r, i) => i).filter((i) => test((f) => rows[i][f] ?? null));
    } catch (error) {
      if (!(error instanceof FilterError)) return String(error);
      return Number.isInteger(error.at) ? null : "no place";
    }
  });
}"""


@pytest.fixture(scope="module")
def address(tmp_path_factory):
    path = tmp_path_factory.mktemp("filter") / "a.jsonl"
    results.write(path, records(30, 10, mean=40))
    collection = Collection()
    collection.add(path)
    with serving(collection) as found:
        yield found


def test_the_filters_language(page, address):
    page.open(address)
    found = page.page.evaluate(RUN, {"rows": ROWS, "cases": [text for text, _ in CASES]})
    for (text, expected), got in zip(CASES, found, strict=True):
        assert got == expected, text


def test_words_quoted_by_the_page_are_read_again(page, address):
    page.open(address)
    hostile = ['a "b" c', "back\\slash", "\\", '"', "or", "x) or (y", "  spaces "]
    same = page.page.evaluate(
        """async (values) => {
          const { parse, quote } = await import("./static/filter.js");
          return values.map((v) => parse(`f = ${quote(v)}`, (f) => f === "f").test(() => v));
        }""",
        hostile,
    )
    assert same == [True] * len(hostile)


def python_metrics(marks, k=10):
    """The same figures, written out."""
    reciprocal, hits, precise = [], [], []
    for row in marks:
        ranks = [i for i, m in enumerate(row, 1) if m]
        reciprocal.append(1 / ranks[0] if ranks else 0)
        hits.append(bool(ranks) and ranks[0] <= k)
        precise.append(np.mean(row[:k]))
    return {"n": len(marks), "mrr": np.mean(reciprocal), "recall": np.mean(hits),
            "precision": np.mean(precise)}  # fmt: skip


def figures(page):
    """The cells of the picker, whether it is open or not: MRR, recall, precision and a button."""
    return page.page.locator(".method td").all_text_contents()


def test_metrics_are_those_of_the_records(page, address):
    items = list(records(30, 10, mean=40))
    page.open(address)
    for judge, threshold in (("annotations", 0.5), ("entailment", 0.5), ("entailment", 0.9)):
        field = "proponent_correct" if judge == "annotations" else "proponent_ais_scores"
        marks = [[x > threshold for x in i[field]] for i in items]
        expected = python_metrics(marks)
        page.page.goto(f"{address}#judge={judge}&threshold={threshold}")
        shown = [f"{expected['mrr']:.3f}"]
        shown += [f"{100 * expected[name]:.1f}%" for name in ("recall", "precision")]
        page.until(lambda shown=shown: figures(page)[:3] == shown, shown)


@pytest.mark.parametrize("fields", [{"has_trex_sentence": False}, {"first_correct_rank": 0}])
def test_queries_without_any_correct_passage_are_left_out(page, tmp_path, fields):
    """As in a run's own tables. Guards: MRR 0.5 of one labelled query, which is found first."""
    items = list(records(3, 2, mean=40))
    for item, marks in zip(items, ([True, False], [False, False], [False, False]), strict=True):
        item["proponent_correct"] = marks
        del item["proponent_ais_scores"]
    results.write(tmp_path / "a.jsonl", [items[0], items[1] | fields])
    # A release's records say neither: there all marks count, as ever.
    results.write(tmp_path / "release.jsonl", items[:2])
    results.write(tmp_path / "missed.jsonl", [items[0], items[1] | fields, items[2]])
    collection = Collection()
    for name in ("a", "release", "missed"):
        collection.add(tmp_path / f"{name}.jsonl")
    with serving(collection) as address:
        page.open(f"{address}#files=a,release,missed")
        page.until(lambda: figures(page)[::4] == ["1.000", "0.500", "0.500"])
        assert page.page.locator(".picker thead").text_content().startswith("shownMRR@2")
        page.open(f"{address}#q=%232")
        assert "not judged" in page.text(".column header")
        # A bar leads to as many queries as it stands for.
        page.open(f"{address}#view=overview&files=missed")
        page.page.wait_for_selector(".chart")
        assert page.texts(".overview tbody tr:first-child td")[0] == "2"
        none = page.page.locator(".chart").first.locator("a").last
        assert none.get_attribute("aria-label") == "none: 1 queries"
        none.click()
        page.until(lambda: page.text(".told").startswith("1 of"))


def test_histograms_and_filters_agree_on_edges(page, address):
    """Every row is in just one bin, and a bin's filter finds the rows of its bar."""
    page.open(address)
    rng = np.random.default_rng(0)
    for _ in range(40):
        low, high = sorted(rng.normal(size=2).round(2).tolist())
        # Values that lie on the edges, and beside them by a rounding.
        edges = low + np.arange(20) * ((high - low) / 20)
        values = [*edges, *np.nextafter(edges, high), *np.nextafter(edges[1:], low), high]
        found = page.page.evaluate(
            """async (values) => {
              const { histogram } = await import("./static/metrics.js");
              return histogram(values.map((v, i) => i), (i) => values[i], 20);
            }""",
            [float(v) for v in values],
        )
        assert sorted(r for b in found for r in b["rows"]) == list(range(len(values)))
        for i, b in enumerate(found):
            last = i + 1 == len(found)
            above = [r for r, v in enumerate(values) if v >= b["low"]]
            inside = [r for r in above if values[r] < b["high"] or last]
            assert inside == b["rows"], (low, high, i)
