"""Errors as the OpenAI API writes them: ``{"error": {"message", "type", "param", "code"}}`` under a fitting status.

``ApiError`` is the one exception that handlers raise; what the rest of the package raises is translated here, so that
a client's mistake is a 4xx and a 500 is always a fault of ours.
"""

from __future__ import annotations

import math
import reprlib
from collections.abc import Mapping
from typing import Any

import orjson

from deepseek.errors import (
    CheckpointError,
    ConfigError,
    DataError,
    DeepseekError,
    EngineError,
    RequestError,
    RunError,
    WeightsError,
)
from deepseek.serve.supervision import EngineBusy, EngineCrashed, EngineLost, EngineReloading

LONGEST = 300  #: characters of a client's own value in an error message
CLIENT_GONE = 499  #: logged, never sent: the client closed the connection before its answer

TYPES = {
    400: "invalid_request_error", 401: "authentication_error", 403: "permission_error", 404: "not_found_error",
    405: "invalid_request_error", 408: "timeout_error", 409: "conflict_error", 411: "invalid_request_error",
    413: "invalid_request_error", 415: "invalid_request_error", 429: "rate_limit_error", 500: "server_error",
    503: "service_unavailable_error", 504: "timeout_error",
}  # fmt: skip


class ApiError(DeepseekError):
    """An answer that is an error.

    Attributes:
        status: the HTTP status.
        param: the field that is wrong, as a path (``messages[0].role``).
        code: a word for programs (``context_length_exceeded``, ``model_not_found``, …).
        headers: further headers of the answer, such as ``retry-after``.
    """

    def __init__(
        self,
        message: str,
        status: int = 400,
        *,
        param: str | None = None,
        code: str | None = None,
        headers: Mapping[str, str] | None = None,
    ) -> None:
        super().__init__(message)
        self.status, self.param, self.code = status, param, code
        self.headers = dict(headers or {})

    def body(self) -> dict[str, Any]:
        kind = TYPES.get(self.status, "invalid_request_error" if self.status < 500 else "server_error")
        return {
            "error": {"message": printable(str(self)), "type": kind, "param": self.param, "code": self.code}
        }

    def encoded(self) -> bytes:
        return orjson.dumps(self.body())


def translated(error: Exception) -> ApiError:
    """What a client is told of ``error``."""
    if isinstance(error, ApiError):
        return error
    if isinstance(error, RequestError):
        return ApiError(str(error), 400, param=error.param)
    if isinstance(error, EngineBusy):
        wait = str(max(1, math.ceil(error.seconds - error.limit)))
        return ApiError(str(error), 429, code="queue_full", headers={"retry-after": wait})
    if isinstance(error, EngineReloading):
        return ApiError(str(error), 409, code="reload_in_progress", headers={"retry-after": "2"})
    if isinstance(error, EngineLost):
        return ApiError(str(error), 503, code="engine_lost", headers={"retry-after": "2"})
    if isinstance(error, EngineCrashed):  # OpenAI's clients ask again after a 503 unless they are told not to
        return ApiError(str(error), 503, code="engine_crashed", headers={"x-should-retry": "false"})
    if isinstance(error, EngineError):
        return ApiError(str(error), 503, code="engine_unavailable", headers={"retry-after": "2"})
    if isinstance(error, (ConfigError, DataError)):
        return ApiError(str(error), 400)
    if isinstance(error, (CheckpointError, RunError, WeightsError)):
        return ApiError(str(error), 400, param="path")
    return ApiError(f"a fault of this server: {type(error).__name__}", 500, code="internal_error")


_BRIEF = reprlib.Repr()
_BRIEF.maxlevel, _BRIEF.maxlist, _BRIEF.maxdict, _BRIEF.maxstring = 8, 50, 50, LONGEST


def shown(value: Any) -> str:
    """A client's value in a message: short, on one line, and made in no time however large or deep the value is."""
    text = repr(value[: LONGEST + 1]) if isinstance(value, str) else _BRIEF.repr(value)
    return text if len(text) <= LONGEST else text[: LONGEST - 1] + "…"


def printable(text: str) -> str:
    """``text`` without what UTF-8 cannot hold."""
    return text.encode("utf-8", "replace").decode()
