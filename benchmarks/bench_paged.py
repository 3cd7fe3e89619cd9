"""Paged attention alone: ours beside what one would write first, and beside the machine's ceilings.

    python benchmarks/bench_paged.py                              # this machine's CPU, or its GPU if it has one
    python benchmarks/bench_paged.py --json out.json              # everything, as one file
    python benchmarks/bench_paged.py --device cpu --threads 2
    python benchmarks/bench_paged.py --sweep                      # GPU: time candidate tiles, splits and stages

A case is one layer of one step: so many decodes at a context length, or prefill chunks. Kinds: F (all positions), L (a
window of 128), H (that window, and blocks of 32 every 16 pooled, with the gate). On a CPU the peer gathers each
sequence's pages and calls SDPA, one sequence after the other. On a GPU it is SDPA (and compiled FlexAttention) over
contiguous keys, which no paged cache has; times are of CUDA graphs over several caches in turn, more than the L2 holds
where memory allows; GB/s count each key and value that the rows see once; the share is of a copy measured in the same
run. Every case is first compared with float64; GPU figures come with the exact mode's check: the same bits alone and
among others.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import statistics
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from deepseek.bench.ceilings import copy_tb_per_s
from deepseek.bench.timing import graph_seconds
from deepseek.ops.paged_attention import (
    Pooled,
    StepRows,
    append_rows,
    paged_attention,
    paged_hybrid_attention,
    pool_pages,
    write_pages,
)

WINDOW, BLOCK, STRIDE = 128, 32, 16


@dataclass(frozen=True)
class Case:
    """``streams`` sequences of ``length`` positions, each with ``rows`` new ones."""

    kind: str
    streams: int
    length: int
    rows: int = 1

    @property
    def name(self) -> str:
        what = "decode" if self.rows == 1 else f"rows{self.rows}"
        return f"{self.kind} {what} {self.streams}x{self.length}"


class Layer:
    """Pages of random numbers, a step's rows over them, and what to time. ``sets``: caches that are used in turn."""

    def __init__(self, case: Case, args: argparse.Namespace, dtype: torch.dtype, sets: int = 1) -> None:
        self.case, self.device, H, K, D = case, args.device, args.heads, args.kv_heads, args.head_dim
        S, page = case.streams, args.page
        per = -(-case.length // page)
        table = (torch.randperm(S * per) + 1).view(S, per)
        place = torch.arange(case.length - case.rows, case.length)
        slot = (table[:, place // page] * page + place % page).flatten().to(self.device)
        table = table.int().to(self.device)
        self.rows = StepRows(
            place.repeat(S).to(self.device), (torch.arange(S + 1) * case.rows).int().to(self.device),
            torch.full((S,), case.length).int().to(self.device), table, table, slot, slot, page,
            (case.rows,) * S, (case.length,) * S, S if case.rows == 1 else 0,
        )  # fmt: skip

        def made(*shape: int) -> Tensor:
            return torch.randn(*shape, device=self.device, dtype=dtype)

        pages = S * per + 1
        self.q, self.q_rope, self.new = (made(S * case.rows, n, D) for n in (H, H, 2 * K))
        self.caches = [[made(pages, page, K, D) for _ in range(3)] for _ in range(sets)]
        self.pools = [[made(pages, page // STRIDE, K, D) for _ in range(2)] for _ in range(sets)]
        self.sink, self.gate = made(2, K, D), torch.rand(S * case.rows, H, device=self.device)
        cos, sin = torch.randn(2, S * case.rows, D // 2, device=self.device)
        self.rope = cos, sin
        self.turn = 0

    def attend(self, rows: StepRows | None = None) -> Tensor:
        rows, at = rows or self.rows, self.turn % len(self.caches)
        self.turn += 1
        k, v, _ = self.caches[at]
        if self.case.kind == "H":
            k_pool, v_pool = self.pools[at]
            pooled = Pooled(self.q, self.gate, k_pool, v_pool, self.sink, BLOCK, STRIDE)
            return paged_hybrid_attention(self.q_rope, k, v, pooled, rows, WINDOW)
        return paged_attention(self.q, k, v, rows.global_SP, rows, WINDOW if self.case.kind == "L" else None)

    def planned(self) -> Tensor:
        """As the first layer of a step, which also decides what all share."""
        return self.attend(replace(self.rows))

    def append(self) -> None:
        K, (k, v, raw), (k_pool, v_pool) = self.new.shape[1] // 2, self.caches[0], self.pools[0]
        new_k, new_v, slot = self.new[:, :K], self.new[:, K:], self.rows.global_slot_N
        if self.case.kind == "H":
            pool = (k_pool, v_pool)
            append_rows(self.q, new_k, new_v, self.rope, (k, v), self.rows, slot, raw, pool, BLOCK, STRIDE)
        else:
            append_rows(self.q, new_k, new_v, self.rope, (k, v), self.rows, slot)

    def apart(self) -> None:
        """The same in separate launches."""
        K, (k, v, raw) = self.new.shape[1] // 2, self.caches[0]
        cos, sin = (x[:, None] for x in self.rope)
        a, b = torch.cat((self.q, self.new[:, :K]), 1).float().chunk(2, -1)
        turned = torch.cat((a * cos - b * sin, b * cos + a * sin), -1).to(k.dtype)
        write_pages(k, v, turned[:, -K:], self.new[:, K:], self.rows.global_slot_N)
        if self.case.kind == "H":
            raw.flatten(0, 1).index_copy_(0, self.rows.global_slot_N, self.new[:, :K])
            k_pool, v_pool = self.pools[0]
            pool_pages(raw, v, k_pool, v_pool, self.rows, BLOCK, STRIDE)

    def naive(self) -> Tensor:
        """One sequence after the other: gather, repeat heads, SDPA."""
        c, k, v = self.case, *self.caches[0][:2]
        out = []
        for s in range(c.streams):
            q = self.q[s * c.rows : (s + 1) * c.rows].transpose(0, 1)[None]
            lo = max(0, c.length - c.rows - WINDOW + 1) if c.kind == "L" else 0
            kv = [x[self.rows.global_SP[s].long()].flatten(0, 1)[lo : c.length] for x in (k, v)]
            kv = [x.transpose(0, 1)[None].repeat_interleave(q.shape[1] // x.shape[1], 1) for x in kv]
            place = torch.arange(lo, c.length, device=q.device)
            seen = place <= place[-c.rows :, None]
            if c.kind == "L":
                seen &= place > place[-c.rows :, None] - WINDOW
            out.append(F.scaled_dot_product_attention(q, kv[0], kv[1], attn_mask=seen)[0].transpose(0, 1))
        return torch.cat(out)

    def contiguous(self) -> Callable[[], Tensor]:
        """SDPA over keys that lie side by side, of kind F: what paging costs."""
        c, (_, H, D), K = self.case, self.q.shape, self.new.shape[1] // 2
        q = self.q.view(c.streams, c.rows, H, D).transpose(1, 2)
        sets = [
            [x[1:].reshape(c.streams, -1, K, D)[:, : c.length].transpose(1, 2) for x in cache[:2]]
            for cache in self.caches
        ]
        sets = [[x.contiguous() for x in kv] for kv in sets]
        causal = c.rows > 1 and c.rows == c.length
        turn = 0

        def call() -> Tensor:
            nonlocal turn
            turn += 1
            k, v = sets[turn % len(sets)]
            return F.scaled_dot_product_attention(q, k, v, is_causal=causal, enable_gqa=True)

        return call

    def bytes(self) -> int:
        """Of the keys and values that the rows see, once each."""
        c, (K, D), size = self.case, self.caches[0][0].shape[2:], self.q.element_size()
        seen = c.length if c.kind == "F" else min(c.length, WINDOW + c.rows - 1)
        pooled = (c.length - BLOCK) // STRIDE + 1 if c.kind == "H" else 0
        return c.streams * (seen + pooled) * 2 * K * D * size

    def flops(self) -> float:
        c, (H, D) = self.case, self.q.shape[1:]
        first, each = c.length - c.rows, range(c.length - c.rows + 1, c.length + 1)
        keys = sum(each) if c.kind == "F" else sum(min(n, WINDOW) for n in each)
        pooled = sum(max(0, (n - BLOCK) // STRIDE + 1) for n in each) if c.kind == "H" else 0
        assert first >= 0
        return 4.0 * c.streams * H * D * (keys + pooled)


def wide(layer: Layer) -> float:
    """The relative error against plain torch in float64."""
    got = layer.attend()
    layer.turn = 0
    rows = replace(layer.rows)
    tensors = ("q", "q_rope", "sink", "gate")
    kept = {name: getattr(layer, name) for name in tensors}, layer.caches, layer.pools
    for name in tensors:
        setattr(layer, name, getattr(layer, name).cpu().double())
    layer.caches, layer.pools = ([[x.cpu().double() for x in kv] for kv in some[:1]] for some in kept[1:])
    names = ("position_N", "ends_S", "length_S", "global_SP", "window_SP", "global_slot_N", "window_slot_N")
    want = layer.attend(replace(rows, **{name: getattr(rows, name).cpu() for name in names}))
    for name, value in kept[0].items():
        setattr(layer, name, value)
    layer.caches, layer.pools, layer.turn = *kept[1:], 0
    return float((got.cpu().double() - want).norm() / want.norm())


def cpu_seconds(work: Callable[[], object], budget: float) -> float:
    work()
    start, times = time.perf_counter(), list[float]()
    while time.perf_counter() - start < budget or len(times) < 5:
        before = time.perf_counter()
        work()
        times.append(time.perf_counter() - before)
    return statistics.median(times)


def gpu_seconds(work: Callable[[], object]) -> float:
    """The median of seven replays of a graph."""
    return statistics.median(graph_seconds(work, repeats=24, replays=7))


def on_cpu(args: argparse.Namespace) -> Iterator[dict[str, Any]]:
    cases = [
        Case(kind, streams, length)
        for kind in "FLH"
        for streams in (1, 32)
        for length in (128, 1024, 4096)
        if streams * length <= 32_768
    ]
    cases += [Case(kind, 1, 512, 512) for kind in "FLH"] + [Case("F", 32, 256, 5)]
    for dtype in (torch.float32, torch.bfloat16):
        for case in cases:
            layer = Layer(case, args, dtype)
            row: dict[str, Any] = {"case": case.name, "dtype": str(dtype)[6:], "error": wide(layer)}
            row["us"] = cpu_seconds(layer.attend, args.seconds) * 1e6
            if dtype == torch.float32:
                exact = partial(layer.attend, replace(layer.rows, exact=True))
                row["exact_us"] = cpu_seconds(exact, args.seconds) * 1e6
            row["with_plan_us"] = cpu_seconds(layer.planned, args.seconds) * 1e6
            row["append_us"] = cpu_seconds(layer.append, args.seconds) * 1e6
            if case.kind != "H":
                row["naive_us"] = cpu_seconds(layer.naive, args.seconds) * 1e6
            yield row


def on_gpu(args: argparse.Namespace) -> Iterator[dict[str, Any]]:
    copy = copy_tb_per_s(torch.device("cuda"))
    yield {"copy_tb_per_s": copy}
    shapes = [(1, 512), (1, 2048), (1, 8192), (8, 2048), (64, 512), (64, 1024), (64, 4096), (1, 65_536)]
    cases = [Case(kind, *shape) for kind in "FLH" for shape in shapes]
    cases += [Case(kind, *shape) for kind in "FH" for shape in ((1, 2048, 5), (32, 1024, 5))]
    cases += [
        Case(kind, *shape) for kind in "FLH" for shape in ((1, 2048, 2048), (1, 8192, 1024), (8, 512, 512))
    ]
    for case in cases:
        one = Layer(case, args, torch.bfloat16)
        sets = max(
            1, min(24, 200_000_000 // max(one.bytes(), 1), 4_000_000_000 // (one.caches[0][0].nbytes * 4))
        )
        layer = Layer(case, args, torch.bfloat16, sets)
        row: dict[str, Any] = {"case": case.name, "dtype": "bfloat16", "sets": sets}
        if case.streams * case.length <= 70_000:
            row["error"] = wide(layer)
        seconds = gpu_seconds(layer.attend)
        row |= {"us": seconds * 1e6, "gb_per_s": layer.bytes() / seconds / 1e9}
        row |= {"share_of_copy": row["gb_per_s"] / copy / 1e3, "tflops": layer.flops() / seconds / 1e12}
        row["append_us"] = gpu_seconds(layer.append) * 1e6
        if case.rows == 1:
            row["append_apart_us"] = _tried(layer.apart)
        if case.kind == "F" and case.rows in (1, case.length):
            row["sdpa_contiguous_us"] = _tried(layer.contiguous())
            row["flex_contiguous_us"] = _tried(_flex(layer)) if args.flex else None
        row["exact_us"] = _tried(partial(layer.attend, replace(layer.rows, exact=True)))
        yield row
        torch.cuda.empty_cache()
    yield {"exact_same_bits": same_bits(args)}


def _tried(work: Callable[[], object]) -> float | str:
    try:
        return gpu_seconds(work) * 1e6
    except Exception as error:
        torch.cuda.synchronize()
        return f"{type(error).__name__}: {str(error)[:120]}"


def _flex(layer: Layer) -> Callable[[], Tensor]:
    from torch.nn.attention.flex_attention import create_block_mask, flex_attention

    c, (_, H, D), K = layer.case, layer.q.shape, layer.new.shape[1] // 2
    q = layer.q.view(c.streams, c.rows, H, D).transpose(1, 2)
    kv = [
        x[1:].reshape(c.streams, -1, K, D)[:, : c.length].transpose(1, 2).contiguous()
        for x in layer.caches[0][:2]
    ]
    before = c.length - c.rows
    mask = create_block_mask(lambda b, h, i, j: i + before >= j, None, None, c.rows, c.length)
    compiled = torch.compile(flex_attention, dynamic=False)
    return lambda: compiled(q, kv[0], kv[1], block_mask=mask, enable_gqa=True)


def same_bits(args: argparse.Namespace) -> dict[str, bool]:
    """Whether a decode's row in exact mode is the same alone, among 31 others, and as a row of a chunk."""
    same = {}
    for kind in "FLH":
        many = Layer(Case(kind, 32, 700), args, torch.bfloat16)
        rows, want = many.rows, many.attend(replace(many.rows, exact=True))
        ones = []
        for s in (0, 17, 31):
            one = slice(s, s + 1)
            alone = replace(
                rows, position_N=rows.position_N[one], ends_S=rows.ends_S[:2], length_S=rows.length_S[one],
                global_SP=rows.global_SP[one], window_SP=rows.window_SP[one], rows=(1,), lengths=(700,), decodes=1,
                global_slot_N=rows.global_slot_N[one], window_slot_N=rows.window_slot_N[one], exact=True,
            )  # fmt: skip
            kept = many.q, many.q_rope, many.gate
            many.q, many.q_rope, many.gate = (x[one] for x in kept)
            ones.append(torch.equal(many.attend(alone)[0], want[s]))
            many.q, many.q_rope, many.gate = kept
        same[kind] = all(ones)
    return same


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--heads", type=int, help="16 on a GPU, 8 on a CPU")
    parser.add_argument("--kv-heads", type=int, help="4 on a GPU, 2 on a CPU")
    parser.add_argument("--head-dim", type=int, help="128 on a GPU, 64 on a CPU")
    parser.add_argument("--page", type=int, default=16)
    parser.add_argument("--threads", type=int, default=0)
    parser.add_argument("--seconds", type=float, default=0.3, help="for each figure on a CPU")
    parser.add_argument("--flex", action="store_true", help="time compiled FlexAttention too")
    parser.add_argument("--sweep", action="store_true")
    parser.add_argument("--cases", help="of the sweep, as F64x640,F8x512x512: kind, streams x length, x rows")
    parser.add_argument("--sweep-seconds", type=float, default=100, help="for the whole sweep")
    parser.add_argument("--jobs", type=int, help="processes that compile, 0: none; the cores but four")
    parser.add_argument("--json", type=Path)
    args = parser.parse_args()
    cuda = args.device == "cuda"
    for name, small, large in (("heads", 8, 16), ("kv_heads", 2, 4), ("head_dim", 64, 128)):
        setattr(args, name, getattr(args, name) or (large if cuda else small))
    if args.threads:
        torch.set_num_threads(args.threads)
    torch.manual_seed(0)
    machine = torch.cuda.get_device_name() if cuda else platform.processor() or platform.machine()
    found: dict[str, Any] = {
        "device": machine, "torch": torch.__version__, "threads": torch.get_num_threads(),
        "load": os.getloadavg()[0], "heads": args.heads, "kv_heads": args.kv_heads, "head_dim": args.head_dim,
        "page": args.page, "results": [],
    }  # fmt: skip
    if args.sweep:
        from tune_paged import sweep
    with torch.inference_mode():
        for row in sweep(args) if args.sweep else on_gpu(args) if cuda else on_cpu(args):
            found["results"].append(row)
            told = (f"{k} {v:.3g}" if isinstance(v, float) else f"{k} {v}" for k, v in row.items())
            print("  ".join(told), flush=True)
            if args.json:
                args.json.write_text(json.dumps(found, indent=1))


if __name__ == "__main__":
    main()
