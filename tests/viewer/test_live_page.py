"""The page for live questions, with a stand-in for the run; the real one: tests/experiments."""

import time

import pytest

from tda import results
from tda.viewer.collection import Collection
from tests.viewer.big_file import records
from tests.viewer.browser import Page, serving


class Answers:
    """A run that knows the shape of its answers, and hostile words."""

    heat_methods = ("trackstar",)

    def __init__(self):
        self.asked = []

    def describe(self, progress):
        return {
            "methods": [
                {"name": n, "title": t, "usual": u, "lacks": why, "contrasts": n == "trackstar"}
                for n, t, u, why in (
                    ("trackstar", "TrackStar", True, None),
                    ("bm25", "BM25", True, None),
                    ("exp5", "Exp 5", False, "no such store"),
                )
            ],
            "passages": 1200,
            "parameters": 5300000,
        }

    def complete(self, progress, prompt, tokens):
        self.asked.append((prompt, tokens))
        others = [{"token": " <b>Lyon</b>", "probability": 0.2}]
        # "é" comes in two tokens, and "Paris" too.
        said = [" Par", "is", ",", " caf", "", "é", " of", " the", " <i>world", "</i>."]
        steps = [
            {"id": 10 + i, "token": token, "probability": 0.5, "others": others if not i else []}
            for i, token in enumerate(said)
        ]
        answers = [
            {"target": "Paris", "probability": 0.45, "ids": [10, 11]},
            {"target": "<b>Lyon</b>", "probability": 0.2, "ids": [77]},
        ]
        whole = {"ended": True, "continues": False}
        return {"prompt": [1, 2, 3], "steps": steps, "answers": answers} | whole

    def context(self, progress, passage):
        self.asked.append(passage)
        return {"before": ["<b>Before.</b>"], "after": ["After."], "earlier": 4, "later": 0}

    def trace(self, progress, query, methods, k):
        prompt, target = query.prompt, query.target
        self.asked.append((prompt, target, methods, k))
        self.tokens, self.contrast = query.tokens, query.contrast
        if prompt == "slow":
            for i in range(3000):
                progress("searching passages", i, 3000)
                time.sleep(0.01)
        if prompt == "wrong":
            raise ValueError("the target ' ' has no token")
        texts = [("p#1", "<i>Paris</i> is the capital of France.", 0.5), ("p2", "Rome.", 0.25)]
        made = [results.record("live", "live", prompt, target, texts, texts[::-1])]
        made.append(results.record("live", "live", prompt, target, texts[::-1], []))
        listed = [
            {"name": m, "title": m.title(), "record": r}
            for m, r in zip(methods, made, strict=False)
        ]
        other = 0.125 if query.contrast else None
        return {"probability": 0.25, "rank": 3, "contrast_probability": other, "methods": listed}

    def heat(self, progress, query, method, passage):
        self.asked.append((query.prompt, query.target, method, passage))
        self.tokens = query.tokens
        if passage == "p2":
            raise ValueError("the store has no passage 'p2'")
        parts = [("<bos>", 0.01, True), ("<i>Paris", 0.4, False), (" is", -0.1, False)]
        tokens = [{"text": t, "part": p, "special": s} for t, p, s in parts]
        return {"tokens": tokens, "sum": 0.31, "score": 0.31, "faithful": True}


CHECKED = "[...document.querySelectorAll('.methods input:checked')].map((i) => i.value)"


@pytest.fixture
def answers():
    return Answers()


@pytest.fixture
def address(tmp_path, answers):
    results.write(tmp_path / "trackstar.jsonl", records(5, 3, mean=40))
    collection = Collection()
    collection.add(tmp_path / "trackstar.jsonl")
    with serving(collection, answers) as found:
        yield found


def asking(page, address):
    page.open(f"{address}#view=trace")
    page.page.wait_for_selector(".methods input")
    return page


@pytest.mark.slow
def test_a_question_is_completed_and_traced(page, address, answers):
    asking(page, address)
    assert "1,200 passages, a model of 5,300,000 parameters" in page.text(".methods")
    assert page.page.evaluate(CHECKED) == ["trackstar", "bm25"]
    # What is not to be had is folded away, with its reason.
    assert page.page.locator(".methods input[value=exp5]").count() == 0
    assert page.text(".methods summary") == "1 not available in this run"
    assert "Exp 5: no such store" in page.page.locator(".methods li").text_content()
    page.until(lambda: page.text(".progress") == "", "nothing is under way")
    page.page.fill("#prompt", "The capital of France is")
    page.page.click("text=Let the model go on")
    page.page.wait_for_selector(".completed button")
    page.until(lambda: answers.asked[-1] == ("The capital of France is", 24))
    assert page.texts(".completed > .row button") == ["Paris\n45.0%", "<b>Lyon</b>\n20.0%"]
    page.page.click(".completed summary")
    assert page.text(".steps").split("\n")[:3] == ["Par 50.0%", "<b>Lyon</b> 20.0%", "is 50.0%"]
    page.page.fill("#target", "Paris")
    page.page.locator(".main-action").click()
    page.page.wait_for_selector(".results .column")
    assert answers.tokens is None  # what is typed is encoded
    assert answers.asked[-1] == ("The capital of France is", "Paris", ["trackstar", "bm25"], 10)
    assert page.texts(".results .column h3") == ["Trackstar", "Bm25"]
    assert page.text("#trackstar-proponents-1 .text") == "<i>Paris</i> is the capital of France."
    assert page.texts("#trackstar-proponents-1 .move") == ["bm25 #2 ↓1"]
    assert "25.0%" in page.text(".results .facts")
    # The question is in the address; the answer stays while another view is looked at.
    assert "prompt=The+capital" in page.page.url
    page.page.keyboard.press("Escape")
    page.page.click(".segments >> text=opponents")
    page.until(lambda: page.text("#trackstar-opponents-1 .text") == "Rome.")
    page.page.click(".views >> text=Notes")
    page.page.wait_for_selector(".notes-page")
    page.page.click(".views >> text=Trace")
    page.page.wait_for_selector(".results .column")
    assert page.page.input_value("#target") == "Paris"
    # An example is a prompt of the results whose target the model states.
    example = page.page.locator(".ask .chip").first
    stated = [r["inputs_plaintext"] for r in records(5, 3, mean=40) if r["is_8b_correct"]]
    assert example.inner_text() in stated
    example.click()
    assert page.page.input_value("#prompt") == example.inner_text()
    page.until(lambda: answers.asked[-1] == (example.inner_text(), 24))
    page.until(lambda: example.inner_text() in page.text(".said"))


def test_a_question_of_one_target_rather_than_another(page, address, answers):
    asking(page, address)
    for box, text in (
        ("prompt", "The capital of France is"),
        ("target", "Paris"),
        ("rather", "<b>"),
    ):
        page.page.fill(f"#{box}", text)
    page.page.locator(".main-action").click()
    page.page.wait_for_selector(".results .column")
    # BM25 ranks for one target: it is left out, and that is said.
    assert answers.asked[-1] == ("The capital of France is", "Paris", ["trackstar"], 10)
    assert answers.contrast == "<b>" and page.texts(".results .column h3") == ["Trackstar"]
    told = page.text(".results")
    assert "say Paris rather than <b>, opponents the contrary" in told
    assert "rank for one target: BM25" in told and "12.5%" in page.text(".results .facts")
    assert page.page.evaluate(CHECKED) == ["trackstar", "bm25"]
    # The address asks the same again; without the other target it is the plain question.
    page.until(lambda: page.text(".progress").endswith(" s"))
    page.open(page.page.url)
    page.page.wait_for_selector(".methods input")
    page.until(lambda: page.text(".progress") == "")
    assert page.page.input_value("#rather") == "<b>"
    page.page.fill("#rather", "")
    page.page.locator(".main-action").click()
    page.until(lambda: page.texts(".results .column h3") == ["Trackstar", "Bm25"])
    assert answers.contrast == "" and "rather" not in page.page.url


def test_a_part_of_a_word_is_no_target(page, address, answers, monkeypatch):
    """The rest of the prompt's last word, and the last word if the most tokens cut it."""
    said = ["ey", " is", " in", " Eur"]
    steps = [
        {"id": i, "token": t, "probability": 0.5, "others": [{"token": "es", "probability": 0.26}]}
        for i, t in enumerate(said)
    ]
    completion = {"prompt": [1], "steps": steps, "ended": False, "continues": True, "answers": []}
    monkeypatch.setattr(answers, "complete", lambda *told: completion)
    asking(page, address)
    page.until(lambda: page.text(".progress") == "")
    page.page.fill("#prompt", "Turk")
    page.page.click("text=Let the model go on")
    words = page.page.locator(".said .word")
    words.first.wait_for()
    assert page.text(".said") == "Turkey is in Eur"
    assert page.texts(".said .word:enabled") == ["is", "in"]
    # Another token is no word either; "token by token" shows what the model might have said.
    titles = [w.get_attribute("title") for w in words.all()]
    assert titles == ["part of a word", "50.0%", "50.0%", "part of a word"]
    # Dragging as far as the cut word stops before it.
    start, end = (words.nth(i).bounding_box() for i in (1, 3))
    page.page.mouse.move(start["x"] + 2, start["y"] + 5)
    page.page.mouse.down()
    page.page.mouse.move(end["x"] + 4, end["y"] + 5, steps=8)
    page.page.mouse.up()
    page.page.wait_for_selector(".results .column")
    assert answers.asked[-1][:2] == ("Turkey ", "is in")


def test_a_span_of_what_the_model_says_is_traced_by_its_tokens(page, address, answers):
    """Mistakes: a subword as a target, the span encoded anew, tokens kept for another text."""
    asking(page, address)
    page.until(lambda: page.text(".progress") == "")
    page.page.fill("#prompt", "The capital of France is ")
    page.page.click("text=Let the model go on")
    words = page.page.locator(".said .word")
    words.first.wait_for()
    assert words.all_inner_texts() == ["Paris", ",", "café", "of", "the", "<i>world", "</i>."]
    assert page.text(".said") == "The capital of France is Paris, café of the <i>world</i>."

    def traced(prompt, target, tokens):
        page.until(lambda: answers.asked[-1][:2] == (prompt, target), target)
        # The answer before stands there until this one comes.
        page.page.wait_for_selector(".results .column")
        page.until(lambda: page.text(".results .asked .target") == target)
        assert answers.tokens == tokens

    words.nth(2).click()
    traced("The capital of France is Paris, ", "café", ((1, 2, 3, 10, 11, 12), (13, 14, 15)))
    # Over several words, by dragging and by a click with Shift.
    start, end = (words.nth(i).bounding_box() for i in (3, 4))
    page.page.mouse.move(start["x"] + 2, start["y"] + 5)
    page.page.mouse.down()
    page.page.mouse.move(end["x"] + 4, end["y"] + 5, steps=4)
    page.page.mouse.up()
    before = "The capital of France is Paris, café "
    before_ids = (1, 2, 3, 10, 11, 12, 13, 14, 15)
    traced(before, "of the", (before_ids, (16, 17)))
    words.nth(5).click(modifiers=["Shift"])
    traced(before, "of the <i>world", (before_ids, (16, 17, 18)))
    pressed = page.page.locator(".said [aria-pressed=true]")
    assert pressed.all_inner_texts() == ["of", "the", "<i>world"]
    # Heat is asked for by the same tokens, and the address asks the same again.
    page.page.click("#trackstar-proponents-1 >> text=heat")
    page.page.wait_for_selector("#trackstar-proponents-1 .token")
    assert answers.tokens[1] == (16, 17, 18)
    answers.tokens = None
    page.open(page.page.url)
    page.page.wait_for_selector(".methods input")
    page.page.locator(".main-action").click()
    page.page.wait_for_selector(".results .column")
    assert answers.tokens[1] == (16, 17, 18)
    # Another text has other tokens.
    page.page.fill("#target", "of a world")
    page.page.locator(".main-action").click()
    page.until(lambda: page.text(".results .asked .target") == "of a world")
    assert answers.tokens is None
    # What stands around a passage in its document.
    page.page.click("#trackstar-proponents-1 .foot >> text=context")
    around = page.page.locator("#trackstar-proponents-1 .around")
    page.until(lambda: "<b>Before.</b>" in around.first.inner_text())
    assert around.first.inner_text().startswith("4 earlier passages")
    assert around.last.inner_text().split("\n")[0] == "After."
    assert "document ends here" in around.last.inner_text()
    assert page.page.locator("#trackstar-proponents-2 .foot >> text=context").count() == 0


@pytest.mark.slow
def test_heat_shows_which_tokens_carry_the_score(page, address, answers):
    asking(page, address)
    page.page.fill("#prompt", "The capital of France is")
    page.page.fill("#target", "Paris")
    page.page.locator(".main-action").click()
    page.page.wait_for_selector(".results .column")
    assert page.page.locator("[data-method=bm25] >> text=heat").count() == 0
    page.page.click("#trackstar-proponents-1 >> text=heat")
    page.page.wait_for_selector("#trackstar-proponents-1 .token")
    tokens = page.page.locator("#trackstar-proponents-1 .token")
    assert tokens.all_inner_texts() == ["<bos>", "<i>Paris", " is"]
    strengths = [t.evaluate("e => e.style.getPropertyValue('--strength')") for t in tokens.all()]
    assert strengths == ["3%", "100%", "25%"]
    # The target stays marked, and the heat stands where the text stood: above the card's foot.
    assert page.texts("#trackstar-proponents-1 .token.sought.target") == ["<i>Paris"]
    assert page.page.locator("#trackstar-proponents-1 p.text ~ .heat ~ .foot").count() == 1
    assert "cold" in tokens.nth(2).get_attribute("class")
    assert tokens.nth(1).get_attribute("title") == "0.4000 at “<i>Paris”, predicting “is”"
    assert page.page.locator("#trackstar-proponents-1 p.text").first.is_hidden()
    page.page.click("#trackstar-proponents-1 .foot >> text=text")
    assert page.page.locator("#trackstar-proponents-1 p.text").first.is_visible()
    page.page.click("#trackstar-proponents-2 >> text=heat")
    page.until(lambda: "no passage 'p2'" in page.text("#trackstar-proponents-2 .heat"))
    page.page.click("text=heat all")
    page.until(lambda: page.page.locator("#trackstar-proponents-1 .token").count() == 3)
    page.page.click(".results >> text=texts")
    page.until(lambda: page.page.locator(".token").count() == 0)
    # Also of what a results file holds.
    page.open(f"{address}#view=query")
    page.page.click("#trackstar-proponents-1 >> text=heat")
    page.page.wait_for_selector("#trackstar-proponents-1 .token")
    first = next(r for r in records(5, 3, mean=40) if r["is_8b_correct"])
    assert answers.asked[-1][0] == first["inputs_plaintext"]
    assert answers.asked[-1][3] == first["proponent_ids"][0]


@pytest.mark.slow
def test_progress_errors_and_stopping(page, address):
    asking(page, address)
    page.page.locator(".main-action").click()
    page.until(lambda: "Give a target" in page.text("#status"))
    page.page.fill("#prompt", "wrong")
    page.page.fill("#target", "x")
    page.page.locator(".main-action").click()
    page.until(lambda: "has no token" in page.text(".progress"))
    # What is typed stays when the page is drawn anew.
    page.page.fill("#target", "typed")
    page.page.uncheck(".methods input[value=bm25]")
    page.page.evaluate("history.pushState(null, '', location.hash + '&side=both')")
    page.page.evaluate("dispatchEvent(new PopStateEvent('popstate'))")
    page.drawn()
    page.page.wait_for_selector(".methods input")
    assert page.page.input_value("#target") == "typed"
    assert page.page.evaluate(CHECKED) == ["trackstar"]
    page.page.fill("#prompt", "slow")
    page.page.locator(".main-action").click()
    page.until(lambda: "searching passages" in page.text(".progress"))
    assert page.page.locator("progress").get_attribute("value") is not None
    page.page.click("text=Stop")
    page.until(lambda: page.text(".progress") == "Stopped.")


@pytest.mark.slow
def test_a_query_of_the_list_is_traced_live(browser, address):
    page = Page(browser, width=400)
    page.open(address)
    prompt = page.text(".asked .prompt")
    page.page.click("text=Trace live")
    page.page.wait_for_selector(".methods input")
    assert page.page.input_value("#prompt") == prompt and page.page.input_value("#target")
    page.page.locator(".main-action").click()
    page.page.wait_for_selector(".results .column")
    assert page.page.evaluate("document.documentElement.scrollWidth") <= 400
    page.context.close()
    page.fine()
