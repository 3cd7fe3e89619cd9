"""The chat page: static files of ``deepseek/serve/web/dist``, held in memory, open to all: they ask for the key."""

from __future__ import annotations

import gzip
import hashlib
import mimetypes
from importlib.resources import files
from typing import Any, NamedTuple

from starlette.requests import Request
from starlette.responses import Response

POLICY = (
    "default-src 'self'; img-src 'self' data:; object-src 'none'; base-uri 'none'; form-action 'none'; "
    "frame-ancestors 'none'"
)
NO_PAGE = (
    '<!doctype html><html lang="en"><meta charset="utf-8"><meta name="viewport" content="width=device-width">'
    "<title>deepseek serve</title><main><h1>deepseek serve</h1><p>The server runs, and its chat page is not built: "
    "this checkout lacks <code>deepseek/serve/web/dist</code>. Run <code>npm ci &amp;&amp; npm run build</code> in "
    "<code>web</code>, or use <code>/v1/chat/completions</code>.</p></main></html>"
)
TYPES = {".js": "text/javascript", ".css": "text/css", ".html": "text/html", ".svg": "image/svg+xml",
         ".woff2": "font/woff2", ".json": "application/json", ".txt": "text/plain"}  # fmt: skip


class Asset(NamedTuple):
    content: bytes
    zipped: bytes
    media_type: str
    etag: str


class Page:
    """The files of the page by path. A request's path is a key of a table and never a path on the disk."""

    def __init__(self, root: Any = None) -> None:
        root = root or files("deepseek.serve").joinpath("web", "dist")
        self.assets: dict[str, Asset] = dict(_found(root, "")) if root.is_dir() else {}
        self.assets.setdefault("/index.html", _asset("index.html", NO_PAGE.encode()))
        self.assets["/"] = self.assets["/index.html"]

    def __contains__(self, path: str) -> bool:
        return path in self.assets

    def answer(self, scope: Any) -> Response:
        """The file at the request's path, which is one of ``assets``."""
        request, asset = Request(scope), self.assets[scope["path"]]
        headers = {"etag": asset.etag, "cache-control": "no-cache", "vary": "accept-encoding"}
        if request.headers.get("if-none-match") == asset.etag:
            return Response(None, 304, headers)
        if asset.zipped and "gzip" in request.headers.get("accept-encoding", ""):
            headers["content-encoding"] = "gzip"
            return Response(asset.zipped, 200, headers, asset.media_type)
        return Response(asset.content, 200, headers, asset.media_type)


def _found(root: Any, inside: str) -> list[tuple[str, Asset]]:
    found = []
    for entry in root.iterdir():
        path = f"{inside}/{entry.name}"
        found += _found(entry, path) if entry.is_dir() else [(path, _asset(entry.name, entry.read_bytes()))]
    return found


def _asset(name: str, content: bytes) -> Asset:
    suffix = "." + name.rpartition(".")[2]
    kind = TYPES.get(suffix) or mimetypes.guess_type(name)[0] or "application/octet-stream"
    text = kind.startswith(("text/", "image/svg", "application/json"))
    kind += "; charset=utf-8" if kind.startswith("text/") else ""
    zipped = gzip.compress(content, 6, mtime=0) if text and len(content) > 1000 else b""
    return Asset(content, zipped, kind, f'"{hashlib.blake2b(content, digest_size=12).hexdigest()}"')
