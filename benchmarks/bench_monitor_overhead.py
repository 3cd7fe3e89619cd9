"""What the monitor costs a run: the same run with it and without it, in turns, in one process; and where it goes.

The two runs of a pair see the same batches and end with the same weights (checked). Compared are the time from the
first step's end to the last one's (everything in the loop: probes, the store, detectors, the event file) and the
processor time meanwhile; the first few steps, in which memory is claimed and the probes learn what they cost, are left
out. On a machine that others use, both vary by more than a percent. So the processor time that the monitor's own
functions take, in the training thread and beside it, is also counted, and told as a share of that of the steps.

    python benchmarks/bench_monitor_overhead.py [--pairs 5] [--steps 150] [--preset tiny] [--threads 1]
"""

from __future__ import annotations

import argparse
import statistics
import tempfile
import time
from pathlib import Path
from typing import Any

import torch

from deepseek.config import replace
from deepseek.events import Event, Sink
from deepseek.monitor.config import MonitorConfig
from deepseek.monitor.detect import Watch
from deepseek.monitor.probe_data import DataProbe
from deepseek.monitor.sink import StoreSink
from deepseek.monitor.store import RunStore
from deepseek.recipes import observe
from deepseek.recipes.plan import PretrainConfig, preset
from deepseek.recipes.pretrain import pretrain
from deepseek.train import TrainStep
from deepseek.weights import checkpoint

WARM = 20  #: steps that are left out


class Clock(Sink):
    """Wall and processor seconds at the end of every step, and how many steps were sampled."""

    def __init__(self) -> None:
        self.wall: list[float] = []
        self.cpu: list[float] = []
        self.sampled = 0

    def write(self, event: Event) -> None:
        if event.name == "train":
            self.wall.append(time.perf_counter())
            self.cpu.append(time.process_time())
        elif event.name == "probe":
            self.sampled += "memory/weights" in event.values.get("series", ())

    def taken(self) -> tuple[float, float]:
        """Wall and processor seconds of the steps after the warm-up."""
        return self.wall[-1] - self.wall[WARM], self.cpu[-1] - self.cpu[WARM]


class Account:
    """Processor seconds that some functions take, of whichever thread calls them."""

    def __init__(self) -> None:
        self.seconds: dict[str, list[float]] = {}

    def watch(self, owner: Any, name: str, label: str) -> None:
        function = getattr(owner, name)

        def counted(*args: Any, **options: Any) -> Any:
            began = time.thread_time()
            try:
                return function(*args, **options)
            finally:
                self.seconds.setdefault(label, []).append(time.thread_time() - began)

        setattr(owner, name, counted)

    def tell(self) -> None:
        steps = sum(self.seconds["step"])
        print(
            f"\nprocessor time: a step {steps / len(self.seconds['step']) * 1e3:.1f} ms, of which in the monitor"
        )
        whole = 0.0
        for label, found in self.seconds.items():
            if label != "step":
                share = sum(found) / steps
                whole += share * (not label.startswith("  "))
                print(
                    f"  {label:32} {share:8.3%}   {len(found):6,} calls of {statistics.median(found) * 1e6:8,.0f} µs "
                    f"(largest {max(found) * 1e3:,.1f} ms)"
                )
        print(f"  {'all':32} {whole:8.3%}")


def accounts() -> Account:
    account = Account()
    account.watch(TrainStep, "__call__", "step")
    account.watch(observe.Observer, "__call__", "hook")
    account.watch(observe.Observer, "_every_step", "  figures of every step")
    account.watch(observe.Observer, "_look", "  sampled probes")
    account.watch(StoreSink, "write", "events to the store")
    account.watch(StoreSink, "_take", "store, in its thread")
    account.watch(Watch, "update", "  detectors")
    account.watch(DataProbe, "_look", "data quality, in its thread")
    return account


def one(config: PretrainConfig, run: Path) -> Clock:
    clock = Clock()
    if not pretrain(config, run, sinks=[clock]).finished:
        raise SystemExit("interrupted")  # by a signal, which a run takes as a wish to save and stop
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
    walls, cpus, account = [], [], accounts()
    with tempfile.TemporaryDirectory() as folder:
        for pair in range(options.pairs):
            runs = {name: Path(folder) / f"{name}-{pair}" for name in ("on", "off")}
            order = ("on", "off") if pair % 2 else ("off", "on")
            clocks = {}
            for name in order:
                before = len(account.seconds.get("step", ()))
                clocks[name] = one(base if name == "on" else off, runs[name])
                if name == "off":
                    del account.seconds["step"][before:]
            assert same_weights(runs["on"], runs["off"]), "the monitor changed the training"
            with RunStore(runs["on"]) as store:
                series = len(store.series.names())
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
    account.tell()
    print(f"{series} series in the store; weights equal bit for bit in all pairs")


if __name__ == "__main__":
    main()
