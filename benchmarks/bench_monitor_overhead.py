"""What the monitor costs a run: the same run with it and without it, in turns, in one process.

The two runs of a pair see the same batches and end with the same weights (checked). Compared are the time from the
first step's end to the last one's (everything in the loop: probes, the store, detectors, the event file) and the
processor time meanwhile, which neighbours on the machine disturb less; the first few steps, in which memory is
claimed and the probes learn what they cost, are left out.

    python benchmarks/bench_monitor_overhead.py [--pairs 5] [--steps 150] [--preset tiny] [--threads 1]
"""

from __future__ import annotations

import argparse
import statistics
import tempfile
import time
from pathlib import Path

import torch

from deepseek.config import replace
from deepseek.events import Event, Sink
from deepseek.monitor.config import MonitorConfig
from deepseek.recipes.plan import PretrainConfig, preset
from deepseek.recipes.pretrain import pretrain
from deepseek.weights import checkpoint

WARM = 20  #: steps that are left out


class Clock(Sink):
    """Wall and processor seconds at the end of every step, and how many series were told."""

    def __init__(self) -> None:
        self.wall: list[float] = []
        self.cpu: list[float] = []
        self.names: set[str] = set()
        self.sampled = 0

    def write(self, event: Event) -> None:
        if event.name == "train":
            self.wall.append(time.perf_counter())
            self.cpu.append(time.process_time())
        elif event.name == "probe":
            names = (*event.values.get("names", ()), *event.values.get("series", ()))
            self.sampled += "memory/weights" in names
            self.names.update(names)

    def taken(self) -> tuple[float, float]:
        """Wall and processor seconds of the steps after the warm-up."""
        return self.wall[-1] - self.wall[WARM], self.cpu[-1] - self.cpu[WARM]


def one(config: PretrainConfig, run: Path) -> Clock:
    clock = Clock()
    pretrain(config, run, sinks=[clock])
    return clock


def same_weights(a: Path, b: Path) -> bool:
    first, second = checkpoint.load(a, groups=("model",)), checkpoint.load(b, groups=("model",))
    return all(torch.equal(value, second.model[name]) for name, value in first.model.items())


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--pairs", type=int, default=5)
    parser.add_argument("--steps", type=int, default=150)
    parser.add_argument("--preset", default="tiny")
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    parser.add_argument("--device", default="cpu")
    parser.add_argument(
        "--cache", type=Path, default=Path("runs/.corpora"), help="where prepared corpora are kept"
    )
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    base = preset(options.preset)
    train = replace(base.train, steps=options.steps, device=options.device, precision_mode="fp32")
    base = replace(base, train=train, data=replace(base.data, cache=str(options.cache), held_out=0.0))
    off = replace(base, monitor=MonitorConfig(enabled=False))
    walls, cpus = [], []
    with tempfile.TemporaryDirectory() as folder:
        for pair in range(options.pairs):
            runs = {name: Path(folder) / f"{name}-{pair}" for name in ("on", "off")}
            order = ("on", "off") if pair % 2 else ("off", "on")
            clocks = {name: one(base if name == "on" else off, runs[name]) for name in order}
            assert same_weights(runs["on"], runs["off"]), "the monitor changed the training"
            (on_wall, on_cpu), (off_wall, off_cpu) = clocks["on"].taken(), clocks["off"].taken()
            walls.append(on_wall / off_wall)
            cpus.append(on_cpu / off_cpu)
            steps = options.steps - WARM - 1
            print(
                f"pair {pair + 1}: step {on_wall / steps * 1e3:.1f} ms with, {off_wall / steps * 1e3:.1f} ms without: "
                f"wall {walls[-1]:.4f}, processor {cpus[-1]:.4f}; {clocks['on'].sampled} sampled steps",
                flush=True,
            )
    for name, ratios in (("wall", walls), ("processor", cpus)):
        print(
            f"{name} time with / without: median {statistics.median(ratios):.4f}, {min(ratios):.4f}…{max(ratios):.4f}"
        )
    print(f"{len(clocks['on'].names)} series from probes; weights equal bit for bit in all pairs")


if __name__ == "__main__":
    main()
