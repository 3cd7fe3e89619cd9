"""What a decoding step costs the GPU, replayed alone, under different choices: microseconds, share of a copy's speed.

    python benchmarks/tune_step.py dense_856m moe_64x2 --streams 1 64
    python benchmarks/tune_step.py dense_856m --streams 1 --next 0 4 8 16 --beyond 0 8 16 24 32 48

Models are those of ``deepseek bench serve``, with random weights. ``next`` and ``beyond`` are the MiB of weights that a
product asks for as it ends (``deepseek.ops.packed_linear``), ``fused`` whether a full or window layer's decode is one
kernel (``deepseek.ops.triton.paged_decode``). A step that takes longer in the engine than replayed waits for the host:
the last column has the engine's median.
"""

from __future__ import annotations

import argparse
import itertools
import statistics
import tempfile
import time
from pathlib import Path

import torch

from deepseek.bench.ceilings import copy_tb_per_s
from deepseek.bench.serve import Job, Options, model_directory
from deepseek.ops import packed_linear
from deepseek.ops.triton import paged_decode
from deepseek.serve import decoder
from deepseek.serve.engine import Engine
from deepseek.serve.engine_config import EngineConfig
from deepseek.serve.graphs import CudaCapture
from deepseek.serve.request import Request
from deepseek.serve.sampler import SamplingConfig

TAKES = paged_decode.takes


def choose(engine: Engine, next_mib: float, beyond_mib: float, fused: bool) -> None:
    """Let the engine's steps be captured anew with these choices."""
    packed_linear.NEXT, decoder.BEYOND = int(next_mib * 2**20), int(beyond_mib * 2**20)
    engine.decoder.link()
    paged_decode.takes = TAKES if fused else lambda rows: False
    assert engine.graphs is not None
    engine.graphs._made.clear()
    engine.graphs._capture = CudaCapture()  # a pool of memory is no more when its last graph is gone


def replayed(engine: Engine, times: int = 200) -> float:
    """Microseconds of the captured step that was made last, replayed again and again; the best of five."""
    assert engine.graphs is not None
    _, replay = list(engine.graphs._made.values())[-1]
    best = float("inf")
    for _ in range(5):
        start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        start.record()
        for _ in range(times):
            replay()
        end.record()
        end.synchronize()
        best = min(best, start.elapsed_time(end) * 1e3 / times)
    return best


def stepped(engine: Engine, times: int = 40) -> float:
    """Microseconds of the engine's own step, the median."""
    seconds = []
    for _ in range(times):
        began = time.perf_counter()
        engine.step()
        seconds.append(time.perf_counter() - began)
    return 1e6 * statistics.median(seconds)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("models", nargs="*", default=["dense_856m"])
    parser.add_argument("--streams", type=int, nargs="+", default=[1, 64])
    parser.add_argument("--prompt", type=int, default=512)
    parser.add_argument("--next", type=float, nargs="+", default=[packed_linear.NEXT / 2**20])
    parser.add_argument("--beyond", type=float, nargs="+", default=[packed_linear.BEYOND / 2**20])
    parser.add_argument("--fused", type=int, nargs="+", default=[1], choices=[0, 1])
    args = parser.parse_args()
    device = torch.device("cuda")
    bandwidth = copy_tb_per_s(device, 2**30)
    print(f"{torch.cuda.get_device_name()}, copy {bandwidth:.3f} TB/s")
    for name in args.models:
        with tempfile.TemporaryDirectory() as scratch:
            directory = model_directory(Options(model=name), Path(scratch), device)
            config = EngineConfig(max_running=max(args.streams), max_length=2048)
            engine = Engine.load(directory, config)
        for streams in args.streams:
            job = Job(str(directory), (streams,), args.prompt, 0, engine.vocabulary)
            sampling = SamplingConfig(temperature=0, max_tokens=1400, ignore_eos=True)
            ids = [f"{streams}-{i}" for i in range(streams)]
            for id, prompt in zip(ids, job.prompts(streams, 1)):
                engine.add(Request(id, tuple(prompt), sampling))
            while engine.stats().prompt_rows or engine.stats().waiting:
                engine.step()
            bytes_read = engine.decoder.bytes_read(streams)
            for choice in itertools.product(args.next, args.beyond, args.fused):
                choose(engine, *choice)
                for _ in range(4):
                    engine.step()
                alone = replayed(engine)
                print(
                    f"{name:12} streams {streams:3} next {choice[0]:4.0f} beyond {choice[1]:4.0f} fused {choice[2]}: "
                    f"{alone:7.1f} us, {bytes_read / alone / bandwidth / 1e6:6.1%} of a copy; "
                    f"engine {stepped(engine):7.1f} us",
                    flush=True,
                )
            for id in ids:
                engine.abort(id)
            while engine.has_work:
                engine.step()
        del engine
        torch.cuda.empty_cache()


if __name__ == "__main__":
    main()
