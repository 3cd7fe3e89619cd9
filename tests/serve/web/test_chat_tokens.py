"""The router's view of an answer: the chips, bars and maps say what the server's trace said."""

from __future__ import annotations

import math
import re
from collections import Counter
from collections.abc import Iterator
from typing import Any

import pytest

pytest.importorskip("starlette", reason="starlette is absent: pip install '.[serve]'")
pytest.importorskip("uvicorn", reason="uvicorn is absent: pip install '.[serve]'")
from fake_chat_server import EXPERT_LAYERS, EXPERTS, HYBRID_LAYERS, pieces, traced, weighed
from page_browser import watched
from test_chat_page import ask, expect, finished, opened

TEXT = (
    "The router sends each token to two experts, and their gates weigh what comes back.\nThen the next layer."
)
TOKENS = pieces(TEXT)


def shown(text: str) -> str:
    return text.replace("\n", "⏎").replace(" ", "·")


@pytest.fixture(scope="module")
def told(server: Any, browser: Any) -> Iterator[Any]:
    """An answer with all details, shown as tokens."""
    with watched(browser) as window:
        yield asked_again(server, window)
        assert window.troubles == []


@pytest.fixture
def page(told: Any) -> Any:
    """The same, as it is when it is opened."""
    told.get_by_role("button", name="Experts", exact=True).click()
    told.get_by_label("Layer", exact=True).select_option(str(EXPERT_LAYERS[0]))
    told.get_by_label("Layer", exact=True).select_option(str(EXPERT_LAYERS[3]))
    return told


def asked_again(server: Any, window: Any) -> Any:
    server.state.__init__()
    page = opened(window, server)
    ask(page, f"say: {TEXT}")
    page.get_by_role("button", name="Tokens").click()
    expect(page.locator(".no-tokens")).to_contain_text("not asked for")
    assert "trace" not in server.state.asked[-1]
    page.get_by_role("button", name="Answer again with token details").click()
    finished(page)
    assert server.state.asked[-1]["trace"] is True
    assert server.state.asked[-1]["top_logprobs"] == 5
    expect(page.locator(".chip")).to_have_count(len(TOKENS))
    return page


def test_chips_carry_the_top_expert_of_the_chosen_layer(page: Any) -> None:
    layer = EXPERT_LAYERS[2]
    page.get_by_label("Layer", exact=True).select_option(str(layer))
    chips = page.locator(".chips .chip").evaluate_all("all => all.map(e => [e.textContent, e.dataset.mark])")
    expected = [[shown(t), str(dict(traced(t, i)["experts"])[layer][0][0])] for i, t in enumerate(TOKENS)]
    assert chips == expected
    page.locator(".chip").first.focus()
    page.keyboard.press("]")
    expect(page.get_by_label("Layer", exact=True)).to_have_value(str(layer + 1))


def test_equal_experts_look_equal_and_numbers_and_patterns_tell_them_apart(page: Any) -> None:
    looks = page.locator(".load-bar").evaluate_all(
        "all => all.map(e => [e.style.getPropertyValue('--c'), e.className])"
    )
    assert len(looks) == EXPERTS
    assert len({tuple(x) for x in looks}) == EXPERTS, "colour with pattern is unique for 32 experts"
    chips = page.locator(".chips .chip").evaluate_all(
        "all => all.map(e => [e.dataset.mark, e.style.getPropertyValue('--c')])"
    )
    assert len(set(map(tuple, chips))) == len({expert for expert, _ in chips})
    assert all(
        re.search(r", expert \d+$", x)
        for x in page.locator(".chip").evaluate_all("a => a.map(e => e.ariaLabel)")
    )


def test_a_token_tells_gates_layers_and_alternatives(page: Any) -> None:
    layer = int(page.get_by_label("Layer", exact=True).input_value())
    page.locator(".chip").nth(4).focus()
    about = page.locator(".about")
    trace = traced(TOKENS[4], 4)
    expect(about).to_contain_text(f"token 5 of {len(TOKENS)}")
    expect(about).to_contain_text(f"id {trace['id']}")
    (first, gate), (second, _) = dict(trace["experts"])[layer]
    rows = about.locator(".gate-bars").first.locator("li")
    expect(rows).to_have_count(2)
    assert rows.nth(0).inner_text().split() == [str(first), str(float(f"{gate:.2g}"))]
    assert rows.nth(1).inner_text().split()[0] == str(second)
    expect(about.locator(".about-layers li")).to_have_count(len(EXPERT_LAYERS))
    best = weighed(TOKENS[4], 4, 5)["top_logprobs"]
    said = about.locator(".gate-bars").last.locator("li").all_inner_texts()
    assert [x.split()[0] for x in said] == [shown(x["token"]) for x in best]
    page.keyboard.press("ArrowRight")
    expect(about).to_contain_text(f"token 6 of {len(TOKENS)}")
    page.keyboard.press("End")
    expect(about).to_contain_text(f"token {len(TOKENS)} of {len(TOKENS)}")


def test_the_histogram_counts_the_answer(page: Any) -> None:
    layer = EXPERT_LAYERS[0]
    page.get_by_label("Layer", exact=True).select_option(str(layer))
    uses = Counter(e for i, t in enumerate(TOKENS) for e, _ in dict(traced(t, i)["experts"])[layer])
    labels = page.locator(".load-bar").evaluate_all("all => all.map(e => e.ariaLabel)")
    for expert, label in enumerate(labels):
        share = float(re.search(r": ([\d.]+)", label)[1])
        assert share == pytest.approx(100 * uses[expert] / len(TOKENS), rel=0.06), label
    heights = page.locator(".load-bar i").evaluate_all("all => all.map(e => parseFloat(e.style.height))")
    assert heights == pytest.approx([100 * uses[e] / max(uses.values()) for e in range(EXPERTS)], abs=0.1)
    most = uses.most_common(1)[0][0]
    page.locator(".load-bar").nth(most).click()
    expect(page.locator(".chip.has")).to_have_count(uses[most])
    expect(page.locator(".chip.hasnt")).to_have_count(len(TOKENS) - uses[most])


def test_hybrid_layers_show_the_share_of_the_global_branch(page: Any) -> None:
    page.get_by_role("button", name="Global branch").click()
    layer = HYBRID_LAYERS[1]
    page.get_by_label("Layer", exact=True).select_option(str(layer))
    shares = [dict(traced(t, i)["gates"])[layer] for i, t in enumerate(TOKENS)]
    marks = [int(x) for x in page.locator(".chips .chip").evaluate_all("all => all.map(e => e.dataset.mark)")]
    assert marks == pytest.approx([100 * s for s in shares], abs=0.51)
    row = HYBRID_LAYERS.index(layer)
    figure = page.locator(".shares figure.heat")
    figure.focus()
    for key in ["ArrowDown"] * row:
        page.keyboard.press(key)
    said = page.inner_text(".shares .heat-words")
    assert f"layer {layer}" in said
    assert float(re.search(r": ([\d.]+)", said)[1]) == pytest.approx(100 * shares[0], rel=0.06)


def test_probabilities_have_classes_that_need_no_colour(page: Any) -> None:
    page.get_by_role("button", name="Probability").click()
    edges = (0.05, 0.2, 0.5, 0.9)
    probabilities = [math.exp(weighed(t, i, 5)["logprob"]) for i, t in enumerate(TOKENS)]
    expected = [f"chip sure-{sum(p >= e for e in edges)}" for p in probabilities]
    assert page.locator(".chips .chip").evaluate_all("all => all.map(e => e.className)") == expected


def test_a_text_model_gives_details_too(server: Any, window: Any) -> None:
    page = opened(window, server)
    page.get_by_role("button", name="Parameters").click()
    page.get_by_role("button", name="Continue a text").click()
    page.get_by_label("Probabilities").check()
    page.get_by_label("Experts and branches").check()
    ask(page, "Once")
    assert server.state.asked[-1]["logprobs"] == 5
    page.get_by_role("button", name="Tokens").click()
    expect(page.locator(".chip")).to_have_count(len(pieces(" and so on.")))
    page.get_by_role("button", name="Probability").click()
    page.locator(".chip").first.focus()
    expect(page.locator(".about .gate-bars li")).to_have_count(5)


def test_thousands_of_tokens_can_be_walked(server: Any, window: Any) -> None:
    server.state.pause = 0
    page = opened(window, server)
    page.get_by_role("button", name="Parameters").click()
    page.get_by_label("Experts and branches").check()
    ask(page, "say: " + "w " * 2300)
    page.get_by_role("button", name="Tokens").click()
    expect(page.locator(".chip")).to_have_count(2000)
    page.get_by_role("button", name=re.compile("Show all")).click()
    expect(page.locator(".chip")).to_have_count(2300)
    page.locator(".chip").first.focus()
    page.keyboard.press("End")
    page.keyboard.press("[")
    expect(page.locator(".about")).to_contain_text("token 2300 of")
