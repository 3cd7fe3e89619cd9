"""The page on the project's own server, its policy, keys and errors; only the engine behind it pretends."""

from __future__ import annotations

import re
import sys
from pathlib import Path
from typing import Any

import pytest

pytest.importorskip("starlette", reason="starlette is absent: pip install '.[serve]'")
pytest.importorskip("uvicorn", reason="uvicorn is absent: pip install '.[serve]'")
sys.path.append(str(Path(__file__).parents[1]))
from fake_client import KEY, TEXT, FakeClient, keyring, serving
from page_browser import watched
from test_chat_page import ANSWERS, ask, expect, finished


def test_a_conversation_with_all_details(browser: Any) -> None:
    client = FakeClient()
    with serving(client) as served, watched(browser) as window:
        page = window.open(f"{served.url}/", "select.model")
        expect(page.locator("select.model option")).to_have_text(["fake", "polite"])
        page.get_by_role("button", name="Parameters").click()
        page.get_by_label("Experts and branches").check()
        page.get_by_label("Probabilities").check()
        page.get_by_role("spinbutton", name="Alternatives").fill(
            "0"
        )  # the pretended ones lie outside the vocabulary
        page.fill("#dial-temperature", "0.5")
        page.fill("#dial-min_p", "0.1")
        page.fill("#dial-max_tokens", "500")
        page.get_by_role("button", name="JSON", exact=True).click()
        ask(page, "Hello?")
        expect(page.locator(ANSWERS)).to_have_text(TEXT.strip())
        [seen] = client.seen
        assert (seen.sampling.temperature, seen.sampling.min_p, seen.sampling.max_tokens) == (0.5, 0.1, 500)
        assert seen.sampling.grammar.kind == "json"
        assert seen.trace is True
        count = len(client.tokenizer.encode(TEXT)) + 1  # the end token is told too
        expect(page.locator(".figures")).to_contain_text(f"{count} tokens")
        expect(page.locator(".figures")).to_contain_text(f"({len(seen.prompt) // 2} cached)")
        page.get_by_role("button", name="Tokens").click()
        expect(page.locator(".chips .chip")).to_have_count(count)
        assert set(page.locator(".chips .chip").evaluate_all("a => a.map(e => e.dataset.mark)")) == {"3"}
        page.locator(".chips .chip").first.focus()
        expect(page.locator(".about")).to_contain_text("0.75")
        page.get_by_role("button", name="Global branch").click()
        assert set(page.locator(".chips .chip").evaluate_all("a => a.map(e => e.dataset.mark)")) == {"50"}
        page.select_option("select.model", "polite")
        ask(page, "Please?")
        assert client.seen[-1].adapter == "polite"
        assert window.troubles == []
        assert window.foreign == []


def test_stop_ends_the_request_in_the_engine_and_continue_goes_on(browser: Any) -> None:
    client = FakeClient(delay=0.05, text=TEXT * 20)
    with serving(client) as served, watched(browser) as window:
        page = window.open(f"{served.url}/", "select.model")
        ask(page, "Hello?", wait=False)
        expect(page.locator(ANSWERS)).to_contain_text("Hello")
        page.keyboard.press("Escape")
        finished(page)
        expect(page.locator(".ended")).to_contain_text("Stopped.")
        expect(page.locator(ANSWERS)).not_to_be_empty()
        kept = page.inner_text(ANSWERS)
        client.delay, client.text = 0.0, " and so on."
        page.get_by_role("button", name="Continue").click()
        expect(page.locator(ANSWERS)).to_contain_text("and so on.")
        # The last rendering may come after the text is there: what was kept is waited for like the rest.
        expect(page.locator(ANSWERS)).to_contain_text(re.compile(rf"^\s*{re.escape(kept.strip())}"))
        window.true(lambda: client.running == set())
        assert len(client.aborted) == 1


def test_keys_a_dead_engine_and_one_that_starts(browser: Any) -> None:
    client = FakeClient(ready=(False, "loading the weights"))
    with serving(client, keys=keyring()) as served, watched(browser) as window:
        page = window.open(f"{served.url}/", "dialog[open]")
        page.get_by_role("textbox", name="API key").fill(KEY)
        page.keyboard.press("Enter")
        client.ready = (True, "ready")
        expect(page.locator("select.model")).to_be_visible()
        client.fail_after = 6
        ask(page, "Hello?")
        expect(page.locator(".notice.lost")).to_contain_text("the step process died")
        expect(page.locator(ANSWERS)).to_contain_text("Hel")
        client.fail_after = None
        page.locator(".notice").get_by_role("button", name="Answer again").click()
        expect(page.locator(ANSWERS)).to_have_text(TEXT.strip())
        expect(page.locator(".branches")).to_have_text("2/2")
