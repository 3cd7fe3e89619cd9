"""The inspector over HTTP: heads, experts, attention maps, ablations, histograms and traces of a run's checkpoints.

The work is a model's and takes a while: one question at a time is computed, in a thread, while everything else goes on
being answered. ``monitor.inspect`` does it; nothing leaves the machine.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import anyio
import anyio.to_thread
from starlette.requests import Request
from starlette.responses import FileResponse, Response
from starlette.routing import Route

from deepseek.errors import DeepseekError
from deepseek.monitor.library import Library
from deepseek.monitor.wire import LONGEST, BadRequest, Json, body, integer, text

MOST = 1 << 20  #: positions, layers, …: what is out of bounds for a model is the inspector's to say
TRACE_FORMS = ("speedscope", "verdict", "chrome")
KEPT = 4  #: runs whose inspector, with a model each, is kept


class InspectApi:
    """The routes below ``/api/runs/{run}/inspect`` and ``/traces``."""

    def __init__(self, library: Library) -> None:
        self.library = library
        self._inspectors: dict[str, Any] = {}
        self._limiter: anyio.CapacityLimiter | None = None

    def routes(self) -> list[Route]:
        run = "/api/runs/{run}"
        return [
            Route(f"{run}/inspect", self.overview),
            Route(f"{run}/inspect/heads", self.heads),
            Route(f"{run}/inspect/experts", self.experts),
            Route(f"{run}/inspect/updates", self.updates),
            Route(f"{run}/inspect/attention", self.attention),
            Route(f"{run}/inspect/histograms", self.histograms),
            Route(f"{run}/inspect/ablate", self.ablate, methods=["POST"]),
            Route(f"{run}/traces", self.traces),
            Route(f"{run}/traces/{{trace}}", self.trace),
        ]

    async def overview(self, request: Request) -> Response:
        return await self._answer(request, lambda inspector: inspector.overview())

    async def heads(self, request: Request) -> Response:
        step = integer(request, "step", None, 0, 2**53)
        return await self._answer(request, lambda inspector: inspector.heads(step=step))

    async def experts(self, request: Request) -> Response:
        step = integer(request, "step", None, 0, 2**53)
        return await self._answer(request, lambda inspector: inspector.experts(step=step))

    async def updates(self, request: Request) -> Response:
        return await self._answer(request, lambda inspector: inspector.updates())

    async def attention(self, request: Request) -> Response:
        names = ("layer", "head", "step", "start", "size", "pixels")
        given = {name: integer(request, name, None, 0, 2**53 if name == "step" else MOST) for name in names}
        if given["layer"] is None or given["head"] is None:
            raise BadRequest("layer=… and head=… say whose attention")
        given = {name: value for name, value in given.items() if value is not None}
        branch = request.query_params.get("branch", "")[:LONGEST]
        return await self._answer(request, lambda inspector: inspector.attention(**given, branch=branch))

    async def histograms(self, request: Request) -> Response:
        step = integer(request, "step", None, 0, 2**53)
        return await self._answer(request, lambda inspector: inspector.histograms(step=step))

    async def ablate(self, request: Request) -> Response:
        given = await body(request)
        mode = text(given, "mode", default="zero", limit=20)
        given.pop("mode", None)
        if unknown := given.keys() - {"layer", "head", "expert", "step"}:
            raise BadRequest(
                f"ablate takes layer, head, expert, mode and step, not {min(unknown)!r}"[:LONGEST]
            )
        for name, value in given.items():
            if value is not None and (
                isinstance(value, bool) or not isinstance(value, int) or not 0 <= value < 2**53
            ):
                raise BadRequest(f"{name!r} must be a whole number from 0 on")
        if given.get("layer") is None or (given.get("head") is None) == (given.get("expert") is None):
            raise BadRequest("give layer, and either head or expert")
        return await self._answer(request, lambda inspector: inspector.ablate(**given, mode=mode))

    async def traces(self, request: Request) -> Response:
        return await self._answer(request, lambda inspector: inspector.traces())

    async def trace(self, request: Request) -> Response:
        """A captured trace: ``form=speedscope`` (the default) to look at, ``verdict`` for what it says, or ``chrome``,
        the profiler's own file."""
        name, form = request.path_params["trace"], request.query_params.get("form", "speedscope")
        if form not in TRACE_FORMS:
            raise BadRequest(f"form={form[:LONGEST]!r} is none of {', '.join(TRACE_FORMS)}")
        if form == "chrome":
            return await self._answer(request, lambda inspector: inspector.trace_file(name, form))
        return await self._answer(request, lambda inspector: inspector.trace(name, form))

    async def _answer(self, request: Request, question: Callable[[Any], Any]) -> Response:
        if self._limiter is None:
            self._limiter = anyio.CapacityLimiter(1)
        name = request.path_params["run"]

        def work() -> Any:
            try:
                return question(self._inspector(name))
            except BadRequest:
                raise
            except DeepseekError as error:
                raise BadRequest(str(error), 404 if "no " in str(error)[:40] else 400) from None

        found = await anyio.to_thread.run_sync(work, limiter=self._limiter)
        if isinstance(found, Path):
            kind = "application/gzip" if found.suffix == ".gz" else None
            headers = {"cache-control": "no-store"}
            return FileResponse(found, filename=found.name, media_type=kind, headers=headers)
        return Json(found)

    def _inspector(self, name: str) -> Any:
        run = self.library.run(name)
        found = self._inspectors.pop(name, None)
        if found is None or found.path != run.path:
            from deepseek.monitor.inspect import Inspector

            found = Inspector(run.path)
        self._inspectors[name] = found  # the newest last
        while len(self._inspectors) > KEPT:
            self._inspectors.pop(next(iter(self._inspectors)))
        return found
