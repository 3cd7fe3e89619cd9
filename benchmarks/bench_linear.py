"""Linear layers and expert layers of serving: how much of the memory's speed do they reach?

A decode step reads every weight once, so a layer is judged by the bytes of weights it reads a second, as a share of
what a large copy reaches (bytes read plus bytes written) in the same run. Every layer is made as often as it takes to
exceed the caches, and the copies take turns; on CUDA a turn is one graph, so that launching is not what is measured.
Competitors are timed in turns too. ``plain`` is ``F.linear``, ``module`` the model's own expert layer; on a CPU
``torch`` is what serves where our native kernels cannot be compiled (oneDNN, FBGEMM); rows are fp32 as in the engine.

    python benchmarks/bench_linear.py [--device cuda] [--threads 1] [--rows 1 4 32 256] [--formats fp32 bf16 int8]
        [--shapes 576x1536 1024x4096] [--experts 512x384x32x2] [--exact] [--paths] [--rounds 10] [--json linear.json]

A shape is inputs × outputs; experts are hidden × expert size × number × chosen per row. ``--paths`` times both ways of
the expert kernels at every number of rows: where they cross is ``STREAM_ROWS`` of ``deepseek.ops.decode_experts``.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import platform
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from deepseek.bench.timing import free, measure, race
from deepseek.nn.moe import MoE, MoEConfig
from deepseek.ops import native
from deepseek.ops.decode_experts import DeviceExperts, PackedExperts
from deepseek.ops.packed_linear import DTYPES, pack_linear

SHAPES = ("576x1536", "1024x1024", "1024x4096", "4096x1024")
EXPERTS = ("512x384x32x2",)
BEYOND_CACHE = {"cpu": 64 << 20, "cuda": 512 << 20}  #: bytes of weights that take turns
COPY = {"cpu": 256 << 20, "cuda": 2 << 30}


def copy_ceiling(device: torch.device) -> float:
    """Bytes a second of a large copy, read and written."""
    source = torch.randn(COPY[device.type] // 4, device=device)
    target = torch.empty_like(source)
    seconds = measure(lambda: target.copy_(source), device).median
    return 2 * source.nbytes / seconds


def turns(calls: Sequence[Callable[[], object]], device: torch.device) -> Callable[[], object]:
    """All calls one after another; on CUDA as one graph."""

    def run() -> None:
        for call in calls:
            call()

    if device.type != "cuda":
        return run
    run()  # compile before capturing
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        run()
    return graph.replay


def compute_dtype(format: str, device: torch.device) -> torch.dtype:
    """Of a step's rows."""
    return torch.float32 if device.type == "cpu" else DTYPES.get(format, torch.float32)


@contextlib.contextmanager
def without_native() -> Iterator[None]:
    """What is packed inside takes plain torch."""
    before = os.environ.get("DEEPSEEK_NATIVE")
    os.environ["DEEPSEEK_NATIVE"] = "0"
    try:
        yield
    finally:
        os.environ.pop("DEEPSEEK_NATIVE")
        if before is not None:
            os.environ["DEEPSEEK_NATIVE"] = before


def random(*shape: int, device: torch.device, scale: float = 1.0) -> Tensor:
    return torch.randn(*shape, device=device) * scale


def linears(
    shape: Sequence[int], rows: int, formats: Sequence[str], exact: bool, device: torch.device, rounds: int
) -> list[dict[str, Any]]:
    """One shape and number of rows, in every format and by ``F.linear``."""
    inputs, outputs = shape
    calls: dict[str, Callable[[], object]] = {}
    sizes: dict[str, float] = {}
    count: dict[str, int] = {}
    for format in formats:
        dtype = compute_dtype(format, device)
        x = random(rows, inputs, device=device).to(dtype)
        size = inputs * outputs * (1 if format == "int8" else DTYPES[format].itemsize)
        count[format] = max(2, min(64, BEYOND_CACHE[device.type] // size))
        weights = [random(outputs, inputs, device=device, scale=0.05) for _ in range(count[format])]
        ways = {format: [pack_linear(w, None, format, device) for w in weights]}
        if exact:
            ways[f"{format} exact"] = [pack_linear(w, None, format, device, exact=True) for w in weights]
        if device.type == "cpu" and native.available():
            with without_native():
                ways[f"{format} torch"] = [pack_linear(w, None, format, device) for w in weights]
        for name, packed in ways.items():
            calls[name] = turns([partial(p, x) for p in packed], device)
            sizes[name], count[name] = packed[0].nbytes, count[format]
        if format in DTYPES:
            plain, given = [w.to(DTYPES[format]) for w in weights], x.to(DTYPES[format])
            calls[f"{format} plain"] = turns([partial(F.linear, given, w) for w in plain], device)
            sizes[f"{format} plain"], count[f"{format} plain"] = size, count[format]
    times = race(calls, device, rounds=rounds)
    return [
        {"what": f"linear {inputs}x{outputs}", "way": name, "rows": rows,
         "seconds": t.median / count[name], "best": t.best / count[name], "bytes": sizes[name]}
        for name, t in times.items()
    ]  # fmt: skip


def expert_path(packed: PackedExperts, path: str) -> Callable[[Tensor], object]:
    """The layer by one of the two ways of its CUDA kernels, whatever the number of rows."""
    layer = packed._layer
    assert isinstance(layer, DeviceExperts)
    weights = layer.router, layer.bias, layer.gate_up, layer.down

    def run(x: Tensor) -> object:
        return getattr(layer.kernels, path)(x, *weights, layer.top_k, layer.normalise)

    return run


def experts(
    shape: Sequence[int], rows: int, formats: Sequence[str], exact: bool, device: torch.device, rounds: int,
    paths: bool = False,
) -> list[dict[str, Any]]:  # fmt: skip
    """One expert layer; the bytes are those of the router and of the experts that the rows chose."""
    hidden, size, number, top_k = shape
    calls: dict[str, Callable[[], object]] = {}
    sizes: dict[str, float] = {}
    count: dict[str, int] = {}
    for format in formats:
        if format == "int8" and device.type != "cpu":
            continue
        dtype = compute_dtype(format, device)
        x = random(rows, hidden, device=device).to(dtype)
        each = 3 * hidden * size * number * (1 if format == "int8" else DTYPES[format].itemsize)
        read = each * min(number, rows * top_k) // number  # at most: rows may agree on experts
        copies = max(1, min(16, BEYOND_CACHE[device.type] // read))
        config = MoEConfig(experts=number, top_k=top_k, expert_ffn=size)
        models = []
        for _ in range(copies):
            moe = MoE(hidden, config).to(device).eval()
            for p in moe.parameters():
                torch.nn.init.normal_(p, std=0.05)
            models.append(moe)
        ways: dict[str, tuple[bool, contextlib.AbstractContextManager[None]]]
        ways = {format: (False, contextlib.nullcontext())}
        if exact:
            ways[f"{format} exact"] = (True, contextlib.nullcontext())
        if device.type == "cpu" and native.available():
            ways[f"{format} torch"] = (False, without_native())
        for name, (is_exact, context) in ways.items():
            with context:
                packed = [
                    PackedExperts(m.router.weight, m.router.bias, m.gate_up, m.down, top_k, True, format, device,
                                  exact=is_exact)
                    for m in models
                ]  # fmt: skip
            calls[name] = turns([partial(p, x) for p in packed], device)
            chosen = sum(p(x)[1].unique().numel() for p in packed) / copies
            sizes[name] = packed[0].router_nbytes + packed[0].experts_nbytes * chosen / number
            count[name] = copies
            for path in ("few", "grouped") if paths and device.type == "cuda" and not is_exact else ():
                calls[f"{name} {path}"] = turns([partial(expert_path(p, path), x) for p in packed], device)
                sizes[f"{name} {path}"], count[f"{name} {path}"] = sizes[name], copies
        if format in DTYPES and (device.type == "cpu" or format == "bf16"):  # others wait for the host
            wide = DTYPES[format]
            for m in models:
                m.gate_up.data, m.down.data = m.gate_up.data.to(wide), m.down.data.to(wide)
            calls[f"{format} module"] = turns([partial(m, x.to(wide)[None]) for m in models], device)
            sizes[f"{format} module"], count[f"{format} module"] = sizes[format], copies
    times = race(calls, device, rounds=rounds)
    what = "experts " + "x".join(map(str, shape))
    return [
        {"what": what, "way": name, "rows": rows, "seconds": t.median / count[name],
         "best": t.best / count[name], "bytes": sizes[name]}
        for name, t in times.items()
    ]  # fmt: skip


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--device", default="cpu", choices=("cpu", "cuda"))
    parser.add_argument("--threads", type=int, default=0, help="0: as many as torch takes")
    parser.add_argument("--rows", type=int, nargs="+", default=[1, 4, 32, 256])
    parser.add_argument("--formats", nargs="+", default=["fp32", "bf16", "int8"])
    parser.add_argument("--shapes", nargs="*", default=list(SHAPES))
    parser.add_argument("--experts", nargs="*", default=list(EXPERTS))
    parser.add_argument(
        "--exact", action="store_true", help="also layers whose rows do not depend on each other"
    )
    parser.add_argument("--paths", action="store_true", help="also each way of the expert kernels by itself")
    parser.add_argument("--rounds", type=int, default=10)
    parser.add_argument("--json", type=Path, help="write the figures there")
    args = parser.parse_args()
    device = torch.device(args.device)
    if args.threads:
        torch.set_num_threads(args.threads)
    formats = [f for f in args.formats if f != "int8" or device.type == "cpu"]
    with torch.inference_mode():
        ceiling = copy_ceiling(device)
        machine = (
            torch.cuda.get_device_name()
            if device.type == "cuda"
            else platform.processor() or platform.machine()
        )
        print(f"{machine}, {torch.get_num_threads()} threads, torch {torch.__version__}")
        print(f"a large copy: {ceiling / 1e9:.1f} GB/s\n")
        print(f"{'layer':28} {'way':14} {'rows':>5} {'µs':>10} {'best µs':>10} {'GB/s':>8} {'of copy':>8}")
        results = []
        for kind, shapes in ((linears, args.shapes), (partial(experts, paths=args.paths), args.experts)):
            for shape in ([int(n) for n in text.split("x")] for text in shapes):
                for rows in args.rows:
                    for row in kind(shape, rows, formats, args.exact, device, args.rounds):
                        row["share_of_copy"] = row["bytes"] / row["seconds"] / ceiling
                        results.append(row)
                        print(
                            f"{row['what']:28} {row['way']:14} {rows:5} {row['seconds'] * 1e6:10.1f} "
                            f"{row['best'] * 1e6:10.1f} {row['bytes'] / row['seconds'] / 1e9:8.1f} "
                            f"{row['share_of_copy']:8.0%}",
                            flush=True,
                        )
                    free(device)
    if args.json:
        figures = {
            "machine": machine, "device": device.type, "threads": torch.get_num_threads(),
            "torch": torch.__version__, "copy_bytes_per_second": ceiling, "results": results,
        }  # fmt: skip
        args.json.write_text(json.dumps(figures, indent=1) + "\n")


if __name__ == "__main__":
    main()
