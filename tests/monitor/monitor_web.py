"""Runs with a real store, and a client of the dashboard, for the tests of what is served."""

from __future__ import annotations

import json
import math
import os
import time
from pathlib import Path
from typing import Any

import numpy as np
from starlette.testclient import TestClient

from deepseek.monitor.access import Access
from deepseek.monitor.dashboard import application
from deepseek.monitor.series import SeriesWriter

ACT = {"X-Deepseek": "1"}


def client(root: Path, access: Access | None = None, **options: Any) -> TestClient:
    """A browser without a browser, at a loopback address."""
    return TestClient(
        application(root, access), base_url="http://127.0.0.1:6060", raise_server_exceptions=False, **options
    )


def values(step: int) -> dict[str, float]:
    """The series of one step: known functions of it, so that a reader can be compared with them."""
    row = {"train/loss": 2.0 + math.exp(-step / 500), "train/grad_norm": 0.5 + 0.1 * math.sin(step)}
    row |= {f"layer/{i}/grad_norm": (i + 1) + step / 1000 for i in range(3)}
    row |= {f"expert/1/{e}/load": (e + 1) / 10 for e in range(4)}
    row |= {f"rank/{r}/step_seconds": 0.1 * (r + 1) for r in range(2)}
    return row


def make_run(path: Path, steps: int = 3000, spike: int = 0, status: str = "done") -> Path:
    """A run of ``steps`` steps with a store and events; a loss of 8 at step ``spike``."""
    path.mkdir(parents=True)
    with SeriesWriter(path / "monitor") as writer:
        for step in range(1, steps + 1):
            row = values(step)
            if step == spike:
                row["train/loss"] = 8.0
            writer.log(step, row, 1.7e9 + step)
    facts = {
        "device": "cpu",
        "parameters": 1234,
        "total_steps": steps,
        "pid": os.getpid() if status == "running" else 1,
    }
    now = time.time() if status == "running" else 1.7e9
    lines = [
        {**facts, "event": "run", "step": 0, "time": now},
        {"bits_per_byte": 1.5, "event": "evaluate", "step": steps, "time": now},
    ]
    lines += [{"event": "done", "step": steps, "time": 1.7e9 + steps}] if status == "done" else []
    (path / "events.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    (path / "config.toml").write_text('[model]\npreset = "tiny"\n')
    (path / "step-000100").mkdir()
    (path / "step-000100" / "manifest.json").write_text("{}")
    return path


def expected(name: str, start: int, stop: int) -> np.ndarray[Any, Any]:
    """What a series holds from ``start`` to ``stop``, both included."""
    return np.array([values(step)[name] for step in range(start, stop + 1)], np.float32)
