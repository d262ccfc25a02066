"""The page of methods held against retraining: its figures are the board's own, to the digit."""

import json
import types

import numpy as np
import pytest

from tda import results
from tda.counterfactual import figures
from tda.counterfactual.bank import Bank, draw_subsets
from tda.reports import board as board_report
from tda.results import ResultsError
from tda.run import board, defaults
from tda.runtime.atomic_file import write_arrays, write_json
from tda.runtime.fingerprint import plain
from tda.viewer import opening
from tda.viewer.board import Board
from tda.viewer.collection import Collection
from tda.viewer.export import export
from tests.viewer.big_file import records
from tests.viewer.browser import Page, serving
from tests.viewer.test_overview import OVERLAPS

METHODS = {"metagradient": 0.1, "trackstar": 0.5, "bm25": 2.0, "random": 50.0}
QUERIES, UNITS, SUBSETS = 5, 40, 12


@pytest.fixture(scope="module")
def workdir(tmp_path_factory):
    """A bank whose losses are linear in what is removed, and methods that know it or not."""
    path = tmp_path_factory.mktemp("board")
    rng = np.random.default_rng(0)
    effects = rng.normal(size=(QUERIES, UNITS))
    banks, base = {}, np.full(QUERIES, 3.0, np.float32)
    for fraction in (0.05, 0.5):
        removed = draw_subsets(UNITS, fraction, SUBSETS, seed=0)
        noise = rng.normal(size=(2, SUBSETS, QUERIES))
        changes = [removed @ effects.T + 0.2 * n for n in noise]
        banks[fraction] = [Bank(removed, (base + c).astype(np.float32), base) for c in changes]
    items = list(records(QUERIES, 4, mean=60))
    facts = [
        types.SimpleNamespace(
            fact_id=i["example_id"],
            entity1=i["targets_plaintext"],
            prompt=lambda number, text=i["inputs_plaintext"]: text,
        )
        for i in items
    ]
    config = defaults.get_config()
    config.counterfactual.update(own_top=0, resamples=50)
    retrained = types.SimpleNamespace(
        run=types.SimpleNamespace(config=config, corpus=types.SimpleNamespace(queries=facts)),
        banks=banks, queries=facts, units=range(UNITS), trainings=[types.SimpleNamespace(steps=7)],
    )  # fmt: skip
    scores = {n: effects + noise * rng.normal(size=effects.shape) for n, noise in METHODS.items()}
    scores["random"] *= 1e-6  # numbers of many digits below the plot
    bank_scores = types.SimpleNamespace(
        retrained=retrained, costs={"metagradient": 10.5}, training_seconds=2.0
    )
    computed = board.Board(bank_scores, scores)
    computed._metasmoothness = lambda: 0.875
    record = computed.figures()
    record["methods"]["bm25"]["own_top"] = {"mean": -0.01, "low": -0.125, "high": 0.5}
    record["methods"]["bm25"]["tail_patch"] = {"mean": 0.0125, "low": 0.01, "high": 0.02}
    write_json(path / "board.json", plain(record))
    write_arrays(path / "board.npz", computed.arrays)
    (path / "board.md").write_text(board_report.describe(record))
    (path / "results").mkdir()
    # One of the queries has passages only in the bank.
    results.write(path / "results" / "trackstar.jsonl", items[: QUERIES - 1])
    results.write(path / "results" / "metagradient.jsonl", items[: QUERIES - 1])
    write_json(path / "metrics.json", {"trackstar": {}, "metagradient": {}})
    return path


@pytest.fixture(scope="module")
def collection(workdir):
    return opening.collect(str(workdir), [], None, str(workdir))


def table_of(path):
    """The cells of a board's Markdown: by method and column."""
    lines = [x[1:-1].split("|") for x in path.read_text().splitlines() if x.startswith("|")]
    head, _, *rows = ([cell.strip() for cell in line] for line in lines)
    return {r[0]: dict(zip(head, r, strict=False)) for r in rows}


def table_on(page):
    return [[c.strip() for c in r.split("\t")] for r in page.texts(".board tbody tr")]


def minus(text):
    return text.replace("-", "−")


def test_pieces_are_the_boards_figures_and_arrays(collection, workdir):
    stored = json.loads((workdir / "board.json").read_text())
    piece = collection.piece("board")
    assert {k: piece[k] for k in stored if k != "texts"} == {
        k: v for k, v in stored.items() if k != "texts"
    }
    with np.load(workdir / "board.npz") as arrays:
        for q in range(QUERIES):
            changes = collection.piece(f"board-{q}")
            for name, values in changes.items():
                assert values == arrays[name][:, q].tolist()
            # What the page draws has the rank correlation that it writes, and its mean is the LDS.
            for label in ("same order", "mean of orders"):
                pair = (np.array(changes[f"0.5/{n}"])[:, None] for n in ("bm25", label))
                expected = figures.spearman(*pair)[0]
                assert piece["lds"][f"0.5/{label}/bm25"][q] == pytest.approx(expected, abs=1e-12)
    mean = np.mean(piece["lds"]["0.05/same order/trackstar"])
    assert mean == stored["methods"]["trackstar"]["lds"]["0.05"]["same order"]["mean"]
    for absent in (f"board-{QUERIES}", "board-x", "board-"):
        with pytest.raises(KeyError):
            collection.piece(absent)


def test_the_page_shows_the_board_and_leads_to_a_query_and_back(page, collection, workdir):
    markdown = table_of(workdir / "board.md")
    record = json.loads((workdir / "board.json").read_text())
    with serving(collection) as address:
        page.open(f"{address}#view=board")
        assert "LDS tells how well a method's scores predict" in page.text(".board > p")
        rows = table_on(page)
        assert len(rows) == len(METHODS)
        for title, lds, _, qld, tail_patch, cost in rows:
            cells = markdown[title]
            assert lds == minus(cells["LDS 5%, same order"])
            assert cost == cells["cost"]
            # Its interval is shown where the pointer rests.
            assert qld == minus(cells["QLD"]).partition(" [")[0]
            # In percent, with two digits more than in the file.
            assert tail_patch == ("1.2500" if cells["tail-patch"] else "")
        hint = page.page.locator(".board td.figure[title]").get_attribute("title")
        assert hint == minus(markdown["BM25"]["QLD"])
        # By LDS, then by what is clicked; and back the other way round.
        assert [r[0] for r in rows] == list(markdown)
        page.page.click("thead >> text=method")
        by_title = sorted(markdown, key=str.lower)
        page.until(lambda: page.texts(".board tbody th") == by_title)
        page.page.keyboard.press("Enter")
        page.until(lambda: page.texts(".board tbody th") == by_title[::-1])
        assert page.page.get_attribute("th[aria-sort]", "aria-sort") == "descending"
        # The other fraction and the mean of orders, with their ceiling.
        page.page.click("text=without 50%")
        page.page.click("text=mean of orders")
        page.until(lambda: "order=mean" in page.page.url)
        page.drawn()
        for title, lds, *_ in table_on(page):
            assert lds == minus(markdown[title]["LDS 50%, mean of orders"])
        assert f"Ceiling {record['ceilings']['0.5']['mean']:.3f} " in page.text(".board")
        # A query and a method: every retraining is a point.
        page.page.click("tbody >> text=BM25")
        page.page.select_option("#board-query", "2")
        page.until(lambda: "q=q00002" in page.page.url)
        page.drawn()
        lds = collection.piece("board")["lds"]["0.5/mean of orders/bm25"][2]
        assert f"BM25: rank correlation {minus(f'{lds:.3f}')} over 12" in page.text(
            ".board section"
        )
        changes = collection.piece("board-2")
        first = [changes["0.5/bm25"][0], changes["0.5/mean of orders"][0]]
        points = page.page.locator(".scatter circle title")
        assert points.count() == SUBSETS
        told = "retraining 1: predicted {:.4f}, loss rose by {:.4f} nats".format(*first)
        assert points.first.text_content() == minus(told)
        names = page.page.locator(".scatter text").all_text_contents()
        axes = ["predicted: sum of the removed units’ scores"]
        axes += ["real: rise of the query’s loss (nats)"]
        assert {*axes} <= {*names}
        page.page.click("text=Its passages")
        page.page.wait_for_selector("article.query")
        assert "Entity 2" in page.text(".asked")
        page.page.click("text=Against retraining")
        page.page.wait_for_selector("article.board")
        assert page.page.input_value("#board-query") == "2"
        page.page.keyboard.press("j")
        page.until(lambda: page.page.input_value("#board-query") == "3")
        page.page.keyboard.press("k")
        page.until(lambda: page.page.input_value("#board-query") == "2")
        page.drawn()
        # A method with passages of its own stands first.
        page.page.click("tbody >> text=metagradient")
        page.until(lambda: "method=metagradient" in page.page.url)
        page.drawn()
        page.page.click("text=Its passages")
        page.until(lambda: page.texts(".column h3") == ["metagradient (exact)", "TrackStar"])
        page.page.click(".views >> text=Board")
        page.page.wait_for_selector("article.board")
        # The last query is on the board alone.
        page.page.select_option("#board-query", str(QUERIES - 1))
        page.until(lambda: page.page.locator("text=Its passages").count() == 0)


def test_a_board_without_results_or_single_queries_is_shown(narrow, workdir, tmp_path):
    """A folder of figures, such as one under results/."""
    record = json.loads((workdir / "board.json").read_text())
    del record["texts"]
    (tmp_path / "board.json").write_text(json.dumps(record))
    collection = opening.collect(str(tmp_path), [], None, str(tmp_path))
    export(collection, tmp_path / "out")
    narrow.open((tmp_path / "out" / "index.html").as_uri())
    assert len(narrow.texts(".board tbody tr")) == len(METHODS)
    assert "figures of methods only" in narrow.text(".board")
    assert narrow.texts(".views a") == ["Board"]
    assert narrow.page.evaluate("document.documentElement.scrollWidth") <= 400


def test_an_export_holds_the_board(browser, collection, tmp_path):
    export(collection, tmp_path / "out")
    page = Page(browser, width=400, scheme="dark")
    page.open((tmp_path / "out" / "index.html").as_uri() + "#view=board&q=q00001")
    assert page.page.locator(".scatter circle").count() == SUBSETS
    assert page.page.evaluate("document.documentElement.scrollWidth") <= 400
    page.open((tmp_path / "out" / "index.html").as_uri() + "#view=board&q=elsewhere")
    assert "The query elsewhere is not on the board" in page.text(".board .wrong")
    page.context.close()
    page.fine()


@pytest.mark.parametrize("text", ["{", "[]", '{"methods": {}}', '{"methods": {"a": {"lds": {}}}}'])
def test_what_is_no_board_is_refused(tmp_path, text):
    (tmp_path / "board.json").write_text(text)
    with pytest.raises(
        ResultsError, match=r"board.json is not a board of methods \(.*compute it again"
    ):
        Board(tmp_path / "board.json")


@pytest.mark.parametrize("width", [1280, 400])
def test_the_numbers_of_the_axes_do_not_run_into_each_other(browser, collection, width):
    page = Page(browser, width=width)
    with serving(collection) as address:
        page.open(f"{address}#view=board&method=random")
        longest = max(page.page.locator(".scatter text").all_text_contents()[:-2], key=len)
        assert len(longest) > 5 and page.page.evaluate(OVERLAPS) == []
    page.context.close()
    page.fine()


def test_a_board_computed_anew_is_shown_at_the_next_look(workdir, tmp_path):
    """And one that is computed while the viewer runs; a page of the earlier one gets no figures."""
    collection = Collection(tmp_path)
    record = json.loads((workdir / "board.json").read_text())
    digests = []
    for queries in (7, 8):
        write_json(tmp_path / "board.json", record | {"queries": queries})
        collection.refresh()
        assert collection.piece("board")["queries"] == queries
        digests.append(collection.index()["board"])
    assert digests[1] in collection.digests() and digests[0] not in collection.digests()
    (tmp_path / "board.json").write_text("half")
    collection.refresh()
    assert collection.piece("board")["queries"] == 8
