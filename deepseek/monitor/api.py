"""The dashboard's HTTP interface: JSON about runs, their live stream, and actions on them.

Every answer comes from files that another process writes; nothing here touches a training run except through the
commands that its store keeps for it. A wrong request is answered with a status of 4xx and ``{"error": why}``, and so is
one about a run that vanished (410) or whose store is damaged (422).

Handlers that read files are plain functions, which Starlette runs in worker threads.
"""

from __future__ import annotations

import fnmatch
import sqlite3
from collections.abc import Callable
from typing import Any

import anyio
from starlette.exceptions import HTTPException
from starlette.requests import Request
from starlette.responses import Response
from starlette.routing import Route

from deepseek.errors import DeepseekError
from deepseek.monitor.catalogue import catalogue
from deepseek.monitor.library import Library, UnknownRun
from deepseek.monitor.openrun import OpenRun
from deepseek.monitor.stream import EventStream, Follower
from deepseek.monitor.wire import LONGEST, BadRequest, Json, integer

POINTS, MOST_POINTS = 1500, 20_000  #: of one series in one answer
MOST_SERIES = 1000  #: in one answer
BUDGET = 2_000_000  #: points of all series in one answer
LAST_STEP = 2**53
FOLLOWER_THREADS = 8


class Api:
    """The routes below ``/api`` over the runs of ``library``."""

    def __init__(self, library: Library) -> None:
        self.library = library
        self._followers: dict[str, Follower] = {}
        self._limiter: anyio.CapacityLimiter | None = None

    def routes(self) -> list[Route]:
        run = "/api/runs/{run}"
        return [
            Route("/api/runs", self.runs),
            Route(run, self.detail),
            Route(f"{run}/series", self.series),
            Route(f"{run}/data", self.data),
            Route(f"{run}/stream", self.stream),
            Route(f"{run}/ranks", self.ranks),
            Route(f"{run}/experts", self.experts),
            Route(f"{run}/events", self.events),
            Route("/api/compare", self.compare),
            Route("/api/catalogue", self.catalogue),
        ]

    def close(self) -> None:
        """End every live stream: the server is about to end."""
        for follower in self._followers.values():
            follower.close()

    # --- runs -------------------------------------------------------------------------------------------------

    def runs(self, request: Request) -> Response:
        found = []
        for name in self.library.ids():
            try:
                found.append(self.library.run(name).summary())
            except (OSError, UnknownRun):
                continue  # it vanished between the two lines
            except (DeepseekError, sqlite3.Error) as error:
                found.append(
                    {"id": name, "name": name.replace("~", "/"), "status": "damaged", "error": str(error)}
                )
        return Json(sorted(found, key=lambda run: (-(run.get("updated") or 0.0), run["id"])))

    def detail(self, request: Request) -> Response:
        return Json(self._run(request).detail())

    def events(self, request: Request) -> Response:
        """Events that are not of every step; ``name`` (repeatable) chooses kinds."""
        run, names = self._run(request), set(request.query_params.getlist("name"))
        limit = integer(request, "limit", 1000, 1, 100_000) or 1000
        run.refresh()
        return Json([e for e in run.log.rare if not names or e["event"] in names][-limit:])

    # --- series -----------------------------------------------------------------------------------------------

    def series(self, request: Request) -> Response:
        return Json(self._run(request).series())

    def data(self, request: Request) -> Response:
        run, window = self._run(request), _window(request)
        run.refresh()
        names = _names(request, run.reader.names())
        if len(names) * window["points"] > BUDGET:
            raise BadRequest(
                f"{len(names)} series × {window['points']} points are more than {BUDGET:,}; ask for fewer points"
            )
        return Json({name: run.window(name, **window) for name in names})

    def compare(self, request: Request) -> Response:
        """The same series of several runs."""
        ids = list(dict.fromkeys(request.query_params.getlist("run")))
        name = request.query_params.get("name", "train/loss")
        if not ids or len(ids) > MOST_SERIES:
            raise BadRequest(f"give between 1 and {MOST_SERIES} run=… to compare")
        window, found = _window(request), {}
        for run in map(self.library.run, ids):
            run.refresh()
            found[run.name] = run.window(name, **window) if name in run.reader.names() else None
        return Json(found)

    def catalogue(self, request: Request) -> Response:
        """Every metric that a run may have: its group, unit and meaning, in English and Chinese."""
        return Json(catalogue())

    def stream(self, request: Request) -> Any:
        run = self._run(request)
        if self._limiter is None:
            self._limiter = anyio.CapacityLimiter(FOLLOWER_THREADS)
        follower = self._followers.get(run.name)
        if follower is None or follower.run is not run:
            follower = self._followers[run.name] = Follower(run, self._limiter)
        return EventStream(follower, request.headers.get("last-event-id", ""))

    def ranks(self, request: Request) -> Response:
        """Seconds of a step, rank × step, for a heat map."""
        run, window = self._run(request), _window(request)
        run.refresh()
        key = request.query_params.get("name", "step_seconds")
        found = sorted((int(n.split("/")[1]), n) for n in run.reader.names() if _matches(n, f"rank/*/{key}"))
        return Json(
            {"ranks": [rank for rank, _ in found], **run.table([n for _, n in found], "seconds", **window)}
        )

    def experts(self, request: Request) -> Response:
        return Json({"layers": self._run(request).experts(**_window(request))})

    def _run(self, request: Request) -> OpenRun:
        return self.library.run(request.path_params["run"])


def _window(request: Request) -> dict[str, Any]:
    start = integer(request, "start", None, -LAST_STEP, LAST_STEP)
    stop = integer(request, "stop", None, -LAST_STEP, LAST_STEP)
    return {"start": start, "stop": stop, "points": integer(request, "points", POINTS, 1, MOST_POINTS)}


def _names(request: Request, known: list[str]) -> list[str]:
    """The series that ``name=…`` asks for; a name may be a pattern like ``layer/*/grad_norm``."""
    asked = request.query_params.getlist("name")
    if not asked:
        raise BadRequest("name=… says which series; /series lists them")
    found: dict[str, None] = {}
    present = set(known)
    for name in asked:
        if name in present:
            found[name] = None
        elif "*" in name or "?" in name:
            found.update(dict.fromkeys(fnmatch.filter(known, name[:LONGEST])))
        else:
            raise BadRequest(f"no series {name[:LONGEST]!r} in this run", 404)
    if len(found) > MOST_SERIES:
        raise BadRequest(f"{len(found)} series in one answer are more than {MOST_SERIES}")
    return list(found)


def _matches(name: str, pattern: str) -> bool:
    parts, wanted = name.split("/"), pattern.split("/")
    return len(parts) == len(wanted) and all(
        p.isdecimal() if w == "*" else p == w for p, w in zip(parts, wanted)
    )  # fmt: skip


def nowhere(request: Request) -> Response:
    """The answer to every path below ``/api`` that is none of ours."""
    raise BadRequest(f"nothing at {request.url.path[:LONGEST]!r}", 404)


# --- errors -------------------------------------------------------------------------------------------------------


def handlers() -> dict[Any, Callable[..., Any]]:
    """What to answer when a handler raises."""
    return {
        HTTPException: lambda _, e: _error(e.detail, e.status_code),
        UnknownRun: lambda _, e: _error(e, 404),
        BadRequest: lambda _, e: _error(e, e.status),
        DeepseekError: lambda _, e: _error(e, 422),
        sqlite3.Error: lambda _, e: _error(f"the run's store cannot be read: {e}", 422),
        FileNotFoundError: lambda _, e: _error(f"the run is gone: {e.filename or e}", 410),
        OSError: lambda _, e: _error(f"the run cannot be read: {e.strerror or e}", 410),
        Exception: lambda _, e: _error(f"a fault of this server: {type(e).__name__}", 500),
    }


def _error(reason: Any, status: int) -> Response:
    return Json({"error": str(reason)}, status)
