"""Hybrid attention against its reference, and both against a float64 loop written from the definition."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from deepseek.ops.attention import window_mask
from deepseek.ops.hybrid_attention import (
    document_blocks,
    hybrid_attention,
    hybrid_attention_reference,
    pool_blocks,
    pooled_length,
    pooled_mask,
)


def random_documents(rows: int, length: int, seed: int) -> Tensor:
    """``[B, T]`` contiguous document ids, the last run of some rows being padding."""
    random = torch.Generator().manual_seed(seed)
    ids = (torch.rand(rows, length, generator=random) < 3 / length).long().cumsum(1).int()
    ids[::2, length - length // 4 :] = -1
    return ids


def inputs(length: int, kv_heads: int, seed: int = 0, rows: int = 2, size: int = 4) -> list[Tensor]:
    """q, k, v, rotated q, rotated k, sink, gate; all independent, as any input may be."""
    random = torch.Generator().manual_seed(seed)
    shapes = [(rows, n, length, size) for n in (4, kv_heads, kv_heads, 4, kv_heads)] + [(2, kv_heads, size)]
    made = [torch.randn(s, generator=random, dtype=torch.float64) for s in shapes]
    made.append(torch.rand(rows, 4, length, generator=random, dtype=torch.float64))
    return [x.requires_grad_() for x in made]


def ours(values: list[Tensor], window: int, block: int, stride: int, documents: Tensor | None) -> Tensor:
    length, masks = values[0].shape[2], dict[str, Any]()
    if documents is not None:
        masks["window_mask"] = window_mask(length, window, documents, "cpu")
        masks["global_mask"] = pooled_mask(torch.arange(length), length, block, stride, documents)
        masks["starts"] = document_blocks(documents, block, stride)
    return hybrid_attention(*values, window=window, block=block, stride=stride, **masks)


def loop(values: list[Tensor], window: int, block: int, stride: int, documents: Tensor | None) -> Tensor:
    """The definition, one query and one head at a time, lists of what is visible made by Python."""
    q, k, v, q_rope, k_rope, sink, gate = values
    rows, heads, length, size = q.shape
    if documents is None:
        documents = torch.zeros(rows, length)
    out = torch.zeros_like(q)
    for b in range(rows):
        ids = documents[b].tolist()
        for t in range(length):
            first = next(s for s in range(t + 1) if all(i == ids[t] for i in ids[s : t + 1]))
            near = range(max(first, t - window + 1), t + 1)
            blocks = [range(s, s + block) for s in range(first, t - block + 2, stride)]
            for h in range(heads):
                g = h * k.shape[1] // heads
                score = torch.stack([q_rope[b, h, t] @ k_rope[b, g, s] for s in near]) / size**0.5
                local = sum(p * v[b, g, s] for p, s in zip(score.softmax(0), near))
                keys = [sink[0, g]] + [sum(k[b, g, s] for s in block_) / block for block_ in blocks]
                mixed = [sink[1, g]] + [sum(v[b, g, s] for s in block_) / block for block_ in blocks]
                score = torch.stack([q[b, h, t] @ key for key in keys]) / size**0.5
                whole = sum(p * value for p, value in zip(score.softmax(0), mixed))
                out[b, h, t] = gate[b, h, t] * whole + (1 - gate[b, h, t]) * local
    return out


CASES = [(1, 4, 4, 2), (7, 3, 4, 2), (8, 8, 4, 4), (17, 5, 4, 3), (21, 4, 6, 2), (19, 30, 3, 1)]


@pytest.mark.parametrize("packed", [False, True])
@pytest.mark.parametrize(("length", "window", "block", "stride"), CASES)
def test_both_equal_the_loop(length: int, window: int, block: int, stride: int, packed: bool) -> None:
    values = [x.detach() for x in inputs(length, 2)]
    documents = random_documents(2, length, 1) if packed else None
    want = loop(values, window, block, stride, documents)
    sizes = {"window": window, "block": block, "stride": stride}
    reference = hybrid_attention_reference(*values, **sizes, documents=documents)  # type: ignore[arg-type]
    torch.testing.assert_close(reference, want, rtol=0, atol=1e-10)
    torch.testing.assert_close(ours(values, window, block, stride, documents), want, rtol=0, atol=1e-10)


@settings(max_examples=12, deadline=None)
@given(
    length=st.integers(1, 40),
    window=st.integers(1, 20),
    block=st.integers(1, 12),
    stride=st.integers(1, 12),
    kv_heads=st.sampled_from([1, 2, 4]),
    packed=st.booleans(),
    seed=st.integers(0, 99),
)
def test_values_and_gradients_equal_the_reference(
    length: int, window: int, block: int, stride: int, kv_heads: int, packed: bool, seed: int
) -> None:
    stride = min(stride, block)
    values = inputs(length, kv_heads, seed)
    documents = random_documents(2, length, seed) if packed else None
    y = ours(values, window, block, stride, documents)
    sizes = {"window": window, "block": block, "stride": stride}
    want = hybrid_attention_reference(*values, **sizes, documents=documents)  # type: ignore[arg-type]
    torch.testing.assert_close(y, want, rtol=0, atol=1e-10)
    weight = torch.randn_like(y)
    torch.testing.assert_close(
        torch.autograd.grad((y * weight).sum(), values, materialize_grads=True),
        torch.autograd.grad((want * weight).sum(), values, materialize_grads=True),
        rtol=0,
        atol=1e-9,
    )


@pytest.mark.parametrize("packed", [False, True])
def test_gradients_are_the_derivative(packed: bool) -> None:
    documents = torch.tensor([[0, 0, 0, 0, 0, 0, 1, 1, 1]], dtype=torch.int32) if packed else None
    values = inputs(9, 1, rows=1, size=2)
    assert torch.autograd.gradcheck(lambda *x: ours(list(x), 3, 4, 2, documents), values)


@settings(max_examples=25, deadline=None)
@given(st.lists(st.integers(1, 40), min_size=1, max_size=8), st.integers(1, 9), st.integers(1, 9))
def test_every_complete_block_of_every_document_has_a_slot(
    lengths: list[int], block: int, stride: int
) -> None:
    stride = min(stride, block)
    documents = torch.cat([torch.full((n,), i) for i, n in enumerate(lengths)])[None]
    want, start = [], 0
    for n in lengths:
        want += [start + j * stride for j in range(pooled_length(n, block, stride))]
        start += n
    starts = document_blocks(documents, block, stride)[0].tolist()
    assert starts[: len(want)] == want
    assert all(s == start for s in starts[len(want) :])


@settings(max_examples=25, deadline=None)
@given(st.integers(0, 50), st.integers(1, 12), st.integers(1, 12))
def test_pooling_is_the_mean_of_whole_blocks(length: int, block: int, stride: int) -> None:
    stride = min(stride, block)
    x = torch.randn(2, 3, length, 4, dtype=torch.float64)
    want = [x[:, :, s : s + block].mean(2) for s in range(0, length - block + 1, stride)]
    made = pool_blocks(x, block, stride)
    assert made.shape[2] == len(want) == pooled_length(length, block, stride)
    if want:
        torch.testing.assert_close(made, torch.stack(want, 2), rtol=0, atol=1e-12)
