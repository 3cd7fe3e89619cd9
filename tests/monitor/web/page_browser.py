"""The system's Chromium, driven by Playwright; where either is absent, tests are skipped."""

from __future__ import annotations

import shutil
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import pytest

CHROMIUM = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")

PATIENCE = 60.0  #: seconds; what is waited for takes a fraction of one on a machine with nothing else to do

LOADING = """[...document.querySelectorAll('.loading, .ghost')].some((e) => {
  const b = e.getBoundingClientRect();
  return b.bottom > 0 && b.top < innerHeight;
})"""


@contextmanager
def chromium() -> Iterator[Any]:
    """A headless browser that may only talk to this machine."""
    sync = pytest.importorskip(
        "playwright.sync_api", reason="Playwright is absent: pip install '.[browser-tests]'"
    )
    if CHROMIUM is None:
        pytest.skip("no Chromium on this machine: apt-get install chromium")
    with sync.sync_playwright() as playwright:
        arguments = ["--no-sandbox", "--host-resolver-rules=MAP * ~NOTFOUND, EXCLUDE 127.0.0.1"]
        browser = playwright.chromium.launch(
            executable_path=CHROMIUM, args=arguments, timeout=3000 * PATIENCE
        )
        try:
            yield browser
        finally:
            browser.close()


def expect(of: Any) -> Any:
    """Playwright's assertions about a page or locator: they wait, up to a minute, until they hold.

    What a page shows follows an action a moment later, so never compare what ``count`` or ``inner_text`` says at once.
    """
    sync = pytest.importorskip("playwright.sync_api")
    sync.expect.set_options(timeout=1000 * PATIENCE)
    return sync.expect(of)


class Watched:
    """A page whose errors, refused resources and foreign requests are kept."""

    def __init__(self, browser: Any, **options: Any) -> None:
        shape = {"viewport": {"width": 1280, "height": 900}, "locale": "en-US", "reduced_motion": "reduce"}
        self.context = browser.new_context(**{**shape, **options})
        self.context.set_default_timeout(1000 * PATIENCE)
        self.page = self.context.new_page()
        self.troubles: list[str] = []
        self.foreign: list[str] = []
        self.page.on("pageerror", lambda e: self.troubles.append(f"error: {e}"))
        self.page.on("console", lambda m: self.troubles.append(m.text) if m.type == "error" else None)
        self.page.on("request", self._asked)

    def _asked(self, request: Any) -> None:
        if not request.url.startswith(("http://127.0.0.1", "data:", "blob:")):
            self.foreign.append(request.url)

    def open(self, address: str, wait: str = "main") -> Any:
        """Go to ``address`` and wait until nothing on it is loading."""
        self.page.goto("about:blank")
        self.page.goto(address)
        self.page.wait_for_selector(wait)
        self.settle()
        return self.page

    def settle(self) -> None:
        """Until nothing in sight is loading; panels below the window wait until somebody scrolls there."""
        self.true(lambda: not self.page.evaluate(LOADING), "something on the page is loading")
        self.page.wait_for_timeout(60)

    def until(self, script: str) -> Any:
        """What ``script`` gives, once it is true; ``wait_for_function`` cannot: the page's policy forbids its eval."""
        return self.true(lambda: self.page.evaluate(script), f"not true: {script}")

    def true(self, what: Callable[[], Any], why: str = "it did not come true") -> Any:
        """What ``what`` gives, once it is true: of the page, or of the server behind it."""
        until = time.monotonic() + PATIENCE
        while not (found := what()):
            assert time.monotonic() < until, f"{why}, after {PATIENCE:g} seconds"
            self.page.wait_for_timeout(20)
        return found

    def still(self, script: str) -> Any:
        """What ``script`` gives, once it has given the same for a while: after a scrolling that is drawn as motion."""
        last: list[Any] = [self.page.evaluate(script)]

        def same() -> bool:
            self.page.wait_for_timeout(150)
            last.append(self.page.evaluate(script))
            return len(last) > 3 and last[-3:] == last[-1:] * 3

        self.true(same, f"still changing: {script}")
        return last[-1]

    def close(self) -> None:
        self.context.close()


@contextmanager
def watched(browser: Any, **options: Any) -> Iterator[Watched]:
    window = Watched(browser, **options)
    try:
        yield window
    finally:
        window.close()
