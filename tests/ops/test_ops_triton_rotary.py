"""The kernels of a packed rotary embedding against float64 and plain torch: interpreted, or compiled on a GPU."""

from __future__ import annotations

import os

import pytest
import torch
from torch import Tensor

if not torch.cuda.is_available():
    os.environ.setdefault("TRITON_INTERPRET", "1")
pytest.importorskip("triton")

from deepseek.nn.rope import RopeScaling, rope_table, rotate
from deepseek.ops import rotary as op
from deepseek.ops.triton import rotary as kernel

CUDA = torch.cuda.is_available()
DEVICE = "cuda" if CUDA else "cpu"
#: rows, positions, query heads, key/value heads, head size
SHAPES = [
    (2, 37, 4, 1, 64), (1, 40, 6, 2, 96), (3, 11, 8, 4, 128), (1, 1, 3, 3, 32), (2, 5, 12, 6, 10), (1, 9, 2, 1, 2),
]  # fmt: skip
Parts = tuple[Tensor, Tensor, Tensor]


def table(rows: int, positions: int, head_dim: int, shared: bool) -> tuple[Tensor, Tensor]:
    scaling = RopeScaling(type="yarn", factor=4.0, original_length=64)  # its table also stretches
    places = torch.arange(positions) if shared else torch.randint(0, 5000, (rows, positions))
    cos, sin = (t.to(DEVICE) for t in rope_table(places, head_dim, 1e4, scaling))
    return (cos, sin) if shared else (cos[:, None], sin[:, None])


def plain(y: Tensor, angles: tuple[Tensor, Tensor], heads: int) -> Parts:
    """The layer's own path: split, then a rotation for queries and one for keys."""
    B, T, D = *y.shape[:2], 2 * angles[0].shape[-1]
    x = y.view(B, T, -1, D).transpose(1, 2)
    kv = (x.shape[1] - heads) // 2
    q, k, v = x.split([heads, kv, kv], 1)
    return tuple(z.transpose(1, 2) for z in (rotate(q, angles), rotate(k, angles), v))  # type: ignore[return-value]


def forward(y: Tensor, angles: tuple[Tensor, Tensor], heads: int) -> Parts:
    parts = [y.new_full(s, torch.nan) for s in op._shapes(y, angles[0], heads)]
    kernel.rotate(y, *(t.contiguous() for t in angles), *parts)
    return parts[0], parts[1], parts[2]


def agree(got: Tensor, want: Tensor, wide: Tensor) -> None:
    """To the last bit with plain torch, which rounds once from fp32. (The interpreter cuts bf16 off.)"""
    if DEVICE == "cpu" and got.dtype == torch.bfloat16:
        torch.testing.assert_close(got.double(), wide, rtol=1.01 * 2**-7, atol=1e-5)
    else:
        assert got.equal(want)
        slack = max(0.51 * torch.finfo(got.dtype).eps, 1e-6)
        torch.testing.assert_close(got.double(), wide, rtol=slack, atol=1e-5)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("shared", [True, False])
@pytest.mark.parametrize("shape", SHAPES)
def test_both_ways(shape: tuple[int, int, int, int, int], shared: bool, dtype: torch.dtype) -> None:
    B, T, H, K, D = shape
    angles = table(B, T, D, shared)
    y = torch.randn(B, T, (H + 2 * K) * D).to(DEVICE, dtype).requires_grad_()
    wide = y.detach().double().requires_grad_()
    got, want, exact = forward(y.detach(), angles, H), plain(y, angles, H), plain(wide, angles, H)
    for a, b, c in zip(got, want, exact):
        assert a.is_contiguous()
        agree(a, b, c.detach())
    ds = [torch.randn(a.shape).to(DEVICE, dtype) for a in got]
    torch.autograd.backward(want, ds)
    torch.autograd.backward(exact, [d.double() for d in ds])
    d_y = torch.full_like(y, torch.nan).detach()
    kernel.rotate_back(ds[0], ds[1], ds[2], *(t.contiguous() for t in angles), d_y)
    assert y.grad is not None
    assert wide.grad is not None
    agree(d_y, y.grad, wide.grad)


@pytest.mark.parametrize("layout", ["heads first", "wider", "rows apart", "every other", "expanded"])
def test_gradients_in_any_layout(layout: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """The operation through its kernels, whose gradients come as attention's kernels leave them."""
    monkeypatch.setattr(op, "fuses", lambda y: True)
    monkeypatch.setattr(op, "available", lambda: True)
    B, T, H, K, D = 2, 21, 4, 2, 64
    angles = table(B, T, D, True)
    y = torch.randn(B, T, (H + 2 * K) * D, device=DEVICE, requires_grad=True)
    parts, want = op.rotary(y, *angles, H), plain(y, angles, H)

    def laid(like: Tensor) -> Tensor:
        B, T, n, D = like.shape
        return {
            "heads first": lambda: torch.randn(B, n, T, D).transpose(1, 2),
            "wider": lambda: torch.randn(B, T, n + 3, D + 7)[:, :, 1:-2, 4:-3],
            "rows apart": lambda: torch.randn(T, B, n, D).transpose(0, 1),
            "every other": lambda: torch.randn(B, T, n, 2 * D)[..., ::2],
            "expanded": lambda: torch.randn(B, 1, n, 1).expand(like.shape),
        }[layout]().to(DEVICE)

    ds = [laid(p) for p in parts]
    (got,) = torch.autograd.grad(parts, y, ds, retain_graph=True)
    assert got.equal(torch.autograd.grad(want, y, ds)[0])
    assert got.equal(torch.autograd.grad(parts, y, ds)[0])
    assert got.is_contiguous()


def test_a_projection_that_is_not_contiguous(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(op, "fuses", lambda y: True)
    monkeypatch.setattr(op, "available", lambda: True)
    angles = table(2, 5, 64, False)
    y = torch.randn(2, 5, 7 * 64, device=DEVICE)[..., 64:]
    for a, b in zip(op.rotary(y, *angles, 2), plain(y.contiguous(), angles, 2)):
        assert a.equal(b)


@pytest.mark.filterwarnings(
    "ignore::RuntimeWarning"
)  # of the interpreter: NumPy says what it thinks of infinity
def test_values_are_copied_as_they_are() -> None:
    odd = torch.tensor([torch.inf, -torch.inf, torch.nan, -0.0, 1e-45, 3e38], device=DEVICE)
    y = odd.repeat(1, 2, 3 * 64 // 6)
    v = forward(y, table(1, 2, 64, True), 1)[2]
    assert v.view(torch.int32).equal(y[..., 128:].reshape(v.shape).view(torch.int32))


@pytest.mark.parametrize(("rows", "positions"), [(0, 4), (3, 0)])
def test_nothing(rows: int, positions: int) -> None:
    y = torch.empty(rows, positions, 4 * 64, device=DEVICE)
    angles = table(1, positions, 64, True)
    parts = forward(y, angles, 2)
    kernel.rotate_back(*parts, *angles, y)
    assert [p.shape[2] for p in parts] == [2, 1, 1]
