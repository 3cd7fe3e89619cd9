"""Numbers for other programs: ``/metrics`` for Prometheus, and a run's series as a CSV or Parquet file."""

from __future__ import annotations

import fnmatch
import os
import sqlite3
import tempfile
import time
from pathlib import Path
from typing import Any

from starlette.background import BackgroundTask
from starlette.requests import Request
from starlette.responses import FileResponse, Response, StreamingResponse
from starlette.routing import Route

from deepseek.errors import DeepseekError
from deepseek.monitor.export.columns import csv_lines, write_parquet
from deepseek.monitor.export.prometheus import OPEN_METRICS, TEXT, Exposition
from deepseek.monitor.library import Library
from deepseek.monitor.openrun import OpenRun
from deepseek.monitor.wire import LONGEST, BadRequest

RECENT = 900.0  #: seconds after its last event for which a run that ended still has its series in /metrics
MOST_SERIES = 2000  #: columns of a table


class ExportApi:
    """``/metrics`` and ``/api/runs/{run}/export``."""

    def __init__(self, library: Library) -> None:
        self.library = library

    def routes(self) -> list[Route]:
        return [Route("/metrics", self.metrics), Route("/api/runs/{run}/export", self.export)]

    def metrics(self, request: Request) -> Response:
        """Every run's state, and the newest values of runs at work; ``run=…`` (repeatable) chooses any."""
        page, asked = Exposition(), request.query_params.getlist("run")
        for name in asked or self.library.ids():
            try:
                self._add(page, self.library.run(name), always=bool(asked))
            except (OSError, DeepseekError, sqlite3.Error):
                if asked:
                    raise
        open_metrics = "application/openmetrics-text" in request.headers.get("accept", "")
        kind = OPEN_METRICS if open_metrics else TEXT
        return Response(page.text(open_metrics), headers={"content-type": kind, "cache-control": "no-store"})

    def _add(self, page: Exposition, run: OpenRun, always: bool) -> None:
        summary = run.summary()
        page.run(summary, run.facts())
        alone = run.path == self.library.root
        recent = time.time() - (summary["updated"] or 0.0) < RECENT
        if always or alone or recent or summary["status"] == "running":
            page.series(run.name, run.reader.last())

    def export(self, request: Request) -> Response:
        """The table of the series that ``name=…`` chooses (patterns; all unless told)."""
        run = self.library.run(request.path_params["run"])
        run.refresh()
        kind = request.query_params.get("format", "csv")
        names = chosen(run.reader.names(), request.query_params.getlist("name"))
        if len(names) > MOST_SERIES:
            raise BadRequest(
                f"{len(names)} series are more than {MOST_SERIES} in one file; choose with name=…"
            )
        file = "".join(c if c.isascii() and (c.isalnum() or c in "._-") else "_" for c in run.name)
        if kind == "csv":
            headers = {
                "content-disposition": f'attachment; filename="{file}.csv"',
                "cache-control": "no-store",
            }
            return StreamingResponse(csv_lines(run.reader, names), media_type="text/csv", headers=headers)
        if kind == "parquet":
            return _parquet(run, names, f"{file}.parquet")
        raise BadRequest(f"format={kind[:LONGEST]!r} is neither csv nor parquet")


def chosen(known: list[str], patterns: list[str]) -> list[str]:
    """The names that match any of ``patterns``, in their own order; all without patterns. Raises ``BadRequest``."""
    if not patterns:
        return known
    wanted = {name for pattern in patterns for name in fnmatch.filter(known, pattern[:LONGEST])}
    if not wanted:
        raise BadRequest(f"no series matches {', '.join(patterns)[:LONGEST]!r}", 404)
    return [name for name in known if name in wanted]


def _parquet(run: OpenRun, names: list[str], filename: str) -> Any:
    descriptor, made = tempfile.mkstemp(prefix="deepseek-", suffix=".parquet")
    os.close(descriptor)
    path = Path(made)
    try:
        write_parquet(run.reader, names, path, {"run": run.name})
    except BaseException:
        path.unlink(missing_ok=True)
        raise
    done = BackgroundTask(path.unlink, missing_ok=True)
    return FileResponse(path, filename=filename, media_type="application/vnd.apache.parquet", background=done)
