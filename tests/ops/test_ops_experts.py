"""Grouped experts against a matmul per expert, and against one token at a time."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from deepseek.errors import ConfigError
from deepseek.ops.experts import combine, grouped_linear, pick_backend, run_experts, sort_by_expert


def experts(n: int, hidden: int, inner: int, dtype: torch.dtype = torch.float32) -> tuple[Tensor, Tensor]:
    make = torch.Generator().manual_seed(1)
    first = torch.randn(n, hidden, 2 * inner, generator=make) * hidden**-0.5
    second = torch.randn(n, inner, hidden, generator=make) * inner**-0.5
    return first.to(dtype).requires_grad_(), second.to(dtype).requires_grad_()


def one_by_one(x: Tensor, token: Tensor, expert: Tensor, gate: Tensor, w_in: Tensor, w_out: Tensor) -> Tensor:
    """``out[token] += gate · expert(x[token])`` for each assignment in turn."""
    out = [torch.zeros_like(x[0]) for _ in x]
    for t, e, g in zip(token.tolist(), expert.tolist(), gate):
        a, b = (x[t] @ w_in[e]).chunk(2)
        out[t] = out[t] + g * ((a * a.sigmoid() * b) @ w_out[e])
    return torch.stack(out)


@settings(max_examples=10, deadline=None)
@given(
    tokens=st.integers(1, 40),
    n=st.integers(1, 9),
    hidden=st.integers(1, 20),
    inner=st.integers(1, 20),
    skew=st.sampled_from(["uniform", "all to one", "some empty"]),
    seed=st.integers(0, 99),
)
@pytest.mark.parametrize("backend", ["grouped_mm", "loop"])
def test_backends_equal_one_token_at_a_time(
    tokens: int, n: int, hidden: int, inner: int, skew: str, seed: int, backend: str
) -> None:
    torch.manual_seed(seed)
    x = torch.randn(tokens, hidden).requires_grad_()
    w_in, w_out = experts(n, hidden, inner)
    token = torch.arange(tokens).repeat_interleave(2)
    expert = torch.randint(0, n, (2 * tokens,))
    if skew == "all to one":
        expert = torch.full_like(expert, n - 1)
    elif skew == "some empty":
        expert = expert // 2 * 2 % n
    gate = torch.rand(2 * tokens).requires_grad_()
    y, order, ends = run_experts(x, token, expert, w_in, w_out, backend)
    assert int(ends[-1]) == 2 * tokens
    out = combine(y, gate[order], token[order], tokens)
    want = one_by_one(x, token, expert, gate, w_in, w_out)
    torch.testing.assert_close(out, want, rtol=1e-5, atol=1e-5)
    weight = torch.randn_like(out)
    leaves = [x, gate, w_in, w_out]
    torch.testing.assert_close(
        torch.autograd.grad((out * weight).sum(), leaves),
        torch.autograd.grad((want * weight).sum(), leaves),
        rtol=1e-4,
        atol=1e-5,
    )


@pytest.mark.parametrize(("hidden", "inner"), [(16, 8), (20, 12), (7, 5)])
def test_bf16_backends_agree(hidden: int, inner: int) -> None:
    """Unaligned sizes too: the grouped kernel itself wants rows of a multiple of 16 bytes."""
    w_in, w_out = experts(4, hidden, inner, torch.bfloat16)
    x, token = torch.randn(30, hidden, dtype=torch.bfloat16), torch.arange(30)
    expert = torch.randint(0, 3, (30,))
    results = [run_experts(x, token, expert, w_in, w_out, name)[0] for name in ("grouped_mm", "loop")]
    torch.testing.assert_close(*results, rtol=2e-2, atol=2e-2)
    grads = [torch.autograd.grad(y.float().square().sum(), [w_in, w_out]) for y in results]
    torch.testing.assert_close(*grads, rtol=5e-2, atol=5e-2)


def test_sorting_groups_and_is_stable() -> None:
    order, ends = sort_by_expert(torch.tensor([2, 0, 2, 0, 3]), 5)
    assert order.tolist() == [1, 3, 0, 2, 4]
    assert ends.tolist() == [2, 2, 4, 5, 5]
    assert ends.dtype == torch.int32


def test_combine_is_differentiable() -> None:
    y, gate = torch.randn(5, 3, dtype=torch.float64), torch.rand(5, dtype=torch.float64)
    token = torch.tensor([0, 3, 3, 1, 0])
    assert torch.autograd.gradcheck(
        lambda y, gate: combine(y, gate, token, 4), (y.requires_grad_(), gate.requires_grad_())
    )


def test_a_gradient_of_stride_zero_is_accepted() -> None:
    w_in, _ = experts(2, 8, 4)
    grouped_linear(
        torch.randn(6, 8), w_in, torch.tensor([2, 6], dtype=torch.int32), "grouped_mm"
    ).sum().backward()
    assert w_in.grad is not None


def test_an_unknown_backend_is_named() -> None:
    with pytest.raises(ConfigError, match=r"no backend 'grouped_nm' \(did you mean 'grouped_mm'\?\)"):
        grouped_linear(torch.randn(2, 8), torch.randn(1, 8, 8), torch.tensor([2]), "grouped_nm")


def test_auto_takes_the_grouped_kernel_only_where_there_is_one() -> None:
    assert pick_backend(torch.empty(1)) == pick_backend(torch.empty(1, dtype=torch.bfloat16)) == "grouped_mm"
    assert pick_backend(torch.empty(1, dtype=torch.float64)) == "loop"
    assert (
        pick_backend(torch.empty(1, device="meta")) == "loop"
    )  # stands for any device that is neither CPU nor CUDA
    assert pick_backend(torch.empty(1, device="meta"), "grouped_mm") == "grouped_mm"
