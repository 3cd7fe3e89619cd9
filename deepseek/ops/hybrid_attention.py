"""Hybrid attention: a sliding window, a global branch over pooled blocks, and a gate between them (F11).

The global branch sees one key and value per block of positions (the mean of ``block`` positions, every
``stride`` positions), so its cost falls by ``stride``. Blocks are counted from the start of each document, so
a packed document gives what it gives alone. A block is visible to a query only once it is complete and only
inside the same document; what is more recent is the window's business. A learned sink slot is always visible,
so that the softmax is defined for the first positions. Close relatives: NSA (arXiv 2502.11089) and S1 §1 of
the source documents.

Shape letters: B rows, H query heads, K key/value heads, T positions, D head size, J pooled blocks.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from deepseek.ops.attention import DocumentSpans, causal_mask, dense_attention, window_attention
from deepseek.registry import register_op


def pooled_length(length: int, block: int, stride: int) -> int:
    """How many complete blocks ``length`` positions hold."""
    return max(0, (length - block) // stride + 1)


def document_blocks(documents: Tensor, block: int, stride: int) -> Tensor:
    """Where blocks start when every document counts its own: ``[B, T]`` ids → ``[B, J]``, unused slots ``T``.

    Documents of a row never hold more complete blocks together than one document of the same length (stride ≤
    block).
    """
    B, T = documents.shape
    t = torch.arange(T, device=documents.device).expand(B, T)
    new = F.pad(documents[:, 1:] != documents[:, :-1], (1, 0), value=True)
    origin = torch.where(new, t, 0).cummax(1).values
    last = t + block - 1
    whole = (last < T) & (origin.gather(1, last.clamp(max=T - 1)) == origin)
    starts = torch.where(whole & ((t - origin) % stride == 0), t, T)
    return starts.sort(1).values[:, : pooled_length(T, block, stride)]


class PooledSpans(NamedTuple):
    """Who sees which slot when rows hold several documents; first and end (exclusive) of each interval, int32.

    Attributes:
        starts: int64 ``[B, J]``, what ``document_blocks`` returned.
        slots: ``[2, B, T]``, the slots that each query sees.
        seen: ``[2, B, J]``, the queries that see each slot.
    """

    starts: Tensor
    slots: Tensor
    seen: Tensor


def pooled_spans(documents: Tensor, spans: DocumentSpans, block: int, stride: int) -> PooledSpans:
    """The intervals of ``documents [B, T]`` with these ``document_spans``."""
    T = documents.shape[1]
    starts = document_blocks(documents, block, stride).contiguous()
    complete = torch.arange(T, device=documents.device).expand_as(documents) - block + 1
    first = torch.searchsorted(starts, spans.start.to(starts.dtype), out_int32=True)
    end = torch.searchsorted(starts, complete.contiguous(), right=True, out_int32=True)
    seen = torch.stack((starts.int() + block - 1, spans.end.gather(1, starts.clamp(max=T - 1))))
    return PooledSpans(starts, torch.stack((first, end.maximum(first))), seen)


def pool_blocks(
    x_BKTD: Tensor, block: int, stride: int, starts: Tensor | None = None, weights: Tensor | None = None
) -> Tensor:
    """Mean over each complete block, ``[B, K, T, D]`` → ``[B, K, J, D]``, or a weighted mean.

    Args:
        starts: what ``document_blocks`` returned, when rows hold several documents.
        weights: ``[K, block]``, the share of each place in the block; rows sum to one.
    """
    B, K, T, D = x_BKTD.shape
    blocks = pooled_length(T, block, stride)
    if not blocks:
        return x_BKTD[:, :, :0]
    if starts is not None:
        place = starts.clamp(max=T - block)[..., None] + torch.arange(block, device=starts.device)
        row = (place + torch.arange(B, device=starts.device)[:, None, None] * T).flatten()
        picked = x_BKTD.transpose(1, 2).reshape(B * T, K * D).index_select(0, row)
        picked = picked.view(B, blocks, block, K, D)
        if weights is not None:
            return torch.einsum("bjnkd,kn->bkjd", picked, weights.to(picked.dtype))
        return picked.mean(2).transpose(1, 2)
    if block % stride:
        taken = x_BKTD.unfold(2, block, stride)[:, :, :blocks]
        if weights is not None:
            return torch.einsum("bkjdn,kn->bkjd", taken, weights.to(taken.dtype))
        return taken.mean(-1)
    if weights is not None:
        pieces = x_BKTD[:, :, : (T // stride) * stride].unflatten(2, (-1, stride))
        shares = weights.to(pieces.dtype).unflatten(1, (-1, stride)).unbind(1)
        each = [torch.einsum("bkjnd,kn->bkjd", pieces[:, :, i : i + blocks], w) for i, w in enumerate(shares)]
        return torch.stack(each).sum(0)
    # Sums of stride-long pieces, then of block/stride neighbouring pieces: no overlapping copy of the row.
    pieces = x_BKTD[:, :, : (T // stride) * stride].unflatten(2, (-1, stride)).sum(3)
    per_block = block // stride
    return torch.stack([pieces[:, :, i : i + blocks] for i in range(per_block)]).sum(0) / block


def pooled_mask(
    queries_T: Tensor, length: int, block: int, stride: int, documents: Tensor | None = None
) -> Tensor:
    """Which slot each query may see: bool ``[T, 1 + J]`` or ``[B, 1, T, 1 + J]`` with documents ``[B, T]``.

    Slot 0 is the sink. Block j covers positions ``j·stride … j·stride + block − 1``, of the row or of its
    document.
    """
    if documents is None:
        starts = torch.arange(pooled_length(length, block, stride), device=queries_T.device) * stride
        return F.pad(starts + block - 1 <= queries_T[:, None], (1, 0), value=True)
    starts = document_blocks(documents, block, stride)
    same = documents.gather(1, starts.clamp(max=length - 1))[:, None] == documents[:, queries_T, None]
    mask = (starts[:, None] + block - 1 <= queries_T[:, None]) & same
    return F.pad(mask[:, None], (1, 0), value=True)


def pooled_attention(q: Tensor, k_pool: Tensor, v_pool: Tensor, sink: Tensor, mask: Tensor) -> Tensor:
    """Attention of ``q [B, H, T, D]`` over the sink ``[2, K, D]`` and the pooled ``k, v [B, K, J, D]``."""
    B, K, _, D = k_pool.shape
    first = sink[:, None, :, None, :].expand(2, B, K, 1, D).to(k_pool.dtype)
    return dense_attention(q, torch.cat((first[0], k_pool), 2), torch.cat((first[1], v_pool), 2), mask)


def _pool(
    k: Tensor, v: Tensor, block: int, stride: int, starts: Tensor | None, pooling: Tensor | None
) -> tuple[Tensor, Tensor]:
    for_k, for_v = (None, None) if pooling is None else pooling.unbind()
    return pool_blocks(k, block, stride, starts, for_k), pool_blocks(v, block, stride, starts, for_v)


@register_op("hybrid_attention", "chunked")
def hybrid_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    q_rope: Tensor,
    k_rope: Tensor,
    sink: Tensor,
    gate: Tensor,
    *,
    window: int,
    block: int,
    stride: int,
    window_mask: Tensor | None = None,
    global_mask: Tensor | None = None,
    starts: Tensor | None = None,
    pooling: Tensor | None = None,
) -> Tensor:
    """``gate · global + (1 − gate) · local``.

    The local branch uses rotated queries and keys; pooled keys have no single position, so the global branch
    uses them unrotated.

    Args:
        q, q_rope: ``[B, H, T, D]``; k, v, k_rope: ``[B, K, T, D]``; sink: ``[2, K, D]``;
        gate: ``[B, H, T]`` or broadcastable, in (0, 1).
        window_mask, global_mask, starts: what ``window_mask``, ``pooled_mask`` and ``document_blocks``
            return; needed when rows hold several documents.
        pooling: ``[2, K, block]``, ``pool_blocks``' weights for keys and for values; ``None``: the mean.

    Returns:
        ``[B, H, T, D]``.
    """
    local = window_attention(q_rope, k_rope, v, window, window_mask)
    if global_mask is None:
        global_mask = pooled_mask(torch.arange(q.shape[2], device=q.device), q.shape[2], block, stride)
    k_pool, v_pool = _pool(k, v, block, stride, starts, pooling)
    whole = pooled_attention(q, k_pool, v_pool, sink, global_mask)
    g = gate[..., None].to(local.dtype)
    return g * whole + (1 - g) * local


@register_op("hybrid_attention", "triton")
def hybrid_attention_kernel(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    q_rope: Tensor,
    k_rope: Tensor,
    sink: Tensor,
    gate: Tensor,
    *,
    window: int,
    block: int,
    stride: int,
    spans: DocumentSpans | None = None,
    pooled: PooledSpans | None = None,
    pooling: Tensor | None = None,
) -> Tensor:
    """``hybrid_attention`` with both branches and the blend in one fused kernel.

    Args:
        spans, pooled: ``document_spans`` and ``pooled_spans``, both when rows hold several documents.
    """
    from deepseek.ops.triton.hybrid_attention import hybrid_forward
    from deepseek.ops.triton.pooling import pool_forward

    start, end = spans or (None, None)
    starts, slots, seen = pooled or (None, None, None)
    if pooling is None:
        k_pool, v_pool = pool_forward(k, v, starts, slots, block, stride)
    else:
        k_pool, v_pool = _pool(k, v, block, stride, starts, pooling)
    gate = gate.expand(q.shape[0], q.shape[1], q.shape[2])
    return hybrid_forward(
        q, q_rope, k_rope, v, k_pool, v_pool, sink, gate, start, end, slots, seen, window, block, stride
    )[0]


@register_op("hybrid_attention", "reference")
def hybrid_attention_reference(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    q_rope: Tensor,
    k_rope: Tensor,
    sink: Tensor,
    gate: Tensor,
    *,
    window: int,
    block: int,
    stride: int,
    documents: Tensor | None = None,
    pooling: Tensor | None = None,
) -> Tensor:
    """The same function with explicit softmaxes and loops, one document at a time; slow and obvious."""
    if documents is not None:
        y = torch.zeros_like(q)
        for row, ids in enumerate(documents):
            start = 0
            for length in ids.unique_consecutive(return_counts=True)[1].tolist():
                here = (slice(row, row + 1), slice(None), slice(start, start + length))
                y[here] = hybrid_attention_reference(
                    q[here], k[here], v[here], q_rope[here], k_rope[here], sink, gate[here],
                    window=window, block=block, stride=stride, pooling=pooling,
                )  # fmt: skip
                start += length
        return y
    B, H, T, D = q.shape
    repeat = H // k.shape[1]
    k, v, k_rope = (x.repeat_interleave(repeat, 1) for x in (k, v, k_rope))
    sink = sink.repeat_interleave(repeat, 1)
    share = k.new_full((2, H, block), 1 / block) if pooling is None else pooling.repeat_interleave(repeat, 1)
    t = torch.arange(T, device=q.device)

    def softmax_attention(q: Tensor, k: Tensor, v: Tensor, mask: Tensor) -> Tensor:
        scores = (q @ k.transpose(-1, -2)) * D**-0.5
        return scores.masked_fill(~mask, float("-inf")).softmax(-1) @ v

    local = softmax_attention(q_rope, k_rope, v, causal_mask(t, t, window))
    keys, values = [sink[0].expand(B, H, D)], [sink[1].expand(B, H, D)]
    visible = [torch.ones(T, dtype=torch.bool, device=q.device)]
    for start in range(0, T - block + 1, stride):
        keys.append((k[:, :, start : start + block] * share[0, :, :, None]).sum(2))
        values.append((v[:, :, start : start + block] * share[1, :, :, None]).sum(2))
        visible.append(t >= start + block - 1)
    whole = softmax_attention(q, torch.stack(keys, 2), torch.stack(values, 2), torch.stack(visible, -1))
    g = gate[..., None]
    return g * whole + (1 - g) * local
