"""A synthetic run for the tests of the monitor: the events a real one writes, from a seeded generator."""

from __future__ import annotations

import json
import math
import random
from pathlib import Path
from typing import Any

START = 1_760_000_000.0
CONFIG = """\
preset = "tiny"

[data]
source = "stdlib"

[train]
steps = 600
batch_tokens = 16384
precision_mode = "auto"

[model]
pattern = "LLLH"
experts = 16
experts_per_token = 2
"""


def events(
    steps: int = 600, *, stop: int | None = 320, layers: int = 3, experts: int = 16, spike: int | None = 417
) -> list[dict[str, Any]]:
    """Events of ``steps`` steps, killed by SIGTERM at ``stop`` and resumed, with one gradient spike."""
    rng, now, out = random.Random(7), START, list[dict[str, Any]]()

    def add(event: str, step: int | None = None, **values: Any) -> None:
        out.append({"event": event, "step": step, "time": round(now, 3), **values})

    run = {
        "run": "quickstart",
        "preset": "tiny",
        "device": "cpu",
        "dtype": "bfloat16",
        "parameters": 3_412_224,
        "active_parameters": 1_118_464,
        "flops_per_token": 7.9e6,
        "peak_flops": 1.9e11,
        "peak_source": "measured matmul",
        "total_steps": steps,
        "batch_tokens": 16384,
        "corpus": {"documents": 1843, "bytes": 27_483_112, "tokens": 7_918_331},
        "command": "deepseek quickstart",
        "code_version": "0.1.0",
        "host_cpu": "2 × x86_64",
        "pid": 2**22 + 11,
    }
    add("prepare", stage="tokenize", done=1843, total=1843)
    add("bad_record", path="corpus/broken.jsonl", offset=18231, reason="not valid UTF-8 at byte 18,244")
    add("run", **run)
    shares = [[1 + 0.9 * rng.random() for _ in range(experts)] for _ in range(layers)]
    for step in range(1, steps + 1):
        now += 0.21
        loss = 2.05 + 6.6 * math.exp(-step / 45) + 0.9 * math.exp(-step / 260) + rng.gauss(0, 0.05)
        lr = 3e-3 * min(step / 40, 0.1 + 0.45 * (1 + math.cos(math.pi * step / steps)))
        add("train", step, **_step(rng, step, loss, lr, shares, spike))
        if step % 100 == 0:
            now += 0.6
            bits = 1.05 + 2.4 * math.exp(-step / 90) + 0.5 * math.exp(-step / 300)
            add(
                "evaluate",
                step,
                loss=loss + 0.05,
                bits_per_byte=bits,
                tokens=40960,
                bytes=170000,
                seconds=0.6,
            )
            add(
                "checkpoint", step, path=f"step-{step:06d}", seconds=0.3, stall_seconds=0.05, bytes=41_000_000
            )
        if step == stop:
            add("interrupted", step, signal="SIGTERM")
            add("checkpoint", step, path=f"step-{step:06d}", seconds=0.4, stall_seconds=0.4, bytes=41_000_000)
            now += 4.0
            add("run", **run, resumed_from=step)
            add("resume", step, path=f"step-{step:06d}", previous_loss=loss)
    compressed = (
        ("gzip -9", "each file", 1.957),
        ("xz -9", "each file", 1.871),
        ("xz -9", "one archive", 1.542),
    )
    for name, how, bits in compressed:
        add("compress", steps, name=name, bits_per_byte=bits, how=how)
    add("done", steps, seconds=now - START)
    add("export", path="export", max_logit_difference=0.0, loaded_with="transformers")
    text = 'def read_config(path):\n    """Read a configuration file and return a dictionary."""\n'
    text += "    with open(path, encoding='utf-8') as file:\n        return parse(file.read())\n"
    add("generate", prompt="def read_config(path):", text=text, tokens=64, seconds=0.7)
    return out


def _step(
    rng: random.Random, step: int, loss: float, lr: float, shares: list[list[float]], spike: int | None
) -> dict[str, Any]:
    load = []
    for row in shares:
        for i, share in enumerate(row):
            row[i] = max(share * (1 + rng.gauss(0, 0.03)) + 0.05 * (1 - share), 0.01)
        load.append([round(v / sum(row), 5) for v in row])
    worst = max(max(row) * len(row) - 1 for row in load)
    norm = 0.35 + 2.2 * math.exp(-step / 60) + abs(rng.gauss(0, 0.04))
    gates = {
        str(layer): [
            round(1 / (1 + math.exp(-(0.4 - 0.5 * h) * (layer / 8) * math.log1p(step / 40))), 4)
            for h in range(4)
        ]
        for layer in (3, 7)
    }
    return {
        "loss": loss,
        "bits_per_byte": loss / math.log(2) / 3.47,
        "balance_loss": 0.01 + 0.02 * math.exp(-step / 80),
        "grad_norm": 31.0 if step == spike else norm,
        "clipped": norm > 1.0 or step == spike,
        "lr": lr,
        "tokens": 16384,
        "tokens_per_second": 78_000 + rng.gauss(0, 1500),
        "mfu": 0.41 + rng.gauss(0, 0.008),
        "seconds": {"data": 0.003, "forward": 0.068, "backward": 0.118, "optimizer": 0.017, "other": 0.004},
        "load": load,
        "gates": gates,
        "max_vio": worst,
        "coverage": min(1.0, 0.8 + step / 200),
        "router_entropy": 2.4 + 0.3 * (1 - math.exp(-step / 100)),
        "skipped": False,
        "fill": 0.985,
    }


def write_run(directory: Path, rows: list[dict[str, Any]], config: str = CONFIG) -> Path:
    """A run directory with ``rows`` as its events."""
    directory.mkdir(parents=True, exist_ok=True)
    lines = "".join(json.dumps(row) + "\n" for row in rows)
    (directory / "events.jsonl").write_text(lines, encoding="utf-8")
    (directory / "config.toml").write_text(config, encoding="utf-8")
    return directory
