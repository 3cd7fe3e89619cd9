"""What a save costs: how long training stands still, and how long until the checkpoint is safe on the disk.

    python benchmarks/bench_checkpoint.py --megabytes 200 --repeats 5 --json out.json

The same state (parameters and two AdamW moments) is written in turn by ``torch.save``, ``torch.save`` and
then ``fsync`` (the fair comparison: without it a power cut loses the file), ours in the foreground, and
ours in the background. Ways alternate inside each repeat; figures are medians of seconds. The first round
is shown on its own: there our background save still has to allocate its host buffers. Reads come from the
page cache, and without verification they map the file and touch nothing.
"""

from __future__ import annotations

import argparse
import json
import platform
import statistics
import tempfile
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path

import torch
from torch import Tensor

from deepseek.events import MemorySink, attached
from deepseek.files import flush
from deepseek.weights.checkpoint import CheckpointConfig, Checkpointer, load

State = dict[str, dict[str, Tensor]]


def make_state(megabytes: int) -> State:
    """``megabytes`` of fp32 in matrices of a million elements: a third parameters, two thirds moments."""
    count = max(1, megabytes // 12)
    model = {f"layers.{i}.weight": torch.randn(1000, 1000) for i in range(count)}
    moments = {
        f"{name}.{m}": torch.randn_like(t) for name, t in model.items() for m in ("exp_avg", "exp_avg_sq")
    }
    return {"model": model, "optimizer": moments}


def with_torch(state: State, path: Path, sync: bool) -> tuple[float, float]:
    start = time.perf_counter()
    torch.save(state, path)
    if sync:
        flush(path)
        flush(path.parent)
    seconds = time.perf_counter() - start
    path.unlink()
    return seconds, seconds


def with_ours(state: State, writer: Checkpointer, step: int) -> tuple[float, float]:
    sink = MemorySink()
    with attached(sink):
        start = time.perf_counter()
        writer.save(step, tensors=state, state={})
        stall = time.perf_counter() - start
        writer.wait()
        seconds = time.perf_counter() - start
    return stall, seconds


def timed(read: Callable[[], object]) -> float:
    start = time.perf_counter()
    read()
    return time.perf_counter() - start


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--megabytes", type=int, default=200)
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--directory", type=Path, help="where to write; default: the temporary directory")
    parser.add_argument("--json", type=Path, help="also write the figures here")
    arguments = parser.parse_args()
    state = make_state(arguments.megabytes)
    size = sum(t.nbytes for group in state.values() for t in group.values())
    rows: dict[str, list[tuple[float, float]]] = {}
    with tempfile.TemporaryDirectory(dir=arguments.directory) as name:
        place = Path(name)
        ways: dict[str, Callable[[int], tuple[float, float]]] = {
            "torch.save": lambda step: with_torch(state, place / "t.pt", sync=False),
            "torch.save + fsync": lambda step: with_torch(state, place / "t.pt", sync=True),
        }
        for label, background in (("ours, foreground", False), ("ours, background", True)):
            config = CheckpointConfig(asynchronous=background, keep_last=1)
            writer = Checkpointer(place / label.split()[1], config)
            ways[label] = partial(with_ours, state, writer)
        for step in range(arguments.repeats + 1):
            for label, way in ways.items():
                rows.setdefault(label, []).append(way(step))
        run = place / "background"
        reads = {
            "load, verified": timed(lambda: load(run)),
            "load, verify=False": timed(lambda: load(run, verify=False)),
        }
    table = {
        label: {
            "first_stall_seconds": figures[0][0],
            "stall_seconds": statistics.median(s for s, _ in figures[1:]),
            "total_seconds": statistics.median(t for _, t in figures[1:]),
        }
        for label, figures in rows.items()
    }
    print(f"{size / 1e6:.0f} MB, {arguments.repeats} repeats, medians; torch {torch.__version__}")
    print(f"{'':20}{'first s':>10}{'stall s':>10}{'total s':>10}{'MB/s':>8}")
    for label, row in table.items():
        rate = size / 1e6 / row["total_seconds"]
        print(
            f"{label:20}{row['first_stall_seconds']:10.3f}{row['stall_seconds']:10.3f}{row['total_seconds']:10.3f}{rate:8.0f}"
        )
    for label, seconds in reads.items():
        print(f"{label:20}{'':20}{seconds:10.3f}{size / 1e6 / seconds:8.0f}")
    if arguments.json:
        report = {
            "bytes": size,
            "repeats": arguments.repeats,
            "torch": torch.__version__,
            "machine": platform.machine(),
            "threads": torch.get_num_threads(),
            "save": table,
            "load_seconds": reads,
        }
        arguments.json.write_text(json.dumps(report, indent=1) + "\n")


if __name__ == "__main__":
    main()
