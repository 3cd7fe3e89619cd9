"""The expert path against one token at a time, and its grouped matmuls against a matmul per expert."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor
from torch._subclasses.fake_tensor import DataDependentOutputException, FakeTensorMode

from deepseek.errors import ConfigError
from deepseek.ops.experts import (
    Dispatch,
    dispatch,
    gates,
    grouped_linear,
    grouped_outer,
    pick_backend,
    route,
    run_experts,
    sample_hidden,
)


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


def placed(expert_NK: Tensor, n: int, floor: int = 0, valid: Tensor | None = None, seed: int = 0) -> Dispatch:
    make = torch.Generator().manual_seed(seed)
    return dispatch(
        expert_NK.to(torch.int32), torch.rand(len(expert_NK), n, generator=make).softmax(-1), valid, floor
    )


@settings(max_examples=10, deadline=None)
@given(
    tokens=st.integers(1, 40),
    n=st.integers(1, 9),
    hidden=st.integers(1, 20),
    inner=st.integers(1, 20),
    skew=st.sampled_from(["uniform", "all to one", "some empty"]),
    seed=st.integers(0, 99),
)
@pytest.mark.parametrize("backend", ["grouped_mm", "tiles", "loop"])
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
    where = placed(expert.view(tokens, 2), n)
    assert int(where.ends_E[-1]) == 2 * tokens
    out, _ = run_experts(x, gate, where, w_in, w_out, backend)
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


@pytest.mark.parametrize("floor", [1, 5, 12])
def test_rescued_tokens_take_part_with_their_own_gate(floor: int) -> None:
    torch.manual_seed(floor)
    tokens, n = 12, 4
    probs = torch.rand(tokens, n, dtype=torch.float64).softmax(-1).requires_grad_()
    expert = torch.zeros(tokens, 1, dtype=torch.int32)  # all to expert 0
    where = dispatch(expert, probs, None, floor)
    gate = gates(probs.gather(1, expert.long()), probs, where)
    x = torch.randn(tokens, 6, dtype=torch.float64, requires_grad=True)
    w_in, w_out = experts(n, 6, 5, torch.float64)
    out, _ = run_experts(x, gate, where, w_in, w_out)
    token, experts_of, value = list(range(tokens)), [0] * tokens, [probs[t, 0] for t in range(tokens)]
    for e in range(1, n):
        for t in probs[:, e].topk(floor).indices.tolist():
            token.append(t)
            experts_of.append(e)
            value.append(probs[t, e])
    want = one_by_one(x, torch.tensor(token), torch.tensor(experts_of), torch.stack(value), w_in, w_out)
    torch.testing.assert_close(out, want)
    leaves, weight = [x, probs, w_in, w_out], torch.randn_like(out)
    torch.testing.assert_close(
        torch.autograd.grad((out * weight).sum(), leaves), torch.autograd.grad((want * weight).sum(), leaves)
    )


@pytest.mark.parametrize(("hidden", "inner"), [(16, 8), (20, 12), (7, 5)])
def test_bf16_backends_agree(hidden: int, inner: int) -> None:
    """Unaligned sizes too: the grouped kernel itself wants rows of a multiple of 16 bytes."""
    w_in, w_out = experts(4, hidden, inner, torch.bfloat16)
    x = torch.randn(30, hidden, dtype=torch.bfloat16)
    where, gate = placed(torch.randint(0, 3, (30, 1)), 4), torch.rand(30)
    results = [run_experts(x, gate, where, w_in, w_out, name)[0] for name in ("grouped_mm", "loop")]
    torch.testing.assert_close(*results, rtol=2e-2, atol=2e-2)
    grads = [torch.autograd.grad(y.float().square().sum(), [w_in, w_out]) for y in results]
    torch.testing.assert_close(*grads, rtol=5e-2, atol=5e-2)


def test_sorting_groups_and_is_stable() -> None:
    where = placed(torch.tensor([[2], [0], [2], [0], [3]]), 5)
    assert where.assignment_R.tolist() == where.token_R.tolist() == [1, 3, 0, 2, 4]
    assert where.row_A.tolist() == [2, 0, 3, 1, 4]
    assert where.ends_E.tolist() == [2, 2, 4, 5, 5]
    assert where.chosen_E.tolist() == [2, 0, 2, 1, 0]
    assert all(t.dtype == torch.int32 for t in where)


@pytest.mark.parametrize(("hidden", "inner"), [(8, 6), (6, 8), (5, 7)])
def test_a_padded_grouped_matmul_has_contiguous_rows(hidden: int, inner: int) -> None:
    where = placed(torch.tensor([[0], [1], [1]], dtype=torch.int32), 2)
    y = grouped_linear(torch.randn(3, hidden), torch.randn(2, hidden, inner), where.ends_E, "grouped_mm")
    assert y.shape == (3, inner)
    assert y.is_contiguous()


def test_the_outer_product_is_the_gradient_of_the_grouped_matmul() -> None:
    x, dy = torch.randn(9, 8), torch.randn(9, 4)
    w = torch.randn(3, 8, 4, requires_grad=True)
    ends = torch.tensor([2, 2, 9], dtype=torch.int32)
    (want,) = torch.autograd.grad(grouped_linear(x, w, ends, "loop"), w, dy)
    for backend in ("loop", "grouped_mm", "tiles"):
        torch.testing.assert_close(grouped_outer(x, dy, ends, backend), want)


@pytest.mark.parametrize("rows", [0, 1, 70])
@pytest.mark.parametrize("sizes", [(0, 0, 0), (70, 0, 0), (0, 0, 70), (1, 33, 16), (16, 32, 17)])
def test_tiles_hold_every_row_whatever_lies_beyond_the_last_end(sizes: tuple[int, ...], rows: int) -> None:
    sizes = tuple(min(n, rows // 3) if rows < 70 else n for n in sizes)
    ends, used = torch.tensor(sizes).cumsum(0).int(), sum(sizes)
    x, dy, w = torch.randn(rows, 5), torch.randn(rows, 4), torch.randn(3, 5, 4)
    want = [grouped_linear(x, w, ends, "loop")[:used], grouped_outer(x, dy, ends, "loop")]
    x[used:], dy[used:] = torch.nan, torch.nan
    got = [grouped_linear(x, w, ends, "tiles")[:used], grouped_outer(x, dy, ends, "tiles")]
    torch.testing.assert_close(got, want)


def test_tiles_ask_nothing_of_the_host() -> None:
    """Tensors without values cannot be read, as those of a step while a CUDA graph is captured."""
    with FakeTensorMode():
        x, dy, w = torch.empty(90, 8), torch.empty(90, 6), torch.empty(5, 8, 6)
        ends = torch.empty(5, dtype=torch.int32)
        assert grouped_linear(x, w, ends, "tiles").shape == (90, 6)
        assert grouped_outer(x, dy, ends, "tiles").shape == (5, 8, 6)
        with pytest.raises(DataDependentOutputException):
            grouped_linear(x, w, ends, "loop")


@pytest.mark.parametrize("normalise", [True, False])
@pytest.mark.parametrize("top_k", [1, 2, 3])
def test_the_router_s_gradient_is_autograd_s(top_k: int, normalise: bool) -> None:
    torch.manual_seed(top_k)
    x = torch.randn(7, 5, dtype=torch.float64, requires_grad=True)
    weight = torch.randn(4, 5, dtype=torch.float64, requires_grad=True)
    bias = torch.randn(4, dtype=torch.float64)
    probs, expert, gate = route(x, weight, bias, top_k, normalise)
    p = (x @ weight.T).softmax(-1)
    assert expert.long().equal((p + bias).topk(top_k).indices)
    g = p.gather(1, expert.long())
    g = g / g.sum(-1, keepdim=True) if normalise else g
    torch.testing.assert_close((probs, gate), (p, g))
    a, b = torch.randn_like(p), torch.randn_like(g)
    torch.testing.assert_close(
        torch.autograd.grad((probs * a).sum() + (gate * b).sum(), (x, weight)),
        torch.autograd.grad((p * a).sum() + (g * b).sum(), (x, weight)),
    )


def test_the_sample_is_even_and_whole_when_small() -> None:
    hidden = torch.randn(12, 6)
    ends = torch.tensor([2, 2, 12], dtype=torch.int32)
    inner = torch.nn.functional.silu(hidden[:, :3]) * hidden[:, 3:]
    want = torch.stack([inner[:2].sum(0), torch.zeros(3), inner[[2, 4, 6, 8, 10]].sum(0)])
    torch.testing.assert_close(sample_hidden(hidden, ends, 5), want)


def test_custom_operations_are_well_formed() -> None:
    """Schema, shapes under fake tensors, and autograd registration, by torch's own checker."""
    torch.manual_seed(0)
    x = torch.randn(6, 8, requires_grad=True)
    expert, probs = torch.randint(0, 3, (6, 2), dtype=torch.int32), torch.rand(6, 3).softmax(-1)
    where = dispatch(expert, probs, None, 2)
    w_in, w_out = experts(3, 8, 4)
    gate = torch.rand(where.row_A.shape[0], requires_grad=True)
    checks = ("test_schema", "test_autograd_registration", "test_faketensor")
    ops = torch.ops.deepseek
    torch.library.opcheck(
        ops.router.default, (x, w_in[0].T.detach(), torch.zeros(8), 2, True), test_utils=checks
    )
    torch.library.opcheck(ops.dispatch.default, (expert, probs, None, 2), test_utils=checks)
    torch.library.opcheck(
        ops.experts.default, (x, gate, *where[:4], where.rescued_S, w_in, w_out, 2, "loop"), test_utils=checks
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
    with FakeTensorMode():
        assert pick_backend(torch.empty(1, device="cuda")) == "tiles"
        assert pick_backend(torch.empty(1, device="cuda", dtype=torch.bfloat16)) == "grouped_mm"
