"""Every page of the dashboard in a real browser, over invented answers: drawn, accessible, translated, by keys."""

from __future__ import annotations

import json
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from fake_series import SPIKE, STEPS
from fake_server import FakeServer, fake_server
from page_browser import Watched, chromium, expect, watched

AXE = Path(__file__).parents[3] / "web" / "node_modules" / "axe-core" / "axe.min.js"
RUN = "moe-3b-hybrid"
PAGES = {
    "runs": "",
    "overview": f"run/{RUN}",
    "incidents": f"run/{RUN}/incidents",
    "incident": f"run/{RUN}/incidents/3",
    "experts": f"run/{RUN}/experts",
    "data": f"run/{RUN}/data",
    "precision": f"run/{RUN}/precision",
    "lineage": f"run/{RUN}/lineage",
    "inspector": f"run/{RUN}/inspect?head=6.3",
    "compare": f"compare?run={RUN}&run=sweep~lr-2e-4",
}
PHONE = {"viewport": {"width": 390, "height": 844}, "is_mobile": True, "has_touch": True}


@pytest.fixture(scope="module")
def server() -> Iterator[FakeServer]:
    with fake_server() as running:
        yield running


@pytest.fixture(scope="module")
def browser() -> Iterator[Any]:
    with chromium() as running:
        yield running


@pytest.fixture
def window(browser: Any) -> Iterator[Watched]:
    with watched(browser) as opened:
        yield opened


@pytest.mark.slow
@pytest.mark.parametrize("theme", ["dark", "light"])
def test_pages_are_whole_and_accessible(server: FakeServer, browser: Any, theme: str) -> None:
    """No error, no refused resource, no request to another machine; axe finds nothing serious on any page."""
    if not AXE.exists():
        pytest.skip("axe-core is absent: run `npm ci` in web/")
    faults: dict[str, Any] = {}
    with watched(
        browser, color_scheme=theme, bypass_csp=True, viewport={"width": 1280, "height": 3200}
    ) as window:
        for name, path in PAGES.items():
            page = window.open(f"{server.url}#/{path}")
            page.evaluate(AXE.read_text(encoding="utf-8") + ";undefined")
            found = page.evaluate(
                "axe.run(document, {resultTypes: ['violations']}).then((r) => r.violations)"
            )
            for x in found:
                if x["impact"] in ("serious", "critical"):
                    faults[f"{name}: {x['id']}"] = [n["html"][:160] for n in x["nodes"]][:3]
        assert window.foreign == []
    assert faults == {}, json.dumps(faults, indent=1)


def test_policy_is_kept_and_nothing_fails(server: FakeServer, window: Watched) -> None:
    """Under the strict policy of the server: a refused style or script would be an error on the console."""
    for path in PAGES.values():
        window.open(f"{server.url}#/{path}")
    assert window.troubles == []
    assert window.foreign == []


def test_chinese_is_complete(server: FakeServer, browser: Any) -> None:
    with watched(browser, locale="zh-CN") as window:
        missing: set[str] = set()
        for path in PAGES.values():
            page = window.open(f"{server.url}#/{path}")
            page.keyboard.press("?")
            expect(page.locator("dialog[open]")).to_have_count(1)
            missing |= set(page.evaluate("[...deepseekUntranslated]"))
            assert page.evaluate("document.documentElement.lang") == "zh-CN"
        assert missing == set()


def test_phone_has_no_sideways_scroll(server: FakeServer, browser: Any) -> None:
    with watched(browser, **PHONE) as window:
        wide = {}
        for name, path in PAGES.items():
            page = window.open(f"{server.url}#/{path}")
            over = page.evaluate("document.documentElement.scrollWidth - innerWidth")
            if over > 0:
                wide[name] = over
        assert wide == {}


def test_red_pin_leads_to_cause_and_rollback(server: FakeServer, window: Watched) -> None:
    server.state.posted.clear()
    page = window.open(f"{server.url}#/run/{RUN}")
    page.click(".pin.critical")
    page.wait_for_selector(".incident")
    expect(page.locator(".verdict.large b")).to_have_text("DATA", use_inner_text=True)
    page.click("[data-action=rollback_skip]")
    expect(page.locator("dialog")).to_contain_text("last checkpoint before the incident", use_inner_text=True)
    expect(page.get_by_label("First step left out")).to_have_value(str(SPIKE - 3))
    assert server.state.posted == [], "nothing is sent before it is confirmed"
    page.click("[data-confirm]")
    page.wait_for_selector(".command.done")
    expect(page.locator(".incident .commands")).to_contain_text("went back", use_inner_text=True)
    assert server.state.posted == [
        {"action": "rollback_skip", "incident": "3", "arguments": {"skip": [SPIKE - 3, SPIKE]}}
    ]


def test_quarantine_sends_the_chosen_documents(server: FakeServer, window: Watched) -> None:
    server.state.posted.clear()
    page = window.open(f"{server.url}#/run/{RUN}/incidents/3")
    boxes = page.locator(".samples input[type=checkbox]")
    expect(boxes.nth(0)).to_be_checked()
    expect(boxes.nth(1)).not_to_be_checked()
    boxes.nth(1).check()
    page.click("[data-action=quarantine]")
    page.click("[data-confirm]")
    page.wait_for_selector("dialog", state="detached")
    window.true(lambda: server.state.posted)
    [sent] = server.state.posted
    assert [(d["path"], d["offset"]) for d in sent["arguments"]["documents"]] == [
        ("corpus/web/shard-00417.jsonl", 88_231_004),
        ("corpus/code/shard-00031.jsonl", 1_204_551),
    ]


def test_drag_reads_full_resolution_and_double_click_resets(server: FakeServer, window: Watched) -> None:
    page = window.open(f"{server.url}#/run/{RUN}")
    page.wait_for_selector(".run-actions")  # the head above the charts is whole
    window.still("JSON.stringify(document.querySelector('.u-over').getBoundingClientRect())")
    box = page.locator(".u-over").first.bounding_box()
    y = box["y"] + box["height"] / 2
    page.mouse.move(box["x"] + 0.60 * box["width"], y)
    page.mouse.down()
    page.mouse.move(box["x"] + 0.64 * box["width"], y, steps=4)
    with page.expect_request(lambda r: "/data?" in r.url and "start=" in r.url):
        page.mouse.up()
    window.until("location.hash.includes('from=')")
    start, stop = (
        int(page.evaluate(f"new URLSearchParams(location.hash.split('?')[1]).get('{k}')"))
        for k in ("from", "to")
    )
    assert start == pytest.approx(0.60 * STEPS, abs=0.01 * STEPS)
    assert stop == pytest.approx(0.64 * STEPS, abs=0.01 * STEPS)
    page.mouse.dblclick(box["x"] + 0.5 * box["width"], y)
    window.until("!location.hash.includes('from=')")


def test_robust_scale_says_what_it_hides(server: FakeServer, window: Watched) -> None:
    page = window.open(f"{server.url}#/run/{RUN}?from=20000&to=40000")
    panel = page.locator(".panel").first
    expect(panel.locator("canvas").first).to_be_visible()
    expect(panel.locator(".note")).to_have_count(0)  # nothing is hidden by default
    panel.get_by_role("button", name="Robust scale").click()
    expect(panel.locator(".note")).to_have_text(re.compile("^1 points lie outside"), use_inner_text=True)


def test_any_series_by_search_in_the_address_and_after_reload(server: FakeServer, window: Watched) -> None:
    page = window.open(f"{server.url}#/run/{RUN}")
    page.keyboard.press("/")
    expect(page.get_by_label("Search series")).to_be_focused()
    page.keyboard.type("layer/*/grad_norm")
    rows = page.locator(".pick")
    expect(rows).to_have_count(12)
    assert [r.split("\n")[0] for r in rows.all_inner_texts()][2:11:8] == [
        "layer/2/grad_norm",
        "layer/10/grad_norm",
    ]
    rows.nth(7).click()
    page.get_by_role("button", name="Show", exact=True).click()
    page.wait_for_selector("section[aria-label='layer/7/grad_norm'] canvas")
    window.until("location.hash.includes('panels=layer%2F7%2Fgrad_norm')")
    page.reload()
    page.wait_for_selector("section[aria-label='layer/7/grad_norm'] canvas")


def test_keys_walk_open_and_help(server: FakeServer, window: Watched) -> None:
    page = window.open(server.url)
    links, chosen, dialogs = (page.locator(x) for x in ("a.run-link", ".run-card.chosen", "dialog[open]"))
    for i in range(2):
        page.keyboard.press("j")
        expect(links.nth(i)).to_be_focused()
        page.keyboard.press("x")
        expect(chosen).to_have_count(i + 1)
    page.keyboard.press("c")
    page.wait_for_selector(".compare canvas")
    page.keyboard.press("Escape")
    page.wait_for_selector(".run-card .status")
    window.settle()
    page.keyboard.press("j")
    expect(links.nth(0)).to_be_focused()
    page.keyboard.press("Enter")
    page.wait_for_selector(".health")
    page.keyboard.press("?")
    expect(dialogs).to_have_count(1)
    page.keyboard.press("Escape")
    expect(dialogs).to_have_count(0)
    page.keyboard.press("i")
    page.wait_for_selector(".incident-list")


def test_a_chart_can_be_read_without_a_mouse(server: FakeServer, window: Watched) -> None:
    page = window.open(f"{server.url}#/run/{RUN}?from={SPIKE - 50}&to={SPIKE + 50}")
    chart = page.locator("figure.chart").first
    chart.focus()
    page.keyboard.press("Home")
    for _ in range(50):
        page.keyboard.press("ArrowRight")
    legend = chart.locator(".legend")
    expect(legend).to_contain_text(f"{SPIKE:,}".replace(",", "\u202f"), use_inner_text=True)
    expect(legend).to_contain_text("7.95", use_inner_text=True)  # 2 and the spike of 6
    expect(chart).to_have_attribute("aria-label", re.compile("last"))


def test_fifty_runs_do_not_slow_the_list(server: FakeServer, window: Watched) -> None:
    before, server.runs = server.runs, [f"sweep~{i}" for i in range(50)]
    try:
        page = window.open(server.url, ".run-card .status")
        cards = page.locator(".run-card")
        expect(cards).to_have_count(50)
        page.fill("#search", "sweep/4")
        expect(cards).to_have_count(11)
    finally:
        server.runs = before


def test_text_of_a_run_cannot_become_code(
    server: FakeServer, window: Watched, monkeypatch: pytest.MonkeyPatch
) -> None:
    import fake_run as fake

    evil = "<img src=x onerror=\"document.title='owned'\">"
    cards = fake.card
    monkeypatch.setattr(
        fake, "card", lambda run, index=0: {**cards(run, index), "name": evil, "device": evil}
    )
    page = window.open(server.url, ".run-card .status")
    expect(page.locator(".run-card h2").first).to_have_text(evil, use_inner_text=True)
    assert page.title() != "owned"
    assert page.locator(".run-card img").count() == 0


def test_speedscope_opens_a_trace_of_this_server(server: FakeServer, window: Watched) -> None:
    page = window.open(f"{server.url}#/run/{RUN}/inspect", ".trace-list a")
    with window.context.expect_page() as opened:
        page.click(".trace-list a")
    viewer = opened.value
    viewer.wait_for_selector("canvas")
    window.true(
        lambda: f"/api/runs/{RUN}/traces/step-049210" in server.state.asked, "the trace is not fetched"
    )
    assert window.foreign == []


def test_a_note_is_kept_beside_its_step(server: FakeServer, window: Watched) -> None:
    page = window.open(f"{server.url}#/run/{RUN}/incidents/3")
    page.get_by_label("New note").fill("shard 417 is base64: told the data team")
    page.keyboard.press("Enter")
    page.wait_for_selector(".notes li")
    assert server.state.notes[0]["step"] == SPIKE
    expect(page.locator(".notes li").first).to_contain_text("told the data team", use_inner_text=True)


def test_a_paused_run_offers_to_go_on(server: FakeServer, window: Watched) -> None:
    page = window.open(f"{server.url}#/run/{RUN}")
    page.click(".run-head [data-action=pause]")
    page.click("[data-confirm]")
    page.wait_for_selector(".run-head .status.paused")
    page.click(".run-head [data-action=continue]")
    page.click("[data-confirm]")
    page.wait_for_selector(".run-head .status.running")
    assert [c["action"] for c in server.state.commands][-2:] == ["pause", "continue"]
