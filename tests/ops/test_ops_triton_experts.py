"""The expert path's kernels against plain torch: interpreted on a CPU, compiled on a GPU."""

from __future__ import annotations

import os

import pytest
import torch
from torch import Tensor

if not torch.cuda.is_available():
    os.environ.setdefault("TRITON_INTERPRET", "1")
pytest.importorskip("triton")

from deepseek.ops import expert_rows as reference
from deepseek.ops.triton import experts as kernel

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
N, D, F = 70, 96, 40


def make(seed: int, *shape: int) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed)).to(DEVICE)


@pytest.mark.parametrize("normalise", [True, False])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize(("experts", "top_k"), [(6, 2), (16, 3), (3, 1), (65, 6), (130, 2)])
def test_router(experts: int, top_k: int, normalise: bool, dtype: torch.dtype) -> None:
    """Tokens in bf16 meet a weight of three parts: as exact as fp32, which one part or two would not be."""
    x, weight, bias = make(0, N, D).to(dtype), make(1, experts, D) * 0.3, make(2, experts) * 0.1
    want = reference.router(x, weight, bias, top_k, normalise)
    probs, expert, gate = kernel.router(x, weight, bias, top_k, normalise)
    torch.testing.assert_close(probs, want[0], rtol=1e-4, atol=1e-5)
    assert expert.equal(want[1])
    torch.testing.assert_close(gate, want[2], rtol=1e-4, atol=1e-5)


@pytest.mark.filterwarnings("ignore::RuntimeWarning")  # of the interpreter: NumPy says what it thinks of NaN
def test_tokens_that_are_not_finite_still_go_to_experts_that_exist() -> None:
    experts = 6  # padded to 16 columns
    x = make(0, N, D)
    x[3], x[5, 7] = float("nan"), float("inf")
    _, expert, _ = kernel.router(x, make(1, experts, D), torch.zeros(experts, device=DEVICE), 2, True)
    assert int(expert.min()) >= 0
    assert int(expert.max()) < experts


def routed(experts: int, top_k: int, popular: float) -> tuple[Tensor, Tensor]:
    """The more ``popular``, the more tokens go to the first experts and the more experts are left empty."""
    bias = torch.zeros(experts, device=DEVICE)
    bias[: experts // 2] = popular
    probs, expert, _ = reference.router(make(3, N, D), make(4, experts, D) * 0.3, bias, top_k, True)
    return probs, expert


@pytest.mark.parametrize("popular", [0.0, 5.0])
@pytest.mark.parametrize("masked", [False, True])
@pytest.mark.parametrize("floor", [0, 3, 20])
@pytest.mark.parametrize(("experts", "top_k"), [(6, 2), (9, 1)])
def test_dispatch_and_every_row_kernel(
    experts: int, top_k: int, floor: int, masked: bool, popular: float
) -> None:
    probs, expert = routed(experts, top_k, popular)
    valid = torch.arange(N, device=DEVICE) < 50 if masked else None
    want = reference.dispatch(expert, probs, valid, floor)
    row, token, assignment, ends, chosen, rescued = kernel.dispatch(expert, probs, valid, floor)
    used = int(ends[-1])
    assert ends.equal(want[3])
    assert chosen.equal(want[4])
    assert row[: N * top_k].equal(want[0][: N * top_k])
    if floor:  # the order inside an expert's slots is free
        assert rescued.view(experts, -1).sort(1).values.equal(want[5].view(experts, -1).sort(1).values)
    places = row[assignment[:used].long()].tolist()
    assert places == list(range(used))
    assert row[N * top_k :].ge(0).equal(rescued >= 0)
    slots = rescued >= 0
    assert token[row[N * top_k :][slots].long()].equal(rescued[slots])

    rows, hidden, gate = row.shape[0], make(6, row.shape[0], 2 * F), make(5, row.shape[0]).abs()
    x, y, d_inner = make(7, N, D), make(8, rows, D), make(9, rows, F)
    assert kernel.gather(x, token, ends)[:used].equal(x[token[:used].long()])
    torch.testing.assert_close(
        kernel.sum_rows(y, row, rescued, N, top_k), reference.sum_rows(y, row, rescued, N, top_k)
    )
    torch.testing.assert_close(
        kernel.swiglu(hidden, gate, assignment, ends)[:used],
        reference.swiglu(hidden, gate, assignment, ends)[:used],
    )
    got = kernel.swiglu_backward(hidden, gate, assignment, ends, d_inner)
    expected = reference.swiglu_backward(hidden, gate, assignment, ends, d_inner)
    for a, b in zip(got[:2], expected[:2]):
        torch.testing.assert_close(a[:used], b[:used])
    torch.testing.assert_close(got[2], expected[2])
    torch.testing.assert_close(
        kernel.sample_hidden(hidden, ends, 8), reference.sample_hidden(hidden, ends, 8)
    )


def test_the_reference_of_swiglu_s_backward_is_autograd_s() -> None:
    """What the kernel is compared with is itself compared with autograd in float64."""
    hidden = make(1, 5, 6).cpu().double().requires_grad_()
    gate = make(2, 5).cpu().double().requires_grad_()
    order, ends = torch.tensor([3, 1, 0, 2, 4], dtype=torch.int32), torch.tensor([2, 5], dtype=torch.int32)
    a, b = hidden.chunk(2, -1)
    want = gate[order.long()][:, None] * torch.nn.functional.silu(a) * b
    d = make(3, 5, 3).cpu().double()
    d_hidden, inner, d_gate = reference.swiglu_backward(hidden.detach(), gate.detach(), order, ends, d)
    torch.testing.assert_close(inner, want.detach())
    torch.testing.assert_close((d_hidden, d_gate), torch.autograd.grad((want * d).sum(), (hidden, gate)))
