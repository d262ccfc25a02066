"""Accessibility: axe-core on every view, in both themes, and pages that fit 400 pixels."""

import functools
import shutil
import subprocess
import tarfile

import pytest

from tda import results
from tda.evaluation.by_label import FiguresByLabel
from tda.viewer.collection import Collection
from tda.viewer.notes import Notes
from tests.viewer.big_file import note_on, records
from tests.viewer.browser import Page, serving
from tests.viewer.test_browser import other_method

AXE = "axe-core@4.11.0"
VIEWS = ["", "#side=both&filter=rank+%3C%3D+3", "#filter=rank+%3D", "#view=overview", "#view=notes",
         "#view=trace", "#view=metadata", "#view=metadata&files=whole&key=year",
         "#judge=entailment&hl=%5B%22the%22%5D"]  # fmt: skip
# Serious ones must not be; moderate ones (such as best practices) are looked at by hand.
IMPACTS = ("serious", "critical")


@functools.cache
def axe(cache) -> str:
    """The source of axe-core, fetched from npm once; skipped where it cannot be had."""
    kept = cache / "axe.min.js"
    if not kept.exists():
        if shutil.which("npm") is None:
            pytest.skip("needs npm to fetch axe-core")
        packed = subprocess.run(
            ["npm", "pack", AXE, "--silent"], cwd=cache, capture_output=True, text=True, timeout=120
        )
        if packed.returncode:
            pytest.skip(f"axe-core cannot be fetched: {packed.stderr.strip()[-200:]}")
        with tarfile.open(cache / packed.stdout.split()[-1]) as archive:
            kept.write_bytes(archive.extractfile("package/axe.min.js").read())
    return kept.read_text(encoding="utf-8")


@pytest.fixture(scope="module")
def address(tmp_path_factory):
    folder = tmp_path_factory.mktemp("accessible")
    items = list(records(60, 5, mean=900))
    results.write(folder / "trackstar.jsonl", items)
    results.write(folder / "bm25.jsonl", other_method(items))
    notes = Notes(folder / "notes.jsonl")
    notes.add(note_on(items[0], items[0]["proponent_ids"][0], "states", "x"))
    collection = Collection(notes=notes)
    for name in ("trackstar", "bm25"):
        collection.add(folder / f"{name}.jsonl")
    # The one file has the first passages of each query, and the other all.
    same = {
        f"{kind}{part}": items[0][f"proponent{part}"]
        for kind in ("proponent", "opponent")
        for part in ("s", "_ids", "_scores")
    }
    results.write(folder / "whole.jsonl", [item | same for item in items])
    collection.add(folder / "whole.jsonl")
    names = {name for item in items for name in item["proponent_ids"]}
    labels = {key: {n: f"{key} {len(n)}" for n in names} for key in ("source", "year")}
    collection.groups = FiguresByLabel(labels)
    with serving(collection) as found:
        yield found


@pytest.mark.slow
@pytest.mark.parametrize("scheme", ["light", "dark"])
@pytest.mark.parametrize("width", [1280, 400])
def test_axe_finds_nothing_serious(browser, address, pytestconfig, scheme, width):
    source = axe(pytestconfig.cache.mkdir("axe-core"))
    page = Page(browser, width=width, scheme=scheme)
    for view in VIEWS:
        page.open(f"{address}{view}")
        if width == 400 and view == "":
            page.page.click(".fold")
        page.page.evaluate(source)
        found = page.page.evaluate("axe.run(document, {resultTypes: ['violations']})")
        serious = [
            (v["id"], [n["html"][:150] for n in v["nodes"][:3]])
            for v in found["violations"]
            if v["impact"] in IMPACTS
        ]
        assert serious == [], view
    page.open(address)
    page.page.keyboard.press("?")
    page.page.evaluate(source)
    found = page.page.evaluate("axe.run(document, {resultTypes: ['violations']})")
    assert [v["id"] for v in found["violations"] if v["impact"] in IMPACTS] == []
    page.context.close()
    page.fine()


@pytest.mark.slow
@pytest.mark.parametrize("view", VIEWS)
@pytest.mark.parametrize("width", [1280, 400, 320])
def test_nothing_is_wider_than_the_page(browser, address, view, width):
    page = Page(browser, width=width)
    page.open(f"{address}{view}")
    assert page.page.evaluate("document.documentElement.scrollWidth") <= width
    page.context.close()
    page.fine()


@pytest.mark.slow
def test_headings_and_names(browser, address):
    """Headings go down one step at a time, and every control has a name."""
    page = Page(browser)
    for view in VIEWS:
        page.open(f"{address}{view}")
        levels = page.page.evaluate(
            "[...document.querySelectorAll('h1,h2,h3,h4')].map((e) => Number(e.tagName[1]))"
        )
        assert all(b - a <= 1 for a, b in zip(levels, levels[1:], strict=False)), levels
        nameless = page.page.evaluate(
            """[...document.querySelectorAll("button, a[href], input, select, textarea")].filter(
              (e) => e.checkVisibility() && !(e.textContent.trim() || e.ariaLabel ||
                e.labels?.length || e.title)).map((e) => e.outerHTML)"""
        )
        assert nameless == []
    page.context.close()
    page.fine()
