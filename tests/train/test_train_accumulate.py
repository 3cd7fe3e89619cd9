"""Sums of micro-batches' gradients: the same bits as a copy to fp32 and additions, and no more memory."""

from __future__ import annotations

import weakref

import pytest
import torch
from torch import Tensor, nn

from deepseek.train.accumulate import Accumulator

SHAPES = [(5, 7), (64,), (3, 4, 8)]


class Case:
    """Parameters that are given gradients as autograd gives them."""

    def __init__(self, dtype: torch.dtype = torch.bfloat16) -> None:
        self.parameters = [nn.Parameter(torch.zeros(shape, dtype=dtype)) for shape in SHAPES]
        self.sums: dict[nn.Parameter, Tensor] = {}
        self.accumulator = Accumulator(self.parameters, self.sums)

    def backward(self, *gradients: Tensor) -> None:
        torch.autograd.backward([(p * g).sum() for p, g in zip(self.parameters, gradients)])


def drawn(dtype: torch.dtype = torch.bfloat16) -> list[Tensor]:
    return [torch.randn(shape).to(dtype) for shape in SHAPES]


def copied_and_added(gradients: list[list[Tensor]]) -> list[Tensor]:
    """What was done before: the first one copied, the others added, each rounded once."""
    totals = [first.float() for first in gradients[0]]
    for later in gradients[1:]:
        for total, g in zip(totals, later, strict=True):
            total += g.float()
    return totals


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("micro_batches", [2, 3, 5])
def test_sums_are_those_of_a_copy_and_additions_bit_for_bit(micro_batches: int, dtype: torch.dtype) -> None:
    case = Case(dtype)
    for _ in range(2):  # a second step starts from nothing
        gradients = [drawn(dtype) for _ in range(micro_batches)]
        with case.accumulator.over(micro_batches):
            for each in gradients:
                case.backward(*each)
                assert all(p.grad is None for p in case.parameters)
        for p, want in zip(case.parameters, copied_and_added(gradients), strict=True):
            assert case.sums[p].dtype == torch.float32
            assert case.sums[p].equal(want)
        case.sums.clear()  # the optimizer's zero_grad


def test_what_got_one_gradient_is_wide_in_the_end() -> None:
    case, first, second = Case(), drawn(), drawn()
    with case.accumulator.over(2):
        case.backward(*first)
        case.backward(*second[:1])
    assert not case.accumulator.waiting
    assert all(total.dtype == torch.float32 for total in case.sums.values())
    wanted = [first[0].float() + second[0].float(), first[1].float(), first[2].float()]
    assert all(case.sums[p].equal(want) for p, want in zip(case.parameters, wanted, strict=True))


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_wide_gradients_add_up_too(dtype: torch.dtype) -> None:
    case, gradients = Case(dtype), [drawn(dtype) for _ in range(3)]
    with case.accumulator.over(3):
        for each in gradients:
            case.backward(*each)
    for p, *each in zip(case.parameters, *gradients, strict=True):
        assert case.sums[p].equal(each[0] + each[1] + each[2])


def test_a_first_gradient_waits_as_it_came_and_is_freed_by_the_second() -> None:
    case = Case()
    p = case.parameters[0]
    with case.accumulator.over(3):
        case.backward(*drawn())
        waiting = case.accumulator.waiting[p]
        assert waiting.dtype == torch.bfloat16
        assert not case.sums
        alive = weakref.ref(waiting)
        del waiting
        case.backward(*drawn())
        assert alive() is None
        assert not case.accumulator.waiting
        address = case.sums[p].data_ptr()
        case.backward(*drawn())
        assert case.sums[p].data_ptr() == address


def test_one_micro_batch_leaves_gradients_where_they_are() -> None:
    case, gradients = Case(), drawn()
    with case.accumulator.over(1):
        case.backward(*gradients)
    assert not case.sums
    assert all(
        p.grad is not None and p.grad.equal(g) for p, g in zip(case.parameters, gradients, strict=True)
    )


def test_a_step_that_fails_leaves_nothing_waiting() -> None:
    case = Case()

    def fail() -> None:
        with case.accumulator.over(2):
            case.backward(*drawn())
            raise RuntimeError("out of memory")

    with pytest.raises(RuntimeError, match="out of memory"):
        fail()
    assert not case.accumulator.waiting
    with case.accumulator.over(1):
        case.backward(*drawn())
    assert not case.sums
