"""Charts as plain SVG, drawn here by hand, each with its numbers beside it as JSON.

The drawing works alone, in print and without scripts. The page's script reads the JSON to draw the chart
again for the width of the screen, to zoom, and to name the values under the pointer. Nothing is ever clipped:
a scale covers every finite value, and a long run is thinned by the smallest and largest value of each bucket
(the scheme of "M4", Jugel et al. 2014, without its first and last), so that a spike of a single step remains.
"""

from __future__ import annotations

import base64
import math
import struct
import zlib
from collections.abc import Sequence
from dataclasses import dataclass, field
from itertools import accumulate
from typing import Any

from deepseek.monitor.history import Break, Points
from deepseek.monitor.markup import Html, data_block, tag
from deepseek.monitor.units import duration, percent, si, significant

WIDTH, HEIGHT = 560, 230
LEFT, RIGHT, TOP, BOTTOM = 50, 14, 14, 26
BUCKETS = 1200  #: kept in the page for zooming: at most twice as many points a line
UNDER, OVER = (0, 114, 178), (213, 94, 0)  #: Okabe-Ito blue and vermilion
COLUMNS = 160  #: of a heat map


@dataclass(frozen=True)
class Line:
    """One series; ``color`` 0-7 of the palette, ``style`` one of 'line', 'faint', 'dots', 'dash'."""

    name: str
    points: Points
    color: int = 0
    style: str = "line"


@dataclass(frozen=True)
class Chart:
    """Lines over the training step."""

    key: str
    title: str
    lines: Sequence[Line]
    unit: str = ""
    log: bool = False
    note: str = ""
    breaks: Sequence[Break] = field(default_factory=tuple)
    bounds: tuple[float, float] | None = None  #: values the scale must at least cover

    def figure(self) -> Html | None:
        """The whole ``<figure>``, or nothing when there is nothing to show."""
        lines = [Line(x.name, _drawable(x.points, self.log), x.color, x.style) for x in self.lines]
        lines = [x for x in lines if x.points]
        if not lines:
            return None
        lost = sorted({x for line in self.lines for x, y in line.points if not math.isfinite(y)})
        text = self.title + (f", {self.unit}" if self.unit else "")
        scale = Scale.around(lines, self.log, self.bounds)
        svg = tag(
            "svg",
            tag("title", f"{text}: {_spoken(lines)}"),
            scale.axes(),
            break_marks(self.breaks, scale),
            [_path(line, scale) for line in lines],
            [_lost_mark(x, scale) for x in lost[:200]],
            viewBox=f"0 0 {WIDTH} {HEIGHT}",
            role="img",
            aria_label=f"{text}: {_spoken(lines)}",
        )
        data = {
            "kind": "lines",
            "log": self.log,
            "unit": self.unit,
            "x": [scale.x0, scale.x1],
            "bounds": self.bounds,
            "lines": [_packed(line) for line in lines],
            "breaks": packed_breaks(self.breaks),
            "lost": lost[:200],
        }
        return _figure(self.key, self.title, self.unit, self.note, legend(lines, lost), svg, data)


@dataclass(frozen=True)
class HeatMap:
    """Experts (or heads) as rows, steps as columns, the share relative to the mean as colour.

    A cell is transparent at the mean, blue below and vermilion above, on any background. Cells are means over
    their steps; the smallest and largest single-step values are in the note.
    """

    key: str
    title: str
    rows: Sequence[tuple[float, list[float]]]
    note: str = ""
    breaks: Sequence[Break] = field(default_factory=tuple)

    def figure(self) -> Html | None:
        width = max((len(values) for _, values in self.rows), default=0)
        rows = [(x, values) for x, values in self.rows if len(values) == width]
        if not rows or not width:
            return None
        grid, x0, x1 = _grid(rows)
        scale = Scale(x0, x1, 0, width, False, height=min(max(40 + 9 * width, 110), 240))
        top = max(max(column) for column in grid)
        low = min(min(column) for column in grid)
        text = f"{self.title}: {low:.2f} to {top:.2f} times the mean share"
        svg = tag(
            "svg",
            tag("title", text),
            scale.frame(),
            tag(
                "image",
                href=png(grid),
                x=LEFT,
                y=TOP,
                width=WIDTH - LEFT - RIGHT,
                height=scale.height - TOP - BOTTOM,
                preserveAspectRatio="none",
            ),
            scale.x_axis(),
            [_row_label(i, width, scale) for i in sorted({0, width - 1})],
            break_marks(self.breaks, scale),
            viewBox=f"0 0 {WIDTH} {scale.height}",
            role="img",
            aria_label=text,
        )
        data = {
            "kind": "heat",
            "x": [x0, x1],
            "height": scale.height,
            "rows": width,
            "grid": [[round(v, 2) for v in column] for column in grid],
            "breaks": packed_breaks(self.breaks),
        }
        return _figure(self.key, self.title, "", self.note, Html(""), svg, data)


@dataclass(frozen=True)
class Scale:
    """Steps and values to places in the drawing."""

    x0: float
    x1: float
    y0: float
    y1: float
    log: bool
    height: int = HEIGHT

    @classmethod
    def around(cls, lines: Sequence[Line], log: bool, bounds: tuple[float, float] | None = None) -> Scale:
        """The scale that covers every point of ``lines`` and ``bounds``."""
        xs = [x for line in lines for x, _ in line.points]
        ys = [y for line in lines for _, y in line.points] + list(bounds or ())
        low, high = min(ys), max(ys)
        if log:
            pad = max((high / low) ** 0.05, 1.05)
            low, high = low / pad, high * pad
        else:
            pad = (high - low) * 0.05 or abs(high) * 0.05 or 1.0
            low, high = (low if bounds and low == bounds[0] else low - pad), high + pad
        x0, x1 = min(xs), max(xs)
        return cls(x0, x1 if x1 > x0 else x0 + 1, low, high, log)

    def x(self, value: float) -> float:
        return LEFT + (value - self.x0) / (self.x1 - self.x0) * (WIDTH - LEFT - RIGHT)

    def y(self, value: float) -> float:
        low, high = self.y0, self.y1
        if self.log:
            low, high, value = math.log(low), math.log(high), math.log(value)
        return self.height - BOTTOM - (value - low) / (high - low) * (self.height - TOP - BOTTOM)

    def frame(self) -> Html:
        return tag(
            "rect",
            class_="frame",
            x=LEFT,
            y=TOP,
            width=WIDTH - LEFT - RIGHT,
            height=self.height - TOP - BOTTOM,
        )

    def axes(self) -> Html:
        marks = []
        for tick in (log_ticks if self.log else linear_ticks)(self.y0, self.y1, 5):
            y = f"{self.y(tick):.1f}"
            marks.append(tag("path", class_="grid", d=f"M{LEFT} {y}H{WIDTH - RIGHT}"))
            marks.append(tag("text", tick_text(tick), x=LEFT - 7, y=y, dy="0.32em", text_anchor="end"))
        return Html("".join([*marks, self.x_axis()]))

    def x_axis(self) -> Html:
        y = self.height - BOTTOM
        marks = [tag("path", class_="axis", d=f"M{LEFT} {y}H{WIDTH - RIGHT}")]
        for tick in linear_ticks(self.x0, self.x1, 6):
            marks.append(
                tag("text", tick_text(tick), x=f"{self.x(tick):.1f}", y=y + 17, text_anchor="middle")
            )
        return Html("".join(marks))


def thin(points: Points, buckets: int) -> Points:
    """At most ``2 * buckets + 2`` of ``points`` (sorted by x): the lowest and the highest of each bucket of
    x, in their order, and both ends."""
    if len(points) <= 2 * buckets:
        return points
    x0, x1 = points[0][0], points[-1][0]
    per_x = buckets / ((x1 - x0) or 1.0)
    kept, current, low, high = [points[0]], 0, points[0], points[0]
    for point in points:
        bucket = min(int((point[0] - x0) * per_x), buckets - 1)
        if bucket != current:
            kept += sorted({low, high})
            current, low, high = bucket, point, point
        low = point if point[1] < low[1] else low
        high = point if point[1] > high[1] else high
    kept += sorted({low, high})
    unique = [p for i, p in enumerate(kept) if i == 0 or p != kept[i - 1]]
    return unique if unique[-1] == points[-1] else [*unique, points[-1]]


def smooth(points: Points, window: int | None = None, *, log: bool = False) -> Points:
    """Centred average over about ``window`` steps (by default 1/30 of them), twice: no lag behind the data.

    Values that are not finite are left out. ``log`` averages the logarithms, for a logarithmic scale.
    """
    if log:
        logs = [(x, math.log(y)) for x, y in points if math.isfinite(y) and y > 0]
        return [(x, math.exp(y)) for x, y in smooth(logs, window)]
    points = [p for p in points if math.isfinite(p[1])]
    radius = max((window or len(points) // 30) // 2, 2)
    values = _centred(_centred([y for _, y in points], radius), radius)
    return [(x, y) for (x, _), y in zip(points, values)]


def _centred(values: list[float], radius: int) -> list[float]:
    """Means of up to ``radius`` neighbours to each side; a window at the start shrinks on both sides, as a
    one-sided mean would misplace a steep beginning."""
    sums = [0.0, *accumulate(values)]
    out = []
    for i in range(len(values)):
        a, b = i - min(radius, i), min(i + min(radius, i), len(values) - 1) + 1
        out.append((sums[b] - sums[a]) / (b - a))
    return out


def linear_ticks(low: float, high: float, count: int) -> list[float]:
    """Round numbers between ``low`` and ``high``, about ``count`` of them."""
    raw = (high - low) / max(count, 1)
    if raw <= 0 or not math.isfinite(raw):
        return [low]
    power = 10.0 ** math.floor(math.log10(raw))
    step = next((m * power for m in (1, 2, 5) if m * power >= raw), 10 * power)
    first = math.ceil(low / step - 1e-9)
    return [round(i * step, 12) for i in range(first, math.floor(high / step + 1e-9) + 1)]


def log_ticks(low: float, high: float, count: int) -> list[float]:
    """Powers of ten between ``low`` and ``high``; with 2 and 5 times as well where there are few."""
    first, last = math.floor(math.log10(low)), math.ceil(math.log10(high))
    every = max((last - first) // max(count, 1), 1)
    multiples = (1,) if last - first > 3 else (1, 2, 5)
    ticks = [m * 10.0**p for p in range(first, last + 1, every) for m in multiples]
    return [t for t in ticks if low <= t <= high]


def tick_text(value: float) -> str:
    """A short label: ``20k``, ``0.05``, ``3e-5``."""
    if value == 0:
        return "0"
    if abs(value) >= 10000:
        text = si(value, 4)
        return _trim(text) if "." in text else text
    if abs(value) < 1e-4:
        mantissa, power = f"{value:.2e}".split("e")
        return f"{mantissa.rstrip('0').rstrip('.')}e{int(power)}"
    return f"{value:.6g}"


def png(grid: list[list[float]]) -> str:
    """A heat map as a data URI: ``grid[column][row]`` of ratios to the mean; first row on top, 8-bit RGBA."""
    height = len(grid[0])
    lines = [b"\0" + b"".join(_rgba(column[row]) for column in grid) for row in range(height)]
    header = struct.pack(">IIBBBBB", len(grid), height, 8, 6, 0, 0, 0)
    chunks = [(b"IHDR", header), (b"IDAT", zlib.compress(b"".join(lines), 9)), (b"IEND", b"")]
    body = b"".join(
        struct.pack(">I", len(d)) + n + d + struct.pack(">I", zlib.crc32(n + d)) for n, d in chunks
    )
    return "data:image/png;base64," + base64.b64encode(b"\x89PNG\r\n\x1a\n" + body).decode()


def legend(lines: Sequence[Line], lost: Sequence[float] = ()) -> Html:
    """The names of ``lines`` with their colours; nothing for a single line."""
    items = [tag("li", tag("i", class_=f"key k{x.color % 8} {x.style}"), x.name) for x in lines]
    if lost:
        items.append(tag("li", tag("i", class_="key lost"), f"not finite at {len(lost)} steps"))
    return tag("ul", items, class_="legend") if len(items) > 1 else Html("")


def break_text(stop: Break) -> str:
    text = f"stopped at step {stop.stopped:,.0f} ({stop.reason}), resumed from step {stop.resumed:,.0f}"
    if stop.loss_before is not None and stop.loss_after is not None:
        text += f": loss {stop.loss_before:.4f} before, {stop.loss_after:.4f} after"
    return text


def break_label(stop: Break) -> str:
    return f"resumed at {stop.resumed:,.0f}"


def break_marks(breaks: Sequence[Break], scale: Scale) -> list[Html]:
    """A dashed line where the run was resumed, with its story as a title."""
    marks = []
    for stop in breaks:
        if scale.x0 <= stop.resumed <= scale.x1:
            x = f"{scale.x(stop.resumed):.1f}"
            line = tag("path", class_="break", d=f"M{x} {TOP - 6}V{scale.height - BOTTOM}")
            flag = tag("path", class_="flag", d=f"M{x} {TOP - 10}l7 4l-7 4z")
            left = scale.x(stop.resumed) > WIDTH - 110
            place = {"x": f"{scale.x(stop.resumed) + (-5 if left else 11):.1f}", "y": TOP - 3}
            name = tag("text", break_label(stop), class_="mark", text_anchor="end" if left else None, **place)
            words = name if len(breaks) < 4 else None
            marks.append(tag("g", tag("title", break_text(stop)), line, flag, words))
    return marks


def packed_breaks(breaks: Sequence[Break]) -> list[dict[str, Any]]:
    return [{"x": stop.resumed, "text": break_text(stop), "label": break_label(stop)} for stop in breaks]


def stacked_bar(title: str, parts: Sequence[tuple[str, float]], note: str = "") -> Html | None:
    """Shares of a whole, in seconds, as one bar and a table."""
    parts = [(name, seconds) for name, seconds in parts if seconds > 0]
    total = sum(seconds for _, seconds in parts)
    if not total:
        return None
    x, rects, rows = 0.0, [], []
    for i, (name, seconds) in enumerate(parts):
        label = f"{name}: {duration(seconds)}, {percent(seconds / total)}"
        width = seconds / total * 1000
        rects.append(
            tag(
                "rect", tag("title", label), class_=f"f{i % 8}", x=f"{x:.2f}", width=f"{width:.2f}", height=36
            )
        )
        cells = [tag("td", duration(seconds)), tag("td", percent(seconds / total))]
        rows.append(tag("tr", tag("th", tag("i", class_=f"key k{i % 8}"), name, scope="row"), cells))
        x += width
    spoken = ", ".join(f"{name} {percent(seconds / total)}" for name, seconds in parts)
    svg = tag(
        "svg",
        rects,
        viewBox="0 0 1000 36",
        preserveAspectRatio="none",
        class_="stack",
        role="img",
        aria_label=f"{title}: {spoken}",
    )
    caption = tag("figcaption", tag("h3", title), tag("p", note, class_="note") if note else None)
    return tag("figure", caption, svg, tag("table", rows, class_="shares"), class_="wide")


def _figure(key: str, title: str, unit: str, note: str, names: Html, svg: Html, data: dict[str, Any]) -> Html:
    heading = tag("h3", title, tag("small", unit) if unit else None)
    caption = tag("figcaption", heading, names, tag("p", note, class_="note") if note else None)
    return tag("figure", caption, svg, data_block(data), class_="chart", id=key)


def _drawable(points: Points, log: bool) -> Points:
    return sorted((x, y) for x, y in points if math.isfinite(y) and math.isfinite(x) and (y > 0 or not log))


def _packed(line: Line) -> dict[str, Any]:
    points = thin(line.points, BUCKETS)
    values = [float(f"{y:.5g}") for _, y in points]
    return {
        "name": line.name,
        "color": line.color % 8,
        "style": line.style,
        "x": [x for x, _ in points],
        "y": values,
    }


def _path(line: Line, scale: Scale) -> Html:
    points = [(scale.x(x), scale.y(y)) for x, y in thin(line.points, WIDTH - LEFT - RIGHT)]
    if line.style == "dots" or len(points) == 1:
        dots = [
            tag("circle", class_=f"dot f{line.color % 8}", cx=f"{x:.1f}", cy=f"{y:.1f}", r="3.5")
            for x, y in points
        ]
        return tag("g", dots)
    path = "M" + "L".join(f"{x:.1f} {y:.1f}" for x, y in points)
    return tag("path", class_=f"line s{line.color % 8} {line.style}", d=path)


def _lost_mark(x: float, scale: Scale) -> Html:
    title = tag("title", f"not finite at step {x:,.0f}")
    return tag("path", title, class_="lost", d=f"M{scale.x(x):.1f} {TOP + 8}l-4 -8h8z")


def _spoken(lines: Sequence[Line]) -> str:
    best = next((x for x in lines if x.style != "faint"), lines[0])
    ys = [y for _, y in best.points]
    return (
        f"{significant(ys[0], 4)} at the first step, {significant(ys[-1], 4)} at the last, "
        f"between {significant(min(ys), 4)} and {significant(max(ys), 4)}"
    )


def _row_label(row: int, rows: int, scale: Scale) -> Html:
    y = TOP + (row + 0.5) / rows * (scale.height - TOP - BOTTOM)
    return tag("text", str(row), x=LEFT - 7, y=f"{y:.1f}", dy="0.32em", text_anchor="end")


def _grid(rows: Sequence[tuple[float, list[float]]]) -> tuple[list[list[float]], float, float]:
    """``grid[column][row]``: the mean over the column's steps of the share divided by the mean share."""
    width, x0, x1 = len(rows[0][1]), rows[0][0], rows[-1][0]
    columns = min(COLUMNS, len(rows))
    sums, counts = [[0.0] * width for _ in range(columns)], [0] * columns
    for x, values in rows:
        column = min(int((x - x0) / ((x1 - x0) or 1) * columns), columns - 1)
        mean = sum(values) / width
        counts[column] += 1
        for i, value in enumerate(values):
            sums[column][i] += value / mean if mean > 0 else 0.0
    grid: list[list[float]] = []
    for total, count in zip(
        sums, counts
    ):  # a column without steps (they were not logged) repeats its neighbour
        grid.append([v / count for v in total] if count else grid[-1] if grid else [1.0] * width)
    return grid, x0, x1 if x1 > x0 else x0 + 1


def _rgba(ratio: float) -> bytes:
    distance = abs(math.log(max(ratio, 0.01), 3))  # full colour at a third and at three times the mean
    return bytes((*(UNDER if ratio < 1 else OVER), min(int(distance * 255), 255)))


def _trim(text: str) -> str:
    digits, suffix = text.rstrip("kMGTPE"), text[len(text.rstrip("kMGTPE")) :]
    return digits.rstrip("0").rstrip(".") + suffix
