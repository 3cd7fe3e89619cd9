"""Time RMSNorm with the residual addition, each way, beside what a compiler makes of its plain torch, on this GPU.

    python benchmarks/bench_rms_norm.py                               # the two shapes of the speed targets; a minute
    python benchmarks/bench_rms_norm.py --warps 16,24 --stages 1,2,3  # other settings of backward than the kernel's own

By CUDA graphs. GB/s count what must be read and written once. Backward has the gradients of the norm, of the sum past
it, and, with ``parts 2``, of a second reader of the norm, as in a layer of experts. The difference of the kernel's
results from the compiled ones is shown as a share of their norm.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Callable

import torch
from torch import Tensor

if not torch.cuda.is_available():
    sys.exit("error: this needs a CUDA GPU of capability 8.0 or newer")

from deepseek.bench.timing import graph_seconds
from deepseek.ops.rms_norm import reference, reference_gradient
from deepseek.ops.triton import rms_norm as kernel

SHAPES = ((32768, 2048), (131072, 1024))  #: rows, features
EPS = 1e-6


def plain(x: Tensor, y: Tensor, weight: Tensor) -> tuple[Tensor, ...]:
    """Sum, norm and 1/rms."""
    total = x + y
    return total, *reference(total, weight, EPS)


def line(name: str, f: Callable[[], tuple[Tensor, ...]], size: int, want: tuple[Tensor, ...]) -> None:
    """One line: time, GB/s of ``size`` bytes, and how far the results are from ``want``."""
    far = max(float((a.double() - b.double()).norm() / b.double().norm()) for a, b in zip(f(), want))
    ms = 1e3 * min(graph_seconds(f, repeats=8))
    print(f"  {name:34} {ms:6.3f} ms {size / ms / 1e6:5.0f} GB/s, off by {far:.1e}", flush=True)


def shape(rows: int, features: int, settings: list[tuple[int, int]]) -> None:
    torch.manual_seed(0)
    torch._dynamo.reset()
    x, y, d, again, d_sum = (torch.randn(rows, features, device="cuda").bfloat16() for _ in range(5))
    weight = torch.rand(features, device="cuda").bfloat16() + 0.5
    ahead, back = torch.compile(plain), torch.compile(reference_gradient)
    want = ahead(x, y, weight)
    line("forward, compiled", lambda: ahead(x, y, weight), 4 * x.nbytes, want)
    line("forward, kernel", lambda: kernel.forward(x, y, weight, EPS), 4 * x.nbytes, want)
    total, _, rstd = want
    for parts, second in ((1, None), (2, again)):
        size, name = (3 + parts) * x.nbytes, f"backward, parts {parts}"
        right = back(d, second, d_sum, total, weight, rstd)
        line(
            f"{name}, compiled",
            lambda second=second: back(d, second, d_sum, total, weight, rstd),  # type: ignore[misc]
            size,
            right,
        )
        for kernel.WARPS, kernel.STAGES in settings:
            line(
                f"{name}, warps {kernel.WARPS} stages {kernel.STAGES}",
                lambda second=second: kernel.backward(d, second, d_sum, total, weight, rstd, True),  # type: ignore[misc]
                size,
                right,
            )


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--warps", default=str(kernel.WARPS), help="of backward's programs on a processor")
    parser.add_argument("--stages", default=str(kernel.STAGES), help="iterations whose loads are under way")
    args = parser.parse_args()
    settings = [(int(w), int(s)) for w in args.warps.split(",") for s in args.stages.split(",")]
    print(f"{torch.cuda.get_device_name()}, torch {torch.__version__}")
    for rows, features in SHAPES:
        print(f"{rows} rows of {features}")
        shape(rows, features, settings)


if __name__ == "__main__":
    main()
