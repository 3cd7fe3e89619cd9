"""Who gets in: every rule against the attack that it is there for. No server is needed: the guard is plain ASGI."""

from __future__ import annotations

import asyncio
import re
from typing import Any

import pytest

from deepseek.address import is_loopback
from deepseek.errors import ConfigError
from deepseek.monitor.access import Access, Guard, new_token

TOKEN = "correct-horse-battery"
LOCAL = {"host": "127.0.0.1:6060"}


class Answer:
    def __init__(self, messages: list[Any]) -> None:
        start = messages[0]
        self.status = start["status"]
        self.headers = [(k.decode(), v.decode()) for k, v in start["headers"]]
        self.body = b"".join(m.get("body", b"") for m in messages[1:])

    def header(self, name: str) -> str:
        return dict(self.headers).get(name, "")


def ask(access: Access, path: str = "/api/runs", method: str = "GET", **headers: str) -> Answer:
    """What the guard answers; an application that says 'in' to everything stands behind it."""
    path, _, query = path.partition("?")
    given = {k.replace("_", "-"): v for k, v in {"host": LOCAL["host"], **headers}.items()}
    raw = [(k.encode(), v.encode("latin-1")) for k, v in given.items()]
    scope = {"type": "http", "method": method, "path": path, "raw_path": path.encode(), "scheme": "http",
             "query_string": query.encode(), "headers": raw}  # fmt: skip
    messages: list[Any] = []

    async def inside(scope: Any, receive: Any, send: Any) -> None:
        await send({"type": "http.response.start", "status": 200, "headers": []})
        await send({"type": "http.response.body", "body": b"in"})

    async def send(message: Any) -> None:
        messages.append(message)

    async def receive() -> Any:
        return {"type": "http.request", "body": b""}

    asyncio.run(Guard(inside, access)(scope, receive, send))
    return Answer(messages)


@pytest.mark.parametrize(
    "host", ["127.0.0.1", "127.8.9.1", "localhost", "::1", "[::1]", "LOCALHOST.", "a.localhost"]
)
def test_loopback_addresses(host: str) -> None:
    assert is_loopback(host)


@pytest.mark.parametrize(
    "host", ["", "0.0.0.0", "::", "192.168.1.5", "example.org", "127.0.0.1.evil.org", "localhost.evil.org"]
)
def test_other_addresses(host: str) -> None:
    assert not is_loopback(host)


@pytest.mark.parametrize("host", ["0.0.0.0", "::", "192.168.1.5", "box.lan"])
def test_a_server_that_others_can_reach_needs_a_token(host: str) -> None:
    with pytest.raises(ConfigError, match="--token"):
        Access(host)
    assert Access(host, TOKEN).token == TOKEN


def test_short_tokens_are_refused() -> None:
    with pytest.raises(ConfigError, match="5 characters"):
        Access("0.0.0.0", "12345")
    assert len(new_token()) >= 32
    assert new_token() != new_token()


@pytest.mark.parametrize(
    "host", ["evil.org", "evil.org:6060", "127.0.0.1.evil.org", "0.0.0.0:6060", "", "[::1", "user@evil.org"]
)
def test_dns_rebinding_is_refused(host: str) -> None:
    assert ask(Access(), host=host).status == 403


@pytest.mark.parametrize("host", ["127.0.0.1:6060", "localhost:9000", "[::1]:6060", "127.0.0.1"])
def test_loopback_is_let_in_without_a_token(host: str) -> None:
    assert ask(Access(), host=host).body == b"in"


def test_a_token_is_needed_for_reading_too() -> None:
    access = Access("0.0.0.0", TOKEN)
    for headers in ({}, {"authorization": "Bearer wrong-token-entirely"}, {"authorization": f"Basic {TOKEN}"},
                    {"cookie": f"{access.cookie_name}=nonsense"}, {"cookie": f"{access.cookie_name}={TOKEN}"},
                    {"cookie": "\x00;;=,"}, {"authorization": "Bearer \xff\xfe"}):  # fmt: skip
        answer = ask(access, host="box.lan:6060", **headers)
        assert answer.status == 401
        assert answer.body != b"in"
    assert ask(access, host="box.lan:6060", authorization=f"Bearer {TOKEN}").body == b"in"


def test_the_link_sets_a_cookie_and_leaves_no_token_in_the_address() -> None:
    access = Access("0.0.0.0", TOKEN)
    answer = ask(access, f"/run/mine?token={TOKEN}&tab=2", host="box.lan")
    cookie = answer.header("set-cookie")
    assert answer.status == 200
    assert TOKEN not in answer.body.decode() + cookie
    assert "url=/run/mine?tab=2" in answer.body.decode()
    assert {"HttpOnly", "SameSite=Strict", "Path=/"} <= {part.strip() for part in cookie.split(";")}
    assert ask(access, host="box.lan", cookie=cookie.split(";")[0]).body == b"in"
    assert ask(Access("0.0.0.0", TOKEN + "x"), host="box.lan", cookie=cookie.split(";")[0]).status == 401


@pytest.mark.parametrize(
    "query", ["token=wrong-token-wrong", "token=", f"token={TOKEN}x", f"nottoken={TOKEN}"]
)
def test_a_wrong_link_gets_no_cookie(query: str) -> None:
    answer = ask(Access("0.0.0.0", TOKEN), f"/?{query}", host="box.lan")
    assert answer.status == 401
    assert not answer.header("set-cookie")


def test_the_link_leads_nowhere_else() -> None:
    """``//evil.org`` in a path is an address of another host to a browser; markup in it must stay text."""
    for path in ("//evil.org/", "/\\evil.org/", '/"><script>alert(1)</script>'):
        body = ask(Access("0.0.0.0", TOKEN), f"{path}?token={TOKEN}", host="box.lan").body.decode()
        assert re.search(r'url=/(?![/\\])[^"]*">', body)
        assert "<script" not in body


def test_a_browser_without_the_token_gets_a_page_that_asks_for_it() -> None:
    answer = ask(Access("0.0.0.0", TOKEN), "/", host="box.lan", accept="text/html,*/*")
    assert answer.status == 401
    assert b'<input type="password" name="token"' in answer.body


@pytest.mark.parametrize("method", ["POST", "PATCH", "PUT", "DELETE"])
def test_actions_need_the_header(method: str) -> None:
    assert ask(Access(), method=method).status == 403
    assert ask(Access(), method=method, x_deepseek="1").body == b"in"
    access = Access("0.0.0.0", TOKEN)
    cookie = f"{access.cookie_name}={access.cookie_value}"
    assert ask(access, method=method, cookie=cookie).status == 403
    assert ask(access, method=method, cookie=cookie, x_deepseek="1").body == b"in"
    assert ask(access, method=method, x_deepseek="1").status == 401
    assert ask(access, method=method, authorization=f"Bearer {TOKEN}").body == b"in"


@pytest.mark.parametrize(
    "origin",
    [
        "http://evil.org",
        "null",
        "http://127.0.0.1:9999",
        "http://127.0.0.1:6060.evil.org",
        "http://localhost:6060",
    ],
)
def test_actions_from_other_origins_are_refused(origin: str) -> None:
    """Another port or another name for this machine is another origin."""
    assert ask(Access(), method="POST", x_deepseek="1", origin=origin).status == 403
    assert ask(Access(), method="POST", x_deepseek="1", origin="http://127.0.0.1:6060").body == b"in"


def test_other_sites_cannot_load_the_api() -> None:
    assert ask(Access(), sec_fetch_site="cross-site").status == 403
    assert ask(Access(), "/", sec_fetch_site="cross-site").body == b"in"  # a link to the page is fine
    assert ask(Access(), method="POST", x_deepseek="1", sec_fetch_site="cross-site").status == 403


@pytest.mark.parametrize("headers", [{}, {"host": "evil.org"}])
def test_every_answer_carries_the_protective_headers(headers: dict[str, str]) -> None:
    answer = ask(Access(), **headers)
    policy = dict(part.strip().split(" ", 1) for part in answer.header("content-security-policy").split(";"))
    assert policy["default-src"] == "'self'"
    assert policy["object-src"] == policy["base-uri"] == "'none'"
    assert "unsafe" not in str(policy)
    assert "http" not in str(policy)
    assert answer.header("x-content-type-options") == "nosniff"
    assert answer.header("referrer-policy") == "no-referrer"


def test_only_the_trace_viewer_may_make_its_own_styles() -> None:
    for path, made in (
        ("/speedscope/index.html", True),
        ("/", False),
        ("/api/x", False),
        ("/x/speedscope/", False),
    ):
        policy = ask(Access(), path).header("content-security-policy")
        assert ("'unsafe-inline'" in policy) is made
        assert "http" not in policy
        assert "'unsafe-eval'" not in policy


def test_websockets_are_closed() -> None:
    sent: list[Any] = []

    async def send(message: Any) -> None:
        sent.append(message)

    asyncio.run(Guard(None, Access())({"type": "websocket", "headers": []}, None, send))
    assert sent == [{"type": "websocket.close", "code": 1008}]
