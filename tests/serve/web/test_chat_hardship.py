"""The chat page when things go wrong around it: reloads, tabs, dead servers, hostile and huge answers."""

from __future__ import annotations

import json
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import pytest

pytest.importorskip("starlette", reason="starlette is absent: pip install '.[serve]'")
pytest.importorskip("uvicorn", reason="uvicorn is absent: pip install '.[serve]'")

ANSWERS = "article.assistant .prose"
WORDS = " ".join(f"word{i}" for i in range(400))


def expect(of: Any) -> Any:
    from page_browser import expect as expecting

    return expecting(of)


def opened(window: Any, address: str) -> Any:
    page = window.open(address, "#composer")
    expect(page.locator("select.model")).to_be_visible()
    return page


def ask(page: Any, text: str) -> None:
    page.fill("#composer", text)
    page.keyboard.press("Enter")


def finished(page: Any) -> None:
    expect(page.locator("article[aria-busy=true]")).to_have_count(0)


def kept(page: Any) -> list[dict[str, Any]]:
    """The conversations in the browser's storage."""
    return page.evaluate(
        "Object.keys(localStorage).filter(k => k.startsWith('deepseek.chat.c.')).map(k => JSON.parse(localStorage[k]))"
    )


def keep(page: Any, conversation: dict[str, Any]) -> None:
    page.evaluate(
        "c => localStorage.setItem('deepseek.chat.c.' + JSON.parse(c).id, c)", json.dumps(conversation)
    )


def texts(page: Any) -> set[str]:
    """What is said in the first of them."""
    return {message["text"] for message in kept(page)[0]["messages"].values()}


def without(conversation: dict[str, Any], *heads: str) -> dict[str, Any]:
    """The conversation less the messages that begin so."""
    messages = {i: m for i, m in conversation["messages"].items() if not m["text"].startswith(heads)}
    order = [i for i in conversation["order"] if i in messages]
    return {**conversation, "order": order, "messages": messages}


def test_a_reload_in_the_middle_of_an_answer(server: Any, window: Any) -> None:
    page = opened(window, server.url)
    ask(page, "say: one")
    finished(page)
    ask(page, f"slow: {WORDS}")
    expect(page.locator(ANSWERS).last).to_contain_text("word7")
    before = page.locator(ANSWERS).last.inner_text()
    page.reload()
    expect(page.locator(ANSWERS)).to_have_count(2)  # the same conversation is shown again
    window.true(lambda: page.locator(ANSWERS).last.inner_text().startswith(before), "what was there is lost")
    expect(page.locator(".notice.lost")).to_contain_text("The connection ended")
    window.true(lambda: server.state.stopped == 1, "the engine went on for nobody")
    server.state.pause = 0.0
    page.locator(".notice").get_by_role("button", name="Continue").click()
    page.keyboard.press("Escape")
    finished(page)
    assert server.state.asked[-1]["continue_final_message"] is True
    assert server.state.asked[-1]["messages"][-1]["content"].startswith(before)
    assert window.troubles == []


def test_an_answer_whose_page_was_killed(server: Any, window: Any) -> None:
    """Nothing could be saved at the end: what was saved on the way is there, and it is said that it is not all."""
    window.page.clock.install()
    page = opened(window, server.url)
    messages = {
        "q": {"role": "user", "parent": None, "text": "say: abc def"},
        "a": {"role": "assistant", "parent": "q", "text": "abc", "finish": "open"},
    }
    old = {
        "id": "c1",
        "title": "killed",
        "updated": 1,
        "messages": messages,
        "order": ["q", "a"],
        "chosen": {},
    }
    keep(page, old)
    keep(page, {**old, "id": "c2", "title": "elsewhere", "updated": (time.time() + 3600) * 1000})
    page.reload()
    page.locator(".chat-open", has_text="killed").click()
    expect(page.locator(".ended")).to_contain_text("The page was closed")
    page.get_by_role("button", name="Continue").click()
    expect(page.locator(ANSWERS)).to_have_text("abc def")
    expect(page.locator(".ended")).to_have_count(0)
    page.locator(".chat-open", has_text="elsewhere").click()
    expect(page.locator(".ended")).to_contain_text("Another tab receives")
    page.clock.fast_forward("01:00:20")
    expect(page.locator(".ended")).to_contain_text("The page was closed")  # after some seconds without news


def test_two_tabs_in_one_conversation(server: Any, window: Any) -> None:
    """Each tab's answer is kept, whoever writes last; one that is deleted elsewhere is not worked on any more."""
    page = opened(window, server.url)
    ask(page, "say: begin")
    finished(page)
    other = window.context.new_page()
    other.goto(server.url)
    other.click(".chat-open")
    expect(other.locator(ANSWERS)).to_have_text("begin")
    ask(page, f"slow: {WORDS}")
    expect(page.locator(ANSWERS).last).to_contain_text("word5")
    expect(other.locator("article.user")).to_have_count(2)
    other.locator("article.user").first.hover()
    other.locator("article.user").first.get_by_role("button", name="Edit").click()
    other.fill(".reword textarea", "say: beside")
    other.keyboard.press("Enter")
    expect(other.locator(ANSWERS)).to_have_text("beside")
    window.true(lambda: "beside" in texts(other), "it was not kept")  # it is shown first
    # a version of the conversation that knows nothing of what the first tab receives
    keep(other, without(kept(other)[0], "slow", "word"))
    window.true(lambda: any("word9" in text for text in texts(other)), "it was lost")
    window.true(lambda: {"say: begin", "begin", "say: beside", "beside"} <= texts(other), "that was lost")
    other.get_by_role("button", name="Delete say: begin").click()
    other.get_by_role("button", name="Delete", exact=True).click()
    window.true(lambda: server.state.stopped == 1, "an answer that nobody can see is worked on")
    window.true(lambda: kept(other) == [], "what was deleted is there again")
    assert window.troubles == []


def test_versions_of_two_tabs_that_cross_lose_nothing(server: Any, window: Any) -> None:
    """A third page on the server's address writes what a tab would that has not heard of the others yet."""
    page = opened(window, server.url)
    ask(page, "say: begin")
    finished(page)
    between = window.context.new_page()
    between.goto(f"{server.url}icon.svg")
    before = kept(between)[0]
    ask(page, "say: more words")
    finished(page)
    window.true(lambda: "more words" in texts(between), "it was not kept")
    said = kept(between)[0]
    keep(between, before)  # nobody receives anything: it is what was said that is missing
    window.true(lambda: {"say: more words", "more words"} <= texts(between), "it was lost")
    cut = json.loads(json.dumps(said).replace('"text": "more words"', '"text": "mo"'))
    for message in cut["messages"].values():
        message["changes"] = min(message.get("changes", 0), 1)  # as it was when its answer had just begun
    keep(between, cut)
    window.true(lambda: "more words" in texts(between), "it was cut")
    expect(page.locator(ANSWERS).last).to_have_text("more words")
    assert window.troubles == []


def test_what_is_deleted_stays_so_though_the_tab_that_receives_it_wrote_meanwhile(
    server: Any, window: Any
) -> None:
    written = "e => e.newValue === null && localStorage.setItem(e.key, e.oldValue)"
    window.page.add_init_script(f"addEventListener('storage', {written})")  # before the page's own listener
    page = opened(window, server.url)
    ask(page, f"slow: {WORDS}")
    expect(page.locator(ANSWERS).last).to_contain_text("word5")
    between = window.context.new_page()
    between.goto(f"{server.url}icon.svg")
    between.evaluate(
        "localStorage.removeItem(Object.keys(localStorage).find(k => k.startsWith('deepseek.chat.c.')))"
    )
    window.true(lambda: server.state.stopped == 1, "an answer that nobody can see is worked on")
    window.true(lambda: kept(between) == [], "it came back")
    expect(page.locator("article")).to_have_count(0)
    assert window.troubles == []


@contextmanager
def running(server: Any) -> Iterator[None]:
    """A server in a thread, killed at the end: its connections break in the middle."""
    thread = threading.Thread(target=server.run, daemon=True)
    thread.start()
    try:
        yield
    finally:
        loop = server.loop
        loop.call_soon_threadsafe(
            lambda: [c.transport.abort() for c in list(server.server.server_state.connections)]
        )
        server.server.should_exit = server.server.force_exit = True
        thread.join(30)
        server.socket.close()


def test_a_server_that_dies_in_the_middle_and_comes_back(server: Any, window: Any) -> None:
    from fake_chat_server import FakeChatServer

    mortal = FakeChatServer()
    port = mortal.socket.getsockname()[1]
    with running(mortal):
        page = opened(window, mortal.url)
        ask(page, f"slow: {WORDS}")
        expect(page.locator(ANSWERS)).to_contain_text("word5")
    expect(page.locator(".notice.lost")).to_be_visible()
    came = page.inner_text(ANSWERS)
    page.locator(".notice").get_by_role("button", name="Continue").click()
    expect(page.locator(".notice.unreached")).to_be_visible()
    window.true(lambda: page.inner_text(ANSWERS) == came, "what came is not kept")
    again = FakeChatServer(port)
    again.state.ready, again.state.pause = False, 0.0
    with running(again):
        page.locator(".notice").get_by_role("button", name="Continue").click()
        expect(page.locator(".notice.starting")).to_contain_text("loading its weights")
        again.state.ready = True  # the page asks again by itself, for what is missing
        window.true(lambda: len(again.state.asked) == 1, "it was not asked again")
        page.keyboard.press("Escape")
        finished(page)
        assert again.state.asked[0]["messages"][-1] == {"role": "assistant", "content": came}
        window.true(lambda: page.inner_text(ANSWERS).startswith(came), "what came is not kept")


def test_a_server_that_says_that_it_ends_is_waited_for(server: Any, window: Any) -> None:
    """An error event in the middle of the stream, as a server that is told to end at once writes it."""
    page = opened(window, server.url)
    server.state.error = {"message": "shutting down", "type": "service_unavailable_error", "code": "aborted"}
    ask(page, "broken: a b")
    expect(page.locator(".notice.lost")).to_contain_text("shutting down")
    page.locator(".notice").get_by_role("button", name="Continue").click()
    expect(page.locator(ANSWERS)).to_have_text("a b")


HOSTILE = {
    "script": "<script>document.title = 'owned'</script>",
    "handlers": "<img src=x onerror=\"document.title='owned'\"><svg/onload=document.title='owned'>"
    "<body onpageshow=alert(1)>",
    "frames": '<iframe srcdoc="<script>parent.document.title=1</script>"></iframe>'
    '<object data="data:text/html,x"></object>',
    "links": "[a](javascript:alert(1)) [b](JaVaScRiPt&colon;alert(1)) [c](data:text/html,<script>alert(1)</script>) "
    "[d](vbscript:x) [e](\tjavascript:alert(1)) [f](java\u0000script:alert(1)) [g](//evil.example/x) "
    "[h](/admin/reload) [i](file:///etc/passwd) [j](blob:http://127.0.0.1/x) [k](https://user:pass@example.org) "
    "[l](&#106;avascript:alert(1))",
    "autolinks": '<javascript:alert(1)> <data:text/html,x> javascript:alert(1) https://example.org/"onmouseover=alert(1)',
    "images": "![x](https://evil.example/pixel.png) ![y](data:image/svg+xml,<svg onload=alert(1)>) ![z](http://evil.example)",
    "attributes": '```js" onload="alert(1)\nx\n```\n\n~~~"><script>alert(1)</script>\ny\n~~~',
    "form": '<form action="https://evil.example"><input name=key type=password>'
    "<button formaction=javascript:alert(1)>go</button></form>",
    "style": "<style>*{display:none}</style><link rel=stylesheet href=https://evil.example/x.css>"
    "<meta http-equiv=refresh content=0>",
    "ids": '<div id="composer" class="notice">Enter your key</div> <a name="page" href="javascript:1">x</a>',
    "tables": "| "
    + " | ".join(f"c{i}" for i in range(200))
    + " |\n"
    + "|-" * 200
    + "|\n"
    + ("|x" * 200 + "|\n") * 300,
    "fence": "text\n\n```html\n<script>document.title='owned'</script>\n" + "never closed\n" * 2000,
    "think": "<think><script>document.title='owned'</script></think><b>after</b>",
    "bidi": "\u202eevil\u202c \u2066x\u2069 [\u202etxt.exe](https://example.org/\u202egpj.exe)\n\n"
    '```c\nif (level != "user\u202e \u2066// admin\u2069 \u2066") {\n```',
    "odd": "\u0000\u0001\u0007\u001b[31m\ud83d\ufffd\ufffe " + "e" + "\u0301" * 5000 + " \ufdfd" * 200,
}


def test_hostile_answers_stay_text_and_leave_the_page_alone(server: Any, window: Any) -> None:
    server.state.texts = {name: text.encode("utf-8", "replace").decode() for name, text in HOSTILE.items()}
    page = opened(window, server.url)
    titles = page.title()
    for name in HOSTILE:
        ask(page, f"text: {name}")
        finished(page)
    assert page.title() != "owned"
    assert titles.endswith("deepseek chat")
    bad = page.evaluate("""[...document.querySelectorAll('article *')].filter(e =>
        ['script', 'iframe', 'object', 'embed', 'form', 'style', 'link', 'meta', 'base', 'img', 'video', 'audio']
            .includes(e.localName))
        .map(e => e.outerHTML.slice(0, 200))""")
    assert bad == []
    wrong = page.evaluate("""[...document.querySelectorAll('article .prose *')].flatMap(e => [...e.attributes]
        .filter(a => a.name.startsWith('on')
                     || ['src', 'srcdoc', 'action', 'formaction', 'style', 'id', 'name'].includes(a.name)
                     || (a.name === 'href' && !/^(https?:|mailto:)/.test(a.value)))
        .map(a => e.outerHTML.slice(0, 200)))""")
    assert wrong == []
    hrefs = page.evaluate("[...document.querySelectorAll('.prose a')].map(e => e.href)")
    assert "https://example.org/gpj.exe" in hrefs, "an address is what it says"
    assert not any("evil.example/x" in h and h.startswith("//") for h in hrefs)
    code = page.locator("figure.code pre").last.inner_text()
    assert "U+202E" in code, "code that would look like other code is shown as it is"
    assert len(page.query_selector_all("#composer")) == 1
    ask(page, "say: still here")
    expect(page.locator(ANSWERS).last).to_have_text("still here")
    assert window.foreign == []
    assert window.troubles == []


def test_copied_code_is_the_code(server: Any, window: Any) -> None:
    window.context.grant_permissions(["clipboard-read", "clipboard-write"])
    server.state.texts["x"] = "```c\na\u202eb // \u2066c\n```"
    page = opened(window, server.url)
    ask(page, "text: x")
    finished(page)
    page.get_by_role("button", name="Copy code").click()
    expect(page.locator("[role=status][aria-live=polite]").last).to_contain_text("Copied")
    assert page.evaluate("navigator.clipboard.readText()") == "a\u202eb // \u2066c"


@pytest.mark.slow
def test_a_line_of_a_megabyte(server: Any, window: Any) -> None:
    """The page can be used while it comes: nothing is drawn so often that it is all the page does."""
    server.state.texts["long"] = "word *and* `code` [x](https://example.org) " * 24_000
    server.state.piece = 10_000
    page = opened(window, server.url)
    page.evaluate("() => { window.ticks = 0; setInterval(() => window.ticks++, 50) }")
    ask(page, "text: long")
    expect(page.locator("article[aria-busy=true]")).to_have_count(1)
    page.click("main")
    page.keyboard.press("n")  # a new conversation, while the other one streams
    ask(page, "say: beside")
    expect(page.locator(ANSWERS)).to_have_text("beside")
    page.locator(".chat-open", has_text="text").click()
    finished(page)
    assert page.evaluate("document.querySelector('article.assistant .prose').textContent.length") > 1_000_000
    assert page.evaluate("window.ticks") > 5
    assert window.troubles == []


def test_ten_thousand_messages(server: Any, window: Any) -> None:
    order = [f"m{i}" for i in range(10_000)]
    messages = {
        name: {
            "role": ("user", "assistant")[i % 2],
            "parent": order[i - 1] if i else None,
            "text": f"message {i}",
            "finish": "stop",
        }
        for i, name in enumerate(order)
    }
    page = opened(window, server.url)
    keep(
        page, {"id": "c1", "title": "long", "updated": 1, "messages": messages, "order": order, "chosen": {}}
    )
    page.reload()
    page.click(".chat-open")
    expect(page.locator("article")).to_have_count(60)
    expect(page.locator(ANSWERS).last).to_have_text("message 9999")
    ask(page, "say: and one more")
    expect(page.locator(ANSWERS).last).to_have_text("and one more")
    assert len(server.state.asked[-1]["messages"]) == 10_001
    page.reload()
    expect(page.locator(ANSWERS).last).to_have_text("and one more")
    assert len(kept(page)[0]["order"]) == 10_002
    page.click(".earlier")
    expect(page.locator("article")).to_have_count(120)
    assert window.troubles == []
