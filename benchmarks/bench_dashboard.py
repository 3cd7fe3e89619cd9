"""How soon the dashboard's page is there on a run of 300 series × 10⁶ steps: the real server, store and browser.

    python benchmarks/bench_dashboard.py                 # makes the run (minutes), then measures
    python benchmarks/bench_dashboard.py --keep DIR      # makes it once in DIR and measures it again and again

Interactive: from the start of the navigation until every chart in the window is drawn with data, the health strip
names the loss, and an answer to a pressed key (the help) has been painted. Each figure is the median of ``--repeats``
cold pages (a new browser context with an empty cache), with the least and the largest; the server process is warm after
``--warm`` pages. The ratios beside it are of the same machine in the same run: an empty page of the same browser, and
the same page on a run of 1,000 steps.
"""

from __future__ import annotations

import argparse
import json
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
import urllib.request
from pathlib import Path
from typing import Any

import numpy as np

from deepseek.monitor.writer import SeriesWriter

FIRST = [
    "train/loss",
    "train/grad_norm",
    "train/tokens_per_second",
    "train/lr",
    "train/mfu",
    "memory/allocated",
]
TIMES = ["time/step", "time/forward", "time/backward", "time/data", "time/other", "memory/reserved"]
SPIKE = 0.62  # of the run: one step of loss 8 among 2


def names(count: int) -> list[str]:
    """``count`` series: what the first screen shows, then layers."""
    rest = (f"layer/{i}/{k}" for i in range(count) for k in ("grad_norm", "weight_norm", "update_ratio"))
    return [*FIRST, *TIMES, *(next(rest) for _ in range(count - len(FIRST) - len(TIMES)))]


def make_run(run: Path, steps: int, series: int, start: float = 1.76e9) -> None:
    """Log ``steps`` rows through ``SeriesWriter``, as a training would, with a one-step spike of the loss."""
    run.mkdir(parents=True)
    known = names(series)
    rng = np.random.default_rng(0)
    rough = rng.standard_normal((4096, series)).astype(np.float32) * 0.02 + 1
    spike = int(SPIKE * steps)
    began = time.perf_counter()
    with SeriesWriter(run / "monitor") as writer:
        for step in range(steps):
            row = dict(zip(known, rough[step % 4096].tolist()))
            row["train/loss"] = 8.0 if step == spike else (2 + 6 * 0.9999**step) * row["train/loss"]
            writer.log(step, row, start + step)
    events = [
        {"event": "run", "step": None, "time": start, "run": run.name, "total_steps": steps, "device": "cpu"},
        {"event": "train", "step": steps - 1, "time": start + steps, "loss": 2.0, "tokens_per_second": 1e5},
        {"event": "done", "step": steps - 1, "time": start + steps},
    ]
    (run / "events.jsonl").write_text("".join(json.dumps(e) + "\n" for e in events), encoding="utf-8")
    took = time.perf_counter() - began
    print(
        f"{run.name}: {steps:,} steps × {series} series in {took:.0f} s ({took / steps * 1e6:.0f} µs a step)"
    )


def serve(root: Path) -> tuple[subprocess.Popen[str], str]:
    """The real server as its own process; returns it with its address once it answers."""
    command = [sys.executable, "-m", "deepseek", "monitor", str(root), "--port", "6321"]
    process = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL, text=True)
    address = "http://127.0.0.1:6321/"
    for _ in range(300):
        try:
            urllib.request.urlopen(address + "api/runs", timeout=30).read()
            return process, address
        except OSError:
            time.sleep(0.1)
    process.terminate()
    raise SystemExit("the server did not start")


READY = """() => {
  const seen = (e) => { const b = e.getBoundingClientRect(); return b.top < innerHeight && b.bottom > 0 };
  const panels = [...document.querySelectorAll('.panel')].filter(seen);
  const tile = document.querySelector('.tile-value');
  const drawn = panels.length > 0 && panels.every((p) => p.querySelector('canvas'));
  return drawn && tile && /\\d/.test(tile.textContent);
}"""


def wait_ready(page: Any) -> None:
    """Until ``READY`` holds; asked from outside, since the page's policy forbids the scripts of a polling wait."""
    deadline = time.perf_counter() + 60
    while not page.evaluate(READY):
        if time.perf_counter() > deadline:
            raise SystemExit("the page did not become ready within 60 s")
        time.sleep(0.02)


def interactive(browser: Any, address: str) -> float:
    """Seconds until the page of a run is drawn and answers a key."""
    context = browser.new_context(viewport={"width": 1440, "height": 900})
    page = context.new_page()
    try:
        began = time.perf_counter()
        page.goto(address, wait_until="commit")
        wait_ready(page)
        page.keyboard.press("?")
        page.wait_for_selector("dialog[open]")
        return time.perf_counter() - began
    finally:
        context.close()


def empty(browser: Any, address: str) -> float:
    """Seconds for a file of the same server that draws nothing: the floor of browser and loopback."""
    context = browser.new_context()
    page = context.new_page()
    try:
        began = time.perf_counter()
        page.goto(address + "icon.svg")
        return time.perf_counter() - began
    finally:
        context.close()


def zoomed(browser: Any, address: str) -> float:
    """Seconds from a zoom to one thousandth of the run until all charts in sight show it at full resolution."""
    context = browser.new_context(viewport={"width": 1440, "height": 900})
    page = context.new_page()
    try:
        page.goto(address)
        wait_ready(page)
        page.wait_for_timeout(600)
        with page.expect_response(lambda r: "start=" in r.url and "/data" in r.url) as answer:
            began = time.perf_counter()
            page.evaluate(
                "location.hash += (location.hash.includes('?') ? '&' : '?') + 'from=619500&to=620500'"
            )
        answer.value.finished()
        page.evaluate("() => new Promise((r) => requestAnimationFrame(() => requestAnimationFrame(r)))")
        return time.perf_counter() - began
    finally:
        context.close()


def spread(seconds: list[float]) -> dict[str, float]:
    return {
        "median": round(statistics.median(seconds), 3),
        "least": round(min(seconds), 3),
        "most": round(max(seconds), 3),
    }


def main() -> None:
    options = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    options.add_argument("--steps", type=int, default=1_000_000)
    options.add_argument("--series", type=int, default=300)
    options.add_argument("--repeats", type=int, default=9)
    options.add_argument("--warm", type=int, default=1)
    options.add_argument("--keep", type=Path)
    o = options.parse_args()
    from playwright.sync_api import sync_playwright

    chromium = shutil.which("chromium")
    if chromium is None:
        raise SystemExit("chromium is not installed: apt-get install chromium")
    with tempfile.TemporaryDirectory() as made:
        root = o.keep or Path(made)
        for run, steps in (("large", o.steps), ("small", 1000)):
            if not (root / run).exists():
                make_run(root / run, steps, o.series)
        server, address = serve(root)
        try:
            with sync_playwright() as playwright:
                browser = playwright.chromium.launch(executable_path=chromium, args=["--no-sandbox"])
                for _ in range(o.warm):
                    interactive(browser, address + "#/run/large")
                figures = {
                    "empty file": spread([empty(browser, address) for _ in range(o.repeats)]),
                    "run of 1,000 steps": spread(
                        [interactive(browser, address + "#/run/small") for _ in range(o.repeats)]
                    ),
                    f"run of {o.steps:,} steps": spread(
                        [interactive(browser, address + "#/run/large") for _ in range(o.repeats)]
                    ),
                    "zoom to 1,000 steps": spread(
                        [zoomed(browser, address + "#/run/large") for _ in range(o.repeats)]
                    ),
                }
                browser.close()
        finally:
            server.terminate()
            server.wait(20)
    for what, seconds in figures.items():
        print(f"{what:26s} {seconds['median']:.3f} s  ({seconds['least']:.3f} to {seconds['most']:.3f})")
    print(json.dumps(figures))


if __name__ == "__main__":
    main()
