"""Time fused products (``deepseek.ops.fused_products``) beside the plain path, on this GPU, and look for better tiles.

    python benchmarks/bench_fused_products.py             # a network and a layer of experts, forward and backward
    python benchmarks/bench_fused_products.py --sweep     # each product with every tile; about a minute

Shapes are those of the reference models in a micro-batch: 32,768 rows of a dense network of 2,048 × 5,632, 131,072
tokens of 64 experts of 1,024 × 768, two a token, some experts chosen ten times as often as others. Both paths take
turns in one process, so that the clock of a hot card is the same for both. The winners of a sweep belong into ``TILES``
of ``deepseek/ops/fused_products.py``. ``quack-kernels`` must be on the path; a directory that it was unpacked to must
be called ``site-packages``.
"""

from __future__ import annotations

import argparse
import itertools
import sys
from collections.abc import Callable
from functools import partial

import torch
from torch import Tensor

if not torch.cuda.is_available():
    sys.exit("error: this needs a CUDA GPU of capability 9.0, and quack-kernels")

from deepseek.bench.timing import measure, race
from deepseek.nn.layers import SwiGLU
from deepseek.ops import fused_products
from deepseek.ops.experts import Dispatch, dispatch, run_experts

CUDA = torch.device("cuda")
ROWS, HIDDEN, INNER = 32_768, 2_048, 5_632
TOKENS, EXPERTS, TOP_K, D, F = 131_072, 64, 2, 1_024, 768
TILES = (
    (256, 128, False), (256, 192, False), (128, 256, False), (128, 128, True), (128, 160, True), (128, 192, True),
)  # fmt: skip


def draw(*shape: int, scale: float = 1.0) -> Tensor:
    return (torch.randn(shape, device=CUDA) * scale).bfloat16().requires_grad_()


def routed() -> tuple[Dispatch, Tensor]:
    """Where assignments go, popular experts getting ten times what others get, and their gates."""
    popular = torch.linspace(0, 2.3, EXPERTS, device=CUDA)
    scores = popular - torch.log(-torch.log(torch.rand(TOKENS, EXPERTS, device=CUDA)))
    probs = scores.softmax(-1)
    where = dispatch(probs.topk(TOP_K, -1).indices.int(), probs, None, 0)
    return where, torch.rand(where.row_A.shape[0], device=CUDA, requires_grad=True)


def taking_turns(name: str, call: Callable[[], object], flops: float) -> None:
    """One line for each path: milliseconds and TFLOP/s."""

    def under(use: bool) -> None:
        with fused_products.forced(use):
            call()

    found = race({"plain": partial(under, False), "fused": partial(under, True)}, CUDA, rounds=12)
    for path, timing in found.items():
        print(f"{name}, {path}: {timing.ms:.3f} ms, {flops / timing.median / 1e12:.0f} TFLOP/s", flush=True)
    print(f"{name}: fused takes {found['fused'].median / found['plain'].median:.3f} of plain", flush=True)


def layers() -> None:
    network, x = SwiGLU(HIDDEN, INNER).to(CUDA, torch.bfloat16), draw(1, ROWS, HIDDEN)
    d_y = torch.randn_like(x)
    leaves = [x, *network.parameters()]
    flops = 3 * 2 * ROWS * 3 * HIDDEN * INNER
    taking_turns("dense network", lambda: torch.autograd.grad(network(x), leaves, d_y), flops)
    where, gate = routed()
    x, w_in, w_out = (
        draw(TOKENS, D),
        draw(EXPERTS, D, 2 * F, scale=D**-0.5),
        draw(EXPERTS, F, D, scale=F**-0.5),
    )
    d_y, leaves = torch.randn_like(x), [x, gate, w_in, w_out]
    flops = 3 * 2 * TOKENS * TOP_K * 3 * D * F
    taking_turns(
        "experts",
        lambda: torch.autograd.grad(run_experts(x, gate, where, w_in, w_out)[0], leaves, d_y),
        flops,
    )


def sweep() -> None:
    """Every product with every tile, most suitable first."""
    run = fused_products.products()
    where, gate = routed()
    starts = torch.nn.functional.pad(where.ends_E, (1, 0))
    token, rows = where.token_R, TOKENS * TOP_K
    x, hidden, inner = (draw(*s).detach() for s in ((TOKENS, D), (rows, F, 2), (rows, F)))
    w_in, w_out = draw(EXPERTS, D, 2 * F).detach(), draw(EXPERTS, F, D).detach()
    wide, up, down = (draw(*s).detach() for s in ((ROWS, HIDDEN), (2 * INNER, HIDDEN), (HIDDEN, INNER)))
    h, scale, experts, dense = (
        draw(ROWS, INNER, 2).detach(),
        gate.detach(),
        2 * rows * D * F,
        2 * ROWS * HIDDEN * INNER,
    )
    cases: dict[str, tuple[str, float, Callable[[], object]]] = {
        "up": ("up", 2 * experts, lambda: run.up(x, w_in, starts, token)),
        "down_gradient": (
            "down_gradient", experts, lambda: run.down_gradient(x, w_out, hidden, scale, starts, token)
        ),
        "rows, to F": ("rows", experts, lambda: run.rows(inner, w_out, starts)),
        "rows, of 2F": ("rows", 2 * experts, lambda: run.rows(hidden.flatten(1), w_in.mT, starts)),
        "outer, to 2F": ("outer", 2 * experts, lambda: run.outer(x, hidden.flatten(1), starts, token)),
        "outer, turned": ("outer", experts, lambda: run.outer(x, inner, starts, token, turned=True)),
        "dense_up": ("dense_up", 2 * dense, lambda: run.dense_up(wide, up)),
        "dense_down_gradient": ("down_gradient", dense, lambda: run.dense_down_gradient(wide, down, h)),
    }  # fmt: skip
    for name, (tile, flops, call) in cases.items():
        found = []
        before = run.tiles[tile]
        for (m, n, turns), share in itertools.product(TILES, (1, 2)):
            run.tiles[tile] = run.tile(m, n, turns, share)
            try:
                found.append((measure(call, CUDA, rounds=4).median, f"{m} x {n}, {turns}, {share}"))
            except Exception as error:
                print(
                    f"{name} {m} x {n}, {turns}, {share}: {type(error).__name__} {str(error)[:200]}",
                    flush=True,
                )
        run.tiles[tile] = before
        for seconds, text in sorted(found)[:4]:
            print(f"{name}: {text}: {seconds * 1e3:.3f} ms, {flops / seconds / 1e12:.0f} TFLOP/s", flush=True)


if __name__ == "__main__":
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--sweep", action="store_true")
    torch.manual_seed(0)
    if parser.parse_args().sweep:
        sweep()
    else:
        layers()
