"""A real browser, and viewers for it to open."""

import contextlib
import pathlib
import shutil
import threading
import time

import pytest
import uvicorn

from tda.viewer.server import create_app

ARGUMENTS = [
    "--no-sandbox",
    "--disable-gpu",
    "--disable-background-networking",
    "--disable-component-update",
    "--disable-sync",
    "--no-first-run",
]


def chromium() -> str:
    """The browser's path; the test is skipped where there is none."""
    pytest.importorskip("playwright", reason="needs the playwright package")
    for name in ("chromium", "chromium-browser", "google-chrome"):
        if path := shutil.which(name):
            return path
    pytest.skip("needs Chromium (Debian: apt-get install chromium)")


@contextlib.contextmanager
def launched():
    """A browser without a window."""
    path = chromium()
    from playwright.sync_api import sync_playwright

    with sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=path, headless=True, args=ARGUMENTS)
        yield browser
        browser.close()


@contextlib.contextmanager
def serving(collection, answers=None, **options):
    """The address of a viewer that is served meanwhile."""
    app = create_app(collection, answers, **options)
    config = uvicorn.Config(app, host="127.0.0.1", port=0, log_level="warning")
    socket = config.bind_socket()
    server = uvicorn.Server(config)
    thread = threading.Thread(target=server.run, kwargs={"sockets": [socket]}, daemon=True)
    thread.start()
    while not server.started:
        assert thread.is_alive()
        time.sleep(0.01)
    try:
        yield f"http://127.0.0.1:{socket.getsockname()[1]}/"
    finally:
        server.should_exit = True
        thread.join(10)


class Page:
    """A page of a viewer, and everything that went wrong on it.

    Attributes:
        page: Playwright's page.
        wrong: errors of scripts and of the console, blocked and failed requests.
        asked: hosts that were asked for anything.
    """

    def __init__(self, browser, width: int = 1280, height: int = 900, scheme: str = "light"):
        self.context = browser.new_context(
            viewport={"width": width, "height": height}, color_scheme=scheme
        )
        self.page = self.context.new_page()
        self.page.set_default_timeout(30_000)
        self.wrong: list[str] = []
        self.asked: set[str] = set()
        self.page.on("pageerror", lambda e: self.wrong.append(f"error: {e}"))
        self.page.on("console", self._said)
        self.page.on("dialog", lambda d: (self.wrong.append(f"dialog: {d.message}"), d.dismiss()))
        self.page.on("request", lambda r: self.asked.add("/".join(r.url.split("/", 3)[:3])))

    def _said(self, message) -> None:
        if message.type in ("error", "warning"):
            self.wrong.append(f"{message.type}: {message.text}")

    def open(self, address: str) -> "Page":
        """Opens an address and waits until it is drawn."""
        self.page.goto("about:blank")
        self.page.goto(address)
        return self.drawn()

    def drawn(self) -> "Page":
        """Waits until the page is drawn."""
        self.page.wait_for_selector("html[data-ready]", state="attached")
        return self

    def text(self, selector: str) -> str:
        """What stands in the first element."""
        return self.page.locator(selector).first.inner_text()

    def texts(self, selector: str) -> list[str]:
        """What stands in all of them."""
        return self.page.locator(selector).all_inner_texts()

    def until(self, condition, what: str = "") -> None:
        """Waits until a condition holds."""
        for _ in range(300):
            if condition():
                return
            self.page.wait_for_timeout(50)
        raise AssertionError(f"it never came: {what or condition}")

    def fine(self) -> None:
        """Nothing went wrong, and nobody else was asked."""
        assert self.wrong == []
        assert len(self.asked - {"about:blank"}) <= 1, self.asked


def screenshot(page: Page, name: str, folder: pathlib.Path) -> None:
    """Keeps what the page looks like."""
    page.page.screenshot(path=str(folder / f"{name}.png"))
