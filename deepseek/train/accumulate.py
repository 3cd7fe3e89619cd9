"""Gradients of several micro-batches, added up in fp32 although each is bf16.

A bf16 sum of many gradients loses the small ones. So, as soon as autograd has a lowered parameter's gradient, a hook
adds it to an fp32 buffer and frees it: at no time are there two gradients of the whole model.
"""

from __future__ import annotations

import weakref
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager

import torch
from torch import Tensor, nn

from deepseek.ops.accumulate import add_


class Accumulator:
    """fp32 sums of the gradients of ``parameters``.

    With one micro-batch it does nothing, and ``p.grad`` is used as it comes. ``sums`` is emptied by the optimizer's
    ``zero_grad``; buffers are kept from step to step.
    """

    def __init__(self, parameters: Iterable[nn.Parameter], sums: dict[nn.Parameter, Tensor]) -> None:
        self.sums, self._active = sums, False
        self._buffers: dict[nn.Parameter, Tensor] = {}
        hook = _hook(weakref.ref(self))
        for p in parameters:
            p.register_post_accumulate_grad_hook(hook)

    @contextmanager
    def over(self, micro_batches: int) -> Iterator[None]:
        """Sum the gradients of so many backward passes."""
        self._active = micro_batches > 1
        try:
            yield
        finally:
            self._active = False

    def _add(self, p: Tensor) -> None:
        assert isinstance(p, nn.Parameter)
        if not self._active or p.grad is None:
            return
        if p not in self._buffers:
            self._buffers[p] = torch.empty_like(p, dtype=torch.float32)
        if p in self.sums:
            add_(self.sums[p], p.grad)
        else:
            self.sums[p] = self._buffers[p].copy_(p.grad)
        p.grad = None


def _hook(accumulator: weakref.ref[Accumulator]) -> Callable[[Tensor], None]:
    """A hook that does not keep its owner alive: of a cycle through a tensor's hooks nothing is ever freed."""

    def add(p: Tensor) -> None:
        if (owner := accumulator()) is not None:
            owner._add(p)

    return add
