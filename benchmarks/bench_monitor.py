"""The run store: what logging costs, beside other trackers, and how fast a long run is read.

    python benchmarks/bench_monitor.py                                   # everything of ours
    python benchmarks/bench_monitor.py --peers /tmp/peers/bin/python     # and trackio, wandb (offline), tensorboardX

The peers run in an interpreter of their own, which needs ``pip install trackio wandb tensorboardX``; what it lacks is
left out. Every writer gets the same rows of 300 series, first one row every 5 ms as a training loop would, then as
fast as it takes them; its process' CPU time per row counts what it does in threads, and its folder is measured at the
end. The overhead is that of a real training step of the quickstart's size, with its figures and 300 more.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import Any

os.environ.setdefault("OMP_NUM_THREADS", "1")

PEERS = ("deepseek", "tensorboardX", "wandb", "trackio")
NAMES = [f"layer/{i // 10}/figure_{i % 10}" for i in range(300)]
PACE = 0.005  #: seconds between two rows of the paced part


def rows(count: int) -> Iterator[dict[str, float]]:
    """Rows of 300 floats that differ; no package needed."""
    state = 1
    for _ in range(count):
        row = {}
        for name in NAMES:
            state = (1103515245 * state + 12345) % 2**31
            row[name] = state / 2**30
        yield row


def writer_of(name: str, folder: Path) -> tuple[Callable[[int, dict[str, float]], Any], Callable[[], Any]]:
    """``log(step, row)`` and ``close`` of a tracker that writes below ``folder``."""
    if name == "deepseek":
        import deepseek.monitor as monitor

        run = monitor.init(name="bench", dir=folder)
        return lambda step, row: run.log(row, step=step), run.finish
    if name == "tensorboardX":
        from tensorboardX import SummaryWriter

        board = SummaryWriter(str(folder))

        def log(step: int, row: dict[str, float]) -> None:
            for key, value in row.items():
                board.add_scalar(key, value, step)

        return log, board.close
    if name == "wandb":
        import wandb

        run = wandb.init(mode="offline", dir=str(folder), project="bench")
        return lambda step, row: run.log(row, step=step), run.finish
    import trackio

    trackio.init(project="bench")
    return lambda step, row: trackio.log(row, step=step), trackio.finish


def write(name: str, folder: Path, paced: int, fast: int) -> dict[str, float]:
    """Time a tracker in this process."""
    log, close = writer_of(name, folder)
    data = list(rows(50))
    took, cpu = [], time.process_time()
    for step in range(paced):
        began = time.perf_counter()
        log(step, data[step % 50])
        took.append(time.perf_counter() - began)
        time.sleep(PACE)
    cpu = time.process_time() - cpu
    at_once = []
    for step in range(paced, paced + fast):
        began = time.perf_counter()
        log(step, data[step % 50])
        at_once.append(time.perf_counter() - began)
    closing = time.perf_counter()
    close()
    took.sort()
    size = sum(p.stat().st_blocks * 512 for p in folder.rglob("*") if p.is_file())
    return {
        "paced_p50_us": 1e6 * statistics.median(took),
        "paced_p99_us": 1e6 * took[int(0.99 * len(took))],
        "paced_max_us": 1e6 * took[-1],
        "cpu_us_per_row": 1e6 * cpu / paced,
        "fast_p50_us": 1e6 * statistics.median(at_once),
        "fast_mean_us": 1e6 * statistics.mean(at_once),
        "close_s": time.perf_counter() - closing,
        "bytes_per_value": size / (paced + fast) / len(NAMES),
    }


def beside(peers: str, paced: int, fast: int) -> dict[str, dict[str, float]]:
    """Each tracker in a process of its own, one after another."""
    found = {}
    for name in PEERS if peers else PEERS[:1]:
        with tempfile.TemporaryDirectory() as folder:
            python = sys.executable if name == "deepseek" else peers
            command = [python, __file__, "--one", name, "--folder", folder, "--paced", str(paced)]
            command += ["--fast", str(fast if name == "deepseek" else min(fast, 300))]
            environment = {
                **os.environ,
                "TRACKIO_DIR": folder,
                "WANDB_SILENT": "true",
                "WANDB_MODE": "offline",
            }
            if name == "deepseek":
                environment.pop("WANDB_MODE")
            done = subprocess.run(command, env=environment, capture_output=True, text=True)
            if done.returncode:
                print(f"{name}: left out: {done.stderr.strip().splitlines()[-1:]}")
                continue
            found[name] = json.loads(done.stdout.strip().splitlines()[-1])
    return found


def read(folder: Path, steps: int) -> dict[str, float]:
    """A run of ``steps`` × 300, written and read."""
    from deepseek.monitor.series import SeriesReader, SeriesWriter

    data, spike = list(rows(50)), steps // 2 + 77
    began = time.perf_counter()
    with SeriesWriter(folder) as writer:
        for step in range(steps):
            row = data[step % 50]
            writer.log(step, {**row, NAMES[0]: 8.0} if step == spike else row)
    wrote = time.perf_counter() - began
    size = sum(p.stat().st_blocks * 512 for p in folder.rglob("*"))
    began = time.perf_counter()
    reader = SeriesReader(folder)
    opened = time.perf_counter() - began
    first = [timed(partial(reader.read, name)) for name in NAMES[100:120]]
    again = [timed(lambda: reader.read(NAMES[0])) for _ in range(50)]
    zoomed = [timed(lambda: reader.read(NAMES[0], steps // 3, steps // 2)) for _ in range(50)]
    whole = [timed(lambda: reader.raw(NAMES[0])) for _ in range(10)]
    newest = timed(reader.latest)
    seen = [reader.read(NAMES[0], points=n).high.max() == 8.0 for n in (1, 10, 100, 1500, 20_000)]
    assert all(seen), "the spike is lost"
    median = statistics.median
    return {
        "write_us_per_row": 1e6 * wrote / steps, "bytes_per_value": size / steps / len(NAMES), "open_ms": 1e3 * opened,
        "first_ms": 1e3 * median(first), "again_ms": 1e3 * median(again), "zoom_ms": 1e3 * median(zoomed),
        "raw_ms": 1e3 * median(whole), "latest_ms": 1e3 * newest,
    }  # fmt: skip


def timed(work: Callable[[], object]) -> float:
    began = time.perf_counter()
    work()
    return time.perf_counter() - began


def overhead(folder: Path, steps: int) -> dict[str, float]:
    """A training step of the quickstart's model: with the sink, without it, in turns; and what the sink itself took."""
    import torch

    import deepseek
    from deepseek.assemble import build
    from deepseek.config import replace
    from deepseek.data import SourceConfig, prepare
    from deepseek.events import attached, emit
    from deepseek.precision import lower
    from deepseek.recipes.plan import confirm_precision, derive, preset
    from deepseek.train import Schedule, TrainStep, build_optimizer, fit, next_token_loss

    config = preset("tiny")
    text = SourceConfig(kind="text", path=str(Path(deepseek.__file__).parent))
    corpus = prepare(replace(config.data, sources=(text,)), folder / "corpora")
    plan = derive(replace(config, train=replace(config.train, steps=steps)), corpus.tokenizer.vocab_size)
    model = build(plan.config.model, plan.device, 0)
    plan = confirm_precision(plan, model)
    optimizer = build_optimizer(model, plan.config.optim, lower(model, plan.policy))
    step = TrainStep(model, next_token_loss, optimizer, plan.policy, micro_rows=plan.config.train.micro_rows)
    schedule, more = Schedule(plan.config.schedule, 10**6), torch.rand(300)
    took: dict[bool, list[float]] = {True: [], False: []}
    cpu: dict[bool, float] = {True: 0.0, False: 0.0}
    at, block, rounds = 0, 5, max(steps // 10, 1)
    gate = gated_sink(folder / "run")

    def probe(number: int, result: object) -> None:
        emit("probe", number, names=NAMES, values=more)

    with corpus.loader(rows=plan.rows, length=config.train.length) as loader, attached(gate):
        for turn in range(-1, 2 * rounds):
            gate.on = on = turn % 2 == 0
            clock = time.process_time()
            for _ in range(block):
                began = time.perf_counter()
                fit(step, loader, schedule, steps=at + 1, start=at, hooks=[probe])
                at += 1
                if turn >= 0:  # the first steps warm up
                    took[on].append(time.perf_counter() - began)
            gate.flush()
            cpu[on] += (time.process_time() - clock) * (turn >= 0)
        thread = gate.thread_seconds()
    count, typical = rounds * block, statistics.median(took[False])
    return {
        "series": len(names_of(folder / "run")), "step_ms": 1e3 * typical,
        "step_with_sink_ms": 1e3 * statistics.median(took[True]), "training_thread_us": 1e6 * gate.seconds / count,
        "sink_thread_us": 1e6 * thread / count, "share_of_step": (gate.seconds + thread) / count / typical,
        "cpu_ratio": cpu[True] / cpu[False],
    }  # fmt: skip


def names_of(run: Path) -> list[str]:
    """The series that were kept."""
    from deepseek.monitor.series import SeriesReader

    return SeriesReader(run / "monitor").names()


def gated_sink(run: Path) -> Any:
    """A ``StoreSink`` that measures itself and can be turned off."""
    from deepseek.monitor.sink import StoreSink

    class Sink(StoreSink):
        seconds, on = 0.0, True

        def write(self, event: Any) -> None:
            if self.on:
                began = time.perf_counter()
                super().write(event)
                self.seconds += time.perf_counter() - began

        def thread_seconds(self) -> float:
            assert self._thread.ident is not None
            return time.clock_gettime(time.pthread_getcpuclockid(self._thread.ident))

    return Sink(run)


def show(title: str, figures: dict[str, float]) -> None:
    print(title)
    for key, value in figures.items():
        print(f"    {key:22} {value:,.3f}" if value < 100 else f"    {key:22} {value:,.0f}")


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--peers", default="", help="a Python that has the other trackers")
    parser.add_argument("--steps", type=int, default=1_000_000, help="of the long run")
    parser.add_argument("--paced", type=int, default=400)
    parser.add_argument("--fast", type=int, default=20_000)
    parser.add_argument(
        "--train", type=int, default=40, help="training steps of the overhead, half with the sink"
    )
    parser.add_argument(
        "--log-only", action="store_true", help="leave out the long run and the training step"
    )
    parser.add_argument("--folder", default="", help="where to write (default: a temporary folder)")
    parser.add_argument("--one", choices=PEERS, help=argparse.SUPPRESS)
    o = parser.parse_args()
    if o.one:
        print(json.dumps(write(o.one, Path(o.folder), o.paced, o.fast)))
        return
    with tempfile.TemporaryDirectory(dir=o.folder or None) as folder:
        for name, figures in beside(o.peers, o.paced, o.fast).items():
            show(f"log, 300 values: {name}", figures)
        if o.log_only:
            return
        show("overhead of a training step", overhead(Path(folder), o.train))
        show(f"read, 300 series x {o.steps:,} steps", read(Path(folder) / "long", o.steps))


if __name__ == "__main__":
    main()
