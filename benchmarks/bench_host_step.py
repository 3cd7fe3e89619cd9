"""What the host does for one decoding step: microseconds of processor time, with a device whose work is nothing.

The engine is the real one, with captured steps whose replay gives the same logits again at once; on a CPU, so an
operation of torch costs its dispatch and a little work (vocabulary of 512), not a kernel's launch. A batch of N decodes
steadily; the least of the chunks' means is told, which on a machine that others use comes nearest to the truth.

    python benchmarks/bench_host_step.py [--streams 1 64] [--sampling greedy random] [--steps 400] [--profile --top 20]
    python benchmarks/bench_host_step.py --torch  # what a step calls of torch, without the replay
"""

from __future__ import annotations

import argparse
import cProfile
import inspect
import pstats
import time
from collections import Counter
from dataclasses import fields, replace
from pathlib import Path
from typing import Any

import torch

from deepseek.assemble import Loaded
from deepseek.data import train_tokenizer
from deepseek.models import Transformer
from deepseek.models.config import tiny
from deepseek.serve.engine import Engine
from deepseek.serve.engine_config import EngineConfig
from deepseek.serve.graphs import DecodeGraphs, Run, Size
from deepseek.serve.request import Request
from deepseek.serve.sampler import SamplingConfig

CHUNK = 25  #: steps that are timed together
SAMPLING = {
    "greedy": SamplingConfig(temperature=0.0),
    "random": SamplingConfig(temperature=0.8, top_p=1.0, seed=1),
    "top-p": SamplingConfig(temperature=0.8, top_p=0.95, seed=1),
    "logprobs": SamplingConfig(temperature=0.0, logprobs=1),
    "penalty": SamplingConfig(temperature=0.0, presence_penalty=0.5),
    "stop": SamplingConfig(temperature=0.0, stop=("\n\n\n", "Observation:")),
}


def engine_of(streams: int, ahead: bool, length: int) -> Engine:
    """A model of two layers, F and L, whose decoding steps are free."""
    torch.manual_seed(0)
    text = inspect.getsource(argparse)
    tokenizer = train_tokenizer([text], 512)
    model = Transformer(tiny(vocab_size=512, pattern="LF", layers=2, hidden=32, max_length=length)).eval()
    options: dict[str, Any] = {"precision": "fp32", "memory_gib": 0.25, "max_running": streams}
    if any(field.name == "ahead" for field in fields(EngineConfig)):
        options["ahead"] = ahead
    engine = Engine(Loaded(model, tokenizer, Path("instant"), None), EngineConfig(device="cpu", **options))
    most = Size(streams, engine.decoder.tables.width)
    words = torch.tensor([t for t in range(512) if tokenizer.piece(t).strip().isalnum()])

    def instant(run: Run) -> Run:
        """Captures a step by running it once; its replay does nothing, and its likeliest tokens are words."""
        out = run()
        best_S2 = out[2]
        best_S2[:, 0] = words[torch.arange(len(best_S2)) % len(words)]
        return lambda: out

    engine.launcher.graphs = DecodeGraphs(engine.decoder, most, engine.vocabulary, instant)
    return engine


def measure(
    streams: int, sampling: str, steps: int, ahead: bool, length: int, profile: cProfile.Profile | None = None,
    counts: Counter[str] | None = None,
) -> float:  # fmt: skip
    """Microseconds of a step, the least of the chunks' means; ``counts``: of torch's operations in one step."""
    engine = engine_of(streams, ahead, length)
    config = replace(SAMPLING[sampling], max_tokens=steps + 64, ignore_eos=True)
    for i in range(streams):
        engine.add(Request(str(i), tuple(range(1, 40 + i % 32)), config))
    for _ in range(20):
        engine.step()
    if counts is not None:
        with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU]) as trace:
            for _ in range(CHUNK):
                engine.step()
        for event in trace.key_averages():
            if event.key.startswith("aten::"):
                counts[event.key] = event.count
    best = float("inf")
    for _ in range(steps // CHUNK):
        began = time.process_time()
        if profile is not None:
            profile.enable()
        for _ in range(CHUNK):
            outputs = engine.step()
        if profile is not None:
            profile.disable()
        best = min(best, (time.process_time() - began) / CHUNK)
        assert len(outputs) == streams
    return 1e6 * best


def _calls(profile: cProfile.Profile, steps: int) -> float:
    """Function calls of a step: a number that no other process changes."""
    return pstats.Stats(profile).total_calls / (steps // CHUNK * CHUNK)  # type: ignore[attr-defined]


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--streams", type=int, nargs="+", default=[1, 64])
    parser.add_argument("--sampling", nargs="+", default=["greedy", "random"], choices=list(SAMPLING))
    parser.add_argument("--steps", type=int, default=400)
    parser.add_argument("--max-length", type=int, default=4096)
    parser.add_argument(
        "--profile", action="store_true", help="count calls; the time is then the profiler's, too"
    )
    parser.add_argument("--top", type=int, default=0, help="with --profile, functions by their own time")
    parser.add_argument("--torch", action="store_true", help="count the operations of torch in a step, too")
    args = parser.parse_args()
    torch.set_num_threads(1)
    print(f"{'streams':>7} {'sampling':10} {'ahead':6} {'us/step':>9}")
    for streams in args.streams:
        for sampling in args.sampling:
            for ahead in (False, True):
                profile = cProfile.Profile() if args.profile else None
                counts: Counter[str] | None = Counter() if args.torch else None
                found = measure(streams, sampling, args.steps, ahead, args.max_length, profile, counts)
                calls = "" if profile is None else f"  {_calls(profile, args.steps):9.0f} calls of Python"
                print(f"{streams:7} {sampling:10} {'on' if ahead else 'off':6} {found:9.1f}{calls}")
                if counts is not None:
                    each = ", ".join(f"{name[6:]} {n / CHUNK:.3g}" for name, n in counts.most_common())
                    print(f"{'':8}{sum(counts.values()) / CHUNK:.1f} operations of torch: {each}")
                if profile is not None and args.top:
                    pstats.Stats(profile).sort_stats("tottime").print_stats(args.top)


if __name__ == "__main__":
    main()
