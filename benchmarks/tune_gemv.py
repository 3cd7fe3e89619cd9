"""Which tile reads a decoding step's weights fastest on this GPU? Products of one row (or two), as the engine has them.

    python benchmarks/tune_gemv.py                 # dense_856m's layers; the winner belongs into TILE of
    python benchmarks/tune_gemv.py --rows 2        # deepseek/ops/triton/linear.py

A layer is made as often as it takes to exceed the caches; the copies take turns in one CUDA graph, each product reading
what the one before it wrote, as in a model, so that what ``chain`` overlaps is seen. ``plain``: torch's kernels for the
same (norm, product, SwiGLU or residual). Candidates are compiled by many processes first.
"""

from __future__ import annotations

import argparse
import itertools
import sys
from collections.abc import Callable, Sequence
from concurrent.futures import ProcessPoolExecutor
from functools import partial
from multiprocessing import get_context
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from deepseek.bench.ceilings import copy_tb_per_s
from deepseek.ops.experts import swiglu

if not torch.cuda.is_available():
    sys.exit("error: this needs a CUDA GPU, and Triton")

from deepseek.ops.triton.linear import Tile, forced_tile, gemv, tile_for

CUTS = [*itertools.product((1, 2, 4), (1024, 2048), (2, 4, 8)), (8, 2048, 8), (8, 1024, 4), (1, 8192, 8), (2, 8192, 8),
        (2, 8192, 16)]  # fmt: skip
CANDIDATES = [Tile(*cut, blocks) for cut in CUTS for blocks in (1, 2, 4, 8, 64)]
BYTES = 512 << 20  #: of weights that take turns


class Case(NamedTuple):
    """A product of the engine: inputs, outputs (of the weight) and what is around it."""

    inputs: int
    outputs: int
    around: str

    def run(self, x: Tensor, weight: Tensor, scale: Tensor, y: Tensor) -> Tensor:
        if self.around == "residual":
            return gemv(x, weight, residual_NF=y)
        return gemv(x, weight, norm=(scale, 1e-5), swiglu=self.around == "swiglu")

    def plain(self, x: Tensor, weight: Tensor, scale: Tensor, y: Tensor) -> Tensor:
        if self.around == "residual":
            return y + F.linear(x, weight)
        z = F.linear(F.rms_norm(x, scale.shape, scale, 1e-5), weight)
        return swiglu(z) if self.around == "swiglu" else z


CASES = [Case(*c) for c in (
    (2048, 3072, "norm"), (2048, 2048, "residual"), (2048, 11264, "swiglu"), (5632, 2048, "residual"),
    (2048, 32768, "norm"), (1024, 1536, "norm"),
)]  # fmt: skip


def inputs(case: Case, rows: int, copies: int) -> list[tuple[Tensor, Tensor, Tensor, Tensor]]:
    def made(*shape: int) -> Tensor:
        return torch.randn(*shape, device="cuda", dtype=torch.bfloat16)

    return [
        (
            made(rows, case.inputs),
            made(case.outputs, case.inputs),
            made(case.inputs),
            made(rows, case.outputs),
        )
        for _ in range(copies)
    ]


def compile_one(job: tuple[Case, Tile, int]) -> str:
    case, tile, rows = job
    try:
        with forced_tile(tile):
            case.run(*inputs(case, rows, 1)[0])
    except Exception as error:
        return f"{case} {tile}: {type(error).__name__}"
    return ""


def microseconds(run: Callable[..., Tensor], sets: Sequence[tuple[Tensor, ...]], repeats: int = 5) -> float:
    """Of one product, by graphs over all copies."""
    for one in sets[:2]:
        run(*one)
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        for one in sets:
            run(*one)
    graph.replay()
    begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    times = []
    for _ in range(repeats):
        begin.record()
        graph.replay()
        end.record()
        end.synchronize()
        times.append(1e3 * begin.elapsed_time(end) / len(sets))
    return min(times)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--rows", type=int, default=1)
    parser.add_argument("--processes", type=int, default=12)
    args = parser.parse_args()
    jobs = [(case, tile, args.rows) for case in CASES for tile in CANDIDATES if tile.blocks == 64]
    with ProcessPoolExecutor(args.processes, get_context("spawn")) as pool:
        for problem in filter(None, pool.map(compile_one, jobs, chunksize=6)):
            print("left out:", problem)
    ceiling = copy_tb_per_s(torch.device("cuda"), 2**30)
    print(f"{torch.cuda.get_device_name()}, {args.rows} rows, a copy: {ceiling:.2f} TB/s")
    ratios: dict[Tile, list[float]] = {tile: [] for tile in CANDIDATES}
    with torch.inference_mode():
        for case in CASES:
            size = 2 * case.inputs * case.outputs
            sets = inputs(case, args.rows, max(4, BYTES // size))
            found = {}
            for tile in CANDIDATES:
                with forced_tile(tile):
                    try:
                        found[tile] = microseconds(partial(case.run), sets)
                    except Exception as error:
                        print(f"{case} {tile}: {type(error).__name__}")
            plain = microseconds(case.plain, sets)
            best = min(found.values())
            for tile, took in found.items():
                ratios[tile].append(took / best)
            now = found[tile_for(1, case.inputs, False)]
            told = ", ".join(
                f"{tuple(t)} {took:.2f}" for t, took in sorted(found.items(), key=lambda x: x[1])[:6]
            )
            print(f"{case.inputs}x{case.outputs} {case.around}: plain {plain:.2f} us, ours {now:.2f}, "
                  f"best {size / best / 1e6 / ceiling:.0%} of a copy: {told}", flush=True)  # fmt: skip
    overall = sorted((sum(r) / len(r), tile) for tile, r in ratios.items() if len(r) == len(CASES))
    print("over all, beside each case's best:", ", ".join(f"{tuple(t)} {r:.3f}" for r, t in overall[:6]))


if __name__ == "__main__":
    main()
