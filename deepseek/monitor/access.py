"""``Access``: who may read the dashboard and who may act through it. An ASGI middleware around the whole application.

The dashboard shows a run's data and can stop it, so it trusts no network. Three attacks shape the rules:

- *another machine*: the server binds to loopback; bound to anything else it needs a token, which is compared in
  constant time and lives in a cookie that scripts cannot read and other sites cannot send (HttpOnly, SameSite=Strict).
- *DNS rebinding* (a site's name is made to point at 127.0.0.1, and its page then reads us as its own origin): without a
  token, a request whose ``Host`` is no loopback name is refused. With one, such a page has no cookie to send.
- *cross-site requests*: what changes something needs the header ``X-Deepseek: 1``, which no form and no simple
  cross-origin request can send, and its ``Origin``, where the browser gives one, must be the host that was asked.

Every answer forbids the page to load anything from elsewhere (content-security policy), so a text of the training data
that contains markup can neither run nor call home. After the OWASP guides on cross-site request forgery and on CSP.
"""

from __future__ import annotations

import hashlib
import hmac
import html
import json
import secrets
from dataclasses import dataclass
from http.cookies import CookieError, SimpleCookie
from typing import Any
from urllib.parse import parse_qsl, urlencode, urlsplit

from deepseek.address import is_loopback
from deepseek.errors import ConfigError

POLICY = (
    "default-src 'self'; img-src 'self' data: blob:; object-src 'none'; base-uri 'none'; form-action 'self'; "
    "frame-ancestors 'self'"
)
#: The trace viewer makes its styles, workers and WebAssembly itself; it is a page of its own, and as closed to others.
VIEWER = "/speedscope/"
VIEWER_POLICY = (
    "default-src 'self'; script-src 'self' 'wasm-unsafe-eval'; style-src 'self' 'unsafe-inline'; "
    "img-src 'self' data: blob:; worker-src 'self' blob:; connect-src 'self' blob: data:; object-src 'none'; "
    "base-uri 'none'; form-action 'none'; frame-ancestors 'self'"
)
HEADERS = [
    (b"x-content-type-options", b"nosniff"),
    (b"x-frame-options", b"SAMEORIGIN"),
    (b"referrer-policy", b"no-referrer"),
    (b"cross-origin-opener-policy", b"same-origin"),
    (b"cross-origin-resource-policy", b"same-origin"),
    (b"permissions-policy", b"camera=(), microphone=(), geolocation=(), browsing-topics=()"),
]
HTML = (b"content-type", b"text/html; charset=utf-8")
NO_STORE = (b"cache-control", b"no-store")
ENTERED = (
    '<!doctype html><meta charset="utf-8"><meta http-equiv="refresh" content="0;url={target}">'
    '<title>deepseek monitor</title><a href="{target}">Go on</a>'
)
LOCKED = (
    '<!doctype html><html lang="en"><meta charset="utf-8"><meta name="viewport" content="width=device-width">'
    "<title>deepseek monitor</title><main><h1>This dashboard needs its token</h1>"
    "<p>It is in the URL that <code>deepseek monitor</code> printed where it was started.</p>"
    '<form method="get"><label>Token <input type="password" name="token" autofocus autocomplete="current-password">'
    "</label> <button>Open</button></form></main></html>"
)
NO_TOKEN = (
    "this dashboard needs its token: open the URL that `deepseek monitor` printed, or send it as "
    "'Authorization: Bearer TOKEN'"
)
SAFE_METHODS = frozenset({"GET", "HEAD", "OPTIONS"})
ACTION_HEADER = "x-deepseek"
SHORTEST_TOKEN = 12  #: characters
COOKIE_SECONDS = 30 * 24 * 3600


@dataclass(frozen=True)
class Access:
    """The rules of one server. ``host`` is the address it binds to, ``token`` what a client must know ('' for none).

    Raises:
        ConfigError: ``host`` can be reached from other machines and there is no token, or the token is too short.
    """

    host: str = "127.0.0.1"
    token: str = ""

    def __post_init__(self) -> None:
        if self.token and len(self.token) < SHORTEST_TOKEN:
            raise ConfigError(
                f"a token of {len(self.token)} characters can be guessed; use {SHORTEST_TOKEN} or more, or --token auto"
            )
        if not self.token and not is_loopback(self.host):
            raise ConfigError(
                f"--host {self.host} lets other machines read the runs and act on them: give --token, or --token auto "
                "for a new one; or leave --host out and reach the page through ssh -L"
            )

    @property
    def cookie_name(self) -> str:
        """Cookies are shared by all ports of a host, so two dashboards on one host need two names."""
        return f"deepseek-{self._digest('name')[:8]}"

    @property
    def cookie_value(self) -> str:
        """Derived from the token, so that the cookie store does not hold the token itself."""
        return self._digest("session")

    def set_cookie(self, secure: bool) -> str:
        """The value of a ``Set-Cookie`` header that lets a browser in."""
        flags = "HttpOnly; SameSite=Strict" + ("; Secure" if secure else "")
        return f"{self.cookie_name}={self.cookie_value}; Max-Age={COOKIE_SECONDS}; Path=/; {flags}"

    def knows_token(self, headers: dict[str, str]) -> bool:
        """Whether a request carries the token as ``Authorization: Bearer`` or the cookie made from it."""
        scheme, _, given = headers.get("authorization", "").partition(" ")
        if scheme.lower() == "bearer" and self.matches(given.strip()):
            return True
        try:
            cookie = SimpleCookie(headers.get("cookie", "")).get(self.cookie_name)
        except CookieError:
            return False
        return cookie is not None and _same(cookie.value, self.cookie_value)

    def matches(self, given: str) -> bool:
        return bool(self.token) and _same(given, self.token)

    def refusal(self, method: str, path: str, headers: dict[str, str]) -> tuple[int, str] | None:
        """Status and reason why a request is refused, or ``None``. ``headers`` have lower-case names."""
        host = headers.get("host", "")
        if self.token:
            if not self.knows_token(headers):
                return 401, NO_TOKEN
        elif not is_loopback(_hostname(host)):
            return (
                403,
                f"the host {host[:100]!r} is no name of this machine's loopback; start with --token to allow any",
            )
        if headers.get("sec-fetch-site") == "cross-site" and (
            method not in SAFE_METHODS or path.startswith("/api")
        ):
            return 403, "requests from other sites are refused"
        if method in SAFE_METHODS:
            return None
        origin = headers.get("origin", "")
        if origin and urlsplit(origin).netloc.lower() != host.lower():
            return 403, f"the page at {origin[:100]!r} may not act on this dashboard"
        if headers.get(ACTION_HEADER) != "1" and not headers.get("authorization"):
            return 403, "what changes something needs the header 'X-Deepseek: 1'"
        return None

    def _digest(self, purpose: str) -> str:
        return hmac.new(
            self.token.encode(), f"deepseek-monitor {purpose}".encode(), hashlib.sha256
        ).hexdigest()


class Guard:
    """ASGI middleware: applies ``access`` to every request and the protective headers to every answer."""

    def __init__(self, app: Any, access: Access) -> None:
        self.app, self.access = app, access

    async def __call__(self, scope: Any, receive: Any, send: Any) -> None:
        if scope["type"] == "websocket":  # there are none here
            await send({"type": "websocket.close", "code": 1008})
            return
        if scope["type"] != "http":
            await self.app(scope, receive, send)
            return

        async def protected(message: Any) -> None:
            if message["type"] == "http.response.start":
                present = {name.lower() for name, _ in message["headers"]}
                policy = VIEWER_POLICY if scope["path"].startswith(VIEWER) else POLICY
                added = [(b"content-security-policy", policy.encode()), *HEADERS]
                message["headers"] = [*message["headers"], *(h for h in added if h[0] not in present)]
            await send(message)

        headers = {k.decode("latin-1").lower(): v.decode("latin-1") for k, v in scope["headers"]}
        if (target := self._entrance(scope)) is not None:
            page = ENTERED.format(target=html.escape(target, quote=True)).encode()
            await _respond(protected, 200, page, [HTML, (b"set-cookie", self._cookie(scope)), NO_STORE])
            return
        refused = self.access.refusal(scope["method"], scope["path"], headers)
        if refused is None:
            await self.app(scope, receive, protected)
            return
        status, reason = refused
        if status == 401 and "text/html" in headers.get("accept", ""):
            await _respond(protected, 401, LOCKED.encode(), [HTML, NO_STORE])
            return
        extra = [(b"www-authenticate", b"Bearer")] if status == 401 else []
        body = json.dumps({"error": reason}).encode()
        await _respond(protected, status, body, [(b"content-type", b"application/json"), NO_STORE, *extra])

    def _entrance(self, scope: Any) -> str | None:
        """Where to go on after ``/?token=…``: the same page, with the token in a cookie and not in the address.

        A page that forwards, not a redirect: after a link from elsewhere, browsers count a redirect as cross-site
        and keep a strict cookie back.
        """
        if (
            scope["method"] != "GET"
            or b"token=" not in scope["query_string"]
            or scope["path"].startswith("/api")
        ):
            return None
        query = parse_qsl(scope["query_string"].decode("latin-1"), keep_blank_values=True)
        if not any(name == "token" and self.access.matches(value) for name, value in query):
            return None
        rest = urlencode([(k, v) for k, v in query if k != "token"])
        path = "/" + scope.get("raw_path", b"/").decode("latin-1").split("?")[0].lstrip("/\\")
        return path + (f"?{rest}" if rest else "")

    def _cookie(self, scope: Any) -> bytes:
        return self.access.set_cookie(secure=scope.get("scheme") == "https").encode()


def new_token() -> str:
    """192 random bits as text that needs no quoting in a URL."""
    return secrets.token_urlsafe(24)


def _hostname(host: str) -> str:
    """``127.0.0.1:6006`` -> ``127.0.0.1``; ``[::1]:6006`` -> ``::1``."""
    try:
        return urlsplit(f"//{host}").hostname or ""
    except ValueError:
        return ""


def _same(given: str, expected: str) -> bool:
    return hmac.compare_digest(given.encode("utf-8", "surrogateescape"), expected.encode())


async def _respond(send: Any, status: int, body: bytes, headers: list[tuple[bytes, bytes]]) -> None:
    length = (b"content-length", str(len(body)).encode())
    await send({"type": "http.response.start", "status": status, "headers": [length, *headers]})
    await send({"type": "http.response.body", "body": body})
