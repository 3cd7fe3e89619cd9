"""A server with invented answers in the API's shape: every page has content, and every number is known to the tests.

The real server is tested elsewhere (and with the page in ``test_page_live.py``). Here a test must know that the spike
is at step 31,217 and nowhere else. ``python fake_server.py [PORT]`` serves it for a look.
"""

from __future__ import annotations

import json
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any
from urllib.parse import parse_qs, unquote, urlsplit

import fake_run
import fake_series
from fake_run import RUNS, SPEEDSCOPE
from fake_series import STEPS

DIST = Path(__file__).parents[3] / "deepseek" / "monitor" / "web" / "dist"
POLICY = (
    "default-src 'self'; img-src 'self' data:; object-src 'none'; base-uri 'none'; frame-ancestors 'none'"
)
VIEWER = (
    "default-src 'self'; script-src 'self' 'wasm-unsafe-eval'; style-src 'self' 'unsafe-inline'; "
    "img-src 'self' data: blob:; worker-src 'self' blob:; connect-src 'self' blob: data:"
)
TYPES = {
    ".html": "text/html; charset=utf-8",
    ".js": "text/javascript; charset=utf-8",
    ".css": "text/css; charset=utf-8",
    ".svg": "image/svg+xml",
    ".json": "application/json",
    ".png": "image/png",
    ".woff2": "font/woff2",
    ".wasm": "application/wasm",
    ".ico": "image/x-icon",
}


class State:
    """What the page changed: commands and marks."""

    def __init__(self) -> None:
        self.commands: list[dict[str, Any]] = []
        self.marks: dict[str, str] = {}
        self.asked: list[str] = []
        self.notes: list[dict[str, Any]] = []
        self.posted: list[dict[str, Any]] = []


class Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    server: FakeServer

    def log_message(self, *_: Any) -> None:
        pass

    def answer(
        self, body: bytes, kind: str = "application/json", status: int = 200, policy: str = POLICY
    ) -> None:
        self.send_response(status)
        headers = {"Content-Type": kind, "Content-Length": str(len(body)), "Content-Security-Policy": policy}
        for key, value in {**headers, "Cache-Control": "no-cache"}.items():
            self.send_header(key, value)
        self.end_headers()
        self.wfile.write(body)

    def json(self, value: Any, status: int = 200) -> None:
        self.answer(json.dumps(value).encode(), status=status)

    def do_GET(self) -> None:
        url = urlsplit(self.path)
        path, query = unquote(url.path), parse_qs(url.query)
        self.server.state.asked.append(self.path)
        if path.startswith("/api/"):
            return self.api(path[5:].split("/"), query)
        file = DIST / (path.lstrip("/") or "index.html")
        if not file.is_file() or DIST not in file.resolve().parents:
            return self.json({"error": "not found"}, 404)
        policy = VIEWER if path.startswith("/speedscope/") else POLICY
        return self.answer(
            file.read_bytes(), TYPES.get(file.suffix, "application/octet-stream"), policy=policy
        )

    def api(self, path: list[str], query: dict[str, list[str]]) -> None:
        number = lambda key, other: int(float(query.get(key, [other])[0]))  # noqa: E731
        if path == ["runs"]:
            return self.json([fake_run.card(r, i) for i, r in enumerate(self.server.runs)])
        if path == ["compare"]:
            found = {}
            for i, run in enumerate(query["run"]):
                w = fake_series.window(
                    query["name"][0], number("start", 0), number("stop", STEPS + 1), number("points", 1500)
                )
                shift = 1 + 0.02 * i
                found[run] = {**w, **{k: [x * shift for x in w[k]] for k in ("low", "high", "mean")}}
            return self.json(found)
        if len(path) == 2:
            return (
                self.json(fake_run.run_info(path[1]))
                if path[1] in RUNS
                else self.json({"error": "no such run"}, 404)
            )
        rest = "/".join(path[2:])
        if rest == "data":
            spans = (number("start", 0), number("stop", STEPS + 1), number("points", 1500))
            return self.json({n: fake_series.window(n, *spans) for n in query.get("name", [])})
        if rest == "stream":
            return self.stream()
        if rest.startswith("incidents/"):
            return self.json(next(x for x in self.marked() if x["id"] == path[3]))
        if rest.startswith("traces/"):
            return self.json(SPEEDSCOPE)
        made = {
            "series": fake_series.series,
            "incidents": self.marked,
            "lineage": fake_run.lineage,
            "ranks": fake_run.ranks,
            "experts": fake_run.experts,
            "notes": lambda: self.server.state.notes,
            "actions": lambda: self.server.state.commands,
            "events": fake_run.switches,
            "inspect": fake_run.inspected,
            "inspect/heads": fake_run.heads,
            "inspect/attention": lambda: fake_run.attention(query),
            "inspect/histograms": fake_run.histograms,
            "traces": fake_run.traces,
        }
        return self.json(made[rest]()) if rest in made else self.json({"error": "not found"}, 404)

    def marked(self) -> list[dict[str, Any]]:
        marks = self.server.state.marks
        return [{**x, "status": marks.get(x["id"], x["status"])} for x in fake_run.incidents()]

    def stream(self) -> None:
        self.send_response(200)
        self.send_header("Content-Type", "text/event-stream")
        self.send_header("Connection", "close")
        self.end_headers()
        try:
            while not self.server.ended.wait(0.2):
                self.wfile.write(b": still here\n\n")
                self.wfile.flush()
        except OSError:
            return
        finally:
            self.close_connection = True

    def change(self) -> None:
        body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
        if self.headers.get("X-Deepseek") != "1":
            return self.json({"error": "the header X-Deepseek is missing"}, 403)
        path = urlsplit(self.path).path
        state = self.server.state
        if path.endswith("/notes"):
            state.notes.append({**body, "id": len(state.notes) + 1, "time": time.time(), "by": "you"})
            return self.json(state.notes[-1])
        if path.endswith("/ablate"):
            return self.json({"loss": 2.113, "ablated_loss": 2.1144, "delta": 0.0014})
        if path.endswith("/actions"):
            state.posted.append(body)
            result = {
                "text": "went back from step 50000 to 30000; the batches of steps 31214 to 31217 are left out"
            }
            arguments = {**body.get("arguments", {}), "incident": body.get("incident")}
            command = {
                "id": len(state.commands) + 1,
                "action": body["action"],
                "arguments": arguments,
                "by": "you",
            }
            command.update(status="done", result=result, created=time.time(), finished=time.time())
            state.commands.append(command)
            return self.json(command)
        state.marks[path.rsplit("/", 1)[1]] = body["status"]
        return self.json(body)

    do_POST = do_PATCH = change


class FakeServer(ThreadingHTTPServer):
    daemon_threads = True

    def __init__(self, port: int = 0) -> None:
        super().__init__(("127.0.0.1", port), Handler)
        self.state, self.runs, self.ended = State(), list(RUNS), threading.Event()

    def handle_error(self, request: Any, client_address: Any) -> None:
        """A page that was left hangs up in the middle of an answer: no error."""
        if not isinstance(sys.exc_info()[1], OSError):
            super().handle_error(request, client_address)

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.server_address[1]}/"


@contextmanager
def fake_server() -> Iterator[FakeServer]:
    """Serve the built page with invented answers on a free port of the loopback."""
    server = FakeServer()
    thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.05}, daemon=True)
    thread.start()
    try:
        yield server
    finally:
        server.ended.set()
        server.shutdown()
        server.server_close()
        thread.join(5)


if __name__ == "__main__":
    FakeServer(int(sys.argv[1]) if len(sys.argv) > 1 else 6170).serve_forever()
