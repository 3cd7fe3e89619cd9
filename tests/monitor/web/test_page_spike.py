"""A one-step spike is on the screen at every zoom level: store, server, page and pixels, nothing invented between them.

Trackers that sample lose it: 2.0 everywhere, 8.0 at one step in 50,000. The pixels of the chart are looked at, not the
data: in the upper part of the plot there must be colour in the spike's column, and nowhere else.
"""

from __future__ import annotations

import json
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
from page_browser import chromium, watched

STEPS, SPIKE = 50_000, 31_217
LEVELS = (STEPS, 20_000, 5_000, 1_000, 200, 24)

#: Columns (as shares of the plot's width) with the line's colour in the upper part of the plot, by the canvas's pixels.
COLUMNS = """() => {
  const over = document.querySelector('.panel .u-over').getBoundingClientRect();
  const canvas = document.querySelector('.panel .u-wrap canvas');
  const box = canvas.getBoundingClientRect();
  const k = canvas.width / box.width;
  const [x0, y0] = [Math.round((over.left - box.left) * k), Math.round((over.top - box.top) * k)];
  const [w, h] = [Math.round(over.width * k), Math.round(over.height * k)];
  const image = canvas.getContext('2d').getImageData(x0, y0, w, Math.round(h * 0.3)).data;
  const found = new Set();
  for (let i = 0; i < image.length; i += 4) {
    const [r, g, b, a] = image.subarray(i, i + 4);
    if (a > 60 && b - r > 60) found.add((i / 4) % w);
  }
  return [...found].sort((a, b) => a - b).map((x) => x / w);
}"""

#: The same in the whole plot.
WHOLE = COLUMNS.replace("0.3)", "1)")
#: The columns that a script finds, or false while there are none.
ANY = "((find) => { const found = find(); return found.length ? found : false; })"


@contextmanager
def dashboard(root: Path) -> Iterator[str]:
    """The real server on a free port of the loopback, in a thread."""
    uvicorn = pytest.importorskip("uvicorn")
    from deepseek.monitor.dashboard import application

    options = uvicorn.Config(application(root), host="127.0.0.1", port=0, log_level="error", lifespan="on")
    server = uvicorn.Server(options)
    thread = threading.Thread(target=server.run, daemon=True)
    thread.start()
    try:
        until = time.monotonic() + 60
        while not server.started:
            assert time.monotonic() < until, "the server did not start"
            time.sleep(0.02)
        port = server.servers[0].sockets[0].getsockname()[1]
        yield f"http://127.0.0.1:{port}/"
    finally:
        server.should_exit = server.force_exit = True
        thread.join(60)


def make_run(path: Path, spike: int | None) -> None:
    from deepseek.monitor.series import SeriesWriter

    path.mkdir(parents=True)
    with SeriesWriter(path / "monitor") as writer:
        for step in range(1, STEPS + 1):
            writer.log(step, {"train/loss": 8.0 if step == spike else 2.0 + 0.02 * (step % 7)}, 1.7e9 + step)
    events = [
        {"event": "run", "step": 0, "time": 1.7e9, "total_steps": STEPS, "device": "cpu"},
        {"event": "done", "step": STEPS, "time": 1.7e9 + STEPS},
    ]
    (path / "events.jsonl").write_text("".join(json.dumps(e) + "\n" for e in events), encoding="utf-8")
    (path / "config.toml").write_text('[model]\npreset = "tiny"\n', encoding="utf-8")


@pytest.fixture(scope="module")
def address(tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    root = tmp_path_factory.mktemp("runs")
    make_run(root / "spiked", SPIKE)
    make_run(root / "even", None)
    with dashboard(root) as url:
        yield url


@pytest.fixture(scope="module")
def browser() -> Iterator[Any]:
    with chromium() as running:
        yield running


def coloured(window: Any, address: str, level: int) -> list[float]:
    start = max(0, SPIKE - level * 2 // 3)
    query = "" if level == STEPS else f"?from={start}&to={start + level}"
    window.open(f"{address}#/run/spiked{query}", ".panel .u-over")
    found: list[float] = window.until(f"{ANY}({COLUMNS})")
    return found


@pytest.mark.slow
@pytest.mark.parametrize("theme", ["dark", "light"])
def test_the_spike_is_drawn_at_every_zoom_level(address: str, browser: Any, theme: str) -> None:
    shapes = [{"viewport": {"width": 1280, "height": 900}}, {"viewport": {"width": 390, "height": 844}}]
    for shape in shapes:
        with watched(browser, color_scheme=theme, **shape) as window:
            for level in LEVELS:
                found = coloured(window, address, level)
                start = 1 if level == STEPS else max(0, SPIKE - level * 2 // 3)
                share = (SPIKE - start) / (STEPS - 1 if level == STEPS else level)
                near = max(0.02, 1.5 / level)
                assert all(abs(x - share) < near for x in found), (level, share, found)
            assert window.troubles == []


@pytest.mark.slow
def test_without_the_spike_the_same_pixels_are_empty(address: str, browser: Any) -> None:
    """The test above can fail: the even run, on the scale of the spiked one, has nothing up there."""
    with watched(browser) as window:
        window.open(f"{address}#/compare?run=even&run=spiked&name=train/loss", ".panel .u-over")
        window.settle()
        spiked = window.until(f"{ANY}({COLUMNS.replace('b - r', 'r - b')})")  # the second line is orange
        window.until(f"{ANY}({WHOLE})")
        both = window.page.evaluate(COLUMNS)
        window.open(f"{address}#/run/even", ".panel .u-over")
        window.until(f"{ANY}({WHOLE})")  # the even run is drawn
        share = (SPIKE - 1) / (STEPS - 1)
        assert all(abs(x - share) < 0.02 for x in spiked), spiked
        assert all(abs(x - share) < 0.02 for x in both), both
