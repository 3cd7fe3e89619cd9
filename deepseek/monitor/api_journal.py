"""What people and the watch write about a run: incidents, notes, lineage; and what people ask it to do."""

from __future__ import annotations

import getpass
from typing import Any

import anyio.to_thread
from starlette.requests import Request
from starlette.responses import Response
from starlette.routing import Route

from deepseek.errors import ConfigError, RunError
from deepseek.monitor import control
from deepseek.monitor.library import Library
from deepseek.monitor.openrun import OpenRun, light
from deepseek.monitor.store import STATUSES
from deepseek.monitor.wire import BadRequest, Json, body, integer, text

LONGEST_NOTE = 10_000  #: characters


class JournalApi:
    """The routes of one run's incidents, notes, lineage and actions."""

    def __init__(self, library: Library) -> None:
        self.library = library

    def routes(self) -> list[Route]:
        run = "/api/runs/{run}"
        return [
            Route(f"{run}/incidents", self.incidents),
            Route(f"{run}/incidents/{{incident}}", self.incident, methods=["GET"]),
            Route(f"{run}/incidents/{{incident}}", self.change_incident, methods=["PATCH"]),
            Route(f"{run}/alerts", self.alerts),
            Route(f"{run}/notes", self.notes, methods=["GET"]),
            Route(f"{run}/notes", self.add_note, methods=["POST"]),
            Route(f"{run}/lineage", self.lineage),
            Route(f"{run}/samples", self.samples),
            Route(f"{run}/actions", self.actions, methods=["GET"]),
            Route(f"{run}/actions", self.act, methods=["POST"]),
        ]

    def incidents(self, request: Request) -> Response:
        """Every incident, without its gradient map and samples: those come with the one that is opened."""
        return Json([light(incident) for incident in self._run(request).incidents()])

    def incident(self, request: Request) -> Response:
        return Json(_known_incident(self._run(request), request))

    async def change_incident(self, request: Request) -> Response:
        status = text(await body(request), "status")
        if status not in STATUSES:
            raise BadRequest(f"status {status!r} is none of {', '.join(STATUSES)}")

        def change() -> Any:
            run = self._run(request)
            return run.store.set_status(_known_incident(run, request)["id"], status)

        return Json(await anyio.to_thread.run_sync(change))

    def alerts(self, request: Request) -> Response:
        after = integer(request, "after", 0, 0, 2**62) or 0
        return Json(self._run(request).store.alerts(after))

    def notes(self, request: Request) -> Response:
        return Json(self._run(request).store.notes())

    async def add_note(self, request: Request) -> Response:
        given = await body(request)
        note, by = text(given, "text", limit=LONGEST_NOTE), text(given, "by", default=_person(), limit=100)
        step = given.get("step")
        if step is not None and (
            isinstance(step, bool) or not isinstance(step, int) or not 0 <= step < 2**53
        ):
            raise BadRequest("'step' must be a whole number from 0 on, or be left out")

        def add() -> Any:
            store = self._run(request).store
            number = store.add_note(note, step=step, by=by)
            return next(n for n in store.notes() if n["id"] == number)

        return Json(await anyio.to_thread.run_sync(add), 201)

    def lineage(self, request: Request) -> Response:
        """Where the run comes from and what became of it: the store's lines, and the events that tell of it."""
        run = self._run(request)
        run.refresh()
        kinds = ("run", "resume", "interrupted", "rollback", "checkpoint", "export", "done")
        events = [e for e in run.log.rare if e["event"] in kinds]
        return Json({"lines": run.store.lineage(), "events": events})

    def samples(self, request: Request) -> Response:
        """Documents of the batches from step ``start`` to ``stop`` of which something is known."""
        start = integer(request, "start", 0, 0, 2**53) or 0
        return Json(self._run(request).store.samples(start, integer(request, "stop", start, 0, 2**53)))

    def actions(self, request: Request) -> Response:
        """What was asked of the run, oldest first, and what came of it."""
        return Json([command.to_dict() for command in self._run(request).store.commands()])

    async def act(self, request: Request) -> Response:
        """Ask the trainer for something. It does so between two steps; the stream tells when."""
        given = await body(request)
        action, arguments = text(given, "action"), given.get("arguments") or {}
        if not isinstance(arguments, dict):
            raise BadRequest("'arguments' must be an object")
        if given.get("incident") is not None:
            arguments = {**arguments, "incident": text(given, "incident")}

        def ask() -> Any:
            run = self._run(request)
            try:
                number = control.request(run.path, action, arguments, by=_person())
            except ConfigError as error:
                raise BadRequest(str(error)) from None
            except RunError as error:
                raise BadRequest(str(error), 409) from None
            return next((c.to_dict() for c in run.store.commands() if c.id == number), {"id": number})

        return Json(await anyio.to_thread.run_sync(ask), 202)

    def _run(self, request: Request) -> OpenRun:
        return self.library.run(request.path_params["run"])


def _known_incident(run: OpenRun, request: Request) -> dict[str, Any]:
    key = request.path_params["incident"]
    found = next((i for i in run.incidents() if str(i.get("id")) == key), None)
    if found is None:
        raise BadRequest(f"run {run.name} has no incident {key[:100]!r}", 404)
    return found


def _person() -> str:
    """Who acts: the account that the dashboard runs under, as it knows no other names."""
    try:
        return f"{getpass.getuser()} (dashboard)"
    except (OSError, KeyError, ImportError):
        return "dashboard"
