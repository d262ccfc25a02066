"""The page by metadata: the library's own figures, of all passages or of the first ones."""

import dataclasses
import math

import numpy as np
import pytest

from tda.answers import Answer, RankedPassage, TraceResult
from tda.evaluation.by_label import FiguresByLabel
from tda.viewer.collection import Collection
from tda.viewer.export import export
from tests.viewer.browser import Page, serving

SOURCES = ["web", "books", "<b>news</b>"]
LABELS = {
    "source": {f"d{i}": SOURCES[i % 3] for i in range(24)},
    "year": {f"d{i}": str(2000 + i % 2) for i in range(24)},
}


def traced(k=24, queries=5):
    """Passages of 24 documents; those of books have higher scores."""
    scores_QxC = np.random.default_rng(0).normal(size=(queries, 24)).round(3)
    scores_QxC[:, 1::3] += 1
    answers = []
    for q, scores_C in enumerate(scores_QxC):
        ranked = [
            RankedPassage(f"d{c}#0-9", float(scores_C[c]), "A text.") for c in np.argsort(-scores_C)
        ]
        lists = tuple(ranked[:k]), tuple(ranked[::-1][:k])
        answers.append(Answer(f"q{q}", f"Question {q} is", "so", *lists))
    return TraceResult("TrackStar", answers)  # fmt: skip


@pytest.fixture
def collection(tmp_path):
    traced().save(tmp_path / "trackstar.jsonl")
    traced(k=4).save(tmp_path / "first.jsonl")
    collection = Collection()
    for name in ("trackstar", "first"):
        collection.add(tmp_path / f"{name}.jsonl")
    collection.groups = FiguresByLabel(LABELS)
    return collection


def without_nan(group):
    fields = dataclasses.asdict(group)
    return {k: None if isinstance(x, float) and math.isnan(x) else x for k, x in fields.items()}


@pytest.mark.parametrize("key", LABELS)
def test_sums_of_all_passages_are_those_of_the_trace(collection, key):
    number = list(LABELS).index(key)
    piece = collection.piece(f"0/by-{number}")
    assert (piece["complete"], piece["queries"], piece["passages"]) == (True, 5, 24)
    assert piece["groups"] == [without_nan(g) for g in traced().by(LABELS[key])]
    for row, answer in enumerate(traced()):
        groups = TraceResult("", [answer]).by(LABELS[key])
        assert collection.piece(f"0/by-{number}-{row}")["groups"] == list(map(without_nan, groups))
    for absent in ("0/by-2", "0/by-0-5", "2/by-0", "0/by-x"):
        with pytest.raises(KeyError):
            collection.piece(absent)


def test_the_first_passages_alone_are_counted_and_not_summed(collection):
    """Mistake: sums over the first passages that look like those over the corpus."""
    piece = collection.piece("1/by-0")
    assert (piece["complete"], piece["passages"]) == (False, 4)
    drawn = [[LABELS["source"][p.id.split("#")[0]] for p in a.proponents] for a in traced(4)]
    shares = [[labels.count(s) / 4 for labels in drawn] for s in SOURCES]
    by_label = {g["label"]: g for g in piece["groups"]}
    for source, shares_Q in zip(SOURCES, shares, strict=True):
        group = by_label[source]
        assert group["mean"] == pytest.approx(np.mean(shares_Q)) and "p" not in group
        assert group["low"] <= group["mean"] <= group["high"]
        assert group["size"] == 4 * sum(shares_Q)
    one = {g["label"]: g["mean"] for g in collection.piece("1/by-0-2")["groups"]}
    assert one == {s: x[2] for s, x in zip(SOURCES, shares, strict=True) if x[2]}


def test_passages_without_a_label_have_a_group_of_their_own(collection):
    """An empty label is one, as `traced.by` has it."""
    collection.groups = FiguresByLabel({"source": {"d1": "books", "d2": ""}})
    sizes = {g["label"]: g["size"] for g in collection.piece("0/by-0")["groups"]}
    assert sizes == {"books": 1, "": 1, "not in the corpus": 22}


def table(page, file):
    rows = page.page.locator(f"section:has(h3:text-is('{file}')) tbody tr").all_inner_texts()
    return {cells[0]: cells[1:] for cells in (row.split("\t") for row in rows)}


def test_the_page_shows_a_query_and_the_mean_of_all(page, collection):
    def written(x, digits=3):
        return f"{x:.{digits}f}".replace("-", "−")

    with serving(collection) as address:
        page.open(f"{address}#q=q2")
        page.page.click(".views >> text=Metadata")
        page.page.wait_for_selector("article.metadata")
        assert "Question 2 is so" in page.text(".metadata")
        rows = table(page, "TrackStar")
        all_queries = {g.label: g for g in traced().by(LABELS["source"])}
        query = {g.label: g for g in TraceResult("", [traced()[2]]).by(LABELS["source"])}
        assert list(rows) == list(all_queries) and rows.keys() == {*SOURCES}
        for label, cells in rows.items():
            g, q = all_queries[label], query[label]
            mean = f"{written(g.mean)} [{written(g.low)}, {written(g.high)}]"
            ofquery = [written(q.mean), written(q.expected), written(q.p, 4)]
            assert cells == ["8", *ofquery, mean, written(g.expected), written(g.p, 4)]
        # A file with the first passages alone says so, and has neither sums nor p-values.
        section = page.text("section:has(h3:text-is('first'))")
        assert "first 4 passages only" in section and "shares of the first 4" in section
        head = page.texts("section:has(h3:text-is('first')) thead th")
        assert head == ["this query", "mean of 5 queries", "source", "proponents", "share", "share"]
        firsts = [LABELS["source"][p.id.split("#")[0]] for p in traced(4)[2].proponents]
        shares = {label: cells[1] for label, cells in table(page, "first").items()}
        assert shares == {s: f"{100 * firsts.count(s) / 4:.1f}%" for s in shares}
        # Another key, and another query of the list, which stays on this page.
        page.page.click(".metadata >> text=year")
        page.until(lambda: set(table(page, "TrackStar")) == {"2000", "2001"})
        page.page.locator("#queries a").nth(3).click()
        page.until(lambda: "Question 3 is so" in page.text(".metadata"))
        assert page.page.locator("#queries [aria-current]").inner_text().startswith("Question 3")
        page.page.click(".metadata >> text=Question 3 is")
        page.page.wait_for_selector("article.query")
        assert page.text(".asked") == "Question 3 is so"


def test_without_metadata_there_is_no_such_page(page, collection):
    collection.groups = None
    with serving(collection) as address:
        page.open(f"{address}#view=metadata")
        assert "Metadata" not in page.text(".views") and page.page.locator(".query").count() == 1


def test_an_export_has_the_figures(browser, collection, tmp_path):
    export(collection, tmp_path / "out")
    page = Page(browser, width=400, scheme="dark")
    page.open(f"{(tmp_path / 'out' / 'index.html').as_uri()}#view=metadata&q=q1")
    assert set(table(page, "TrackStar")) == {*SOURCES}
    assert page.page.evaluate("document.documentElement.scrollWidth") <= 400
    page.context.close()
    page.fine()
