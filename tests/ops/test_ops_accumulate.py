"""Narrow gradients added to a wide sum: the kernel against torch, bit for bit."""

from __future__ import annotations

from importlib.util import find_spec

import pytest
import torch

from deepseek.ops import accumulate
from deepseek.ops.triton import kernels

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"


@pytest.mark.skipif(find_spec("triton") is None, reason="needs Triton")
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("shape", [(1,), (3, 7), (2048,), (5, 33, 40), (0, 4)])
def test_the_kernel_is_torchs_addition(shape: tuple[int, ...], dtype: torch.dtype) -> None:
    total, addend = torch.randn(shape, device=DEVICE), torch.randn(shape, device=DEVICE).to(dtype)
    want = total + addend
    assert accumulate.fits(total, addend)
    kernels("accumulate").add_(total, addend)
    assert total.equal(want)


def test_whatever_the_kernel_does_not_take_is_added_all_the_same() -> None:
    total = torch.randn(6, 4, device=DEVICE)
    for addend in (
        torch.randn(6, 4, device=DEVICE),
        torch.randn(4, 6, device=DEVICE).bfloat16().T,
        torch.randn(4, device=DEVICE).bfloat16().expand(6, 4),
        torch.randn(6, 8, device=DEVICE).half()[:, ::2],
    ):
        assert not accumulate.fits(total, addend)
        want = total + addend
        accumulate.add_(total, addend)
        assert total.equal(want)
    wide, narrow = total.double(), total.bfloat16()
    assert not accumulate.fits(wide, narrow)
    want = wide + narrow
    accumulate.add_(wide, narrow)
    assert wide.equal(want)


@pytest.mark.skipif(find_spec("triton") is None, reason="needs Triton")
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("shape", [(1,), (3, 7), (2048,), (5, 33, 40), (0, 4)])
def test_the_kernel_of_two_narrow_ones_is_torchs_sum(shape: tuple[int, ...], dtype: torch.dtype) -> None:
    a, b = (torch.randn(shape, device=DEVICE).to(dtype) for _ in range(2))
    total = kernels("accumulate").wide_sum(a, b)
    assert total.dtype == torch.float32
    assert total.equal(a.float() + b.float())


def test_the_sum_of_two_is_a_wide_copy_and_an_addition() -> None:
    narrow = [torch.randn(6, 4, device=DEVICE).to(t) for t in (torch.bfloat16, torch.float16)]
    wide, apart = torch.randn(6, 4, device=DEVICE), torch.randn(4, 6, device=DEVICE).bfloat16().T
    for a in (*narrow, wide, apart):
        for b in (*narrow, wide, apart):
            before, total = a.clone(), accumulate.wide_sum(a, b)
            assert total.dtype == torch.float32
            assert total.equal(a.float() + b.float())
            assert a.equal(before)
    assert accumulate.wide_sum(wide.double(), narrow[0]).dtype == torch.float64


def test_hundreds_of_small_ones_are_not_lost() -> None:
    total = torch.full((64,), 256.0, device=DEVICE)
    for _ in range(256):
        accumulate.add_(total, torch.full((64,), 0.25, device=DEVICE).bfloat16())
    assert total.equal(torch.full((64,), 320.0, device=DEVICE))
