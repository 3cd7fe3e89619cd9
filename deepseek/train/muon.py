"""Muon (Jordan et al. 2024): a matrix's momentum is replaced by the nearest orthogonal matrix.

That is found by a few Newton–Schulz iterations. Here it is batched: all matrices of one shape, the experts' included,
go through one chain of batched matmuls, in chunks of bounded memory. The update is scaled to the size of AdamW's (arXiv
2502.16982), so one learning rate serves both.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterable, Iterator, Mapping
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from deepseek.ops.muon import descend_, look_ahead_
from deepseek.train.part import Part, Shape

NEWTON_SCHULZ = (
    3.4445,
    -4.7750,
    2.0315,
)  #: quintic coefficients: steep at 0, roughly 1 ± 0.3 after five steps
CHUNK = 2**27  #: elements that are orthogonalised at once; their temporaries are about three times as many


def orthogonalise(matrices: Tensor, steps: int = 5) -> Tensor:
    """The nearest semi-orthogonal matrix of each ``[..., m, n]``, roughly (singular values within about 0.7…1.2).

    Runs in bf16 on CUDA, where it is fast and precise enough, and in fp32 (fp64 for fp64) elsewhere.
    """
    a, b, c = NEWTON_SCHULZ
    x = matrices.to(working_dtype(matrices)).reshape(-1, *matrices.shape[-2:])
    wide = x.shape[-2] <= x.shape[-1]
    x = x if wide else x.mT
    x = x / (x.norm(dim=(-2, -1), keepdim=True) + 1e-7)
    for _ in range(steps):
        gram = torch.bmm(x, x.mT)
        x = torch.baddbmm(x, torch.baddbmm(gram, gram, gram, beta=b, alpha=c), x, beta=a)
    return (x if wide else x.mT).to(matrices.dtype).reshape(matrices.shape)


def working_dtype(like: Tensor) -> torch.dtype:
    return torch.bfloat16 if like.is_cuda else torch.promote_types(like.dtype, torch.float32)


class Piece(NamedTuple):
    """Some of a parameter's matrices, ``[k, m, n]`` each; ``lowered`` is the weight in its low precision, if any."""

    grad: Tensor
    momentum: Tensor
    weight: Tensor
    lowered: Tensor | None


class Muon(Part):
    """Momentum, orthogonalised, for parameters whose last two dimensions are a matrix.

    Update: ``p ← p·(1 − lr·wd) − lr·0.2·√max(m, n)·orthogonalise(nesterov momentum)``.
    """

    def __init__(
        self,
        groups: Iterable[dict[str, Any]],
        lr: float,
        momentum: float = 0.95,
        weight_decay: float = 0.0,
        steps: int = 5,
        masters: Mapping[nn.Parameter, Tensor] | None = None,
    ) -> None:
        defaults = {"lr": lr, "momentum": momentum, "weight_decay": weight_decay, "ns_steps": steps}
        super().__init__(groups, defaults, masters)

    def new_state(self, p: nn.Parameter) -> dict[str, Tensor]:
        return {"momentum": torch.zeros_like(self.weight(p))}

    def state_shapes(self, p: nn.Parameter) -> dict[str, Shape]:
        return {"momentum": p.shape}

    @torch.no_grad()
    def update(self, scale: Tensor | None = None, apply: Tensor | None = None) -> None:
        for group, scalars in zip(self.param_groups, self.scalars, strict=True):
            by_shape: dict[tuple[int, ...], list[Piece]] = defaultdict(list)
            for p in self.ready(group):
                by_shape[p.shape[-2:]].extend(self._pieces(p))
            for shape, same in by_shape.items():
                row = _row(group, scalars["lr"], max(shape), scale, apply).to(same[0].weight.dtype)
                for chunk in _chunks(same):
                    _step_chunk(chunk, row, group["ns_steps"])

    def _pieces(self, p: nn.Parameter) -> Iterator[Piece]:
        """The parameter in slices of at most ``CHUNK`` elements (one matrix at least)."""
        shape = p.shape[-2:]
        size = max(1, CHUNK // shape.numel())
        tensors = [self.gradient(p).reshape(-1, *shape), self.state[p]["momentum"].view(-1, *shape)]
        tensors += [self.weight(p).view(-1, *shape)]
        tensors += [p.data.view(-1, *shape)] if p in self.masters else []
        for parts in zip(*(t.split(size) for t in tensors)):
            yield Piece(*parts, *([None] if len(parts) == 3 else []))


def _row(group: dict[str, Any], lr: Tensor, side: int, scale: Tensor | None, apply: Tensor | None) -> Tensor:
    """``deepseek.ops.muon.SCALARS`` for matrices whose longer side is ``side``."""
    one = torch.ones_like(lr)
    applied = one if apply is None else apply.to(lr.dtype)
    factor = one if scale is None else scale.to(lr.dtype)
    fresh, lr = (1 - group["momentum"]) * applied, lr * applied
    keep, rate = 1 - lr * group["weight_decay"], lr * (0.2 * side**0.5)
    return torch.stack([factor, applied, fresh, one * group["momentum"], keep, rate])


def _step_chunk(pieces: list[Piece], row: Tensor, steps: int) -> None:
    counts = [len(piece.momentum) for piece in pieces]
    like = pieces[0].momentum
    directions = like.new_empty(sum(counts), *like.shape[1:], dtype=working_dtype(like))
    for piece, direction in zip(pieces, directions.split(counts)):
        look_ahead_(direction, piece.momentum, piece.grad, row)
    for piece, update in zip(pieces, orthogonalise(directions, steps).split(counts)):
        descend_(piece.lowered, piece.weight, update, row)


def _chunks(pieces: list[Piece]) -> Iterator[list[Piece]]:
    """Consecutive pieces, together at most ``CHUNK`` elements (one piece at least)."""
    chunk: list[Piece] = []
    for piece in pieces:
        if chunk and sum(p.momentum.numel() for p in chunk) + piece.momentum.numel() > CHUNK:
            yield chunk
            chunk = []
        chunk.append(piece)
    if chunk:
        yield chunk
