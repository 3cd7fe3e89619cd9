"""Where a decoding step of the engine spends its time: microseconds a step, and what runs in it.

    python benchmarks/profile_decode.py dense_856m moe_64x2 --streams 1 64
    python benchmarks/profile_decode.py --quick small_moe          # a CPU: to see that it runs

Models are those of ``deepseek bench serve``, with random weights. For every number of streams: the median step between
two tokens of all of them, with and without running ahead (``--ahead``: only with), the same step's captured graph
replayed alone (what the step takes beyond that, the host takes), then a profile of ten more steps.
Times of kernels that begin before the one before has ended (``deepseek/ops/triton/chain.py``) contain their waiting:
they overlap, and add up to more than the step.
"""

from __future__ import annotations

import argparse
import statistics
import tempfile
import time
from pathlib import Path

import torch
from torch.profiler import ProfilerActivity, profile

from deepseek.bench.serve import Job, Options, model_directory
from deepseek.serve.engine import Engine
from deepseek.serve.engine_config import EngineConfig
from deepseek.serve.request import Request
from deepseek.serve.sampler import SamplingConfig

CUDA = torch.cuda.is_available()


def steps(
    engine: Engine, job: Job, streams: int, repeat: int, profiled: bool
) -> tuple[list[float], float, profile]:
    """Of steps in which every stream decodes: the seconds of each, those of one replayed after three quarters of them,
    and a profile of the ten that follow.
    """
    sampling = SamplingConfig(temperature=0, max_tokens=job.answer, ignore_eos=True)
    for i, prompt in enumerate(job.prompts(streams, repeat)):
        engine.add(Request(f"{repeat}-{i}", tuple(prompt), sampling))
    begun, seconds, first = set[str](), list[float](), job.answer * 3 // 4
    activities = [ProfilerActivity.CPU, *([ProfilerActivity.CUDA] if CUDA else [])]
    found, alone = profile(activities=activities), float("nan")
    while engine.has_work:
        if profiled and len(seconds) in (first, first + 10):
            if CUDA:
                torch.cuda.synchronize()
            if len(seconds) == first:
                alone = replayed(engine)
            (found.start if len(seconds) == first else found.stop)()
        began = time.perf_counter()
        begun |= {output.id for output in engine.step() if output.tokens}
        if len(begun) == streams:
            seconds.append(time.perf_counter() - began)
    return seconds[5:first], alone, found


def replayed(engine: Engine, times: int = 200) -> float:
    """Seconds of the captured step that was made last, replayed again and again; the best of five."""
    graphs = engine.launcher.graphs
    if graphs is None or not graphs._made:
        return float("nan")
    replay = list(graphs._made.values())[-1]._replay
    best = float("inf")
    for _ in range(5):
        start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        start.record()
        for _ in range(times):
            replay()
        end.record()
        end.synchronize()
        best = min(best, start.elapsed_time(end) / times / 1e3)
    return best


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("models", nargs="*", default=["dense_856m"])
    parser.add_argument("--streams", type=int, nargs="+", default=[1, 64])
    parser.add_argument("--prompt", type=int, default=512)
    parser.add_argument("--answer", type=int, default=192)
    parser.add_argument("--ahead", action="store_true", help="only running ahead")
    parser.add_argument("--quick", action="store_true")
    args = parser.parse_args()
    if args.quick:
        args.prompt, args.answer = 32, 48
    for name in args.models:
        with tempfile.TemporaryDirectory() as scratch:
            device = torch.device("cuda" if CUDA else "cpu")
            directory = model_directory(Options(model=name, quick=args.quick), Path(scratch), device)
            for ahead in (True,) if args.ahead else (True, False):
                length = args.prompt + args.answer + 64
                config = EngineConfig(max_running=max(args.streams), max_length=length, ahead=CUDA and ahead)
                began = time.perf_counter()
                engine = Engine.load(directory, config)
                loaded = time.perf_counter() - began
                way = "running ahead" if ahead else "one step at a time"
                print(f"{name}, {way}, loaded in {loaded:.1f} s", flush=True)
                for streams in args.streams:
                    job = Job(str(directory), (streams,), args.prompt, args.answer, engine.vocabulary)
                    steps(engine, job, streams, 0, False)
                    seconds, alone, found = steps(engine, job, streams, 1, True)
                    middle = statistics.median(seconds)
                    print(f"  {streams} streams: {1e6 * middle:.0f} us a step, {streams / middle:.0f} tok/s, replayed "
                          f"alone {1e6 * alone:.0f} us, "
                          f"{engine.decoder.bytes_read(streams) / 1e9:.3f} GB of weights", flush=True)  # fmt: skip
                    order = f"self_{'cuda' if CUDA else 'cpu'}_time_total"
                    print(
                        found.key_averages().table(sort_by=order, row_limit=20, max_name_column_width=60),
                        flush=True,
                    )


if __name__ == "__main__":
    main()
