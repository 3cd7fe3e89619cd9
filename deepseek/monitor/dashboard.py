"""``deepseek monitor``: the web server of the dashboard, over the runs of a directory.

``application`` is the whole of it as an ASGI application; ``serve`` runs that under uvicorn until it is interrupted.
"""

from __future__ import annotations

import contextlib
import gzip
import hashlib
import mimetypes
import socket
import sys
import threading
import webbrowser
from collections.abc import AsyncIterator, Callable, Sequence
from pathlib import Path
from typing import IO, Any, NamedTuple

from deepseek import address
from deepseek.address import is_loopback
from deepseek.errors import MissingExtraError
from deepseek.monitor.access import Access, Guard
from deepseek.monitor.alerts import Receiver

PORT = 6060  #: the first port that is tried
TRIES = 50
DIST = Path(__file__).parent / "web" / "dist"
TYPES = {
    ".js": "text/javascript", ".mjs": "text/javascript", ".css": "text/css", ".html": "text/html",
    ".wasm": "application/wasm", ".svg": "image/svg+xml", ".json": "application/json", ".woff2": "font/woff2",
    ".map": "application/json",
}  # fmt: skip
NO_PAGE = (
    '<!doctype html><html lang="en"><meta charset="utf-8"><meta name="viewport" content="width=device-width">'
    "<title>deepseek monitor</title><main><h1>deepseek monitor</h1><p>The server runs, and its page is not built: "
    "this checkout lacks <code>deepseek/monitor/web/dist</code>. Run <code>npm ci &amp;&amp; npm run build</code> in "
    '<code>web</code>, or read <a href="/api/runs">the runs as JSON</a>.</p></main></html>'
)


class Asset(NamedTuple):
    """A file of the page: what it is, plain and compressed, and whether its name changes with its content."""

    content: bytes
    zipped: bytes
    media_type: str
    etag: str
    hashed: bool


class Page:
    """The built page, held in memory. A request's path is a key of a table and never a path on the disk."""

    def __init__(self, directory: Path = DIST) -> None:
        self.directory = directory
        self._lock, self._assets, self._built = threading.Lock(), dict[str, Asset](), -1.0

    def get(self, path: str) -> Asset | None:
        """The asset at ``path``; for a path that names no file, the page itself, which has its own routes."""
        assets = self._current()
        found = assets.get(path.strip("/"))
        if found is None and "." not in path.rsplit("/", 1)[-1]:
            return assets.get("index.html")
        return found

    def _current(self) -> dict[str, Asset]:
        """Read the files once, and again after a new build."""
        index = self.directory / "index.html"
        built = index.stat().st_mtime if index.is_file() else 0.0
        with self._lock:
            if built != self._built:
                files = [p for p in sorted(self.directory.rglob("*")) if p.is_file()]
                self._assets = {
                    p.relative_to(self.directory).as_posix(): _asset(p, self.directory) for p in files
                }
                self._assets.setdefault("index.html", _made(NO_PAGE.encode(), "text/html", False))
                self._built = built
            return self._assets


def application(
    root: Path | str, access: Access | None = None, *, dist: Path = DIST, receivers: Sequence[Receiver] = ()
) -> Any:
    """The dashboard of the runs below ``root`` as an ASGI application; ``root`` may be one run.

    ``receivers`` are told of runs that die or fall silent (``Sentinel``).

    Raises:
        RunError: ``root`` is a file.
        MissingExtraError: without the extra ``web``.
    """
    try:
        import orjson  # noqa: F401
        from starlette.applications import Starlette
        from starlette.middleware import Middleware
        from starlette.middleware.gzip import GZipMiddleware
        from starlette.routing import Route
    except ImportError as error:
        raise MissingExtraError(error.name or "starlette", "web", "the dashboard") from error
    from deepseek.monitor.api import Api, handlers, nowhere
    from deepseek.monitor.api_export import ExportApi
    from deepseek.monitor.api_inspect import InspectApi
    from deepseek.monitor.api_journal import JournalApi
    from deepseek.monitor.library import Library
    from deepseek.monitor.sentinel import Sentinel

    library, page = Library(root), Page(dist)
    api = Api(library)
    parts: list[Any] = [api, JournalApi(library), InspectApi(library), ExportApi(library)]
    routes = [route for part in parts for route in part.routes()]

    @contextlib.asynccontextmanager
    async def lifespan(_: Any) -> AsyncIterator[None]:
        warming = threading.Thread(target=library.warm, name="deepseek-open-runs", daemon=True)
        warming.start()
        with Sentinel(library, receivers, failed=_warn) if receivers else contextlib.nullcontext():
            yield
        library.close()
        warming.join(5)

    app = Starlette(
        routes=[*routes, Route("/api/{rest:path}", nowhere), Route("/{path:path}", _page_of(page))],
        middleware=[
            Middleware(Guard, access=access or Access()),
            Middleware(GZipMiddleware, minimum_size=1400, compresslevel=2),
        ],
        exception_handlers=handlers(),
        lifespan=lifespan,
    )
    app.state.end_streams = api.close
    return app


def serve(
    root: Path | str,
    *,
    host: str = "127.0.0.1",
    port: int | None = None,
    token: str = "",
    open_browser: bool = False,
    ends_with: IO[Any] | None = None,
    receivers: Sequence[Receiver] = (),
    say: Callable[[str], None] = print,
) -> None:
    """Serve the dashboard until interrupted, or until the stream ``ends_with`` ends.

    ``port`` 0 takes any free one, ``None`` the first free one from 6060.

    Raises:
        ConfigError: ``host`` and ``token`` do not go together, or the address cannot be had.
        MissingExtraError: without the extra ``web``.
    """
    access = Access(host, token)
    app = application(root, access, receivers=receivers)
    bound = bind(host, port)
    page = url(bound, token)
    say(f"dashboard of {root}: {page}  (Ctrl-C ends it)")
    if open_browser:
        threading.Timer(0.5, webbrowser.open, [page]).start()
    runs = server(app)
    if ends_with is not None:
        threading.Thread(target=_end_with, args=(ends_with, runs), daemon=True).start()
    with contextlib.suppress(KeyboardInterrupt), bound:
        runs.run(sockets=[bound])


def _warn(text: str) -> None:
    print(f"warning: {text}", file=sys.stderr, flush=True)


def _end_with(stream: IO[Any], runs: Any) -> None:
    while stream.read(4096):
        pass
    runs.should_exit = True


def server(app: Any) -> Any:
    """A uvicorn server of ``app`` that, asked to end, first ends the live streams, which never would.

    Raises:
        MissingExtraError: without the extra ``web``.
    """
    try:
        import uvicorn
    except ImportError as error:
        raise MissingExtraError("uvicorn", "web", "the dashboard") from error

    class Server(uvicorn.Server):
        async def shutdown(self, sockets: list[socket.socket] | None = None) -> None:
            app.state.end_streams()
            await super().shutdown(sockets)

    config = uvicorn.Config(
        app, log_level="error", access_log=False, server_header=False, timeout_keep_alive=30, lifespan="on",
        timeout_graceful_shutdown=2, proxy_headers=False, ws="none",
    )  # fmt: skip
    return Server(config)


def bind(host: str, port: int | None) -> socket.socket:
    """A listening socket; ``None``: on the first free port from 6060. Raises ``ConfigError``."""
    return address.bind(host, range(PORT, PORT + TRIES) if port is None else port)


def url(bound: socket.socket, token: str = "") -> str:
    """What to open in a browser to reach ``bound``."""
    host, port = bound.getsockname()[:2]
    if host in ("0.0.0.0", "::"):
        host = socket.gethostname()
    host = "localhost" if is_loopback(host) and host != "::1" else host
    host = f"[{host}]" if ":" in host else host
    return f"http://{host}:{port}/" + (f"?token={token}" if token else "")


def _page_of(page: Page) -> Callable[[Any], Any]:
    from starlette.responses import Response

    def answer(request: Any) -> Response:
        asset = page.get(request.path_params["path"])
        if asset is None:
            return Response("not found", 404, media_type="text/plain")
        kept = "public, max-age=31536000, immutable" if asset.hashed else "no-cache"
        headers = {"etag": asset.etag, "cache-control": kept, "vary": "accept-encoding"}
        if request.headers.get("if-none-match") == asset.etag:
            return Response(None, 304, headers)
        if "gzip" in request.headers.get("accept-encoding", "") and asset.zipped:
            return Response(asset.zipped, 200, {**headers, "content-encoding": "gzip"}, asset.media_type)
        return Response(asset.content, 200, headers, asset.media_type)

    return answer


def _asset(path: Path, root: Path) -> Asset:
    kind = TYPES.get(path.suffix) or mimetypes.guess_type(path.name)[0] or "application/octet-stream"
    return _made(path.read_bytes(), kind, path.relative_to(root).parts[0] == "assets")


def _made(content: bytes, kind: str, hashed: bool) -> Asset:
    small = (
        kind.startswith(("text/", "image/svg", "application/json", "application/wasm"))
        and len(content) > 1000
    )
    kind += "; charset=utf-8" if kind.startswith("text/") else ""
    etag = f'"{hashlib.blake2b(content, digest_size=12).hexdigest()}"'
    return Asset(content, gzip.compress(content, 6, mtime=0) if small else b"", kind, etag, hashed)
