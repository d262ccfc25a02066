"""One browser for all tests, and a page that must end without anything having gone wrong."""

import pytest

from tests.viewer.browser import Page, launched


@pytest.fixture(scope="session")
def browser():
    with launched() as found:
        yield found


@pytest.fixture
def page(browser):
    found = Page(browser)
    yield found
    found.context.close()
    found.fine()


@pytest.fixture
def narrow(browser):
    found = Page(browser, width=400, scheme="dark")
    yield found
    found.context.close()
    found.fine()
