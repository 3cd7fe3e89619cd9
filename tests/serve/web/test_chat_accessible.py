"""The chat page for everybody: no serious fault in both themes, all of it in Chinese, on a phone, and by keys."""

from __future__ import annotations

import json
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

pytest.importorskip("starlette", reason="starlette is absent: pip install '.[serve]'")
pytest.importorskip("uvicorn", reason="uvicorn is absent: pip install '.[serve]'")
from page_browser import watched
from test_chat_page import ask, expect, finished, opened

AXE = Path(__file__).parents[3] / "web" / "node_modules" / "axe-core" / "axe.min.js"
PHONE = {"viewport": {"width": 390, "height": 844}, "is_mobile": True, "has_touch": True}
MARKDOWN = (
    "say: # Title\n\n> quote\n\n- [x] done\n- [ ] open\n\n$$\nx^2\n$$\n\n[link](https://example.org) `code`"
)


def walk(page: Any, server: Any, see: Callable[[str], None]) -> None:
    """Go through everything the page can show, and ``see`` each state by its name."""
    see("empty")
    ask(page, "How does a router choose its experts?")
    see("answer")
    ask(page, MARKDOWN)
    see("markdown")
    page.locator("article.assistant .acts .text-button").last.click()
    see("no tokens")
    page.locator(".no-tokens .button").click()
    finished(page)
    expect(page.locator(".chip").first).to_be_visible()
    for i in range(3):
        page.locator(".tokens > header .segments button").nth(i).click()
        page.locator(".chips .chip").nth(3).focus()
        see(f"tokens {i}")
    for question in ("drop: a b c d", "busy", "fail", "bad", "long: a b"):
        ask(page, question)
        see(question)
    server.state.ready = False
    ask(page, "not ready")
    see("not ready")
    server.state.ready = True
    expect(page.locator(".notice.starting")).to_have_count(0)
    finished(page)
    ask(page, "slow: " + "word " * 40, wait=False)
    expect(page.locator("article[aria-busy=true] .prose")).to_contain_text("word")
    see("streaming")
    page.keyboard.press("Escape")
    finished(page)
    page.locator("article.user").last.hover()
    page.locator("article.user .acts .icon-button").last.click()
    see("editing")
    page.locator(".reword .button").first.click()
    page.locator(".top .icon-button").last.click()
    page.locator(".params .segments").first.locator("button").last.click()
    page.locator(".params details summary").click()
    page.locator(".params .presets .icon-button").first.click()
    see("parameters")
    page.keyboard.press("Escape")


@pytest.mark.slow
@pytest.mark.parametrize("theme", ["dark", "light"])
def test_no_serious_fault_in_any_state(server: Any, browser: Any, theme: str) -> None:
    if not AXE.exists():
        pytest.skip("axe-core is absent: run `npm ci` in web/")
    server.state.__init__()
    faults: dict[str, Any] = {}
    shape = {"width": 1400, "height": 2400}
    with watched(browser, color_scheme=theme, bypass_csp=True, viewport=shape) as window:
        page = opened(window, server)
        page.evaluate(AXE.read_text(encoding="utf-8") + ";undefined")

        def see(name: str) -> None:
            options: dict[str, Any] = {"resultTypes": ["violations"]}
            if theme == "light":  # all else is the same in both
                options["runOnly"] = ["color-contrast"]
            found = page.evaluate(
                "(options) => axe.run(document, options).then((r) => r.violations)", options
            )
            for x in found:
                if x["impact"] in ("serious", "critical"):
                    faults[f"{name}: {x['id']}"] = [n["html"][:200] for n in x["nodes"]][:3]

        walk(page, server, see)
        page.click(".top .only-wide")
        see("help")
        page.keyboard.press("Escape")
        page.locator(".chat-acts .icon-button").last.click()
        see("delete")
    assert faults == {}, json.dumps(faults, indent=1)


def test_chinese_is_complete_and_the_policy_is_kept(server: Any, browser: Any) -> None:
    server.state.__init__()
    with watched(browser, locale="zh-CN") as window:
        page = opened(window, server)
        walk(page, server, lambda _: None)
        page.click(".top .only-wide")
        expect(page.locator("dialog[open]")).to_be_visible()
        assert page.evaluate("[...deepseekUntranslated]") == []
        assert page.evaluate("document.documentElement.lang") == "zh-CN"
        told = [
            x for x in window.troubles if not re.search(r"status of (429|500|400|503)|INCOMPLETE_CHUNKED", x)
        ]
        assert told == [], "the policy refused something, or a script failed"
        assert window.foreign == []


def test_every_text_in_the_source_has_its_chinese() -> None:
    source = Path(__file__).parents[3] / "web" / "chat" / "src"
    if not source.is_dir():
        pytest.skip("the page's source is not part of this distribution")
    words = (source / "zh.ts").read_text(encoding="utf-8")
    known = {json.loads(f'"{x}"') for x in re.findall(r'"((?:[^"\\]|\\.)*)": "', words)}
    used = set()
    for file in source.glob("*.tsx"):
        text = file.read_text(encoding="utf-8")
        used |= {json.loads(f'"{x}"') for x in re.findall(r'\bt\("((?:[^"\\]|\\.)*)"', text)}
    assert len(used) > 150
    assert used - known == set()


def test_phone_has_drawers_and_no_sideways_scroll(server: Any, browser: Any) -> None:
    server.state.__init__()
    with watched(browser, **PHONE) as window:
        page = opened(window, server)
        wide: dict[str, int] = {}

        def see(name: str) -> None:
            over = page.evaluate("""Math.max(document.documentElement.scrollWidth - innerWidth,
                document.querySelector('.thread').scrollWidth - document.querySelector('.thread').clientWidth)""")
            if over > 0:
                wide[name] = over

        walk(page, server, see)
        assert wide == {}
        expect(page.locator("dialog.drawer")).to_have_count(0)
        page.get_by_role("button", name="Conversations").click()
        expect(page.locator("dialog.drawer.side")).to_be_visible()
        page.locator(".chat-open").first.click()
        expect(page.locator("dialog.drawer")).to_have_count(0)
        assert window.foreign == []


def test_everything_by_keys(server: Any, window: Any) -> None:
    page = opened(window, server)
    expect(page.locator("#composer")).to_be_focused()
    page.keyboard.type("say: one")
    page.keyboard.press("Shift+Enter")
    page.keyboard.type("two")
    page.keyboard.press("Enter")
    finished(page)
    assert server.state.asked[-1]["messages"][0]["content"] == "say: one\ntwo"
    page.keyboard.press("ArrowUp")
    expect(page.locator(".reword textarea")).to_be_focused()
    page.keyboard.press("Escape")
    expect(page.locator(".reword")).to_have_count(0)
    page.locator(".thread").focus()
    page.keyboard.press("r")
    finished(page)
    expect(page.locator("article.assistant .branches")).to_have_text("2/2")
    page.keyboard.press("n")
    expect(page.locator(".welcome")).to_be_visible()
    expect(page.locator("#composer")).to_be_focused()
    page.locator(".thread").focus()
    page.keyboard.press("j")
    expect(page.locator("article")).to_have_count(2)
    page.locator(".thread").focus()
    page.keyboard.press("p")
    expect(page.locator(".params")).to_be_visible()
    page.keyboard.press("p")
    expect(page.locator(".params")).to_have_count(0)
    page.keyboard.press("s")
    expect(page.locator(".side")).to_have_count(0)
    page.keyboard.press("t")
    window.until("document.documentElement.dataset.theme === 'dark'")
    page.keyboard.press("i")
    expect(page.locator("#composer")).to_be_focused()


def test_an_input_method_may_use_enter(server: Any, window: Any) -> None:
    page = opened(window, server)
    page.fill("#composer", "ni hao")
    page.evaluate("""document.getElementById('composer').dispatchEvent(
        new KeyboardEvent('keydown', {key: 'Enter', isComposing: true, bubbles: true, cancelable: true}))""")
    page.wait_for_timeout(100)
    assert server.state.asked == []
