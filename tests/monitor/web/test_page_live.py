"""The thirty seconds on a real run: red pin, cause, roll back; everything real but the batch that was spoilt."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from live_run import BAD, EVERY
from page_browser import chromium, expect, watched
from test_page_spike import dashboard

HERE = Path(__file__).parent


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """Runs, one of them training in a process of its own until the test ends."""
    folder = tmp_path_factory.mktemp("live")
    command = [
        sys.executable,
        str(HERE / "live_run.py"),
        str(folder / "runs" / "live"),
        str(folder / "corpus"),
    ]
    with (folder / "log").open("w") as log:
        process = subprocess.Popen(
            command, stdout=log, stderr=log, env={**os.environ, "OMP_NUM_THREADS": "1"}
        )
    try:
        yield folder / "runs"
    finally:
        process.terminate()
        process.wait(60)


def events(root: Path) -> list[dict[str, Any]]:
    path = root / "live" / "events.jsonl"
    return [json.loads(x) for x in path.read_text().splitlines() if x.endswith("}")] if path.exists() else []


def until(what: Any, seconds: float, why: str) -> Any:
    """``what()`` once it is true."""
    end = time.monotonic() + seconds
    while time.monotonic() < end:
        found = what()
        if found:
            return found
        time.sleep(0.2)
    raise AssertionError(why)


@pytest.mark.slow
def test_from_red_pin_to_cause_to_rollback(root: Path) -> None:
    from deepseek.monitor.store import RunStore

    with chromium() as browser:

        def judged() -> list[int]:
            """Steps of incidents of the numbers: a slow machine may have others, of time, that are the data's too."""
            told = [e for e in events(root) if e["event"] == "incident" and e["verdict"] == "DATA"]
            return [e["step"] for e in told if e["kind"] in ("loss_spike", "gradient_spike")]

        found = until(judged, 300, "the spike was not seen, or its cause was not found")
        assert found[0] == BAD
        with dashboard(root) as address, watched(browser) as window:
            began = time.monotonic()
            page = window.open(f"{address}#/run/live", ".pin")
            page.locator(f".pin[aria-label*='{BAD}']").first.click()
            page.wait_for_selector(".incident")
            expect(page.locator(".verdict.large b")).to_have_text("DATA", use_inner_text=True)
            page.wait_for_selector(".sample")  # the batch's documents are named
            page.click("[data-action=rollback_skip]")
            expect(page.get_by_label("Last step left out")).to_have_value(str(BAD))
            page.click("[data-confirm]")
            page.wait_for_selector(".incident .command.done")
            print(f"from the page to the run's answer: {time.monotonic() - began:.1f} s")
            assert window.troubles == []
    back = until(
        lambda: [e for e in events(root) if e["event"] == "rollback"], 60, "the run did not go back"
    )[0]
    assert back["step"] == (BAD - 1) // EVERY * EVERY, "the newest checkpoint before the bad batch"
    again = until(lambda: [e for e in events(root) if e["event"] == "train" and e["step"] == BAD][1:], 120,
                  "the run did not come by again")  # fmt: skip
    spike = next(e for e in events(root) if e["event"] == "train" and e["step"] == BAD)
    assert spike["loss"] > 2 * again[0]["loss"], "what was drawn instead of the bad batch is no spike"
    with RunStore(root / "live") as store:

        def kept() -> bool:
            store.series.refresh()
            _, values = store.series.raw("train/loss", BAD, BAD)
            return bool(len(values)) and np.allclose(values[-1], again[0]["loss"], rtol=1e-4)

        until(kept, 60, "the later row has not replaced the earlier")
