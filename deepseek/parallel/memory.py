"""Activation memory: ways of keeping less from forward to backward, and what a training step keeps (F07).

    ds.activation_checkpoint(model, "sqrt")

| mode | keeps | runs again |
|---|---|---|
| ``none`` | everything | nothing |
| ``sqrt`` | the inputs of ⌈√n⌉ segments, and the last segment | the others, one at a time |
| ``selective`` | dear results: matrix products, attention, top-k, communication | norms, activations, sums |
| ``budget=0.4`` | at most that share | as little as that allows |
| ``optimal`` | at most ``memory`` bytes | as little as that allows |
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Iterable, Sequence
from typing import Any, NamedTuple, TypeVar

import torch
from torch import Tensor, nn

from deepseek.errors import ConfigError, did_you_mean
from deepseek.parallel.checkpointing import Checkpointed, Planner, attach, detach
from deepseek.parallel.flops import flop_counter
from deepseek.parallel.offload import Offloader
from deepseek.parallel.saved import SavedBytes
from deepseek.parallel.segments import (
    Chain,
    Plan,
    cost,
    every_block,
    optimal,
    save_all,
    sqrt_segments,
)

Model = TypeVar("Model", bound=nn.Module)

MODES = ("none", "sqrt", "blocks", "selective", "budget", "optimal")


class MemoryReport(NamedTuple):
    """What one training step costs.

    Attributes:
        saved_bytes: kept on the device from forward to backward, weights aside.
        offloaded_bytes: kept on the host instead.
        flops: of the matrix products and attention of forward and backward, recomputation included. Compiled blocks
            run eagerly while FLOPs are counted, so what a compiler recomputes is not in it.
        seconds: of one step that nothing else observes.
        peak: largest allocation during that step, bytes, weights and gradients included; ``None`` on a CPU.
    """

    saved_bytes: int
    offloaded_bytes: int
    flops: int
    seconds: float
    peak: int | None


def activation_checkpoint(
    model: Model,
    mode: str = "none",
    *,
    offload: bool = False,
    sample: Any = None,
    memory: int | None = None,
    blocks: Sequence[nn.Module] | None = None,
) -> Model:
    """Make ``model`` keep less for backward, and return it. Names, weights and results stay as they are.

    Works on our ``Transformer`` and on any module with a row of blocks. What a block gets and returns may hold
    anything; a block must not change what it gets (a key-value cache with gradients on would be extended twice).
    Compile the blocks before or after (``compile_blocks``), not the whole model: that would run them eagerly.

    Args:
        mode: ``"none"``; ``"sqrt"``: ⌈√n⌉ segments (arXiv 1604.06174); ``"blocks"``: every block; ``"selective"``: keep
            what is dear, run the rest again; ``"budget=0.4"``: keep that share, run again as little as that allows
            (a compiled block: by the compiler, inside the block); ``"optimal"``: least recomputation within ``memory``.
        offload: what is kept, if 1 MiB or more, waits in host memory.
        sample: arguments of ``model`` (a tensor or a tuple) on which blocks are measured at once; otherwise the first
            forward pass with gradients measures, checkpointing every block. Only ``budget`` and ``optimal`` measure.
        memory: bytes for what is kept (``optimal``); default: what checkpointing every block needs.
        blocks: the row of blocks, in the order in which they are called; default: the longest ``ModuleList`` or
            ``Sequential``.

    Raises:
        ConfigError: unknown mode, no blocks, or no plan fits the memory (raised where blocks are measured).
    """
    name, share = parse_mode(mode)
    row = list(blocks) if blocks is not None else find_blocks(model)
    for block in row:
        detach(block)
    if name == "none" and not offload:
        return model
    attach(
        Checkpointed(
            row,
            _planner(name, share, len(row), memory),
            selective=name == "selective",
            budget=share,
            offloader=Offloader() if offload else None,
        )
    )
    if sample is not None and name in ("budget", "optimal"):
        with torch.enable_grad():
            model(*sample) if isinstance(sample, tuple) else model(sample)
    return model


def parse_mode(mode: str) -> tuple[str, float | None]:
    """``"budget=0.4"`` → ``("budget", 0.4)``; the other modes have no number.

    Raises:
        ConfigError: unknown mode, or a share that is not in (0, 1].
    """
    name, equals, number = mode.partition("=")
    if name not in MODES or (name == "budget") != bool(equals):
        raise ConfigError(
            f"activation_checkpoint={mode!r} is none of 'none', 'sqrt', 'blocks', 'selective', 'budget=0.4', 'optimal'"
            f"{did_you_mean(name, MODES)}"
        )
    if not equals:
        return name, None
    try:
        share = float(number)
    except ValueError:
        share = 0.0
    if not 0 < share <= 1:
        raise ConfigError(f"activation_checkpoint={mode!r}: the share must be a number above 0 and at most 1")
    return name, share


def kept_share(mode: str, layers: int) -> float:
    """About which share of the activations is there at once in ``mode``, for guessing how many rows fit.

    A block's input is taken for a tenth of what it saves; what is being run again counts.
    """
    name, share = parse_mode(mode)
    segments = math.ceil(math.sqrt(layers))
    shares = {
        "none": 1.0, "selective": 0.6, "budget": share or 1.0, "blocks": 0.1 + 1 / layers,
        "optimal": 0.1 + 1 / layers, "sqrt": 0.1 * segments / layers + 1 / segments,
    }  # fmt: skip
    return min(1.0, shares[name])


def find_blocks(model: nn.Module) -> list[nn.Module]:
    """The blocks of the longest ``ModuleList`` or ``Sequential`` that is not inside another."""
    rows: dict[str, list[nn.Module]] = {}
    for name, module in model.named_modules():
        inside = any(name.startswith(f"{outer}." if outer else "") for outer in rows)
        if isinstance(module, (nn.ModuleList, nn.Sequential)) and len(module) and not inside:
            rows[name] = list(module)
    if not rows:
        raise ConfigError(
            f"{type(model).__name__} has no ModuleList or Sequential; name its blocks: "
            "activation_checkpoint(model, mode, blocks=[...])"
        )
    return max(rows.values(), key=len)


def _planner(name: str, share: float | None, n: int, memory: int | None) -> Plan | Planner:
    if name == "budget":
        assert share is not None
        return lambda chain: optimal(chain, int(share * cost(save_all(n), chain).peak))
    if name == "optimal":
        return lambda chain: optimal(chain, memory or _every_block_bytes(chain))
    plans = {"none": save_all, "sqrt": sqrt_segments, "blocks": every_block, "selective": every_block}
    return plans[name](n)


def _every_block_bytes(chain: Chain) -> int:
    return cost(every_block(len(chain.seconds)), chain).peak


def measure(step: Callable[[], Tensor], *, weights: Iterable[Tensor] = ()) -> MemoryReport:
    """Bytes, FLOPs, seconds and peak of ``step`` and the backward pass of the loss it returns.

    Runs it three times: bytes are counted (and compiled blocks compile), FLOPs are counted, time is taken. Gradients
    add up in the parameters.

    Args:
        step: a forward pass that returns the scalar to call ``backward`` on.
        weights: tensors that do not count as saved, beside parameters (for compiled blocks: ``model.parameters()``).
    """
    with SavedBytes(weights) as saved:
        loss = step()
    loss.backward()
    device = loss.device
    del loss
    with torch.compiler.set_stance("force_eager"), flop_counter() as flops:
        step().backward()
    if device.type == "cuda":
        torch.cuda.synchronize(device)
        torch.cuda.reset_peak_memory_stats(device)
    began = time.perf_counter()
    step().backward()
    peak = None
    if device.type == "cuda":
        torch.cuda.synchronize(device)
        peak = torch.cuda.max_memory_allocated(device)
    seconds = time.perf_counter() - began
    return MemoryReport(saved.total, saved.offloaded, int(flops.get_total_flops()), seconds, peak)
