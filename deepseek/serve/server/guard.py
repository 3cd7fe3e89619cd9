"""``Guard``: the outermost layer. Who may ask, what every answer carries, and the line in the log.

Every route but ``/health``, ``/ready`` and the chat page's files wants a key, also those that do not exist, so that
nobody without one learns which do. A server without keys serves loopback only, and then also refuses a ``Host`` that
is no loopback name: a site whose name is made to point at 127.0.0.1 would read us as its own (DNS rebinding). Requests
that a browser makes for another site's page are refused in either case.
"""

from __future__ import annotations

import logging
import re
import secrets
from typing import Any
from urllib.parse import urlsplit

from deepseek.address import is_loopback
from deepseek.serve.server.access_log import Record
from deepseek.serve.server.errors import CLIENT_GONE, ApiError
from deepseek.serve.server.exchange import KEY, RECORD
from deepseek.serve.server.front import Front
from deepseek.serve.server.page import POLICY, Page

HEAD_BYTES = 64 << 10  #: of a request's line and headers
OPEN = frozenset({"/health", "/ready"})
NAMES = re.compile(r"[\w.:-]{1,128}", re.ASCII)  #: what is honoured as X-Request-Id
HEADERS = [
    (b"content-security-policy", POLICY.encode()),
    (b"x-content-type-options", b"nosniff"),
    (b"x-frame-options", b"DENY"),
    (b"referrer-policy", b"no-referrer"),
    (b"cross-origin-opener-policy", b"same-origin"),
    (b"cross-origin-resource-policy", b"same-origin"),
    (b"permissions-policy", b"camera=(), microphone=(), geolocation=(), browsing-topics=()"),
]
NO_KEY = "this server needs an API key: send it as 'Authorization: Bearer KEY'"
WRONG_KEY = "the API key is not known to this server"

log = logging.getLogger("deepseek.serve")


class Guard:
    """ASGI middleware around the whole application."""

    def __init__(self, app: Any, front: Front, page: Page) -> None:
        self.app, self.front, self.page = app, front, page

    async def __call__(self, scope: Any, receive: Any, send: Any) -> None:
        if scope["type"] == "websocket":
            await send({"type": "websocket.close", "code": 1008})
            return
        if scope["type"] != "http":
            await self.app(scope, receive, send)
            return
        headers = {k.decode("latin-1").lower(): v.decode("latin-1") for k, v in scope["headers"]}
        given = headers.get("x-request-id", "")
        name = given if NAMES.fullmatch(given) else secrets.token_hex(12)
        record = scope[RECORD] = Record(name, scope["method"])
        started = False

        async def protected(message: Any) -> None:
            nonlocal started
            if message["type"] == "http.response.start":
                started = True
                record.status = record.status or message["status"]
                present = {key.lower() for key, _ in message["headers"]}
                added = [(b"x-request-id", record.id.encode()), *HEADERS]
                message["headers"] = [*message["headers"], *(h for h in added if h[0] not in present)]
            await send(message)

        try:
            try:
                self._check(scope, headers, record)
                await self.app(scope, receive, protected)
            except ApiError as error:
                await refuse(protected, error)
            except Exception as error:
                log.exception("request %s: %s %s", record.id, scope["method"], record.route or "?")
                if started:
                    raise
                fault = ApiError(
                    f"a fault of this server: {type(error).__name__}", 500, code="internal_error"
                )
                await refuse(protected, fault)
        finally:
            record.status = record.status or CLIENT_GONE
            record.route = record.route or "other"
            self.front.metrics.answered(record)
            self.front.log.write(record)

    def _check(self, scope: Any, headers: dict[str, str], record: Record) -> None:
        """Raises ``ApiError`` unless the request may go on; finds its key."""
        size = sum(len(k) + len(v) for k, v in scope["headers"]) + len(scope.get("raw_path", b""))
        if size + len(scope["query_string"]) > HEAD_BYTES:
            raise ApiError(f"the head of this request has more than {HEAD_BYTES:,} bytes", 431)
        path, keys = scope["path"], self.front.keys
        if headers.get("sec-fetch-site") in ("cross-site", "same-site") and path not in self.page:
            raise ApiError("requests from pages of other sites are refused", 403, code="cross_site")
        if path in OPEN or path in self.page:
            return
        if not keys:
            host = headers.get("host", "")
            if not is_loopback(hostname(host)):
                raise ApiError(
                    f"the host {host[:100]!r} is no name of this machine's loopback; a server with keys answers to any",
                    403,
                    code="unknown_host",
                )
            return
        given = headers.get("authorization", "")
        key = keys.find(given)
        if key is None:
            record.route = "unauthorized"
            raise ApiError(
                WRONG_KEY if given else NO_KEY,
                401,
                code="invalid_api_key",
                headers={"www-authenticate": "Bearer"},
            )
        scope[KEY], record.key = key, key.name


async def refuse(send: Any, error: ApiError) -> None:
    """Send ``error`` as the whole answer."""
    body = error.encoded()
    headers = [(b"content-type", b"application/json"), (b"content-length", str(len(body)).encode()),
               (b"cache-control", b"no-store")]  # fmt: skip
    headers += [(k.encode(), v.encode()) for k, v in error.headers.items()]
    await send({"type": "http.response.start", "status": error.status, "headers": headers})
    await send({"type": "http.response.body", "body": body})


def hostname(host: str) -> str:
    """``127.0.0.1:8000`` -> ``127.0.0.1``; ``[::1]:8000`` -> ``::1``."""
    try:
        return urlsplit(f"//{host}").hostname or ""
    except ValueError:
        return ""
