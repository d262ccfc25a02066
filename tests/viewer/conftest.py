"""Pages that must end without anything having gone wrong."""

import pytest

from tests.viewer.browser import Page


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
