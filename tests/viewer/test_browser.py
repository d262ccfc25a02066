"""The viewer in a real browser: what a reader does, and what hostile text does not."""

import contextlib
import functools
import http.server
import json
import pathlib
import re
import threading
import urllib.parse

import pytest

from tda import results
from tda.viewer.collection import Collection
from tda.viewer.export import export
from tda.viewer.notes import Notes
from tests.viewer.big_file import note_on, records
from tests.viewer.browser import Page, serving

QUERIES = 130


def other_method(items, seed=1):
    """The same queries by another method: some passages shared, at other ranks; opponents too."""
    out = []
    for i, r in enumerate(items):
        order = [3, 0, 2, 1, 4]
        new = {f: [r[f][j] for j in order] for f in r if f.startswith("proponent")}
        new["proponent_ids"] = [
            name + "'" if j >= 3 + i % 3 else name for j, name in enumerate(new["proponent_ids"])
        ]
        new |= {"opponents": ["The opposite."], "opponent_ids": [f"o{i}"], "opponent_scores": [-1]}
        out.append(r | new)
    return out


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    path = tmp_path_factory.mktemp("browser")
    items = list(records(QUERIES, 5, mean=150))
    results.write(path / "trackstar.jsonl", items)
    results.write(path / "bm25.jsonl", other_method(items)[: QUERIES - 1])
    results.write(path / "grad_dot.jsonl", items[10:20])
    return path


def collected(folder, notes=None):
    collection = Collection(notes=notes)
    for name in ("trackstar", "bm25", "grad_dot"):
        collection.add(folder / f"{name}.jsonl")
    return collection


@pytest.fixture(scope="module")
def address(folder):
    with serving(collected(folder)) as found:
        yield found


def items_of(folder, name="trackstar"):
    return list(results.read(folder / f"{name}.jsonl"))


def listed(page):
    return page.texts("#queries li")


def test_smoke_open_filter_compare_highlight(page, address, folder):
    """The short way through the page; the rest is in the slow tests."""
    items = items_of(folder)
    page.open(address)
    assert len(listed(page)) == 50 and f"{QUERIES} of {QUERIES}" in page.text(".told")
    # It opens on the first query whose target the model states.
    first = next(i for i in items if i["is_8b_correct"])
    assert first is not items[0] and first["inputs_plaintext"] in page.text(".asked .prompt")
    cards = page.page.locator("[data-method=trackstar] article.card")
    assert cards.count() == 5
    assert first["proponents"][0] == cards.nth(0).locator(".text").inner_text()
    best = cards.nth(0).locator(".text .window").inner_text()
    assert best == first["proponent_ais_best_windows"][0] != first["proponents"][0]
    page.page.fill("#filter", "rank = 1 and relation != P17")
    expected = [i for i in items if i["proponent_correct"][0] and i["relation"] != "P17"]
    page.until(lambda: page.text(".told").startswith(f"{len(expected)} of"))
    assert len(listed(page)) == min(50, len(expected))
    assert page.page.locator("[data-method=bm25] article.card").count() == 5
    assert "shares" in page.text("[data-method=bm25] header")
    marks = page.page.locator("[data-method=trackstar] mark.target").all_inner_texts()
    assert expected[0]["targets_plaintext"] in marks
    # A filter that is half typed leaves the last list, and offers fields for its last word.
    before = listed(page)
    page.page.fill("#filter", "rank = 1 and (ta")
    page.until(lambda: "incomplete" in page.text(".told"))
    assert listed(page) == before and len(before) == min(50, len(expected))
    offered = page.page.eval_on_selector_all("#filter-words option", "e => e.map((o) => o.value)")
    assert offered == ["rank = 1 and (target"]


@pytest.mark.parametrize("width", [1280, 400])
@pytest.mark.parametrize(
    "text", ["rank = ", "rank == 3", '"a b', "no_field = 3", "(", "bm26.rank = 1"]
)
def test_a_link_with_a_wrong_filter_says_so_and_shows_all_queries(browser, address, width, text):
    """On a phone too, where the list is folded; and nothing else is said to be filtered by it."""
    page = Page(browser, width=width)
    link = urllib.parse.quote(text)
    for view in ("query", "overview"):
        page.open(f"{address}#view={view}&filter={link}")
        message = page.page.locator(".told .wrong")
        assert message.is_visible()
        assert re.search(r"incomplete|not expected|not closed|no field", message.inner_text())
        assert "all queries are listed" in message.inner_text()
        assert page.page.locator("#queries li").count() == 50
    # The links of the overview narrow what is shown, and not by what is wrong.
    assert f"{QUERIES} queries of TrackStar, for" in page.text("h3:text('In detail') + p")
    page.page.locator(".grouped a").first.click()
    page.page.wait_for_selector("article.query")
    assert page.page.locator(".told .wrong").count() == 0
    assert 0 < page.page.locator("#queries li").count() < 50
    page.context.close()
    page.fine()


def test_names_with_hyphens_and_other_signs_are_marked(page, tmp_path):
    """Each is literal text of a regular expression with the flag u, which forbids other escapes."""
    targets = ["Coca-Cola", r"a\b-^$.*+?(c)[d]{e}|/,:;<=>@#%&~`!'\"_f"]
    results.write(
        tmp_path / "m.jsonl",
        (
            results.record(str(i), "q", "Jean-Luc Picard drinks", target, [("p", text, 0.5)], [])
            for i, target in enumerate(targets)
            for text in [f"Jean-Luc Picard drinks {target} here."]
        ),
    )
    collection = Collection()
    collection.add(tmp_path / "m.jsonl")
    with serving(collection) as address:
        for i, target in enumerate(targets):
            page.open(f"{address}#q={i}")
            assert page.texts("article.card mark.target") == [target]
            assert page.texts("article.card mark.prompt") == ["Jean-Luc Picard"]


@pytest.mark.slow
def test_pages_sorting_jumps_and_random(page, address, folder):
    items = items_of(folder)
    page.open(address)
    page.page.click("text=›")
    page.until(lambda: "page 2 of 3" in page.text(".pager"))
    assert listed(page)[0].startswith(items[50]["inputs_plaintext"])
    page.page.click("text=»")
    page.until(lambda: len(listed(page)) == 30)
    page.page.fill("#jump", "q00077")
    page.page.press("#jump", "Enter")
    page.until(lambda: items[77]["inputs_plaintext"] in page.text(".asked"))
    assert "page 2 of 3" in page.text(".pager")
    page.page.fill("#jump", "12")
    page.page.press("#jump", "Enter")
    page.until(lambda: items[11]["inputs_plaintext"] in page.text(".asked"))
    page.page.fill("#jump", "999")
    page.page.press("#jump", "Enter")
    page.until(lambda: "no query has" in page.text(".told"))
    page.page.select_option("#sort", "-top")
    best = sorted(items, key=lambda i: -i["proponent_scores"][0])
    # The list stays at the page of the query that is shown.
    page.until(lambda: page.page.locator("#queries [aria-current]").count() == 1)
    page.open(page.page.url.replace("q=q00011", "page=1"))
    assert [x.split("\n")[0] for x in listed(page)[:9]] == [
        f"{i['inputs_plaintext']} {i['targets_plaintext']}" for i in best[:9]
    ]
    before = page.page.url
    page.page.click("text=Random")
    page.until(lambda: page.page.url != before)
    page.page.select_option("#sort", "bm25.overlap")
    page.until(lambda: "sort=bm25.overlap" in page.page.url)


@pytest.mark.slow
def test_two_and_three_methods_side_by_side(page, address, folder):
    ours, theirs = items_of(folder), items_of(folder, "bm25")
    page.open(f"{address}#q=q00012&files=trackstar,bm25,grad_dot")
    assert page.texts(".column h3") == ["TrackStar", "BM25", "gradient dot product"]
    a, b = ours[12]["proponent_ids"], theirs[12]["proponent_ids"]
    both = len(set(a) & set(b))
    assert f"shares {both} of 5 with TrackStar" in page.text("[data-method=bm25] header")
    assert "shares 5 of 5 with TrackStar" in page.text("[data-method=grad_dot] header")
    for rank, name in enumerate(a, 1):
        moves = page.texts(f"#trackstar-proponents-{rank} .move")
        if name in b:
            by = b.index(name) + 1 - rank
            told = "=" if by == 0 else f"↓{by}" if by > 0 else f"↑{-by}"
            assert moves[0] == f"bm25 #{b.index(name) + 1} {told}"
        else:
            assert moves[0] == "bm25 –"
        assert moves[1] == f"grad_dot #{rank} ="
    shared = next(i for i, name in enumerate(a, 1) if name in b)
    page.page.click(f"#trackstar-proponents-{shared} .move:first-of-type")
    there = b.index(a[shared - 1]) + 1
    assert page.page.evaluate("document.activeElement.id") == f"bm25-proponents-{there}"
    page.page.click("text=opponents")
    page.until(lambda: "The opposite." in page.text("[data-method=bm25]"))
    assert "No opponents" in page.text("[data-method=trackstar]")
    page.page.click(".segments >> text=both")
    page.until(lambda: page.texts("[data-method=bm25] h4") == ["Proponents", "Opponents"])
    # A file without the query says so, and is not put in its place.
    page.open(f"{address}#q=q{QUERIES - 1:05}&files=trackstar,bm25")
    assert "This file does not contain the query." in page.text(".column:nth-child(2)")


@pytest.mark.slow
def test_a_link_restores_everything(page, browser, address):
    page.open(address)
    page.page.fill("#filter", "rank <= 3")
    page.until(lambda: "filter=" in page.page.url)
    page.page.select_option("#sort", "-top")
    page.page.click(".segments >> text=both")
    page.until(lambda: "side=both" in page.page.url)
    page.drawn().page.fill("#highlight", "capital")
    page.page.press("#highlight", "Enter")
    page.until(lambda: page.page.locator(".legend mark.own").count() == 1)
    page.page.locator("#queries a").nth(3).click()
    page.until(lambda: "q=" in page.page.url)
    page.drawn()
    shown = page.text(".asked"), listed(page), page.text(".told"), page.texts("h4")
    other = Page(browser)
    other.open(page.page.url)
    other.until(lambda: other.text(".asked") == shown[0])
    assert (other.text(".asked"), listed(other), other.text(".told"), other.texts("h4")) == shown
    assert other.page.input_value("#sort") == "-top"
    assert other.page.input_value("#filter") == "rank <= 3"
    other.context.close()
    other.fine()
    page.page.go_back()
    page.until(lambda: page.text(".asked") != shown[0])


@pytest.mark.slow
def test_highlighting_of_what_is_selected(page, address, folder):
    page.open(f"{address}#q=q00003")
    text = items_of(folder)[3]["proponents"][0]
    word = max(text[:60].split(), key=len)
    page.page.evaluate(
        """(word) => {
          const node = [...document.querySelector(".text").childNodes].find((n) =>
            n.nodeType === 3 && n.data.includes(word));
          const at = node.data.indexOf(word);
          getSelection().setBaseAndExtent(node, at, node, at + word.length);
          document.querySelector(".text").dispatchEvent(new MouseEvent("mouseup", {bubbles: true}));
        }""",
        word,
    )
    page.until(lambda: page.page.locator("article mark.own").count() > 0)
    marked = page.texts("article mark.own")
    assert {m.lower() for m in marked} == {word.lower()}
    page.page.click(".legend .chip")
    page.until(lambda: page.page.locator("article mark.own").count() == 0)


@pytest.mark.slow
def test_the_raw_record_is_the_files(page, address, folder):
    page.open(f"{address}#q=q00005")
    page.page.locator(".raw summary").first.click()
    page.until(lambda: page.text(".raw pre").startswith("{"))
    assert json.loads(page.text(".raw pre")) == items_of(folder)[5]


@pytest.mark.slow
def test_the_overview_leads_to_the_queries_behind_a_bar(page, address, folder):
    items = items_of(folder)
    page.open(f"{address}#view=overview")
    page.page.wait_for_selector(".overview")
    relation = page.text(".grouped tbody th a")
    own = [i for i in items if i["relation"] == relation]
    page.page.locator(".grouped tbody a.bar").first.click()
    page.until(lambda: page.text(".told").startswith(f"{len(own)} of"))
    page.open(f"{address}#view=overview")
    page.page.wait_for_selector(".chart")
    for bar in range(0, page.page.locator(".chart .bars a").count(), 7):
        page.open(f"{address}#view=overview")
        link = page.page.locator(".chart .bars a").nth(bar)
        told = link.get_attribute("aria-label")
        wanted = re.search(r": ([\d,]+) queries", told)[1]
        link.click()
        page.until(lambda n=wanted: page.text(".told").startswith(f"{n} of"), told)


@pytest.mark.slow
def test_the_keyboard_alone(page, address, folder):
    items = items_of(folder)
    page.open(f"{address}#q=q00000")
    page.page.keyboard.press("j")
    page.until(lambda: items[1]["inputs_plaintext"] in page.text(".asked"))
    page.page.keyboard.press("j")
    page.until(lambda: items[2]["inputs_plaintext"] in page.text(".asked"))
    page.page.keyboard.press("k")
    page.until(lambda: items[1]["inputs_plaintext"] in page.text(".asked"))
    # What is pressed keeps the focus, though the page is drawn anew.
    page.page.focus("text=Next →")
    for row in (2, 3):
        page.page.keyboard.press("Enter")
        page.until(lambda row=row: items[row]["inputs_plaintext"] in page.text(".asked"))
        page.drawn()
    page.page.focus(".picker summary")
    page.page.keyboard.press("Enter")
    page.page.focus(".method:nth-child(3) button")
    for count in (3, 2):
        page.page.keyboard.press("Enter")
        page.until(lambda count=count: page.page.locator(".column").count() == count)
    page.page.keyboard.press("o")
    page.until(lambda: "side=opponents" in page.page.url)
    page.page.keyboard.press("2")
    page.until(lambda: page.page.locator(".column").count() == 1)
    page.page.keyboard.press("v")
    page.page.wait_for_selector(".overview")
    page.page.keyboard.press("q")
    page.page.wait_for_selector(".query")
    page.page.keyboard.press("/")
    page.page.keyboard.type("jr?")
    page.until(lambda: "filter=jr" in page.page.url)
    page.page.keyboard.press("Escape")
    page.page.keyboard.press("?")
    page.page.wait_for_selector("dialog[open]")
    page.page.keyboard.press("Escape")
    page.until(lambda: page.page.locator("dialog").count() == 0)
    page.page.keyboard.press("d")
    assert page.page.evaluate("document.documentElement.dataset.theme") == "dark"
    page.page.keyboard.press("Tab")
    assert page.page.evaluate("document.activeElement !== document.body")


@pytest.mark.slow
def test_notes_survive_a_restart(page, folder, tmp_path):
    path = tmp_path / "notes.jsonl"
    first = items_of(folder)[0]["proponent_ids"][0]
    with serving(collected(folder, Notes(path))) as address:
        page.open(address)
        page.page.select_option("#trackstar-proponents-1 select.note", "states")
        page.until(lambda: path.exists() and "states" in path.read_text())
        page.page.fill("#trackstar-proponents-1 .comment", "clearly <b>")
        page.page.press("#trackstar-proponents-1 .comment", "Tab")
        page.until(lambda: "clearly" in path.read_text())
        # The other column has the same passage at another rank: its note is the same.
        there = items_of(folder, "bm25")[0]["proponent_ids"].index(first) + 1
        value = page.page.input_value(f"#bm25-proponents-{there} select.note")
        assert value == "states"
    page.asked.clear()
    with serving(collected(folder, Notes(path))) as address:
        page.open(address)
        assert page.page.input_value("#trackstar-proponents-1 select.note") == "states"
        assert page.page.input_value("#trackstar-proponents-1 .comment") == "clearly <b>"
        page.page.click("text=Notes")
        page.page.wait_for_selector(".notes-page")
        assert "clearly <b>" in page.text(".note-list")
        row = page.texts(".notes-page tbody tr:first-child td")
        assert row == ["1 (100%)", "1 (100%)", "0"]


@pytest.mark.slow
def test_a_file_is_opened_from_the_page(page, address, folder, tmp_path):
    path = tmp_path / "mine.jsonl"
    results.write(path, items_of(folder)[:7])
    page.open(address)
    page.page.click("text=Open…")
    page.page.set_input_files("#open-file", str(path))
    page.page.locator("dialog button:has-text('Open')").last.click()
    page.until(lambda: "7 of 7" in page.text(".told"))
    assert "mine" in page.page.locator(".method button").all_text_contents()
    assert page.page.locator("#open-url").count() == 0


# What a corpus may hold, and what may stand in any field of a record.
ATTACKS = [
    "<script>window.attacked = 1</script>",
    "<img src=x onerror='window.attacked=1'>",
    '"><svg onload=window.attacked=1>',
    "' autofocus onfocus='window.attacked=1",
    "javascript:window.attacked=1",
    "</script><script>window.attacked=1</script>",
    "{{constructor.constructor('window.attacked=1')()}}",
    "</title></style></textarea><iframe srcdoc='<script>parent.attacked=1</script>'>",
    "\u202egnorw \u2066x\u2069 \u0000 \ufffe \u2028 \u2029 \ud800 z\u0300\u0301\u0302\u0303",
    "x" * 120_000,
    "__proto__",
    "constructor",
    "${window.attacked=1}`",
]


def hostile_records():
    for i, attack in enumerate(ATTACKS):
        other = ATTACKS[(i + 1) % len(ATTACKS)]
        item = results.record(
            attack, other, attack, other, [(attack, attack, 0.5), (other, other, 0.4)],
            [(attack, attack, -0.5)], relation=attack, groundtruth=other,
            proponent_correct=[True, False], c4_frequency_bucket=attack,
        )  # fmt: skip
        yield item | {"8b_generations": [attack, other]}


@pytest.fixture(scope="module")
def hostile(tmp_path_factory):
    path = tmp_path_factory.mktemp("hostile") / "a.jsonl"
    with open(path, "w", encoding="ascii") as out:
        for item in hostile_records():
            out.write(json.dumps(item) + "\n")
        out.write("<script>window.attacked=1</script>\n")
    return path


def inert(page):
    assert page.page.evaluate("typeof window.attacked") == "undefined"
    assert page.page.locator("main script, main iframe, main svg[onload], main img").count() == 0
    assert page.page.evaluate("Object.keys({}).length + Object.keys(Object.prototype).length") == 0
    assert page.page.evaluate("document.documentElement.scrollWidth <= innerWidth")


@pytest.mark.slow
def test_what_a_model_knows_beyond_the_prior_is_told(page, tmp_path):
    items = list(records(3, 2, mean=40))
    told = ["2.5 nats (knows)", "0.5 nats (guesses)", "8.0 nats"]
    for item, states, prior in zip(items, (True, True, False), (3.5, 1.5, 9), strict=True):
        item |= {"is_8b_correct": states, "target_nats": 1.0, "target_prior_nats": prior}
    results.write(tmp_path / "a.jsonl", items)
    collection = Collection()
    collection.add(tmp_path / "a.jsonl")
    with serving(collection) as address:
        page.open(address)
        for item, expected in zip(items, told, strict=True):
            page.page.goto(f"{address}#q={item['example_id']}")
            page.until(lambda item=item: item["inputs_plaintext"] in page.text(".asked .prompt"))
            assert expected in [x.strip() for x in page.texts("dl.facts dd")]


@pytest.mark.slow
def test_attacks_are_text(page, hostile, tmp_path):
    notes = Notes(tmp_path / "notes.jsonl")
    for attack in ATTACKS:
        if len(attack) < 4000 and "\ud800" not in attack:
            query = {f: attack for f in ("example_id", "inputs_plaintext", "targets_plaintext")}
            notes.add(note_on(query, attack, "states", attack, attack))
    collection = Collection(notes=notes)
    collection.add(hostile, title=ATTACKS[0])
    collection.add(hostile, label="b", title=ATTACKS[2])
    with serving(collection) as address:
        for row in range(len(ATTACKS)):
            name = urllib.parse.quote(f"#{row + 1}")
            hl = urllib.parse.quote(json.dumps([ATTACKS[1], ATTACKS[3]]))
            page.open(
                f"{address}#q={name}&side=both&hl={hl}&filter={urllib.parse.quote(ATTACKS[0])}"
            )
            page.page.wait_for_selector(f"[data-row='{row}']")
            inert(page)
            shown = page.page.evaluate("document.querySelector('article.card .text').textContent")
            # A lone surrogate cannot leave the page; all else is as it was.
            assert shown.replace("\ufffd", "\ud800") == ATTACKS[row]
            assert ATTACKS[row][:50].split()[0][:20] in page.text(".asked") or row == 8
            page.page.locator(".raw summary").first.click()
            inert(page)
        page.open(f"{address}#q=%23{len(ATTACKS) + 1}&filter=malformed")
        assert "is not a record" in page.text(".malformed h2")
        assert "<script>" in page.text(".malformed pre")
        for view in ("overview", "notes", "trace"):
            page.open(f"{address}#view={view}")
            inert(page)
        page.open(f"{address}#filter=malformed")
        assert len(listed(page)) == 1
        page.open(f"{address}#filter={urllib.parse.quote('alert(1) or __proto__')}")
        inert(page)


@pytest.mark.slow
def test_an_inline_script_would_be_blocked(browser, address):
    """The policy itself: even a script that got into the page does not run."""
    page = Page(browser)
    page.open(address)
    page.page.evaluate(
        """() => {
          const script = document.createElement("script");
          try { script.textContent = "window.attacked = 1"; } catch {}
          document.body.append(script);
          try { document.body.insertAdjacentHTML("beforeend", "<img src=x onerror='attacked=1'>"); }
          catch { window.refused = true; }
        }"""
    )
    page.page.wait_for_timeout(200)
    assert page.page.evaluate("[typeof window.attacked, window.refused]") == ["undefined", True]
    assert any("Content Security Policy" in w or "Trusted" in w for w in page.wrong)
    page.context.close()


@pytest.mark.slow
def test_another_site_neither_reads_nor_writes(browser, folder, tmp_path):
    notes = tmp_path / "notes.jsonl"
    evil = Collection()
    evil.add(folder / "grad_dot.jsonl")
    with serving(collected(folder, Notes(notes))) as address, serving(evil) as elsewhere:
        # Another origin, whose own policy would let it do anything.
        context = browser.new_context(bypass_csp=True)
        other = context.new_page()
        other.goto(elsewhere.replace("127.0.0.1", "localhost"))
        outcome = other.evaluate(
            """async (address) => {
              const tried = [];
              for (const [path, options] of [
                ["data/index.json", {}], ["data/index.json", {mode: "no-cors"}],
                ["api/notes", {method: "POST", mode: "no-cors", body: "{}"}],
                ["api/notes", {method: "POST", headers: {"x-viewer-token": "x"}, body: "{}"}],
              ]) {
                try {
                  const found = await fetch(address + path, options);
                  tried.push(found.type + ":" + (await found.text()).length);
                } catch { tried.push("refused"); }
              }
              return tried;
            }""",
            address,
        )
        assert set(outcome) <= {"refused", "opaque:0"}, outcome
        assert not notes.exists()
        context.close()


def test_traces_of_other_questions_do_not_stand_side_by_side(page, tmp_path):
    prompts = {"france": ["Paris is in", "Lyon is in"], "spain": ["Madrid is in", "Paris is in"]}
    for label, texts in prompts.items():
        passage = [(f"p-{label}", f"{label} has cities.", 0.5)]
        results.write(
            tmp_path / f"{label}.jsonl",
            (
                results.record(str(i), "queries", t, "Europe", passage, [])
                for i, t in enumerate(texts)
            ),
        )
    # The same question under another number is another query: its numbers are of another list.
    collection = Collection(notes=Notes(tmp_path / "notes.jsonl"))
    for label in prompts:
        collection.add(tmp_path / f"{label}.jsonl")
    with serving(collection) as address:
        page.open(f"{address}#q=0")
        assert page.texts(".column p.quiet") == ["This file does not contain the query."]
        assert page.texts(".column .text") == ["france has cities."]
        page.page.select_option("#france-proponents-1 select.note", "states")
        page.until(lambda: "Note saved." in page.text("#status"))
        # With the other file in front, query 0 would be another question.
        page.page.click(".picker summary")
        page.page.click(".sheet >> text=first")
        page.until(lambda: "does not contain this query" in page.text("#status"))
        page.until(lambda: "Madrid" in page.text(".asked"))
        assert page.page.input_value("#spain-proponents-1 select.note") == ""
        page.page.fill("#filter", "noted")
        page.until(lambda: page.text(".told").startswith("0 of 2"))


@pytest.mark.slow
@pytest.mark.parametrize("how", ["file", "http"])
def test_an_export_works_without_python(browser, folder, tmp_path, hostile, how):
    notes = Notes(tmp_path / "notes.jsonl")
    items = items_of(folder)
    notes.add(note_on(items[3], items[3]["proponent_ids"][0], "part", "seen", "trackstar"))
    collection = collected(folder, notes)
    collection.add(hostile, label="odd")
    export(collection, tmp_path / "out")
    page = Page(browser)
    if how == "file":
        open_at = (tmp_path / "out" / "index.html").as_uri()
        _use(page, open_at, items)
    else:
        with static_server(tmp_path / "out") as address:
            _use(page, address, items)
    page.context.close()
    page.fine()


def _use(page, address, items):
    page.open(f"{address}#q=q00003")
    assert items[3]["inputs_plaintext"] in page.text(".asked")
    assert page.text("#trackstar-proponents-1 .text") == items[3]["proponents"][0]
    assert "states part of it “seen”" in page.text("#trackstar-proponents-1 .note")
    assert page.page.locator("text=Open…").count() == 0
    page.page.fill("#filter", "rank = 1")
    found = sum(i["proponent_correct"][0] for i in items)
    page.until(lambda: page.text(".told").startswith(f"{found} of"))
    page.open(f"{address}#q=q00127&files=trackstar,bm25")
    assert items[127]["inputs_plaintext"] in page.text(".asked")
    page.open(f"{address}#view=overview")
    page.page.wait_for_selector(".chart")
    page.open(f"{address}#view=notes")
    assert "seen" in page.text(".note-list")
    for row in range(1, len(ATTACKS) + 2):
        page.open(f"{address}#files=odd&q=%23{row}")
        page.page.wait_for_selector(f"[data-row='{row - 1}'], .malformed")
        inert(page)


@pytest.mark.slow
def test_the_example_in_the_docs_opens(page):
    """Opened as a reader of a clone does, from the disk."""
    example = pathlib.Path(__file__).parents[2] / "docs/example/index.html"
    page.open(example.as_uri())
    assert len(page.texts(".story tbody tr")) == 4 and len(page.texts(".suggested li")) == 3
    page.page.locator(".suggested a").first.click()
    page.page.wait_for_selector("article.query .card.right")


class Quiet(http.server.SimpleHTTPRequestHandler):
    def log_message(self, *args):
        pass


@contextlib.contextmanager
def static_server(folder):
    """Any web server: here Python's own."""
    handler = functools.partial(Quiet, directory=str(folder))
    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), handler)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    yield f"http://127.0.0.1:{server.server_port}/index.html"
    server.shutdown()


@pytest.mark.slow
def test_a_server_that_is_gone_is_told(browser, folder):
    page = Page(browser)
    with serving(collected(folder)) as address:
        page.open(address)
    page.page.locator("#queries a").nth(40).click()
    page.until(lambda: "does not answer" in page.text("main"))
    page.context.close()


@pytest.mark.slow
def test_a_page_tells_that_its_results_have_changed(browser, tmp_path):
    """Another page has read the index anew."""
    file = tmp_path / "trackstar.jsonl"
    results.write(file, records(60, 3, 50))
    collection = Collection()
    collection.add(file)
    pages = page, other = Page(browser), Page(browser)
    with serving(collection) as address:
        page.open(address)
        results.write(file, records(60, 3, 50, 9))
        other.open(address)
        for opened, expected in ((page, "have changed; reload"), (other, "Raw records")):
            opened.page.locator("#queries a").nth(40).click()
            opened.until(lambda o=opened, text=expected: text in o.text("main"))
    for opened in pages:
        opened.context.close()
