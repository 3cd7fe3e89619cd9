"""The kernels of RMSNorm against float64: interpreted on a CPU, compiled on a GPU."""

from __future__ import annotations

import os

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

if not torch.cuda.is_available():
    os.environ.setdefault("TRITON_INTERPRET", "1")
pytest.importorskip("triton")

from deepseek.ops import rms_norm as op
from deepseek.ops.triton import rms_norm as kernel

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
#: Rows fewer and more than programs times their rows; features below, at and above a power of two; up to the widest.
SHAPES = [(1, 1), (5, 16), (300, 33), (2, 3, 1000)]
WIDE = [(37, 1024), (21, 2048), (2, 2049), (1, 8192)]
CASES = [(s, t) for s in SHAPES for t in (torch.float32, torch.bfloat16, torch.float16)]
CASES += [(s, torch.bfloat16) for s in WIDE]
EPS = 1e-5


def exact(
    x: Tensor, y: Tensor | None, weight: Tensor, d_normed: Tensor, d_sum: Tensor | None
) -> tuple[Tensor, ...]:
    """Norm, 1/rms, and the gradients for ``x`` and the weight, in float64 by autograd; the sum is rounded once."""
    total = (x if y is None else (x.double() + y.double()).to(x.dtype)).double().requires_grad_()
    wide = weight.double().requires_grad_()
    normed = F.rms_norm(total, weight.shape, wide, EPS)
    outputs, given = [normed], [d_normed.double()]
    if d_sum is not None:
        outputs, given = [*outputs, total], [*given, d_sum.double()]
    d_x, d_weight = torch.autograd.grad(outputs, [total, wide], given)
    return normed.detach(), (total.square().mean(-1) + EPS).rsqrt().detach(), d_x, d_weight


def near(got: Tensor, want: Tensor) -> None:
    """Within the rounding of the result's dtype: the kernel rounds once. (The interpreter cuts bf16 off.)"""
    cut = DEVICE == "cpu" and got.dtype == torch.bfloat16
    slack = 1e-5 if got.dtype == torch.float32 else (1.01 if cut else 0.51) * torch.finfo(got.dtype).eps
    torch.testing.assert_close(got.double(), want, rtol=slack, atol=2e-5)


def given(shape: tuple[int, ...], dtype: torch.dtype, count: int) -> list[Tensor]:
    return [torch.randn(shape, device=DEVICE).to(dtype) for _ in range(count)]


@pytest.mark.parametrize(("shape", "dtype"), CASES)
def test_values_and_gradients(shape: tuple[int, ...], dtype: torch.dtype) -> None:
    x, y, d_normed, d_again, d_sum = given(shape, dtype, 5)
    weight = torch.rand(shape[-1], device=DEVICE).to(dtype) + 0.5
    for other, again, passed in ((None, None, None), (y, None, d_sum), (y, d_again, d_sum)):
        total, normed, rstd = kernel.forward(x, other, weight, EPS)
        near(total, (x.double() if other is None else x.double() + y.double()))
        d = d_normed.double() if again is None else d_normed.double() + again.double()
        want = exact(total, None, weight, d, passed)
        near(normed, want[0])
        near(rstd, want[1])
        d_x, d_weight = kernel.backward(d_normed, again, passed, total, weight, rstd, True)
        near(d_x, want[2])
        torch.testing.assert_close(d_weight.double(), want[3], rtol=torch.finfo(dtype).eps, atol=1e-4)
        alone, nothing = kernel.backward(d_normed, again, passed, total, weight, rstd, False)
        assert alone.equal(d_x)
        assert nothing.numel() == 0


def test_the_weight_may_be_wider_than_what_it_scales() -> None:
    x, d = given((6, 40), torch.bfloat16, 2)
    weight = torch.rand(40, device=DEVICE)
    _, normed, rstd = kernel.forward(x, None, weight, EPS)
    d_x, d_weight = kernel.backward(d, None, None, x, weight, rstd, True)
    want = exact(x, None, weight, d, None)
    assert (normed.dtype, d_x.dtype, d_weight.dtype) == (x.dtype, x.dtype, torch.float32)
    for got, right in zip((normed, rstd, d_x, d_weight), want):
        near(got, right)


def test_what_is_not_contiguous() -> None:
    x, y, d_normed, d_sum = (torch.randn(40, 6, device=DEVICE).T for _ in range(4))
    weight = torch.rand(80, device=DEVICE)[::2]
    total, normed, rstd = kernel.forward(x, y, weight, EPS)
    d_x, d_weight = kernel.backward(d_normed, None, d_sum, total, weight, rstd, True)
    for got, right in zip((normed, rstd, d_x, d_weight), exact(x, y, weight, d_normed, d_sum)):
        near(got, right)


def test_the_weights_gradient_is_the_same_every_time() -> None:
    x, d = given((500, 72), torch.bfloat16, 2)
    weight = torch.rand(72, device=DEVICE)
    _, _, rstd = kernel.forward(x, None, weight, EPS)
    first, second = (kernel.backward(d, None, None, x, weight, rstd, True)[1] for _ in range(2))
    assert first.equal(second)


def test_no_rows() -> None:
    x, weight = torch.empty(0, 16, device=DEVICE), torch.ones(16, device=DEVICE)
    total, normed, rstd = kernel.forward(x, x, weight, EPS)
    assert total.shape == normed.shape == (0, 16)
    d_x, d_weight = kernel.backward(normed, None, total, total, weight, rstd, True)
    assert d_x.shape == (0, 16)
    assert d_weight.equal(torch.zeros_like(weight))


@pytest.mark.parametrize("features", [16, 1024, 2048, 4096, 8192])
def test_a_thread_holds_sixteen_elements(features: int) -> None:
    tile = kernel.options(features)
    assert tile["BR"] * tile["BC"] == 16 * 32 * tile["num_warps"]


@pytest.mark.parametrize("frozen", [None, "x", "weight"])
def test_the_operations_by_their_kernels(frozen: str | None, monkeypatch: pytest.MonkeyPatch) -> None:
    """A residual block as a model has it; what comes in is not changed."""
    monkeypatch.setattr(op, "fuses", lambda x: True)
    monkeypatch.setattr(op, "available", lambda: True)
    x, weight = torch.randn(2, 9, 48, device=DEVICE), torch.rand(48, device=DEVICE)
    tensors = [x.requires_grad_(frozen != "x"), weight.requires_grad_(frozen != "weight")]
    wide = [t.detach().double().requires_grad_(t.requires_grad) for t in tensors]
    kept = [t.detach().clone() for t in tensors]

    passed, normed = op.rms_norm_beside(x, weight, EPS)
    total, y = op.add_rms_norm(passed, normed.sin(), weight, EPS)
    total, *pair = op.add_rms_norm_twice(total, op.rms_norm(y.cos(), weight, EPS), weight, EPS)
    got = total + pair[0].sin() * pair[1]

    def norm(t: Tensor) -> Tensor:
        return F.rms_norm(t, (48,), wide[1], EPS)

    added = wide[0] + norm(wide[0]).sin()
    added = added + norm(norm(added).cos())
    want = added + norm(added).sin() * norm(added)
    torch.testing.assert_close(got.double(), want, rtol=1e-4, atol=1e-4)
    d = torch.randn(2, 48, 9, device=DEVICE).mT
    want.backward(d.double())
    for passes in (1, 2):
        got.backward(d, retain_graph=True)
        for a, b in zip(tensors, wide):
            assert (a.grad is None) == (b.grad is None)
            if a.grad is not None and b.grad is not None:
                torch.testing.assert_close(a.grad.double(), passes * b.grad, rtol=1e-4, atol=1e-4)
    assert all(t.equal(k) for t, k in zip(tensors, kept))
