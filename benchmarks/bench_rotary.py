"""Time the packed rotary embedding beside the rotations and ``cat`` that a compiler makes, on this GPU.

    python benchmarks/bench_rotary.py                      # the two shapes of the speed targets; under a minute
    python benchmarks/bench_rotary.py --tiles 1024,4096    # with other tiles than the kernels' own

Forward, and forward with backward whose gradients are contiguous and then heads first, by CUDA graphs. GB/s count what
must be read and written once: the projection and its parts, and the same again for the gradients. The results of both
are compared bit by bit with eager torch. A compiler's need not be the same: it adds products without rounding them.
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
from deepseek.nn.rope import rope_table
from deepseek.ops.rotary import rotary, rotated
from deepseek.ops.triton import rotary as kernel

SHAPES = ((8, 4096, 16, 4, 128), (16, 4096, 16, 4, 64))  #: B, T, H, K, D
Apart = Callable[[Tensor, Tensor, Tensor, int], tuple[Tensor, ...]]


def plain(y: Tensor, cos: Tensor, sin: Tensor, heads: int) -> tuple[Tensor, ...]:
    """Split and rotate; the values stay a slice of the projection."""
    x = y.unflatten(-1, (-1, 2 * cos.shape[-1]))
    kv = (x.shape[2] - heads) // 2
    q, k, v = x.split([heads, kv, kv], 2)
    return rotated(q, cos, sin), rotated(k, cos, sin), v


def case(name: str, apart: Apart, shape: tuple[int, ...], layout: str) -> None:
    """One line: times, GB/s and whether the bits are those of eager torch."""
    B, T, H, K, D = shape
    torch.manual_seed(0)
    y = torch.randn(B, T, (H + 2 * K) * D, device="cuda").bfloat16().requires_grad_()
    angles = rope_table(torch.arange(T, device="cuda"), D, 1e4)
    like = [torch.randn(B, T, n, D, device="cuda").bfloat16() for n in (H, K, K)]
    ds = like if layout == "contiguous" else [d.transpose(1, 2).contiguous().transpose(1, 2) for d in like]

    def both(f: Apart = apart) -> list[Tensor]:
        parts = f(y, *angles, H)
        return [*(p.detach() for p in parts), *torch.autograd.grad(parts, y, ds)]

    same = all(a.equal(b) for a, b in zip(both(), both(plain), strict=True))
    with torch.no_grad():
        forward = 1e3 * min(graph_seconds(lambda: apart(y, *angles, H), repeats=8))
    whole = 1e3 * min(graph_seconds(both, repeats=8))
    backward, size = whole - forward, 2 * y.nbytes / 1e6
    print(
        f"  {name:10} {layout:11} forward {forward:6.3f} ms {size / forward:5.0f} GB/s, "
        f"backward {backward:6.3f} ms {size / backward:5.0f} GB/s; {'the same' if same else 'other'} bits",
        flush=True,
    )


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument(
        "--tiles", default="", help="elements of a half a program has at a time, a power of two each"
    )
    args = parser.parse_args()
    tiles = [int(t) for t in args.tiles.split(",") if t] or [kernel.TILE]
    print(f"{torch.cuda.get_device_name()}, torch {torch.__version__}")
    for shape in SHAPES:
        print("B={} T={} H={} K={} D={}".format(*shape))
        for layout in ("contiguous", "heads first"):
            torch._dynamo.reset()
            case("compiled", torch.compile(plain), shape, layout)
            for kernel.TILE in tiles:
                case(f"tile {kernel.TILE}", rotary, shape, layout)


if __name__ == "__main__":
    main()
