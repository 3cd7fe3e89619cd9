"""The chat page in a real browser, over a server whose answers are known: talk, branches, errors, what is kept."""

from __future__ import annotations

import json
import re
import time
from pathlib import Path
from typing import Any

import pytest

pytest.importorskip("starlette", reason="starlette is absent: pip install '.[serve]'")
pytest.importorskip("uvicorn", reason="uvicorn is absent: pip install '.[serve]'")

ANSWERS = "article.assistant .prose"


def expect(of: Any) -> Any:
    from page_browser import expect as expecting

    return expecting(of)


def opened(window: Any, server: Any) -> Any:
    page = window.open(server.url, "#composer")
    expect(page.locator("select.model")).to_be_visible()
    return page


def ask(page: Any, text: str, *, wait: bool = True) -> None:
    """Send ``text``; with ``wait``, until nothing streams any more."""
    page.fill("#composer", text)
    page.keyboard.press("Enter")
    if wait:
        finished(page)


def finished(page: Any) -> None:
    expect(page.locator("article[aria-busy=true]")).to_have_count(0)
    expect(page.locator(".send.stop")).to_have_count(0)


def asked(server: Any) -> list[tuple[str, str]]:
    """The messages of the last request."""
    return [(m["role"], m["content"]) for m in server.state.asked[-1]["messages"]]


def test_a_question_is_answered_with_numbers(server: Any, window: Any) -> None:
    page = opened(window, server)
    ask(page, "say: one two three")
    expect(page.locator(ANSWERS)).to_have_text("one two three")
    assert asked(server) == [("user", "say: one two three")]
    figures = page.locator(".figures")
    for told in ("3 tokens", re.compile(r"prompt \d+ \(\d+ cached\)"), "tokens/s", "first after"):
        expect(figures).to_contain_text(told)
    ask(page, "say: more")
    assert asked(server) == [
        ("user", "say: one two three"),
        ("assistant", "one two three"),
        ("user", "say: more"),
    ]
    assert window.troubles == []
    assert window.foreign == []


def test_stop_aborts_the_request_and_continue_goes_on(server: Any, window: Any) -> None:
    page = opened(window, server)
    words = " ".join(f"word{i}" for i in range(3000))
    ask(page, f"slow: {words}", wait=False)
    expect(page.locator(ANSWERS)).to_contain_text("word3")
    page.keyboard.press("Escape")
    finished(page)
    expect(page.locator(".ended")).to_contain_text("Stopped.")
    window.true(lambda: server.state.stopped == 1, "the server did not see the client go")
    expect(page.locator(ANSWERS)).not_to_be_empty()
    kept = page.inner_text(ANSWERS)
    server.state.pause = 0.03
    page.get_by_role("button", name="Continue").click()
    window.true(lambda: len(server.state.asked) == 2, "the server was not asked again")
    expect(page.locator("article[aria-busy=true]")).to_have_count(1)
    page.click(".send.stop")
    finished(page)
    assert asked(server)[-1] == ("assistant", kept)
    assert server.state.asked[-1]["continue_final_message"] is True
    window.true(lambda: page.inner_text(ANSWERS).startswith(kept), "what was there is lost")


def test_an_answer_cut_by_its_length_can_be_continued(server: Any, window: Any) -> None:
    page = opened(window, server)
    ask(page, "long: all of it")
    expect(page.locator(".ended")).to_contain_text("longest length")
    page.get_by_role("button", name="Continue").click()
    expect(page.locator(".ended")).to_have_count(0)


def test_second_answer_and_edited_question_are_branches(server: Any, window: Any) -> None:
    page = opened(window, server)
    ask(page, "say: first")
    page.get_by_role("button", name="Answer again").click()
    finished(page)
    expect(page.locator("article.assistant .branches")).to_have_text("2/2")
    ask(page, "say: second")
    page.locator("article.user").first.hover()
    page.locator("article.user").first.get_by_role("button", name="Edit").click()
    page.fill(".reword textarea", "say: other")
    page.keyboard.press("Enter")
    finished(page)
    expect(page.locator("article.user")).to_have_count(1)
    expect(page.locator(ANSWERS)).to_have_text("other")
    assert asked(server) == [("user", "say: other")]
    page.locator("article.user").get_by_role("button", name="Earlier version").click()
    expect(page.locator("article.user")).to_have_count(2)
    expect(page.locator(ANSWERS).last).to_have_text("second")
    window.until("document.activeElement.closest('article.user')")  # the focus stays at the switch
    page.locator("article.assistant").first.get_by_role("button", name="Earlier version").click()
    expect(page.locator(ANSWERS)).to_have_count(1)
    page.reload()
    page.click(".chat-open")
    expect(page.locator(ANSWERS)).to_have_count(1)


def test_conversations_are_kept_renamed_deleted_and_found(server: Any, window: Any) -> None:
    page = opened(window, server)
    for name in ("apples", "pears", "plums", "figs", "dates"):
        ask(page, f"say: {name}")
        page.get_by_role("button", name=re.compile("New chat")).first.click()
    page.reload()
    expect(page.locator(".chat")).to_have_count(5)
    page.fill("#search", "plum")
    expect(page.locator(".chat")).to_have_count(1)
    page.click(".chat-open")
    expect(page.locator(ANSWERS)).to_have_text("plums")
    page.get_by_role("button", name="Rename").click()
    page.keyboard.press("Control+a")
    page.keyboard.type("Stone fruit")
    page.keyboard.press("Enter")
    page.fill("#search", "")
    expect(page.locator(".chat.on")).to_contain_text("Stone fruit")
    page.get_by_role("button", name="Delete Stone fruit").click()
    page.get_by_role("button", name="Keep it").click()
    expect(page.locator(".chat")).to_have_count(5)
    page.get_by_role("button", name="Delete Stone fruit").click()
    page.get_by_role("button", name="Delete", exact=True).click()
    expect(page.locator(".chat")).to_have_count(4)
    page.reload()
    expect(page.locator(".chat")).to_have_count(4)


def test_export_comes_back_by_import(server: Any, window: Any, browser: Any, tmp_path: Path) -> None:
    from page_browser import watched

    page = opened(window, server)
    ask(page, "say: carried over")
    with page.expect_download() as download:
        page.get_by_role("button", name="Export all").click()
    path = tmp_path / "chats.json"
    download.value.save_as(path)
    assert json.loads(path.read_text())["format"] == "deepseek-chat-1"
    bad = tmp_path / "bad.json"
    wrong = {"role": "assistant", "text": "kept", "parent": None, "numbers": "no", "trouble": {"kind": 1}}
    messages = {"a": wrong, "b": {"role": "system", "text": "dropped"}}
    hostile = {
        "id": "x",
        "order": ["a", "__proto__", "b"],
        "title": 7,
        "chosen": {"": 3},
        "messages": messages,
    }
    bad.write_text(
        json.dumps({"format": "deepseek-chat-1", "conversations": [hostile, None, 3, {"id": "../y"}]})
    )
    with watched(browser) as other:
        page = opened(other, server)
        field = page.locator("input[type=file]")
        field.set_input_files(path)
        expect(page.locator(".chat")).to_have_count(1)
        field.set_input_files(path)
        expect(page.locator(".chat")).to_have_count(2)
        field.set_input_files(Path(__file__))
        expect(page.locator(".side footer .note")).to_contain_text("is no export")
        field.set_input_files(bad)
        expect(page.locator(".chat")).to_have_count(3)
        page.locator(".chat-open", has_text="Untitled").click()
        expect(page.locator(ANSWERS)).to_have_text("kept")
        page.locator(".chat-open", has_text="carried").first.click()
        expect(page.locator(ANSWERS)).to_have_text("carried over")
        assert other.troubles == []


def test_system_prompt_and_parameters_are_sent(server: Any, window: Any) -> None:
    page = opened(window, server)
    page.click(".system summary")
    page.fill(".system textarea", "Be brief.")
    page.get_by_role("button", name="Parameters").click()
    page.fill("#dial-temperature", "0.3")
    page.fill("#dial-top_k", "40")
    page.fill("#dial-seed", "7")
    page.fill("#dial-max_tokens", "99")
    page.get_by_label("Stop texts").fill("END\n\\n\\n")
    page.fill("#dial-top_p", "3")
    expect(page.locator("#dial-top_p")).to_have_attribute("aria-invalid", "true")
    page.get_by_role("button", name="JSON schema").click()
    page.get_by_label("Schema", exact=True).fill('{"type": ')
    expect(page.get_by_text("No JSON schema:")).to_be_visible()
    page.get_by_label("Schema", exact=True).fill('{"type": "object"}')
    page.get_by_label("Probabilities").check()
    page.select_option("select.model", "moe-16x2-polite")
    ask(page, "say: ok")
    sent = dict(server.state.asked[-1])
    assert sent.pop("messages") == [
        {"role": "system", "content": "Be brief."},
        {"role": "user", "content": "say: ok"},
    ]
    assert sent.pop("response_format") == {
        "type": "json_schema",
        "json_schema": {"name": "answer", "schema": {"type": "object"}, "strict": True},
    }
    assert sent == {
        "model": "moe-16x2-polite", "stream": True, "stream_options": {"include_usage": True}, "temperature": 0.3,
        "top_k": 40, "seed": 7, "max_tokens": 99, "stop": ["END", "\n\n"], "logprobs": True, "top_logprobs": 5,
    }  # fmt: skip
    page.get_by_role("button", name="Reset to").click()
    expect(page.locator("#dial-temperature")).to_have_value("")
    ask(page, "say: ok")
    sent = server.state.asked[-1]
    assert {"temperature", "top_k", "seed", "stop", "response_format"} & set(sent) == set()
    assert sent["model"] == "moe-16x2-polite"


def test_presets_are_remembered(server: Any, window: Any) -> None:
    page = opened(window, server)
    page.keyboard.press("Escape")
    page.get_by_role("button", name="Parameters").click()
    page.get_by_label("Preset", exact=True).select_option("Creative")
    expect(page.locator("#dial-temperature")).to_have_value("1.1")
    page.fill("#dial-min_p", "0.2")
    expect(page.get_by_label("Preset", exact=True)).to_have_value("")
    page.get_by_role("button", name="Keep as a preset").click()
    page.keyboard.type("mine")
    page.keyboard.press("Enter")
    page.get_by_label("Preset", exact=True).select_option("Precise")
    expect(page.locator("#dial-min_p")).to_have_value("")
    page.reload()
    page.get_by_label("Preset", exact=True).select_option("mine")
    expect(page.locator("#dial-min_p")).to_have_value("0.2")
    page.get_by_role("button", name="Delete the preset").click()
    expect(page.get_by_label("Preset", exact=True)).to_have_value("")


def test_a_key_is_asked_for_and_forgotten_with_the_tab(server: Any, window: Any) -> None:
    server.state.key = "sk-right-key"
    page = window.open(server.url, "#composer")
    dialog = page.locator("dialog[open]")
    expect(dialog).to_contain_text("a key is needed")
    page.keyboard.type("sk-wrong")
    page.keyboard.press("Enter")
    expect(dialog).to_contain_text("a key is needed")
    page.get_by_role("textbox", name="API key").fill("sk-right-key")
    page.get_by_role("button", name="Use this key").click()
    expect(page.locator("select.model")).to_be_visible()
    ask(page, "say: let in")
    expect(page.locator(ANSWERS)).to_have_text("let in")
    kept = page.evaluate("[JSON.stringify(localStorage), JSON.stringify(sessionStorage)]")
    assert "sk-right-key" not in kept[0]
    assert "sk-right-key" in kept[1]
    server.state.key = "sk-changed-key"
    ask(page, "say: again", wait=False)
    page.get_by_role("textbox", name="API key").fill("sk-changed-key")
    page.keyboard.press("Enter")
    expect(page.locator(ANSWERS).last).to_have_text("again")
    expect(page.locator(".notice")).to_have_count(0)


def test_a_busy_server_counts_down(server: Any, window: Any) -> None:
    server.state.retry_after = 3600
    page = window.page
    page.clock.install()
    page = opened(window, server)
    ask(page, "busy")
    notice = page.locator(".notice.busy")
    expect(notice).to_contain_text("12 requests wait already")
    button = notice.get_by_role("button")
    expect(button).to_be_disabled()
    expect(button).to_have_text(re.compile(r"Try again in 3[56]\d\d s"))
    page.clock.fast_forward("59:30")
    expect(button).to_have_text(re.compile(r"Try again in [1-3]?\d s"))
    expect(button).to_be_disabled()
    page.clock.fast_forward(30_000)
    expect(button).to_be_enabled()
    button.click()
    expect(page.locator(ANSWERS)).to_have_text("Here I am again.")


def test_a_server_that_starts_is_waited_for(server: Any, window: Any) -> None:
    page = opened(window, server)
    server.state.ready = False
    ask(page, "say: at last")
    expect(page.locator(".notice.starting")).to_contain_text("the engine is loading its weights")
    server.state.ready = True
    expect(page.locator(ANSWERS)).to_have_text("at last")
    expect(page.locator(".notice")).to_have_count(0)


def test_the_page_itself_waits_for_the_server(server: Any, window: Any) -> None:
    server.state.ready = False
    page = window.page
    page.goto(server.url)
    expect(page.locator(".welcome")).to_contain_text("not ready")
    server.state.ready = True
    expect(page.locator("select.model")).to_be_visible()


def test_a_server_that_answers_before_the_page_is_painted_is_heard(server: Any, window: Any) -> None:
    listed = {"object": "list", "data": [{"id": "at-once", "parent": None, "object": "model", "created": 1}]}
    window.page.add_init_script(f"""
        const ask = window.fetch;
        const answer = () => Promise.resolve(new Response({json.dumps(json.dumps(listed))}, {{status: 200}}));
        window.fetch = (url, options) => String(url).includes('v1/models') ? answer() : ask(url, options);
    """)
    page = opened(window, server)
    expect(page.locator("select.model")).to_have_value("at-once")


@pytest.mark.parametrize(
    ("how", "why"), [("drop", "The connection ended"), ("broken", "the engine died")], ids=["drop", "broken"]
)
def test_a_lost_answer_keeps_what_came(server: Any, window: Any, how: str, why: str) -> None:
    page = opened(window, server)
    text = " ".join(f"word{i}" for i in range(20))
    ask(page, f"{how}: {text}")
    expect(page.locator(".notice.lost")).to_contain_text(why)
    kept = page.inner_text(ANSWERS)
    assert kept.startswith("word0")
    assert "word19" not in kept
    page.reload()
    page.click(".chat-open")
    expect(page.locator(ANSWERS)).to_have_text(kept)
    page.locator(".notice").get_by_role("button", name="Continue").click()
    expect(page.locator(ANSWERS)).to_have_text(text)
    expect(page.locator(".notice")).to_have_count(0)


def test_errors_are_told_and_can_be_tried_again(server: Any, window: Any) -> None:
    page = opened(window, server)
    ask(page, "fail")
    expect(page.locator(".notice.server")).to_contain_text("asked to fail: <b>no markup</b>")
    ask(page, "bad")
    expect(page.locator(".notice.refused")).to_contain_text("asked to bad")
    page.locator(".notice.refused").get_by_role("button", name="Try again").click()
    finished(page)
    expect(page.locator(".notice.refused")).to_have_count(1)


def test_a_model_without_template_continues_texts(server: Any, window: Any) -> None:
    server.state.template = server.state.tells = False
    page = opened(window, server)
    ask(page, "Once upon a time")
    page.get_by_role("button", name="Continue the text").click()
    expect(page.locator(ANSWERS)).to_have_text("and so on.")
    assert server.state.asked[-1]["prompt"] == "Once upon a time"
    ask(page, ", they")
    assert server.state.asked[-1]["prompt"] == "Once upon a time and so on., they"


def test_scrolling_up_is_respected(server: Any, window: Any) -> None:
    page = opened(window, server)
    lines = "\n\n".join(f"line {i}" for i in range(400))
    ask(page, f"slow: {lines}", wait=False)
    page.wait_for_function("document.querySelector('.thread').scrollTop > 200")
    thread = page.locator(".thread")
    thread.hover()
    page.mouse.wheel(0, -150)
    expect(page.locator(".to-end")).to_be_visible()

    def stays() -> bool:
        top = window.still("document.querySelector('.thread').scrollTop")  # the wheel's motion is over
        lines_then = page.locator(f"{ANSWERS} p").count()
        window.true(lambda: page.locator(f"{ANSWERS} p").count() > lines_then + 5, "no more lines came")
        return bool(thread.evaluate("e => e.scrollTop") == top)

    assert stays() or stays(), "the page moves while it is read"  # or the wheel's motion had not begun
    page.click(".to-end")
    expect(page.locator(".to-end")).to_have_count(0)
    page.wait_for_timeout(500)
    window.true(lambda: thread.evaluate("e => e.scrollHeight - e.clientHeight - e.scrollTop") < 5)
    page.keyboard.press("Escape")


def test_two_conversations_stream_at_once(server: Any, window: Any) -> None:
    page = opened(window, server)
    ask(page, "slow: " + " ".join(f"w{i}" for i in range(60)), wait=False)
    expect(page.locator(ANSWERS)).to_contain_text("w3")
    page.get_by_role("button", name=re.compile("New chat")).first.click()
    ask(page, "say: beside")
    expect(page.locator(ANSWERS)).to_have_text("beside")
    page.locator(".chat-open", has_text="slow").click()
    expect(page.locator(ANSWERS)).to_contain_text("w59")


def test_a_long_conversation_stays_fast(server: Any, window: Any) -> None:
    """600 messages: only the last ones are drawn, and a new answer draws no other message again."""
    messages, order = {}, [f"old{i}" for i in range(600)]
    for i, name in enumerate(order):
        text = f"message {i}\n\n```python\nx = {i}\n```"
        role, parent = ("user", "assistant")[i % 2], order[i - 1] if i else None
        messages[name] = {"role": role, "parent": parent, "text": text}
    kept = {"id": "c1", "title": "long", "updated": 1, "messages": messages, "order": order, "chosen": {}}
    page = opened(window, server)
    page.evaluate("c => localStorage.setItem('deepseek.chat.c.c1', c)", json.dumps(kept))
    page.reload()
    page.click(".chat-open")
    expect(page.locator("article")).to_have_count(60)
    page.evaluate("""() => {
        window.changed = 0;
        const old = m => m.target.parentElement?.closest('[data-id^=old]');
        new MutationObserver(list => { window.changed += list.filter(old).length }).observe(
            document.querySelector('.thread'), {subtree: true, childList: true, characterData: true, attributes: true});
    }""")
    ask(page, "say: " + "many words " * 50)
    assert page.evaluate("window.changed") == 0
    page.click(".earlier")
    expect(page.locator("article")).to_have_count(120)


def test_code_is_copied_and_announced(server: Any, window: Any) -> None:
    window.context.grant_permissions(["clipboard-read", "clipboard-write"])
    page = opened(window, server)
    ask(page, "How does a router choose?")
    expect(page.locator("figure.code figcaption")).to_contain_text("python")
    page.get_by_role("button", name="Copy code").click()
    expect(page.locator("[role=status][aria-live=polite]").last).to_contain_text("Copied")
    assert page.evaluate("navigator.clipboard.readText()").startswith("def route(x_TD")


def test_the_reader_is_told_in_sentences_not_in_words(server: Any, window: Any) -> None:
    page = opened(window, server)
    page.evaluate("""() => {
        window.told = [];
        const live = document.querySelector('.app > [aria-live=polite]');
        new MutationObserver(() => window.told.push(live.textContent)).observe(
            live, {childList: true, characterData: true, subtree: true});
    }""")
    began = time.monotonic()
    ask(page, "slow: " + " ".join(f"This is sentence {i}." for i in range(30)))
    window.until("window.told.some(x => x.trim().endsWith('End of the answer.'))")
    told = [x for x in page.evaluate("window.told") if x.strip()]
    assert 1 <= len(told) <= 2 + (time.monotonic() - began) / 4, told  # of 150 tokens
    assert told[-1].rstrip().endswith("End of the answer.")


def test_a_server_that_tells_of_no_template_is_given_texts_at_once(server: Any, window: Any) -> None:
    server.state.template = False
    page = opened(window, server)
    expect(page.locator("#composer")).to_have_attribute("placeholder", re.compile("beginning of a text"))
    ask(page, "Once upon a time")
    expect(page.locator(ANSWERS)).to_have_text("and so on.")
    assert "prompt" in server.state.asked[-1]


def test_thoughts_are_folded_and_not_sent_back(server: Any, window: Any) -> None:
    page = opened(window, server)
    ask(page, "say: <think>Let me see.</think>It is four.")
    expect(page.locator("article.assistant > .prose")).to_have_text("It is four.")
    expect(page.locator(".thought")).not_to_have_attribute("open", re.compile(".*"))
    ask(page, "say: yes")
    assert asked(server)[1] == ("assistant", "It is four.")


def test_a_full_browser_says_so(server: Any, window: Any) -> None:
    page = opened(window, server)
    page.evaluate(
        "() => { Storage.prototype.setItem = () => { throw new DOMException('full', 'QuotaExceededError') } }"
    )
    ask(page, "say: still here")
    expect(page.locator(ANSWERS)).to_have_text("still here")
    expect(page.locator(".side [role=alert]")).to_contain_text("The browser keeps no more")


def test_two_tabs_see_each_other(server: Any, window: Any) -> None:
    page = opened(window, server)
    other = window.context.new_page()
    other.goto(server.url)
    expect(other.locator("select.model")).to_be_visible()
    ask(page, "say: from the first")
    other.locator(".chat-open", has_text="from the first").click()
    expect(other.locator(ANSWERS)).to_have_text("from the first")
    ask(other, "say: from the second")
    expect(page.locator(ANSWERS)).to_have_count(2)
    expect(page.locator(ANSWERS).last).to_have_text("from the second")
