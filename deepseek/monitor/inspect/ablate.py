"""What the loss would be without a head, or without an expert: measured, by taking it out.

Three ways of taking out: ``zero`` (it adds nothing), ``mean`` (it adds what it adds on average over the batch, so that
only what it says about each token is lost), and for experts ``reroute`` (the router may not choose it, and the next
best expert answers). The model is given back as it was.

The layers below the one that is changed give the same as before, so they are run once: ``Replay`` starts again from the
input of any block.

Shape letters: B rows, T positions, C hidden size, H heads, D head size, N tokens, K experts per token.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, ExitStack, contextmanager
from dataclasses import asdict, dataclass
from typing import Any, Literal, cast

import torch
from torch import Tensor, nn

from deepseek.batch import IGNORE, Batch
from deepseek.errors import ConfigError
from deepseek.models import Transformer
from deepseek.models.transformer import Block
from deepseek.monitor.inspect.examine import attentions, evaluating
from deepseek.nn.moe import MoE, Routing
from deepseek.ops.cross_entropy import linear_cross_entropy
from deepseek.ops.experts import swiglu

Mode = Literal["zero", "mean", "reroute"]
KEPT_BYTES = 2**29  #: block inputs are kept up to this size; a larger batch is run from the start each time


@dataclass(frozen=True)
class Ablation:
    """What taking one part out did; losses in nats per target.

    Attributes:
        delta: ``ablated_loss − loss``; above zero for a part that helps.
        error: standard error of ``delta`` over the rows of the batch, NaN with one row.
        seconds: of the measurement.
    """

    layer: int
    head: int | None
    expert: int | None
    mode: str
    loss: float
    ablated_loss: float
    delta: float
    error: float
    seconds: float

    def to_dict(self) -> dict[str, Any]:
        return asdict(self)


class Replay:
    """A model and a batch whose loss can be had again from any block on.

    Args:
        batch: on the model's device.
    """

    @torch.no_grad()
    def __init__(self, model: Transformer, batch: Batch) -> None:
        self.model, self.batch = model, batch
        self._inputs: list[tuple[Any, ...]] = []
        hidden = batch.tokens.numel() * model.config.hidden * model.embedding.weight.element_size()
        kept = hidden * len(model.blocks) <= KEPT_BYTES
        with ExitStack() as hooks:
            for block in model.blocks if kept else []:
                handle = block.register_forward_pre_hook(lambda module, args: self._inputs.append(args))
                hooks.callback(handle.remove)
            with evaluating(model):
                self.rows = self._row_losses(self._all())

    def losses(self, first: int = 0) -> Tensor:
        """Sum of the cross-entropy of each row, nats, fp64 ``[B]``; only blocks ``first`` and above are run."""
        with torch.no_grad(), evaluating(self.model):
            if not self._inputs:
                return self._row_losses(self._all())
            x, *rest = self._inputs[first]
            for block in list(self.model.blocks)[first:]:
                x, _ = block(x, *rest)
            return self._row_losses(self.model.norm(x))

    def _all(self) -> Tensor:
        return self.model(self.batch.tokens, self.batch.documents, self.batch.positions).hidden

    def _row_losses(self, hidden_BTC: Tensor) -> Tensor:
        weight = self.model.head_weight
        each = [
            linear_cross_entropy(h, weight, t)[0].double().cpu()
            for h, t in zip(hidden_BTC, self.batch.targets)
        ]
        return torch.stack(each)


def ablate(
    replay: Replay, layer: int, *, head: int | None = None, expert: int | None = None, mode: Mode = "zero"
) -> Ablation:
    """Take one head or one expert out, and measure the loss.

    Raises:
        ConfigError: neither or both were named, there is no such part, or ``mode`` does not fit it.
    """
    began, model = time.perf_counter(), replay.model
    if (head is None) == (expert is None):
        raise ConfigError("name one part to take out: a head or an expert")
    _check_layer(model, layer)
    without = (
        head_taken_out(replay, layer, head, mode)
        if head is not None
        else _expert(replay, layer, expert, mode)
    )
    with without:
        rows = replay.losses(layer)
    counts = (replay.batch.targets != IGNORE).sum(1).double().cpu()
    targets = max(float(counts.sum()), 1.0)
    loss, ablated = float(replay.rows.sum()) / targets, float(rows.sum()) / targets
    return Ablation(
        layer, head, expert, mode, loss, ablated, ablated - loss, _error(rows - replay.rows, counts),
        time.perf_counter() - began,
    )  # fmt: skip


def ablate_all(
    replay: Replay,
    *,
    mode: Mode = "zero",
    experts: bool = True,
    progress: Callable[[int, int], None] | None = None,
) -> list[Ablation]:
    """Every head, and with ``experts`` every expert, one after the other; ``progress(done, of)`` after each."""
    parts: list[tuple[int, int | None, int | None]] = []
    moes = replay.model.moe_layers()
    for layer, attention in enumerate(attentions(replay.model)):
        parts += [(layer, head, None) for head in range(attention.config.heads)]
        if experts and layer in moes:
            parts += [(layer, None, expert) for expert in range(moes[layer].config.experts)]
    done = []
    for layer, head, expert in parts:
        done.append(ablate(replay, layer, head=head, expert=expert, mode=mode))
        if progress is not None:
            progress(len(done), len(parts))
    return done


def _error(difference_B: Tensor, counts_B: Tensor) -> float:
    """Standard error of a ratio of sums over rows (the usual linearised one)."""
    rows = len(counts_B)
    if rows < 2:
        return math.nan
    mean = difference_B.sum() / counts_B.sum().clamp(min=1)
    residual = difference_B - mean * counts_B
    variance = residual.square().sum() * rows / (rows - 1) / counts_B.sum().clamp(min=1) ** 2
    return float(variance.sqrt())


def _check_layer(model: Transformer, layer: int) -> None:
    if not 0 <= layer < len(model.blocks):
        raise ConfigError(f"no layer {layer}: the model has layers 0 to {len(model.blocks) - 1}")


def head_taken_out(replay: Replay, layer: int, head: int, mode: Mode) -> AbstractContextManager[None]:
    """A ``with`` block in which the head's output is zero, or its mean over the batch."""
    attention = attentions(replay.model)[layer]
    heads, size = attention.config.heads, attention.config.head_dim
    if not 0 <= head < heads:
        raise ConfigError(f"no head {head} in layer {layer}: it has heads 0 to {heads - 1}")
    if mode not in ("zero", "mean"):
        raise ConfigError(f"mode='{mode}' is not for heads; take 'zero' or 'mean'")
    own = slice(head * size, (head + 1) * size)
    valid = None if replay.batch.documents is None else (replay.batch.documents >= 0)[..., None]

    def hook(module: nn.Module, args: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
        y = args[0].clone()
        part = y[..., own]
        if mode == "zero":
            y[..., own] = 0
        elif valid is None:
            y[..., own] = part.mean((0, 1))
        else:
            y[..., own] = (part * valid).sum((0, 1)) / valid.sum().clamp(min=1)
        return (y,)

    return _hooked(attention.output.register_forward_pre_hook(hook))


@contextmanager
def _hooked(*handles: Any) -> Iterator[None]:
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


def _expert(replay: Replay, layer: int, expert: int | None, mode: Mode) -> AbstractContextManager[None]:
    ffn, experts = cast(Block, replay.model.blocks[layer]).ffn, replay.model.config.moe.experts
    if not isinstance(ffn, MoE):
        raise ConfigError(f"layer {layer} has no experts")
    if expert is None or not 0 <= expert < experts:
        raise ConfigError(f"no expert {expert} in layer {layer}: it has experts 0 to {experts - 1}")
    if mode == "reroute":
        if ffn.config.top_k >= experts:
            raise ConfigError(
                f"all {experts} experts answer every token (top_k={ffn.config.top_k}): nothing to reroute to"
            )
        return _changed(ffn.router.bias.data[expert], -1e4)
    if mode == "zero":
        return _changed(ffn.down.data[expert], 0.0)
    if mode == "mean":
        return _averaged(ffn, expert)
    raise ConfigError(f"mode='{mode}' is not known; take 'zero', 'mean' or 'reroute'")


@contextmanager
def _changed(part: Tensor, value: float) -> Iterator[None]:
    """``part`` (a view of a weight) filled with ``value`` for a while."""
    before = part.clone()
    part.fill_(value)
    try:
        yield
    finally:
        part.copy_(before)


@contextmanager
def _averaged(ffn: MoE, expert: int) -> Iterator[None]:
    """The expert answers every token with its mean answer to the tokens that chose it."""
    weights, routed = ffn.down.data[expert].clone(), list[Routing]()

    def inner(x_NC: Tensor) -> Tensor:
        return swiglu(x_NC @ ffn.gate_up.data[expert].to(x_NC.dtype)) @ weights.to(x_NC.dtype)

    def answer(module: nn.Module, args: tuple[Any, ...], out: Any) -> Any:
        y_BTC, stats = out
        routing = routed.pop()
        tokens, top_k = routing.expert_NK.shape
        gate_N = (routing.gate_A[: tokens * top_k].view(tokens, top_k) * (routing.expert_NK == expert)).sum(1)
        chosen = gate_N > 0
        if not bool(chosen.any()):
            return out
        mean_C = inner(args[0].flatten(0, 1)[chosen]).mean(0)
        return y_BTC + (gate_N[:, None].to(mean_C.dtype) * mean_C).view_as(y_BTC).to(y_BTC.dtype), stats

    handles = (
        ffn.router.register_forward_hook(lambda module, args, out: routed.append(out)),
        ffn.register_forward_hook(answer),
    )
    with _hooked(*handles), _changed(ffn.down.data[expert], 0.0):
        yield
