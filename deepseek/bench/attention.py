"""``deepseek bench attention``: hybrid and window attention against full causal SDPA and compiled flex_attention.

Forward, and forward with backward, of the operation alone (no projections, no rotation), on the layout that the
layers give it. Ratios are to full causal SDPA of the same heads at the same length. Errors are against float64
on a short row, with SDPA's own bf16 error beside them. For decoding, what counts is the bytes of keys and values
that one new token reads.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from deepseek.bench.ceilings import compute_dtype, copy_tb_per_s, matmul_tflops
from deepseek.bench.report import BenchOptions, Report
from deepseek.bench.timing import Call, attempt, free, race
from deepseek.config import replace as changed
from deepseek.errors import ConfigError
from deepseek.models import ModelConfig, count
from deepseek.nn.attention import Attention, AttentionConfig, FullAttention, WindowAttention
from deepseek.nn.hybrid import HybridAttention
from deepseek.ops.attention import causal_mask, dense_attention, window_mask
from deepseek.ops.hybrid_attention import hybrid_attention_reference, pooled_mask
from deepseek.registry import backends, get_op, load_plugins

LAYERS: dict[str, type[Attention]] = {"F": FullAttention, "L": WindowAttention, "H": HybridAttention}


@dataclass(frozen=True, kw_only=True)
class Options(BenchOptions):
    """Hybrid and window attention against full attention."""

    shapes: tuple[str, ...] = ("1x4096", "8x4096", "1x32768")  # rows x length
    heads: int = 16
    kv_heads: int = 4
    head_dim: int = 128
    window: int = 128
    block: int = 32
    stride: int = 32
    rounds: int = 10

    @property
    def config(self) -> AttentionConfig:
        c = AttentionConfig(
            heads=self.heads, kv_heads=self.kv_heads, head_dim=self.head_dim, window=self.window,
            block=self.block, stride=self.stride,
        )  # fmt: skip
        return changed(c, heads=4, kv_heads=2, head_dim=16, window=32) if self.quick else c

    @property
    def sizes(self) -> list[tuple[int, int]]:
        """(rows, length) of every shape. Raises ``ConfigError`` for one that cannot be read."""
        found = []
        for shape in ("1x256",) if self.quick else self.shapes:
            rows, _, length = shape.partition("x")
            if not rows.isdigit() or not length.isdigit():
                raise ConfigError(f"--shapes {shape!r} is not ROWSxLENGTH, such as 1x4096")
            found.append((int(rows), int(length)))
        return found


@dataclass(frozen=True)
class Inputs:
    """Random ``q, q_rope [B, H, T, D]``, ``k, k_rope, v [B, K, T, D]``, ``sink [2, K, D]``, ``gate [B, H, T]``."""

    q: Tensor
    k: Tensor
    v: Tensor
    q_rope: Tensor
    k_rope: Tensor
    sink: Tensor
    gate: Tensor

    @classmethod
    def random(
        cls, config: AttentionConfig, rows: int, length: int, device: torch.device, dtype: torch.dtype
    ) -> Inputs:
        """Heads as the layers have them: ``[B, T, H, D]`` in memory."""

        def heads(number: int) -> Tensor:
            x = torch.randn(rows, length, number, config.head_dim, device=device).to(dtype)
            return x.transpose(1, 2).requires_grad_()

        gate = torch.rand(rows, length, config.heads, device=device).transpose(1, 2)
        sink = torch.randn(2, config.kv_heads, config.head_dim, device=device)
        return cls(
            heads(config.heads), heads(config.kv_heads), heads(config.kv_heads), heads(config.heads),
            heads(config.kv_heads), sink.requires_grad_(), gate.requires_grad_(),
        )  # fmt: skip

    def to(self, dtype: torch.dtype) -> Inputs:
        """Fresh leaves of another dtype."""
        return Inputs(*(t.detach().to(dtype).requires_grad_() for t in self.tensors))

    @property
    def tensors(self) -> tuple[Tensor, ...]:
        return (self.q, self.k, self.v, self.q_rope, self.k_rope, self.sink, self.gate)


Make = Callable[
    [Inputs], tuple[Callable[[], Tensor], tuple[Tensor, ...]]
]  #: inputs -> forward, what gets gradients


def sdpa(x: Inputs) -> tuple[Callable[[], Tensor], tuple[Tensor, ...]]:
    """Full causal attention by torch."""
    grouped = x.q.shape[1] != x.k.shape[1]
    leaves = (x.q_rope, x.k_rope, x.v)
    return lambda: F.scaled_dot_product_attention(*leaves, is_causal=True, enable_gqa=grouped), leaves


def full(x: Inputs) -> tuple[Callable[[], Tensor], tuple[Tensor, ...]]:
    """Full causal attention as our layers call it: torch's fastest kernel for this device first."""
    leaves = (x.q_rope, x.k_rope, x.v)
    return lambda: dense_attention(*leaves), leaves


def flex_window(config: AttentionConfig, x: Inputs) -> tuple[Callable[[], Tensor], tuple[Tensor, ...]]:
    """Compiled flex_attention with a window mask."""
    from torch.nn.attention.flex_attention import create_block_mask, flex_attention

    def visible(b: Tensor, h: Tensor, i: Tensor, j: Tensor) -> Tensor:
        return (i >= j) & (i - j < config.window)

    T = x.q.shape[2]
    blocks = create_block_mask(visible, None, None, T, T, device=x.q.device)
    compiled: Any = torch.compile(flex_attention, dynamic=False)
    leaves = (x.q_rope, x.k_rope, x.v)
    return lambda: compiled(*leaves, block_mask=blocks, enable_gqa=True), leaves


def window(
    config: AttentionConfig, backend: str, x: Inputs
) -> tuple[Callable[[], Tensor], tuple[Tensor, ...]]:
    """Our window attention by one of its backends."""
    op, leaves = get_op("window_attention", backend), (x.q_rope, x.k_rope, x.v)
    more: tuple[Tensor, ...] = ()
    if backend == "chunked":  # its mask is made once a model, not once a layer
        more = (window_mask(x.q.shape[2], config.window, None, x.q.device),)
    return lambda: op(*leaves, config.window, *more), leaves


def hybrid(
    config: AttentionConfig, backend: str, compiled: bool, x: Inputs
) -> tuple[Callable[[], Tensor], tuple[Tensor, ...]]:
    """Our hybrid attention by one of its backends; compiled, as in a compiled block, its pooling is fused."""
    op, T, device = get_op("hybrid_attention", backend), x.q.shape[2], x.q.device
    sizes: dict[str, Any] = {"window": config.window, "block": config.block, "stride": config.stride}
    if backend == "chunked":
        sizes["window_mask"] = window_mask(T, config.window, None, device)
        sizes["global_mask"] = pooled_mask(torch.arange(T, device=device), T, config.block, config.stride)
    call: Any = torch.compile(op, dynamic=False) if compiled else op
    return lambda: call(*x.tensors, **sizes), x.tensors


def contestants(config: AttentionConfig, device: torch.device) -> dict[str, Make]:
    """What runs here, by name; the name's first letter is that of the layer kind, for the count of FLOPs."""
    load_plugins()

    def here(op: str) -> list[str]:
        slow = ("reference",) if device.type != "cpu" else ("reference", "triton")
        return [b for b in backends(op) if b not in slow]

    gpu = device.type == "cuda"
    found: dict[str, Make] = {"Full, SDPA": sdpa, "Full, ours": full}
    if gpu:
        found["Local, flex_attention compiled"] = partial(flex_window, config)
    found.update({f"Local, ours, {b}": partial(window, config, b) for b in here("window_attention")})
    found.update({f"Hybrid, ours, {b}": partial(hybrid, config, b, False) for b in here("hybrid_attention")})
    if gpu and "triton" in here("hybrid_attention"):
        found["Hybrid, ours, triton, compiled"] = partial(hybrid, config, "triton", True)
    return found


def run(options: Options) -> Report:
    """Times, errors and bytes."""
    device, config, sizes = options.torch_device, options.config, options.sizes
    torch.manual_seed(options.seed)
    report = Report("attention", device, options, options.json)
    size, numbers = (256, 2**20) if options.quick else (8192, 2**30)
    report.ceiling(f"{_name(device)} matmul {size}^3, TFLOP/s", matmul_tflops(device, size))
    report.ceiling("copy, TB/s", copy_tb_per_s(device, numbers))
    free(device)
    for rows, length in sizes:
        _times(report, config, rows, length, options, device)
    _errors(report, config, 128 if options.quick else 512, device)
    report.add("bytes of keys and values that a new token reads, per row", reads(config, options))
    return report.close()


def _name(device: torch.device) -> str:
    return "fp32" if device.type == "cpu" else "bf16"


def _times(
    report: Report, config: AttentionConfig, rows: int, length: int, options: Options, device: torch.device
) -> None:
    """One table: every contestant at one shape."""
    forward: dict[str, Call] = {}
    both: dict[str, Call] = {}
    for name, make in contestants(config, device).items():
        inputs = Inputs.random(config, rows, length, device, compute_dtype(device))
        outcome = attempt(partial(_calls, make, inputs), device)
        if outcome.value is None:
            report.note(f"{name} at {rows}x{length}: {outcome.problem}")
            continue
        forward[name], both[name] = outcome.value
    rounds, warmup = (2, 1) if options.quick else (options.rounds, 3)
    alone = race(forward, device, rounds=rounds, warmup=warmup)
    together = race(both, device, rounds=rounds, warmup=warmup)
    base = next(iter(forward))
    table = []
    for name in forward:
        work = (
            4 * count.visible_pairs(_model(config), name[0], length) * rows * config.heads * config.head_dim
        )
        f, t = alone[name].median, together[name].median
        table.append({
            "rows x length": f"{rows}x{length}", "attention": name, "forward ms": f * 1e3,
            "forward+backward ms": t * 1e3, "of SDPA, forward": f / alone[base].median,
            "of SDPA, forward+backward": t / together[base].median, "TFLOP/s": 3.5 * work / t / 1e12,
        })  # fmt: skip
    report.add(f"time at {rows} x {length:,}", table)
    free(device)


def _calls(make: Make, inputs: Inputs) -> tuple[Call, Call]:
    """Forward, and forward with backward; both have run once."""
    call, leaves = make(inputs)

    def forward() -> None:
        with torch.no_grad():
            call()

    gradient = torch.randn_like(call().detach())

    def both() -> None:
        torch.autograd.grad(call(), leaves, gradient)

    forward()
    both()
    return forward, both


def _model(config: AttentionConfig) -> ModelConfig:
    return ModelConfig(attention=config, pattern="F")


def _errors(report: Report, config: AttentionConfig, length: int, device: torch.device) -> None:
    """Outputs and gradients against float64, on one short row."""
    small = Inputs.random(config, 1, length, device, compute_dtype(device))
    exact, table = small.to(torch.float64), []
    at = torch.arange(length, device=device)

    def dense(reach: int | None) -> Tensor:
        repeat = config.heads // config.kv_heads
        k, v = (t.repeat_interleave(repeat, 1) for t in (exact.k_rope, exact.v))
        scores = exact.q_rope @ k.mT * config.head_dim**-0.5
        return scores.masked_fill(~causal_mask(at, at, reach), float("-inf")).softmax(-1) @ v

    short = (exact.q_rope, exact.k_rope, exact.v)
    truth: Mapping[str, tuple[Callable[[], Tensor], tuple[Tensor, ...]]] = {
        "F": (lambda: dense(None), short),
        "L": (lambda: dense(config.window), short),
        "H": (
            lambda: hybrid_attention_reference(
                *exact.tensors, window=config.window, block=config.block, stride=config.stride
            ),
            exact.tensors,
        ),
    }
    for name, make in contestants(config, device).items():
        outcome = attempt(lambda make=make, name=name: _error(make(small), truth[name[0]]), device)  # type: ignore[misc]
        if outcome.value is None:
            report.note(f"{name}, error: {outcome.problem}")
        else:
            table.append({"attention": name, **outcome.value})
    report.add(f"relative error against float64, {length} positions", table)


def _error(
    ours: tuple[Callable[[], Tensor], tuple[Tensor, ...]],
    truth: tuple[Callable[[], Tensor], tuple[Tensor, ...]],
) -> dict[str, float]:
    """Norm of the difference over the norm: of the output, and the largest of the gradients'."""
    out, exact = ours[0](), truth[0]()
    gradient = torch.randn_like(out.detach())
    got = torch.autograd.grad(out, ours[1], gradient)
    want = torch.autograd.grad(exact, truth[1], gradient.to(exact.dtype))

    def relative(a: Tensor, b: Tensor) -> float:
        return float((a.double() - b).norm() / b.norm())

    return {"output": relative(out.detach(), exact.detach()), "worst gradient": max(map(relative, got, want))}


def reads(config: AttentionConfig, options: Options) -> list[dict[str, Any]]:
    """Counted from the config, and measured on one layer's cache (fp32 on a CPU, bf16 else)."""
    device, dtype, table = options.torch_device, compute_dtype(options.torch_device), []
    for length in dict.fromkeys(length for _, length in options.sizes):
        full = count.cache_bytes(changed(_model(config), layers=4), length, dtype_bytes=dtype.itemsize)
        for pattern in ("F", "L", "H", "LLLH", "LLLF"):
            model = changed(_model(config), layers=4, pattern=pattern)
            held = count.cache_bytes(model, length, dtype_bytes=dtype.itemsize)
            measured = sum(_cache_bytes(kind, config, length, device, dtype) for kind in model.kinds)
            table.append({
                "length": length, "pattern": pattern, "counted, KiB a layer": held / 4 / 1024,
                "measured, KiB a layer": measured / 4 / 1024, "of full": measured / full,
            })  # fmt: skip
    return table


def _cache_bytes(
    kind: str, config: AttentionConfig, length: int, device: torch.device, dtype: torch.dtype
) -> int:
    cache = LAYERS[kind](config.heads * config.head_dim, config).new_cache()
    k, v = (
        torch.randn(1, config.kv_heads, length, config.head_dim, device=device).to(dtype) for _ in range(2)
    )
    cache.extend(k, v)
    return cache.nbytes
