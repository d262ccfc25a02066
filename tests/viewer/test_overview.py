"""The first page of a run: what it was, its methods by both measures, and where to begin."""

import json

import pytest

from tda import results
from tda.viewer import opening
from tests.viewer.big_file import records
from tests.viewer.browser import Page, serving
from tests.viewer.test_browser import other_method

METRICS = {
    "trackstar": {"mrr": 0.6514, "recall_at_10": 0.8, "tail_patch": 0.0248},
    "bm25": {"mrr": 0.94, "recall_at_10": 0.987, "tail_patch": -0.0145},
    "grad_cos": {"mrr": 0.5, "recall_at_10": float("nan")},
    "grad_dot": {"mrr": 0.25},
}


@pytest.fixture(scope="module")
def workdir(tmp_path_factory):
    path = tmp_path_factory.mktemp("run")
    (path / "results").mkdir()
    items = list(records(40, 5, mean=60))
    for i, item in enumerate(items):
        item["relation"] = ["capital", "capital", "capital", "river", "language"][i % 5]
        # Some capitals are guessed: as likely after prompts about others.
        item |= {"target_nats": 1.0, "target_prior_nats": 1.5 if i % 5 == 0 else 3.0}
    other = other_method(items)
    for item in other:  # the other method has its correct passages elsewhere
        item["proponent_correct"] = item["proponent_correct"][::-1]
    methods = {"trackstar": items, "bm25": other, "grad_cos": items[:30], "grad_dot": items[:30]}
    for name, listed in methods.items():
        results.write(path / "results" / f"{name}.jsonl", listed)
    for m in METRICS.values():
        ends = {k: [x - 0.01, x + 0.01] for k, x in m.items() if k != "mrr" or x > 0.3}
        m |= {"intervals": ends, "n_queries": 1094, "n_stated": 687}
    (path / "metrics.json").write_text(json.dumps(METRICS))
    config = {"model": {"pretrained": "", "size": "tiny"}, "train": {"epochs": 8.0}}
    config["data"] = {"corpus": "", "sentences": "", "name": "world_facts"}
    (path / "config.json").write_text(json.dumps(config))
    return path


def reciprocal_rank(item):
    marks = item["proponent_correct"]
    return 1 / (1 + marks.index(True)) if True in marks else 0


@pytest.fixture(scope="module")
def address(workdir):
    with serving(opening.collect(str(workdir), [], None, str(workdir))) as url:
        yield url


def test_a_run_opens_on_what_it_found(page, address, workdir):
    page.open(address)
    facts = dict(x.split("\n") for x in page.texts(".story .facts > div"))
    evaluated = facts.pop("evaluated")
    assert evaluated.count("-") == 2
    assert facts == {
        "model": "tiny, from scratch: 8 epochs",
        "corpus": "world_facts",
        "queries": "1,094",
        "the model states": "687 of them",
    }
    assert [r.split("\t") for r in page.texts(".story tbody tr")] == [
        ["TrackStar", "0.651 [0.641, 0.661]", "0.800 [0.790, 0.810]", "+2.48% [+1.48%, +3.48%]"],
        ["BM25", "0.940 [0.930, 0.950]", "0.987 [0.977, 0.997]", "−1.45% [−2.45%, −0.45%]"],
        ["gradient cosine", "0.500 [0.490, 0.510]", "–", "–"],
        ["gradient dot product", "0.250", "–", "–"],
    ]
    # Nothing of JavaScript's own, such as the length of an empty list, stands between the sections.
    texts = page.page.evaluate(
        "[...document.querySelector('.overview').childNodes].filter((n) => n.nodeType === 3)"
        ".map((n) => n.data)"
    )
    assert not any(texts)
    titles = page.page.locator(".story circle title").all_text_contents()
    assert titles == [
        "TrackStar: MRR 0.651, tail-patch +2.48%",
        "BM25: MRR 0.940, tail-patch −1.45%",
    ]
    # Three queries that the model knows, and on which the methods differ most of their relation.
    ours, theirs = (
        list(results.read(workdir / "results" / f"{n}.jsonl")) for n in ("trackstar", "bm25")
    )
    spreads = {}
    for one, other in zip(ours, theirs, strict=True):
        if one["is_8b_correct"] and one["target_prior_nats"] == 3:
            text = f"{one['inputs_plaintext']} {one['targets_plaintext']}"
            spread = abs(reciprocal_rank(one) - reciprocal_rank(other))
            spreads.setdefault(one["relation"], {})[text] = spread
    suggested = page.texts(".suggested a")
    relations = [r for s in suggested for r, texts in spreads.items() if s in texts]
    assert len(suggested) == len({*relations}) == 3
    for text, relation in zip(suggested, relations, strict=True):
        assert spreads[relation][text] == max(spreads[relation].values()) > 0
    page.page.locator(".suggested a").first.click()
    page.page.wait_for_selector("article.query")
    assert page.text(".asked") == suggested[0]
    # Side by side stand the methods that differ, not only the two that are shown at first.
    assert len(page.texts(".column h3")) == len(METRICS)
    page.page.click(".brand")
    page.page.wait_for_selector(".story")


def test_a_run_without_labels_has_one_measure(page, workdir, tmp_path):
    (tmp_path / "results").mkdir()
    metrics = {"trackstar": {"tail_patch": 0.0248, "has_labels": False}}
    (tmp_path / "metrics.json").write_text(json.dumps(metrics))
    items = list(results.read(workdir / "results" / "trackstar.jsonl"))
    for item in items:
        for name in ("proponent_correct", "first_correct_rank", "c4_frequency"):
            item.pop(name, None)
    results.write(tmp_path / "results" / "trackstar.jsonl", items)
    with serving(opening.collect(str(tmp_path), [], None, str(tmp_path))) as url:
        page.open(url)
        assert page.texts(".story thead th") == ["method", "tail-patch"]
        assert page.texts(".story tbody td") == ["+2.48%"]
        assert not page.texts(".story p")


CROWDED = {
    "trackstar": (0.651, 0.0248), "trackstar_train": (0.640, 0.0251), "ekfac": (0.645, 0.0235),
    "rerank_exp5": (0.72, 0.0262), "hidden": (0.66, 0.004), "bm25": (0.94, 0.0145),
    "grad_cos": (0.515, 0.0224), "grad_dot": (0.357, 0.017), "random": (0.01, -0.001),
}  # fmt: skip
OVERLAPS = """[...document.querySelectorAll(".scatter text")].flatMap((a, i, all) => {
  const box = (e) => e.getBoundingClientRect();
  const crosses = (a, b) =>
    a.left < b.right && b.left < a.right && a.top < b.bottom && b.top < a.bottom;
  const others = [...all.slice(i + 1), ...document.querySelectorAll(".scatter circle")];
  const isCut = box(a).left < 0 || box(a).right > document.documentElement.clientWidth;
  return [...(isCut ? [a] : []), ...others.filter((b) => crosses(box(a), box(b)))].map(
    (b) => `${a.textContent}: ${b.textContent}`);
})"""


@pytest.mark.parametrize("width", [1280, 400])
def test_names_of_crowded_points_neither_overlap_nor_are_cut(browser, workdir, tmp_path, width):
    """What has no room for its name has a number, and a touch tells each point."""
    (tmp_path / "results").symlink_to(workdir / "results")
    metrics = {}
    for name, (mrr, patch) in CROWDED.items():
        ends = {"mrr": [mrr - 0.02, mrr + 0.02], "tail_patch": [patch - 0.006, patch + 0.006]}
        metrics[name] = {"mrr": mrr, "tail_patch": patch, "intervals": ends}
    (tmp_path / "metrics.json").write_text(json.dumps(metrics))
    page = Page(browser, width=width)
    with serving(opening.collect(str(tmp_path), [], None, str(tmp_path))) as url:
        page.open(url)
        assert page.page.evaluate(OVERLAPS) == []
        texts = page.page.locator(".scatter text").all_text_contents()
        numbers = dict(x.split(" ", 1) for x in page.text(".numbered").split(" · "))
        for name in page.texts(".story tbody th"):
            number = next((n for n, numbered in numbers.items() if numbered == name), None)
            assert texts.count(name if number is None else number) == 1
        for circle in page.page.locator(".scatter circle").all():
            circle.scroll_into_view_if_needed()
            box = circle.bounding_box()
            page.page.mouse.click(box["x"] + box["width"] / 2, box["y"] + box["height"] / 2)
            assert page.text(".pointed") == circle.locator("title").text_content()
    page.context.close()
    page.fine()


def test_four_methods_stand_side_by_side(page, address):
    page.open(f"{address}#view=query&files=trackstar,bm25,grad_cos,grad_dot&q=q00003")
    tops = page.page.eval_on_selector_all(
        ".column", "e => e.map((c) => c.getBoundingClientRect().top)"
    )
    assert len(tops) == 4 and len({*tops}) == 1
    assert page.page.evaluate("document.documentElement.scrollWidth") <= 1280


def test_the_first_passage_stands_above_the_fold(browser, address):
    """On a phone: 400 × 800."""
    page = Page(browser, width=400, height=800, scheme="dark")
    page.open(f"{address}#view=query&files=trackstar,bm25,grad_cos,grad_dot")
    box = page.page.locator("article.card .text").first.bounding_box()
    assert box["y"] + 20 < 800
    page.page.click(".picker summary")
    sheet = page.page.locator(".sheet").bounding_box()
    assert sheet["x"] >= 0 and sheet["x"] + sheet["width"] <= 400
    page.page.keyboard.press("Escape")
    page.until(lambda: page.page.locator(".picker[open]").count() == 0)
    page.context.close()
    page.fine()
