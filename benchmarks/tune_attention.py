"""Check the fused attention kernels on this GPU, time them, and look for better tiles.

    python benchmarks/tune_attention.py                      # errors against float64, times against SDPA
    python benchmarks/tune_attention.py --sweep              # time every candidate tile of every kernel
    python benchmarks/tune_attention.py --sweep --lengths 32768 --head-dim 64

Times are of CUDA graphs: what the GPU does, without Python's launches. A sweep first compiles all candidates in
parallel processes (Triton keeps them on disk), then times them one by one. The winners belong into ``HOPPER`` of
``deepseek/ops/triton/hybrid_attention.py``.
"""

from __future__ import annotations

import argparse
import os
import subprocess
import sys
from collections.abc import Callable, Iterator
from dataclasses import replace
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

if not torch.cuda.is_available():
    sys.exit("error: this needs a CUDA GPU, and Triton; `deepseek bench attention --quick` runs without")

from deepseek.bench.timing import graph_seconds
from deepseek.ops.attention import document_spans
from deepseek.ops.hybrid_attention import hybrid_attention_kernel, hybrid_attention_reference, pooled_spans
from deepseek.ops.triton import hybrid_attention as kernels
from deepseek.ops.triton.hybrid_attention import Tiles, Tuning, forced_tuning
from deepseek.ops.triton.pooling import pool_forward

WINDOW, BLOCK, STRIDE = 128, 32, 32

#: own rows, rows a step, warps, stages
FORWARD = (
    (64, 64, 4, 2),
    (64, 64, 4, 3),
    (64, 128, 4, 2),
    (128, 64, 8, 2),
    (128, 64, 8, 3),
    (128, 128, 8, 2),
)
QUERIES = (
    (64, 64, 4, 2),
    (64, 64, 4, 3),
    (128, 64, 8, 2),
    (128, 64, 8, 3),
    (128, 128, 8, 1),
    (128, 128, 8, 2),
)
KEYS = (
    (64, 32, 4, 2),
    (64, 32, 4, 3),
    (64, 64, 4, 2),
    (64, 64, 8, 2),
    (128, 32, 8, 2),
    (128, 64, 8, 2),
    (128, 64, 8, 3),
    (128, 128, 8, 1),
)
CANDIDATES = {"forward": FORWARD, "queries": QUERIES, "keys": KEYS}


def inputs(
    rows: int, length: int, heads: int, kv: int, size: int, dtype: torch.dtype = torch.bfloat16
) -> list[Tensor]:
    """q, k, v, q_rope, k_rope, sink, gate on the GPU, laid out as the projections make them."""
    torch.manual_seed(0)
    shapes = [(rows, length, n, size) for n in (heads, kv, kv, heads, kv)]
    made = [torch.randn(s, device="cuda").to(dtype).transpose(1, 2) for s in shapes]
    made += [
        torch.randn(2, kv, size, device="cuda"),
        torch.rand(rows, length, heads, device="cuda").transpose(1, 2),
    ]
    return [x.requires_grad_() for x in made]


def milliseconds(work: Callable[[], object]) -> float:
    """GPU time of one call, the best of five replays of a graph."""
    return 1e3 * min(graph_seconds(work, repeats=10))


def relative(a: Tensor, b: Tensor) -> float:
    return ((a.double() - b).norm() / b.norm().clamp(min=1e-30)).item()


def check(heads: int, kv: int, size: int) -> None:
    """Errors of outputs and gradients against float64, with and without documents."""
    names = ("y", "dq", "dk", "dv", "dq_rope", "dk_rope", "dsink", "dgate")
    for length in (1000, 1024):
        for packed in (False, True):
            values = inputs(2, length, heads, kv, size)
            wide = [x.detach().double().requires_grad_() for x in values]
            documents = spans = pooled = None
            if packed:
                documents = (torch.rand(2, length, device="cuda") < 3 / length).long().cumsum(1).int()
                spans = document_spans(documents)
                pooled = pooled_spans(documents, spans, BLOCK, STRIDE)
            want = hybrid_attention_reference(
                *wide, window=WINDOW, block=BLOCK, stride=STRIDE, documents=documents
            )
            weight = torch.randn_like(want)
            theirs = torch.autograd.grad((want * weight).sum(), wide)
            for tma in (False, True):
                with forced_tuning(kernels.tuning_for(values[0]).reading(tma)):
                    y = hybrid_attention_kernel(
                        *values, window=WINDOW, block=BLOCK, stride=STRIDE, spans=spans, pooled=pooled
                    )
                    ours = torch.autograd.grad((y * weight).sum(), values)
                errors = [relative(a, b) for a, b in zip((y, *ours), (want, *theirs))]
                told = " ".join(f"{n} {e:.1e}" for n, e in zip(names, errors))
                verdict = "ok" if max(errors) < 2e-2 else "WRONG"
                print(
                    f"check D={size} T={length} documents={packed} tma={tma}: {verdict}  {told}", flush=True
                )


class Calls:
    """The three parts of one hybrid layer on fixed inputs, each a function to time."""

    def __init__(self, rows: int, length: int, heads: int, kv: int, size: int) -> None:
        q, k, v, q_rope, k_rope, sink, gate = (x.detach() for x in inputs(rows, length, heads, kv, size))
        k_pool, v_pool = pool_forward(k, v, None, None, BLOCK, STRIDE)
        self.tensors = (q, q_rope, k_rope, v, k_pool, v_pool, sink, gate)
        self.pool = lambda: pool_forward(k, v, None, None, BLOCK, STRIDE)
        self.out, self.whole, self.lse = self.forward()
        self.do = torch.randn_like(self.out)

    def forward(self) -> tuple[Tensor, Tensor, Tensor]:
        return kernels.hybrid_forward(*self.tensors, None, None, None, None, WINDOW, BLOCK, STRIDE)

    def backward(self) -> object:
        kept = (self.out, self.whole, self.lse)
        return kernels.hybrid_backward(
            self.do, *self.tensors, *kept, None, None, None, None, WINDOW, BLOCK, STRIDE
        )


def tunings(base: Tuning, part: str) -> Iterator[tuple[str, Tuning]]:
    for tma in (False, True):
        for tiles in CANDIDATES[part]:
            changed: dict[str, Any] = {part: Tiles(*tiles, tma)}
            yield f"{part} {tiles} tma={tma}", replace(base, **changed)


def sweep(rows: int, length: int, heads: int, kv: int, size: int) -> None:
    """Times of every candidate; a candidate that does not fit the machine is told so."""
    calls = Calls(rows, length, heads, kv, size)
    base = kernels.tuning_for(calls.do)
    for part in CANDIDATES:
        found = []
        for name, tuning in tunings(base, part):
            try:
                with forced_tuning(tuning):
                    found.append((milliseconds(calls.forward if part == "forward" else calls.backward), name))
            except Exception as error:
                print(f"  {name}: {type(error).__name__}", flush=True)
        print(
            f"{rows}x{length} D={size}, {'forward' if part == 'forward' else 'whole backward'}, best first:"
        )
        for time, name in sorted(found):
            print(f"  {time:.4f} ms  {name}", flush=True)


def compile_all(arguments: list[str], workers: int) -> None:
    """Compile the candidates in ``workers`` processes."""
    here = [sys.executable, __file__, *arguments]
    children = [
        subprocess.Popen([*here, "--worker", str(i), "--workers", str(workers)]) for i in range(workers)
    ]
    for child in children:
        child.wait()


def work(index: int, workers: int, rows: int, length: int, heads: int, kv: int, size: int) -> None:
    """Compile this process's share."""
    calls = Calls(rows, length, heads, kv, size)
    base = kernels.tuning_for(calls.do)
    jobs = [job for part in CANDIDATES for job in tunings(base, part)]
    for _, tuning in jobs[index::workers]:
        try:
            with forced_tuning(tuning):
                calls.forward()
                calls.backward()
        except Exception:
            pass  # told by the sweep
    torch.cuda.synchronize()


def times(rows: int, length: int, heads: int, kv: int, size: int) -> None:
    """Forward, and forward with backward, against SDPA; pooling and autograd's additions included."""
    values = inputs(rows, length, heads, kv, size)
    _, _, v, q_rope, k_rope, _, _ = values
    weight = torch.randn_like(q_rope)

    def hybrid() -> Tensor:
        return hybrid_attention_kernel(*values, window=WINDOW, block=BLOCK, stride=STRIDE)

    def window() -> Tensor:
        return kernels.window_forward(q_rope, k_rope, v, None, None, WINDOW)[0]

    def full() -> Tensor:
        return F.scaled_dot_product_attention(q_rope, k_rope, v, is_causal=True, enable_gqa=True)

    def train(call: Callable[[], Tensor], leaves: list[Tensor]) -> Callable[[], object]:
        return lambda: torch.autograd.grad(call(), leaves, weight)

    leaves = [q_rope, k_rope, v]
    calls = Calls(rows, length, heads, kv, size)
    told = {
        "SDPA": milliseconds(train(full, leaves)),
        "window": milliseconds(train(window, leaves)),
        "hybrid": milliseconds(train(hybrid, values)),
        "hybrid, its forward kernel": milliseconds(calls.forward),
        "hybrid, its backward kernels": milliseconds(calls.backward),
        "pooling forward": milliseconds(calls.pool),
    }
    for name, time in told.items():
        print(
            f"{rows}x{length} D={size} {name}: {time:.4f} ms ({time / told['SDPA']:.3f} of SDPA)", flush=True
        )


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--sweep", action="store_true")
    parser.add_argument("--rows", type=int, default=1)
    parser.add_argument("--lengths", type=int, nargs="+", default=[4096, 32768])
    parser.add_argument("--heads", type=int, default=16)
    parser.add_argument("--kv-heads", type=int, default=4)
    parser.add_argument("--head-dim", type=int, default=128)
    parser.add_argument("--workers", type=int, default=min(12, os.cpu_count() or 1))
    parser.add_argument("--worker", type=int)
    a = parser.parse_args()
    if a.worker is not None:
        work(a.worker, a.workers, a.rows, a.lengths[0], a.heads, a.kv_heads, a.head_dim)
        return
    if a.sweep:
        shape = ["--rows", a.rows, "--heads", a.heads, "--kv-heads", a.kv_heads, "--head-dim", a.head_dim]
        compile_all([str(x) for x in (*shape, "--lengths", a.lengths[0])], a.workers)
    else:
        check(a.heads, a.kv_heads, a.head_dim)
    for length in a.lengths:
        (sweep if a.sweep else times)(a.rows, length, a.heads, a.kv_heads, a.head_dim)


if __name__ == "__main__":
    main()
