"""``deepseek bench fusion``: ``ds.jit`` beside eager torch and ``torch.compile`` alone.

Three works: one layer as the source documents fuse it (norm, linear, GELU, linear, residual), BERT-base end to end
(random weights), and a block of our own model. The same work in the same format throughout; errors are against float64.
Launches are kernels on a GPU; on a CPU operators and compiled loops that touch data, views and allocations left out.
Last, how long a first step waits for the compiler: all blocks by one compilation, and the model as one graph.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.profiler import ProfilerActivity

from deepseek.bench.ceilings import ceiling_size, copy_tb_per_s, matmul_tflops
from deepseek.bench.report import BenchOptions, Report
from deepseek.bench.timing import Call, attempt, free, race, synchronize
from deepseek.errors import MissingExtraError
from deepseek.models import PRESETS, Transformer
from deepseek.ops.jit import compile_blocks, jit

EAGER = "eager"
FORMATS = {"fp32": torch.float32, "bf16": torch.bfloat16}
#: Operators that move no data: views, allocations, bookkeeping.
FREE = (
    "as_strided", "view", "_unsafe_view", "reshape", "t", "transpose", "permute", "expand", "unsqueeze", "squeeze",
    "select", "slice", "split", "split_with_sizes", "chunk", "unbind", "detach", "alias", "empty", "empty_strided",
    "empty_like", "resize_", "resolve_conj", "resolve_neg", "to", "result_type", "lift_fresh", "item",
    "_local_scalar_dense", "is_nonzero", "set_", "narrow", "flatten", "unflatten", "contiguous", "linear",
)  # fmt: skip


@dataclass(frozen=True, kw_only=True)
class Options(BenchOptions):
    """ds.jit beside eager torch and torch.compile."""

    hidden: tuple[int, ...] = (256, 1024, 4096)  # sizes of the layer
    rows: tuple[int, ...] = (128, 8192)  # tokens the layer gets: few, where launching decides, and many
    batches: tuple[str, ...] = ("32x128", "8x512")  # what BERT gets
    formats: tuple[str, ...] = ("bf16", "fp32")
    autotune: bool = False  # also mode="max-autotune", which compiles for minutes
    rounds: int = 10
    seconds: float = 0.0  # compile nothing new after so long; 0: no limit
    began: float = field(default_factory=time.perf_counter)

    @property
    def late(self) -> bool:
        return 0 < self.seconds < time.perf_counter() - self.began


class Layer(nn.Module):
    """Norm, linear, GELU, linear, residual: what S1 §4.1 fuses."""

    def __init__(self, hidden: int) -> None:
        super().__init__()
        self.norm, self.up, self.down = (
            nn.LayerNorm(hidden), nn.Linear(hidden, 4 * hidden), nn.Linear(4 * hidden, hidden)
        )  # fmt: skip

    def forward(self, x: Tensor) -> Tensor:
        return x + self.down(F.gelu(self.up(self.norm(x))))


def contenders(work: Callable[..., Any], options: Options) -> dict[str, Callable[..., Any]]:
    """Ways of running the same work, by name."""
    ways: dict[str, Callable[..., Any]] = {EAGER: work}
    if options.quick:  # compiling takes longer than anything else here
        return ways | ({"ds.jit": jit(work, dynamic=False)} if isinstance(work, Layer) else {})
    ways["torch.compile"] = torch.compile(work, dynamic=False)
    ways["ds.jit"] = jit(work, dynamic=False)
    if options.torch_device.type == "cuda":
        ways["ds.jit, CUDA graphs"] = jit(work, dynamic=False, mode="reduce-overhead")
        if options.autotune:
            ways["ds.jit, max-autotune"] = jit(work, dynamic=False, mode="max-autotune")
    return ways


def run(options: Options) -> Report:
    """A table for each work, format and size."""
    device = options.torch_device
    report = Report("fusion", device, options, options.json)
    report.ceiling("matmul, TFLOP/s", matmul_tflops(device, ceiling_size(device, options.quick)))
    report.ceiling("copy, TB/s", copy_tb_per_s(device, 2**20 if options.quick else 2**30))
    torch.manual_seed(options.seed)
    for name, make, shape, kind in _works(options):
        title = f"{name}, {kind}, forward"
        if options.late:
            report.note(f"{title}: left out, {options.seconds:.0f} s are over")
            continue
        outcome = attempt(partial(_compare, report, title, make, shape, FORMATS[kind], options), device)
        if outcome.value is None and outcome.problem:
            report.note(f"{title}: {outcome.problem}")
        free(device)
    if not options.late:
        _first_steps(report, options)
    return report.close()


def _works(options: Options) -> Iterator[tuple[str, Callable[[], nn.Module], tuple[int, ...], str]]:
    """Name, module, input shape and format of everything measured: what matters most first."""
    formats = options.formats[:1] if options.quick else options.formats
    formats = tuple("fp32" if options.torch_device.type == "cpu" else kind for kind in formats)
    batches = ("2x16",) if options.quick else options.batches
    sizes = (64,) if options.quick else options.hidden
    for kind in dict.fromkeys(formats):
        for batch in batches:
            rows, length = map(int, batch.split("x"))
            yield f"BERT-base at {batch}", partial(bert, options.quick), (rows, length), kind
        for hidden in sizes:
            for rows in (128,) if options.quick else options.rows:
                yield f"layer, {rows} x {hidden}", partial(Layer, hidden), (rows, hidden), kind
        yield "block of ours", partial(our_block, options.quick), (1, 64 if options.quick else 4096), kind


def bert(small: bool = False) -> nn.Module:
    """``BertModel`` of the base configuration, random weights.

    Raises:
        MissingExtraError: transformers is not installed.
    """
    try:
        from transformers import BertConfig, BertModel
    except ImportError as error:
        raise MissingExtraError("transformers", "hf", "BERT-base") from error
    changes = {"num_hidden_layers": 2, "hidden_size": 64, "intermediate_size": 128, "num_attention_heads": 2}
    return BertModel(BertConfig(**(changes if small else {})), add_pooling_layer=False)


def our_block(small: bool = False) -> nn.Module:
    """One layer's worth of our dense model: the embedding, a block and the last norm."""
    changes: dict[str, Any] = {"layers": 1, "vocab_size": 512}
    changes |= {"hidden": 64, "ffn": 128} if small else {}
    return Transformer(PRESETS["small" if small else "dense_856m"](**changes))


def _compare(
    report: Report,
    title: str,
    make: Callable[[], nn.Module],
    shape: tuple[int, ...],
    dtype: torch.dtype,
    o: Options,
) -> bool:
    """One table: every contender on one work."""
    device = o.torch_device
    module = make().to(device).eval().requires_grad_(False)
    tokens = not isinstance(module, Layer)
    x = torch.randint(0, 500, shape, device=device) if tokens else torch.randn(shape, device=device)
    with torch.no_grad():
        exact = _tensor(module.double()(x if tokens else x.double()))
    module = module.to(dtype)
    x = x if tokens else x.to(dtype)
    rows = []
    with torch.no_grad(), _named_kernels():
        calls: dict[str, Call] = {}
        for name, way in contenders(module, o).items():
            call = partial(way, x)
            began = time.perf_counter()
            answer = _tensor(call())
            synchronize(device)
            calls[name], first = call, time.perf_counter() - began
            rows.append({
                "by": name, "ms": None, "of eager": None, "less time %": None, "launches": launches(call, device),
                "error": float((answer - exact).abs().max() / exact.abs().max()),
                "first call s": first,
            })  # fmt: skip
        times = race(calls, device, rounds=2 if o.quick else o.rounds)
    for row in rows:
        share = times[str(row["by"])].median / times[EAGER].median
        row.update({"ms": times[str(row["by"])].ms, "of eager": share, "less time %": 100 * (1 - share)})
    report.add(title, rows)
    return True


def _tensor(output: Any) -> Tensor:
    """The hidden states in what a model returns, as a tensor that stays when CUDA graphs run again."""
    hidden = output if isinstance(output, Tensor) else getattr(output, "last_hidden_state", None)
    return (output.hidden if hidden is None else hidden).double()


@contextmanager
def _named_kernels() -> Iterator[None]:
    """Have compiled C++ loops show up in a profile. Private, and only for counting."""
    try:
        from torch._inductor import config
    except ImportError:  # pragma: no cover
        yield
        return
    with config.patch({"cpp.enable_kernel_profile": True}):
        yield


def launches(call: Call, device: torch.device) -> int:
    """How many kernels (on a CPU: operators and compiled loops) one call runs."""
    call()
    synchronize(device)
    gpu = device.type == "cuda"
    with torch.profiler.profile(activities=[ProfilerActivity.CUDA if gpu else ProfilerActivity.CPU]) as seen:
        call()
        synchronize(device)
    if gpu:
        return sum(e.count for e in seen.key_averages() if e.device_type.name == "CUDA")
    return count_operators(seen.events())


def count_operators(events: Any) -> int:
    """Outermost operators that touch data, and compiled loops."""

    def works(event: Any) -> int:
        name = event.name.removeprefix("aten::")
        loop = "cpp_fused" in name
        if loop or (event.name.startswith("aten::") and name not in FREE and not _composite(event)):
            return 1
        return sum(works(child) for child in event.cpu_children)

    return sum(works(event) for event in events if event.cpu_parent is None)


def _composite(event: Any) -> bool:
    """An operator that is made of others: those count. What a matrix product or a norm does inside is its own."""
    return event.name in (
        "aten::layer_norm",
        "aten::rms_norm",
        "aten::scaled_dot_product_attention",
        "aten::matmul",
    )


def _first_steps(report: Report, options: Options) -> None:
    """Seconds of the first training step, compiled each way from nothing."""
    device = options.torch_device
    name, length = ("small", 64) if options.quick else ("dense_856m", 1024)
    changes: Mapping[str, Any] = (
        {"hidden": 64, "ffn": 128, "layers": 4, "vocab_size": 512} if options.quick else {}
    )
    rows = []
    for way in ("compile_blocks", "one graph"):
        if options.late:
            continue
        torch._dynamo.reset()
        with torch.device(device):
            model = Transformer(PRESETS[name](pattern="F", **changes))
        tokens = torch.randint(0, 500, (1, length), device=device)
        run: Callable[..., Any] = model
        if way == "one graph":
            run = torch.compile(model, backend="aot_eager") if options.quick else jit(model, dynamic=False)
        else:
            backend = "aot_eager" if options.quick else "inductor"
            compile_blocks(model.blocks, dynamic=False, patterns=True, backend=backend)
        seconds = []
        for _ in range(2):
            began = time.perf_counter()
            with torch.autocast(device.type, torch.bfloat16, enabled=device.type == "cuda"):
                loss = run(tokens).hidden.square().mean()
            loss.backward()
            synchronize(device)
            seconds.append(time.perf_counter() - began)
        rows.append(
            {"way": way, "layers": len(model.blocks), "first step s": seconds[0], "second step s": seconds[1]}
        )
        del model, run, loss
        free(device)
    report.add(f"first step of {name}, forward and backward (the disk cache may help)", rows)
