"""Window attention against a dense mask, and a loop nobody could get wrong."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from deepseek.ops import attention
from deepseek.ops.attention import (
    causal_mask,
    dense_attention,
    pick_backend,
    window_attention,
    window_mask,
)


def random_documents(rows: int, length: int, seed: int, padding: bool = True) -> Tensor:
    """``[B, T]`` contiguous document ids, the last run of some rows being padding."""
    random = torch.Generator().manual_seed(seed)
    cuts = torch.rand(rows, length, generator=random) < 3 / length
    ids = cuts.long().cumsum(1).int()
    if padding:
        ids[::2, length - length // 4 :] = -1
    return ids


def tensors(
    rows: int, heads: int, kv_heads: int, length: int, size: int, dtype: torch.dtype, seed: int = 0
) -> list[Tensor]:
    random = torch.Generator().manual_seed(seed)
    shapes = [(rows, n, length, size) for n in (heads, kv_heads, kv_heads)]
    return [torch.randn(s, generator=random, dtype=dtype).requires_grad_() for s in shapes]


def softmax_loop(q: Tensor, k: Tensor, v: Tensor, window: int, documents: Tensor | None) -> Tensor:
    """One query at a time, with Python deciding what it sees."""
    out = torch.zeros_like(q)
    for b in range(q.shape[0]):
        for t in range(q.shape[2]):
            seen = [
                s
                for s in range(max(0, t - window + 1), t + 1)
                if documents is None or documents[b, s] == documents[b, t]
            ]
            for h in range(q.shape[1]):
                g = h * k.shape[1] // q.shape[1]
                weights = (k[b, g, seen] @ q[b, h, t] * q.shape[-1] ** -0.5).softmax(0)
                out[b, h, t] = weights @ v[b, g, seen]
    return out


@settings(max_examples=12, deadline=None)
@given(
    length=st.integers(1, 70),
    window=st.integers(1, 24),
    kv_heads=st.sampled_from([1, 2, 4]),
    packed=st.booleans(),
    seed=st.integers(0, 99),
)
@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float64, 1e-10), (torch.float32, 2e-5)])
def test_window_equals_a_dense_mask(
    length: int, window: int, kv_heads: int, packed: bool, seed: int, dtype: torch.dtype, tolerance: float
) -> None:
    q, k, v = inputs = tensors(2, 4, kv_heads, length, 6, dtype, seed)
    documents = random_documents(2, length, seed) if packed else None
    t = torch.arange(length)
    y = window_attention(q, k, v, window, window_mask(length, window, documents, "cpu"))
    want = dense_attention(q, k, v, causal_mask(t, t, window, documents))
    torch.testing.assert_close(y, want, rtol=0, atol=tolerance)
    weight = torch.randn_like(y)
    torch.testing.assert_close(
        torch.autograd.grad((y * weight).sum(), inputs),
        torch.autograd.grad((want * weight).sum(), inputs),
        rtol=0,
        atol=20 * tolerance,
    )


@pytest.mark.parametrize("length", [1, 5, 8, 13, 16])
@pytest.mark.parametrize("packed", [False, True])
def test_window_equals_a_loop(length: int, packed: bool) -> None:
    q, k, v = (x.detach() for x in tensors(2, 4, 2, length, 6, torch.float64))
    documents = random_documents(2, length, 3) if packed else None
    y = window_attention(q, k, v, 5, window_mask(length, 5, documents, "cpu"))
    torch.testing.assert_close(y, softmax_loop(q, k, v, 5, documents), rtol=0, atol=1e-10)


@pytest.mark.parametrize("kv_heads", [1, 2, 6])
def test_dense_equals_a_loop(kv_heads: int) -> None:
    q, k, v = (x.detach() for x in tensors(1, 6, kv_heads, 9, 4, torch.float64))
    torch.testing.assert_close(dense_attention(q, k, v), softmax_loop(q, k, v, 99, None), rtol=0, atol=1e-10)


def test_window_gradients_are_the_derivative() -> None:
    inputs = tensors(1, 2, 1, 7, 2, torch.float64)
    assert torch.autograd.gradcheck(lambda q, k, v: window_attention(q, k, v, 3), inputs)


def test_a_window_longer_than_the_row_is_the_row() -> None:
    q, k, v = tensors(1, 2, 1, 7, 4, torch.float64)
    assert window_mask(7, 1000, None, "cpu").shape == (1, 7, 14)
    torch.testing.assert_close(window_attention(q, k, v, 1000), dense_attention(q, k, v), rtol=0, atol=1e-10)


def test_bf16_rows_of_padding_stay_finite() -> None:
    q, k, v = (x.bfloat16() for x in tensors(2, 4, 2, 37, 8, torch.float32))
    documents = torch.full((2, 37), -1, dtype=torch.int32)
    y = window_attention(q, k, v, 8, window_mask(37, 8, documents, "cpu"))
    assert y.dtype == torch.bfloat16
    assert y.isfinite().all()


def test_kernels_take_what_they_can(monkeypatch: pytest.MonkeyPatch) -> None:
    cpu, gpu = torch.device("cpu"), torch.device("cuda")
    monkeypatch.setattr(attention, "available", lambda: True)
    assert pick_backend(gpu, 128, torch.bfloat16) == pick_backend(gpu, 96, torch.float32) == "triton"
    for device, size, dtype in (
        (cpu, 128, torch.bfloat16),
        (gpu, 80, torch.float16),
        (gpu, 64, torch.float64),
    ):
        assert pick_backend(device, size, dtype) == "chunked"
    monkeypatch.setattr(attention, "available", lambda: False)
    assert pick_backend(gpu, 128, torch.bfloat16) == "chunked"
