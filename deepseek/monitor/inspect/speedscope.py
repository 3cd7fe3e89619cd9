"""A recorded time line in the file format of speedscope, a viewer of flame graphs that runs in the browser, offline.

One profile per thread and stream, of the kind 'evented': every range opens and closes, properly nested. The format is
the one of the file-format-schema that speedscope publishes.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from deepseek.monitor.inspect.timeline import Span, Timeline

SCHEMA = "https://www.speedscope.app/file-format-schema.json"  #: the name of the format; nobody fetches it


def to_speedscope(timeline: Timeline, name: str) -> dict[str, Any]:
    """The whole time line as a JSON-able dict; times in microseconds from its start."""
    frames: dict[str, int] = {}
    lanes = {"steps and phases": sorted([*timeline.steps, *timeline.phases], key=lambda s: (s.start, -s.end))}
    lanes.update(timeline.host)
    lanes.update(timeline.device)
    lanes = {lane: spans for lane, spans in lanes.items() if spans}
    origin = min((spans[0].start for spans in lanes.values()), default=0.0)
    profiles = [_profile(lane, spans, origin, frames) for lane, spans in lanes.items()]
    profiles.sort(key=lambda p: (p["name"] != "steps and phases", -len(p["events"])))
    busiest = next((i for i, p in enumerate(profiles) if p["name"] != "steps and phases"), 0)
    return {
        "$schema": SCHEMA,
        "name": name,
        "exporter": "deepseek-framework",
        "activeProfileIndex": busiest,
        "shared": {"frames": [{"name": frame} for frame in frames]},
        "profiles": profiles,
    }


def _profile(lane: str, spans: Sequence[Span], origin: float, frames: dict[str, int]) -> dict[str, Any]:
    events: list[dict[str, Any]] = []
    stack: list[tuple[int, float]] = []
    end = 0.0

    def close(at: float) -> None:
        frame, until = stack.pop()
        events.append({"type": "C", "frame": frame, "at": round(min(until, at), 3)})

    for span in spans:
        start, until = span.start - origin, span.end - origin
        while stack and stack[-1][1] <= start:
            close(stack[-1][1])
        if stack:
            until = min(until, stack[-1][1])  # clocks round: a child never outlives its parent
        frame = frames.setdefault(span.name, len(frames))
        events.append({"type": "O", "frame": frame, "at": round(start, 3)})
        stack.append((frame, until))
        end = max(end, until)
    while stack:
        close(stack[-1][1])
    return {
        "type": "evented",
        "name": lane,
        "unit": "microseconds",
        "startValue": 0,
        "endValue": round(end, 3),
        "events": events,
    }
