"""A real browser for pages: headless Chromium, driven by Playwright. Tests skip where either is missing."""

import shutil
from collections.abc import Iterator
from pathlib import Path

import pytest


@pytest.fixture(scope="session")
def chromium() -> Iterator:
    playwright = pytest.importorskip("playwright.sync_api", reason="needs playwright (extra dev)")
    program = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")
    if program is None:
        pytest.skip("needs Chromium (Debian's package chromium)")
    flags = ["--no-sandbox", "--disable-gpu", "--disable-quic", "--no-first-run", "--disable-background-networking"]
    flags += ["--disable-component-update", "--disable-sync", "--force-color-profile=srgb"]
    with playwright.sync_playwright() as p:
        browser = p.chromium.launch(executable_path=program, args=flags)
        yield browser
        browser.close()


class Opened:
    """A page in the browser, and what it complained of."""

    def __init__(self, browser, target: str, **options) -> None:
        self.context = browser.new_context(**{"viewport": {"width": 1280, "height": 900}, **options})
        self.page = self.context.new_page()
        self.complaints: list[str] = []
        self.requests: list[str] = []
        self.page.on("console", lambda m: self.complaints.append(m.text) if m.type in ("error", "warning") else None)
        self.page.on("pageerror", lambda error: self.complaints.append(str(error)))
        self.page.on("request", lambda request: self.requests.append(request.url))
        self.page.goto(target)
        self.page.wait_for_selector("body[data-ready=yes]", timeout=60_000)


@pytest.fixture
def open_page(chromium) -> Iterator:
    """``open_page(path or url, **context options)`` -> Opened, once the page is ready. A page must have nothing to
    complain of, and must fetch nothing: checked when the test is over."""
    opened: list[Opened] = []

    def open_(target: Path | str, **options) -> Opened:
        url = target if isinstance(target, str) else target.resolve().as_uri()
        opened.append(Opened(chromium, url, **options))
        return opened[-1]

    yield open_
    for one in opened:
        one.context.close()
    assert [complaint for one in opened for complaint in one.complaints] == []
    outside = [
        u for one in opened for u in one.requests if not u.startswith(("file:", "data:", "blob:", "http://127.0.0.1:"))
    ]
    assert outside == []
