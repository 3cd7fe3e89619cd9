"""Gradients of several micro-batches, added up in fp32 although each is bf16.

A bf16 sum of many gradients loses the small ones. So, as soon as autograd has a lowered parameter's gradient, a hook
adds it to an fp32 sum and frees it: at no time are there two gradients of the whole model.

The first gradient waits as it is. With the second it becomes the sum, which costs 8 bytes an element of memory traffic
where a copy to fp32 and an addition would cost 6 + 10, and gives the same bits: a bf16 number is one of fp32 too.
"""

from __future__ import annotations

import weakref
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager

import torch
from torch import Tensor, nn

from deepseek.ops.accumulate import add_, wide_sum


class Accumulator:
    """fp32 sums of the gradients of ``parameters``.

    With one micro-batch it does nothing, and ``p.grad`` is used as it comes. ``sums`` is complete when ``over`` ends,
    not before. Memory is never more than 4 bytes an element, and the gradient that has just come: none until the first
    gradient, which is kept as it is, 2 bytes; with the second it is freed and the sum takes 4, until the optimizer's
    ``zero_grad`` empties ``sums``. (Sums that stayed from step to step would take 4 + 2 while first gradients wait.)

    Attributes:
        waiting: first gradients, as they came. Empty but inside ``over``.
    """

    def __init__(self, parameters: Iterable[nn.Parameter], sums: dict[nn.Parameter, Tensor]) -> None:
        self.sums, self._active = sums, False
        self.waiting: dict[nn.Parameter, Tensor] = {}
        hook = _hook(weakref.ref(self))
        for p in parameters:
            p.register_post_accumulate_grad_hook(hook)

    @contextmanager
    def over(self, micro_batches: int) -> Iterator[None]:
        """Sum the gradients of so many backward passes."""
        self._active = micro_batches > 1
        try:
            yield
            for p in list(self.waiting):  # those that got one gradient only
                self.sums[p] = _wide(self.waiting.pop(p))
        finally:
            self._active = False
            self.waiting.clear()

    def _add(self, p: Tensor) -> None:
        assert isinstance(p, nn.Parameter)
        if not self._active or p.grad is None:
            return
        grad, p.grad = p.grad, None
        if p in self.sums:
            add_(self.sums[p], grad)
        elif p in self.waiting:
            self.sums[p] = wide_sum(self.waiting.pop(p), grad)
        else:
            self.waiting[p] = grad


def _wide(x: Tensor) -> Tensor:
    return x.to(torch.promote_types(x.dtype, torch.float32))


def _hook(accumulator: weakref.ref[Accumulator]) -> Callable[[Tensor], None]:
    """A hook that does not keep its owner alive: of a cycle through a tensor's hooks nothing is ever freed."""

    def add(p: Tensor) -> None:
        if (owner := accumulator()) is not None:
            owner._add(p)

    return add
