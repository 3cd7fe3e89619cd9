"""The kernels of a dense SwiGLU against float64: interpreted on a CPU, compiled on a GPU."""

from __future__ import annotations

import os

import pytest
import torch
from torch import Tensor

if not torch.cuda.is_available():
    os.environ.setdefault("TRITON_INTERPRET", "1")
pytest.importorskip("triton")

from deepseek.ops import swiglu as op
from deepseek.ops.triton import swiglu as kernel

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
SHAPES = [(1, 64), (5, 512), (37, 40), (70, 1536), (3, 1), (9, 33), (130, 72)]


def exact(h: Tensor, d: Tensor) -> tuple[Tensor, Tensor]:
    """The product and the gradient for ``h`` in float64, by autograd."""
    wide = h.double().requires_grad_()
    gate, up = wide.chunk(2, -1)
    product = gate * torch.sigmoid(gate) * up
    product.backward(d.double())
    assert wide.grad is not None
    return product.detach(), wide.grad


def near(got: Tensor, want: Tensor) -> None:
    """Within the rounding of the result's dtype: the kernel rounds once. (The interpreter cuts bf16 off.)"""
    cut = DEVICE == "cpu" and got.dtype == torch.bfloat16
    slack = 1e-5 if got.dtype == torch.float32 else (1.01 if cut else 0.51) * torch.finfo(got.dtype).eps
    torch.testing.assert_close(got.double(), want, rtol=slack, atol=1e-5)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize(("rows", "features"), SHAPES)
def test_product_and_gradient(rows: int, features: int, dtype: torch.dtype) -> None:
    h = (3 * torch.randn(rows, 2 * features)).to(DEVICE, dtype)
    d = torch.randn(rows, features).to(DEVICE, dtype)
    product, d_h = exact(h, d)
    near(kernel.product(h), product)
    place, untouched = d.clone(), d.clone()
    near(kernel.gradient_in_place(h, place, again=True), d_h)
    near(place, product)
    near(kernel.gradient_in_place(h, untouched, again=False), d_h)
    assert untouched.equal(d)


def test_a_part_of_a_wider_tensor() -> None:
    wide = torch.randn(6, 200).to(DEVICE)
    h, d = wide[:, 8:88], torch.randn(6, 40).to(DEVICE)
    product, d_h = exact(h, d)
    near(kernel.product(h), product)
    near(kernel.gradient_in_place(h, d, again=True), d_h)


@pytest.mark.filterwarnings(
    "ignore::RuntimeWarning"
)  # of the interpreter: NumPy says what it thinks of infinity
def test_large_gates_saturate_and_what_is_not_finite_stays_so() -> None:
    gate = torch.tensor([[-1e4, -200.0, -60.0, 0.0, 60.0, 200.0, 1e4, torch.nan]])
    h, d = torch.cat((gate, torch.ones_like(gate)), -1).to(DEVICE), torch.ones(1, 8).to(DEVICE)
    product, d_h = exact(h[:, [*range(7), *range(8, 15)]], d[:, :7])
    got, place = kernel.product(h), d.clone()
    got_d = kernel.gradient_in_place(h, place, again=True)
    near(got[:, :7], product)
    near(got_d[:, :7], d_h[:, :7])
    near(got_d[:, 8:15], d_h[:, 7:])
    assert torch.stack((got[0, 7], place[0, 7], got_d[0, 7], got_d[0, 15])).isnan().all()


def test_no_rows() -> None:
    h, d = torch.empty(0, 16, device=DEVICE), torch.empty(0, 8, device=DEVICE)
    assert kernel.product(h).shape == (0, 8)
    assert kernel.gradient_in_place(h, d, again=True).shape == (0, 16)


@pytest.mark.parametrize("needed", [(True, True), (True, False), (False, True)])
def test_the_operation_by_its_kernels(needed: tuple[bool, bool], monkeypatch: pytest.MonkeyPatch) -> None:
    """Backward overwrites the product's gradient, which is its own, and nothing else."""
    monkeypatch.setattr(op, "fuses", lambda h: True)
    monkeypatch.setattr(op, "available", lambda: True)
    h, weight = (torch.randn(s, device=DEVICE) for s in ((2, 9, 80), (24, 40)))
    given = [t.requires_grad_(n) for t, n in zip((h, weight), needed)]
    wide = [t.detach().double().requires_grad_(n) for t, n in zip(given, needed)]
    d = torch.randn(2, 24, 9, device=DEVICE).mT  # not contiguous
    before, kept = d.clone(), [t.detach().clone() for t in given]
    got, want = op.swiglu_linear(*given), torch.nn.functional.linear(op.swiglu(wide[0]), wide[1])
    torch.testing.assert_close(got.double(), want, rtol=1e-4, atol=1e-4)
    want.backward(d.double())
    for passes in (1, 2):
        got.backward(d, retain_graph=True)
        for a, b in zip(given, wide):
            assert (a.grad is None) == (b.grad is None)
            if a.grad is not None and b.grad is not None:
                torch.testing.assert_close(a.grad.double(), passes * b.grad, rtol=1e-4, atol=1e-4)
    assert d.equal(before)
    assert all(t.equal(k) for t, k in zip(given, kept))
