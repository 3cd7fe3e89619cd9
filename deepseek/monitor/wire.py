"""What goes over the wire: JSON in which a number that JSON lacks is ``null``, and what a request may ask."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import orjson
from starlette.requests import ClientDisconnect, Request
from starlette.responses import Response

from deepseek.errors import DeepseekError
from deepseek.monitor.units import number

LONGEST = 400  #: characters of a name or a value in an error message or a query
OPTIONS = orjson.OPT_SERIALIZE_NUMPY | orjson.OPT_NON_STR_KEYS
BODY_BYTES = 256 << 10


class BadRequest(DeepseekError):
    """A request that cannot be answered as it is; ``status`` is the HTTP status."""

    def __init__(self, message: str, status: int = 400) -> None:
        super().__init__(message)
        self.status = status


class Json(Response):
    """A JSON answer: numpy arrays become lists, NaN and infinities ``null``. Never kept by a browser."""

    media_type = "application/json"

    def __init__(self, content: Any, status_code: int = 200) -> None:
        super().__init__(content, status_code, {"cache-control": "no-store"})

    def render(self, content: Any) -> bytes:
        return encode(content)


def encode(content: Any) -> bytes:
    """JSON as UTF-8. What JSON cannot hold is written as its ``str``."""
    try:
        return orjson.dumps(content, default=_plain, option=OPTIONS)
    except (
        TypeError
    ):  # a number of more than 64 bits, a name that is no UTF-8: somewhere, so all is looked at
        return orjson.dumps(_scrubbed(content), default=_plain, option=OPTIONS)


def _scrubbed(value: Any) -> Any:
    if isinstance(value, str):
        return value.encode("utf-8", "replace").decode()
    if isinstance(value, int) and not -(2**63) <= value < 2**63:
        return str(value)
    if isinstance(value, dict):
        return {_scrubbed(k): _scrubbed(v) for k, v in value.items()}
    return [_scrubbed(v) for v in value] if isinstance(value, (list, tuple)) else value


def _plain(value: Any) -> Any:
    if isinstance(value, np.ndarray):  # one that is not contiguous or of an uncommon type
        return np.ascontiguousarray(value).tolist()
    if isinstance(value, (set, frozenset)):
        return sorted(value, key=str)
    return str(value)


def integer(request: Request, name: str, default: int | None, low: int, high: int) -> int | None:
    """The query parameter ``name`` as an integer between ``low`` and ``high``. Raises ``BadRequest``."""
    text = request.query_params.get(name)
    if text is None or text == "":
        return default
    try:
        value = int(text)
    except ValueError:
        found = number(text)
        if found is None or not math.isfinite(found):
            raise BadRequest(f"{name}={text[:LONGEST]!r} is no whole number") from None
        value = int(found)
    if not low <= value <= high:
        raise BadRequest(f"{name}={value} must lie between {low} and {high}"[:LONGEST])
    return value


async def body(request: Request) -> dict[str, Any]:
    """The JSON object that a request carries. Raises ``BadRequest``."""
    data = b""
    try:
        async for chunk in request.stream():
            data += chunk
            if len(data) > BODY_BYTES:
                raise BadRequest(f"a body of more than {BODY_BYTES >> 10} KiB", 413)
    except ClientDisconnect:
        raise BadRequest("the client went away") from None
    try:
        found = orjson.loads(data)
    except orjson.JSONDecodeError as error:
        raise BadRequest(f"the body is no JSON: {error}"[:LONGEST]) from None
    if not isinstance(found, dict):
        raise BadRequest("the body must be a JSON object")
    return found


def text(values: dict[str, Any], name: str, *, default: str | None = None, limit: int = LONGEST) -> str:
    """``values[name]`` as text of at most ``limit`` characters. Raises ``BadRequest``."""
    value = values.get(name, default)
    if not isinstance(value, str) or not value.strip():
        raise BadRequest(f"{name!r} must be a text that is not empty")
    if len(value) > limit:
        raise BadRequest(f"{name!r} has {len(value)} characters, more than {limit}")
    return value
