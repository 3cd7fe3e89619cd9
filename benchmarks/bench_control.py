"""What actions and the data-quality monitor cost, and how soon a drift of the data is told.

    python benchmarks/bench_control.py              # all, on the Python standard library: some minutes
    python benchmarks/bench_control.py quality      # one part: idle, quality, drift, rollback

``idle``: the controller's time per step while nobody asks for anything. ``quality``: the monitor per batch of 8,192
tokens, beside building the same batch (CPU time of the thread, so that neighbours do not count). ``drift``: batches
until an alert after a fifth of the documents was replaced, by kind of noise, and alerts of healthy streams.
``rollback``: seconds from the request to the end of the first step after it, beside a new process that resumes there.
"""

from __future__ import annotations

import dataclasses
import os
import statistics
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

os.environ.setdefault("OMP_NUM_THREADS", "1")

import numpy as np
import torch

from deepseek.data import Corpus, DataConfig, Loader, prepare
from deepseek.data.loader import Delivery
from deepseek.data.quality import QualityMonitor

ROWS, LENGTH, BEGIN, SEEDS = 16, 512, 100, 4


def idle() -> None:
    """Steps of a millisecond, for two seconds: with the controller, and with nothing."""
    from types import SimpleNamespace

    from deepseek.recipes.control import Controller
    from deepseek.train import Stop

    def spent(hook: Callable[[int, Any], None]) -> tuple[float, int]:
        total, steps, until = 0.0, 0, time.perf_counter() + 2.0
        while time.perf_counter() < until:
            time.sleep(0.001)
            began = time.thread_time()
            hook(steps, None)
            total, steps = total + time.thread_time() - began, steps + 1
        return total, steps

    with tempfile.TemporaryDirectory() as folder:
        trainer: Any = SimpleNamespace(path=Path(folder), rank=0, stop=Stop())
        with Controller(trainer) as controller:
            (ours, steps), (nothing, others) = spent(controller), spent(lambda step, result: None)
    each, empty = ours / steps, nothing / others
    print(
        f"idle: {each * 1e6:.1f} µs a step of CPU time, an empty hook {empty * 1e6:.1f}; looking every 0.2 s"
    )


def deliveries(corpus: Corpus, batches: int, seed: int) -> list[tuple[Delivery, float]]:
    """Batches with the seconds that building each took."""
    loader, found = Loader(corpus.train, rows=ROWS, length=LENGTH, seed=seed, prefetch=0), []
    for _ in range(batches):
        began = time.thread_time()
        next(loader)
        assert loader.last is not None
        found.append((loader.last, time.thread_time() - began))
    return found


def quality(corpus: Corpus) -> None:
    monitor = QualityMonitor(Loader(corpus.train, rows=ROWS, length=LENGTH), decode=corpus.tokenizer.decode)
    built, watched = [], []
    for delivery, seconds in deliveries(corpus, 400, seed=0):
        began = time.thread_time()
        monitor.update(delivery)
        watched.append(time.thread_time() - began)
        built.append(seconds)
    tail = watched[100:]
    print(
        f"quality: {statistics.median(tail) * 1e6:.0f} µs a batch of {ROWS * LENGTH:,} tokens (median; mean "
        f"{statistics.mean(tail) * 1e6:.0f} with comparisons and languages), {max(watched) * 1e3:.0f} ms once for the "
        f"limits; building the batch took {statistics.median(built[100:]) * 1e6:.0f} µs"
    )


def noises(corpus: Corpus) -> dict[str, Callable[[Any], Any]]:
    draw, encode = np.random.default_rng(0), corpus.tokenizer.encode
    high = encode("".join(map(chr, draw.integers(33, 255, 30_000))))
    low = encode("".join(map(chr, draw.integers(97, 123, 30_000))))
    words = ["class", "self", "return", "import", "none"]
    return {
        "random tokens": lambda ids: draw.integers(0, corpus.tokenizer.vocab_size, len(ids)),
        "random bytes": lambda ids: np.roll(high, draw.integers(1000)),
        "random letters": lambda ids: np.roll(low, draw.integers(1000)),
        "shuffled tokens": lambda ids: draw.permutation(ids),
        "five words": lambda ids: encode(" ".join(draw.choice(words, 60))),
    }


def spoilt(delivery: Delivery, spoil: Callable[[Any], Any]) -> Delivery:
    targets = delivery.batch.targets.clone()
    for r, row in enumerate(delivery.rows):
        at = 0
        for piece in row:
            if piece.document % 5 == 0:
                here = targets[r, at : at + piece.length]
                here.copy_(torch.from_numpy(np.resize(spoil(here.numpy()), piece.length).astype(np.int64)))
            at += piece.length
    return delivery._replace(batch=dataclasses.replace(delivery.batch, targets=targets))


def drift(corpus: Corpus, healthy: int = 3000) -> None:
    streams = [[d for d, _ in deliveries(corpus, BEGIN + 200, seed)] for seed in range(SEEDS)]
    for name, spoil in noises(corpus).items():
        found = []
        for stream in streams:
            monitor = QualityMonitor(Loader(corpus.train, rows=ROWS, length=LENGTH))
            for delivery in stream:
                late = delivery.number >= BEGIN
                report = monitor.update(spoilt(delivery, spoil) if late else delivery)
                if report and report.alerts:
                    found.append(report.alerts[0].batch + 1 - BEGIN)
                    break
            else:
                found.append(-1)
        print(f"drift: {name:16} told after {found} batches (seeds 0 to {SEEDS - 1})")
    alerts, highest = 0, 0.0
    for seed in range(SEEDS):
        monitor = QualityMonitor(
            loader := Loader(corpus.train, rows=ROWS, length=LENGTH, seed=seed, prefetch=0)
        )
        for _ in range(healthy):
            next(loader)
            assert loader.last is not None
            if report := monitor.update(loader.last):
                alerts += len(report.alerts)
                highest = max(highest, *(s.psi or 0.0 for s in report.sources.values()))
    print(f"drift: healthy streams, {SEEDS * healthy:,} batches: {alerts} alerts, PSI at most {highest:.3f}")


def rollback() -> None:
    from deepseek.config import replace
    from deepseek.events import Event, Sink, read_jsonl
    from deepseek.monitor.control import request
    from deepseek.recipes.pretrain import preset, pretrain
    from deepseek.train import Stop
    from deepseek.weights.checkpoint import CheckpointConfig

    class Watcher(Sink):
        def __init__(self) -> None:
            self.asked = self.took = 0.0
            self.back = False

        def write(self, event: Event) -> None:
            if event.name == "train" and event.step == 9 and not self.asked:
                self.asked = time.perf_counter()
                threading.Thread(target=request, args=(run, "rollback_skip", {"skip": [7, 8]})).start()
            self.back = self.back or event.name == "rollback"
            if event.name == "train" and self.back and not self.took:
                self.took = time.perf_counter() - self.asked
                stop.request("measured")

    with tempfile.TemporaryDirectory() as folder:
        run, stop, watcher = Path(folder) / "run", Stop(), Watcher()
        config = preset("tiny")
        config = replace(
            config,
            checkpoint=CheckpointConfig(every=5, keep_last=0),
            train=replace(config.train, steps=40, precision_mode="fp32"),
        )
        pretrain(config, run, sinks=[watcher], stop=stop)
        began = time.time()
        command = [
            sys.executable,
            "-m",
            "deepseek",
            "resume",
            str(run),
            "--from",
            "5",
            "--train.steps=6",
            "--quiet",
        ]
        subprocess.run(command, check=True)
        steps = [e for e in read_jsonl(run / "events.jsonl") if e["event"] == "train" and e["time"] > began]
        print(
            f"rollback: {watcher.took:.2f} s from the request to the end of the first step after it; a new process "
            f"that resumed from that checkpoint ended its first step after {steps[0]['time'] - began:.2f} s"
        )


def main() -> None:
    torch.set_num_threads(1)
    parts = sys.argv[1:] or ["idle", "quality", "drift", "rollback"]
    for part in parts:
        if part in ("idle", "rollback"):
            globals()[part]()
    if {"quality", "drift"} & set(parts):
        with tempfile.TemporaryDirectory() as cache:
            corpus = prepare(DataConfig(), cache)
            if "quality" in parts:
                quality(corpus)
            if "drift" in parts:
                drift(corpus)


if __name__ == "__main__":
    main()
