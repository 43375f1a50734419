"""A real browser for tests of pages: Chromium through playwright, and all that a page says and asks for."""

import contextlib
import shutil
from dataclasses import dataclass, field
from urllib.parse import urlsplit

import pytest

WIDTHS = (360, 768, 1400)  # a phone, a tablet, a desk
CHROMIUMS = ("chromium", "chromium-browser", "google-chrome")


@pytest.fixture(scope="module")
def chromium():
    """A playwright `Browser` without a window; tests that take it are skipped where there is none."""
    api = pytest.importorskip("playwright.sync_api", reason="needs playwright (pip install playwright)")
    executable = next(filter(None, map(shutil.which, CHROMIUMS)), None)
    if executable is None:
        pytest.skip(f"needs a browser, one of {', '.join(CHROMIUMS)}")
    with api.sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=executable, args=["--no-sandbox", "--disable-dev-shm-usage"])
        yield browser
        browser.close()


@dataclass
class Visit:
    """An open page and what it did since it was opened.

    Attributes:
        page: playwright's `Page`.
        messages: Of its console, (type, text): "error", "warning", "log" and so on; of errors that nothing caught, "error" too.
        requests: Addresses that were asked for, that of the page itself first; what lies inside the page (data:) is none.
    """

    page: object
    messages: list = field(default_factory=list)
    requests: list = field(default_factory=list)

    @property
    def errors(self):
        """What the console shows in red."""
        return [text for kind, text in self.messages if kind == "error"]

    @property
    def foreign_requests(self):
        """Addresses on other hosts than the page's."""
        return [address for address in self.requests if urlsplit(address).netloc != urlsplit(self.page.url).netloc]

    @property
    def overflow(self):
        """By how many pixels the page is wider than its window."""
        return self.page.evaluate("document.documentElement.scrollWidth - document.documentElement.clientWidth")


@contextlib.contextmanager
def visited(browser, address, width=1400, height=900, **options):
    """A `Visit` of `address` in a window of its own; `options` are those of playwright's `new_page`, such as color_scheme."""
    page = browser.new_page(viewport={"width": width, "height": height}, **options)
    visit = Visit(page)
    page.on("console", lambda message: visit.messages.append((message.type, message.text)))
    page.on("pageerror", lambda error: visit.messages.append(("error", str(error))))
    page.on("request", lambda request: request.url.startswith(("data:", "blob:")) or visit.requests.append(request.url))
    page.on("websocket", lambda socket: visit.requests.append(socket.url))
    try:
        page.goto(address)
        yield visit
    finally:
        page.close()
