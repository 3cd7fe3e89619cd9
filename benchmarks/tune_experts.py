"""Times of the expert layer's kernels by tile on this GPU: what ``deepseek/ops/triton/decode_experts.py`` should say.

    python benchmarks/tune_experts.py [--shape 1024x768x64x2] [--rows 1 2 4 8 16 32 64 128 256] [--compile]

For every number of rows and way (``few``, ``grouped``) it times the whole layer, with norm and residual, as one CUDA
graph over layers enough to exceed the caches; one knob is turned at a time, from what the module says. ``--compile``
compiles all of it in parallel first (Triton keeps it on disk).
"""

from __future__ import annotations

import argparse
import os
import subprocess
import sys
from collections.abc import Callable, Iterator
from functools import partial
from typing import Any

import torch

if not torch.cuda.is_available():
    sys.exit("error: this needs a CUDA GPU, and Triton")

from bench_linear import copy_ceiling, turns

from deepseek.bench.timing import measure
from deepseek.ops.triton import decode_experts as kernels

BEYOND_CACHE = 400 << 20  #: bytes of weights that take turns
MOST_FEW = 32  #: rows
TILES: dict[str, list[dict[str, Any]]] = {
    "few_gate_up": [
        {"BF": 1, "num_warps": 1}, {"BF": 2, "num_warps": 1}, {"BF": 2, "num_warps": 2}, {"BF": 4, "num_warps": 2},
        {"BF": 4, "num_warps": 4}, {"BF": 8, "num_warps": 4},
    ],
    "few_down": [
        {"BC": 1, "num_warps": 1}, {"BC": 2, "num_warps": 1}, {"BC": 2, "num_warps": 2}, {"BC": 4, "num_warps": 4},
    ],
    "gate_up": [
        {"BF": 32, "BC": 128, "num_warps": 4, "num_stages": 3, "maxnreg": 168},
        {"BF": 32, "BC": 128, "num_warps": 4, "num_stages": 3, "maxnreg": 128},
        {"BF": 32, "BC": 64, "num_warps": 4, "num_stages": 6, "maxnreg": 128},
        {"BF": 16, "BC": 128, "num_warps": 4, "num_stages": 4, "maxnreg": 128},
        {"BF": 16, "BC": 256, "num_warps": 4, "num_stages": 3, "maxnreg": 128},
        {"BF": 64, "BC": 64, "num_warps": 4, "num_stages": 4, "maxnreg": 168},
        {"BF": 64, "BC": 128, "num_warps": 8, "num_stages": 3, "maxnreg": 128},
    ],
    "down": [
        {"BC": 64, "BF": 128, "num_warps": 4, "num_stages": 3, "maxnreg": 128},
        {"BC": 32, "BF": 128, "num_warps": 4, "num_stages": 4, "maxnreg": 128},
        {"BC": 32, "BF": 256, "num_warps": 4, "num_stages": 3, "maxnreg": 128},
        {"BC": 64, "BF": 256, "num_warps": 4, "num_stages": 3, "maxnreg": 168},
        {"BC": 64, "BF": 64, "num_warps": 4, "num_stages": 6, "maxnreg": 168},
        {"BC": 128, "BF": 64, "num_warps": 4, "num_stages": 4, "maxnreg": 168},
    ],
}  # fmt: skip


def changes(path: str) -> Iterator[tuple[str, Callable[[], None]]]:
    """Every knob of a way: what it is called and what turns it."""
    yield "as it is", lambda: None
    for name, tiles in TILES.items():
        if name.startswith("few") == (path == "few"):
            for tile in tiles:
                kept = kernels.TILES[name] | tile
                yield f"{name} {tile}", partial(kernels.TILES.__setitem__, name, kept)
    if path == "grouped":
        for fetch in (0, 256, 1024):
            yield f"FETCH {fetch}", partial(setattr, kernels, "FETCH", fetch)
        for ahead in (264, 792, 100_000):
            yield f"AHEAD {ahead}", partial(setattr, kernels, "AHEAD", ahead)
        yield "FIND 0", partial(setattr, kernels, "FIND", 0)


def layers(shape: tuple[int, ...], count: int) -> list[tuple[Any, ...]]:
    hidden, size, experts, top_k = shape
    random = partial(torch.randn, device="cuda")
    return [
        (
            random(experts, hidden) * 0.05, torch.zeros(experts, device="cuda"),
            (random(experts, 2 * size, hidden, dtype=torch.bfloat16) * 0.05),
            (random(experts, hidden, size, dtype=torch.bfloat16) * 0.05), top_k, True,
        )
        for _ in range(count)
    ]  # fmt: skip


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--shape", default="1024x768x64x2", help="hidden, expert size, experts, chosen")
    parser.add_argument("--rows", type=int, nargs="+", default=[1, 2, 4, 8, 16, 32, 64, 128, 256])
    parser.add_argument("--compile", action="store_true", help="compile in parallel before timing")
    parser.add_argument("--only", help=argparse.SUPPRESS)  # compile one number of rows and leave
    args = parser.parse_args()
    if args.compile:
        command = [sys.executable, __file__, "--shape", args.shape, "--only", "yes", "--rows"]
        started = [subprocess.Popen([*command, str(rows)], env=os.environ.copy()) for rows in args.rows]
        for process in started:
            process.wait()
    shape = tuple(int(n) for n in args.shape.split("x"))
    hidden, size, experts, top_k = shape
    device = torch.device("cuda")
    norm = torch.ones(hidden, device=device, dtype=torch.bfloat16), 1e-5
    before = dict(kernels.TILES), kernels.FETCH, kernels.AHEAD, kernels.FIND
    with torch.inference_mode():
        ceiling = 1.0 if args.only else copy_ceiling(device)
        whole = 3 * hidden * size * experts * 2
        for rows in args.rows:
            read = whole * min(experts, rows * top_k) // experts
            packed = layers(shape, 1 if args.only else max(2, min(16, BEYOND_CACHE // read)))
            x = torch.randn(rows, hidden, device=device, dtype=torch.bfloat16)
            for path in ("few", "grouped") if rows <= MOST_FEW else ("grouped",):
                call = getattr(kernels, path)
                calls = [partial(call, x, *layer, norm=norm, residual_NC=x) for layer in packed]
                chosen = sum(c()[1].unique().numel() for c in calls) / len(calls)
                used = whole * chosen / experts + hidden * experts * 4
                for name, change in changes(path):
                    change()
                    try:
                        if args.only:
                            calls[0]()
                            continue
                        seconds = measure(turns(calls, device), device).median / len(calls)
                        share = used / seconds / ceiling
                        print(f"{rows:4} {path:8} {seconds * 1e6:7.1f} µs {share:5.0%}  {name}", flush=True)
                    except Exception as error:  # a tile that does not fit is a result too
                        print(f"{rows:4} {path:8} {type(error).__name__}  {name}", flush=True)
                    finally:
                        kernels.TILES.update(before[0])
                        kernels.FETCH, kernels.AHEAD, kernels.FIND = before[1:]
            del packed
            torch.cuda.empty_cache()


if __name__ == "__main__":
    main()
