"""One look at the model at work: a forward pass of a few rows with hooks, beside training.

It runs in evaluation mode, without gradients and without compiled code; hooks are there for its length only. What it
sees: activations after each block, units that never answer, what each attention head does, and every target's loss.

Shape letters: B rows, T positions, C hidden size, E experts, F inner size of a feed-forward, S tokens shown to each.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from functools import partial
from typing import Any, NamedTuple, cast

import torch
from torch import Tensor, nn

from deepseek.batch import Batch
from deepseek.models.transformer import Block, Transformer
from deepseek.monitor.inspect.heads import head_statistics
from deepseek.nn.layers import SwiGLU, to_compute_dtype
from deepseek.nn.moe import MoE
from deepseek.ops.experts import swiglu
from deepseek.precision import Policy
from deepseek.train.losses import token_losses

SHOWN = 16  #: tokens that an expert is shown: those its router likes best for it
QUIET = 0.01  #: a unit whose largest answer is below this share of the layer's rms counts as dead

Figures = tuple[list[str], Tensor]  #: names and as many values, on the device


class Look(NamedTuple):
    """What a forward pass showed.

    Attributes:
        figures: names with values.
        losses: ``[B, T]`` nats of every target, 0 where there is none. batch: the rows. first_row: their place in
            the rank's batch.
    """

    figures: list[Figures]
    losses: Tensor
    batch: Batch
    first_row: int = 0


@torch.no_grad()
def look(model: Transformer, batch: Batch, policy: Policy, queries: int = 32) -> Look:
    """Show ``batch`` (on the model's device) to ``model``, which is left as it was."""
    figures: list[Figures] = []
    with quiet(model), _hooked(model, batch, queries, figures), policy.compute(batch.tokens.device):
        hidden = model(batch.tokens, batch.documents, batch.positions).hidden
        losses = token_losses(model, hidden.flatten(0, 1), batch.targets.flatten())
    figures.append(_activation("head", hidden))
    return Look(figures, losses.view_as(batch.targets), batch)


@contextmanager
def quiet(model: nn.Module) -> Iterator[None]:
    """Evaluation mode and no compiled code, for a while."""
    compiled = any(module._compiled_call_impl is not None for module in model.modules())
    training = [module for module in model.modules() if module.training]
    for module in training:
        module.training = False
    try:
        with torch.compiler.set_stance("force_eager") if compiled else nullcontext():
            yield
    finally:
        for module in training:
            module.training = True


@contextmanager
def _hooked(model: Transformer, batch: Batch, queries: int, figures: list[Figures]) -> Iterator[None]:
    """Hooks that add to ``figures``, for the length of a ``with`` block."""
    handles = [model.embedding.register_forward_hook(partial(_after_embedding, figures))]
    for i, module in enumerate(model.blocks):
        block, heads = cast(Block, module), _Heads(i, batch, queries, figures)
        handles += [
            block.register_forward_hook(partial(_after_block, i, figures)),
            block.attention.register_forward_pre_hook(heads.input),
            block.attention.output.register_forward_pre_hook(heads.output),
        ]
        if isinstance(block.ffn, MoE):
            handles.append(
                block.ffn.router.register_forward_hook(partial(_after_router, i, block.ffn, figures))
            )
        elif isinstance(block.ffn, SwiGLU):
            handles.append(block.ffn.down.register_forward_pre_hook(partial(_before_down, i, figures)))
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


def _activation(place: str, x: Tensor) -> Figures:
    """Root mean square and largest magnitude of what flows through the model here."""
    wide = x.float()
    values = torch.stack((wide.square().mean().sqrt(), wide.abs().amax()))
    return [f"layer/{place}/activation_rms", f"layer/{place}/activation_max"], values


def _after_embedding(figures: list[Figures], module: nn.Module, args: Any, x: Tensor) -> None:
    figures.append(_activation("embedding", x))


def _after_block(i: int, figures: list[Figures], module: nn.Module, args: Any, out: Any) -> None:
    figures.append(_activation(str(i), out[0]))


def dead_share(inner: Tensor) -> Tensor:
    """The share ``[...]`` of units of ``[..., N, F]`` answers that never reach ``QUIET`` times their rms."""
    wide = inner.float()
    limit = QUIET * wide.square().mean((-2, -1)).sqrt()
    return (wide.abs().amax(-2) <= limit[..., None]).float().mean(-1)


def _before_down(i: int, figures: list[Figures], module: nn.Module, args: Any) -> None:
    """Dense feed-forward: the input of the last projection is what the units answer."""
    figures.append(([f"layer/{i}/dead_units"], dead_share(args[0].flatten(0, -2)).view(1)))


def _after_router(
    i: int, moe: MoE, figures: list[Figures], module: nn.Module, args: Any, routing: Any
) -> None:
    """Experts: every one is shown the tokens that its router likes best for it, whether they chose it or not."""
    x_NC, valid_N = args[0], args[1] if len(args) > 1 else None
    probs = routing.probs_NE if valid_N is None else routing.probs_NE.masked_fill(~valid_N[:, None], -1.0)
    token_SE = probs.topk(min(SHOWN, len(probs)), dim=0).indices
    shown_ESC = to_compute_dtype(x_NC)[token_SE.T]
    inner = swiglu(torch.bmm(shown_ESC, moe.gate_up.to(shown_ESC.dtype)))
    dead_E = dead_share(inner)
    names = [f"expert/{i}/{e}/dead_units" for e in range(len(dead_E))]
    figures.append(([*names, f"layer/{i}/dead_units"], torch.cat((dead_E, dead_E.mean()[None]))))


class _Heads:
    """Two hooks of one attention layer: its input, and its heads' outputs."""

    def __init__(self, i: int, batch: Batch, queries: int, figures: list[Figures]) -> None:
        self.i, self.batch, self.queries, self.figures = i, batch, queries, figures
        self.x: Tensor | None = None

    def input(self, module: nn.Module, args: Any) -> None:
        self.x = args[0]
        self.attention: Any = module

    def output(self, module: nn.Module, args: Any) -> None:
        assert self.x is not None
        heads = head_statistics(
            self.attention, self.x, args[0],
            documents=self.batch.documents, positions=self.batch.positions, queries=self.queries,
        )  # fmt: skip
        for figure in ("entropy", "sink", "max_logit", "output_norm"):
            values = getattr(heads, figure)
            names = [f"attention/{self.i}/{h}/{figure}" for h in range(len(values))]
            self.figures.append((names, values))
