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

import torch
import torch.nn.functional as F
from torch import Tensor

from deepseek.ops.attention import causal_mask, dense_attention, window_attention
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


def pool_blocks(x_BKTD: Tensor, block: int, stride: int, starts: Tensor | None = None) -> Tensor:
    """Mean over each complete block: ``[B, K, T, D]`` → ``[B, K, J, D]``; ``starts``: ``document_blocks``."""
    B, K, T, D = x_BKTD.shape
    blocks = pooled_length(T, block, stride)
    if not blocks:
        return x_BKTD[:, :, :0]
    if starts is not None:
        place = starts.clamp(max=T - block)[..., None] + torch.arange(block, device=starts.device)
        row = (place + torch.arange(B, device=starts.device)[:, None, None] * T).flatten()
        picked = x_BKTD.transpose(1, 2).reshape(B * T, K * D).index_select(0, row)
        return picked.view(B, blocks, block, K, D).mean(2).transpose(1, 2)
    if block % stride:
        return x_BKTD.unfold(2, block, stride)[:, :, :blocks].mean(-1)
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
) -> Tensor:
    """``gate · global + (1 − gate) · local``.

    The local branch uses rotated queries and keys; pooled keys have no single position, so the global branch
    uses them unrotated.

    Args:
        q, q_rope: ``[B, H, T, D]``; k, v, k_rope: ``[B, K, T, D]``; sink: ``[2, K, D]``;
        gate: ``[B, H, T]`` or broadcastable, in (0, 1).
        window_mask, global_mask, starts: what ``window_mask``, ``pooled_mask`` and ``document_blocks``
            return; needed when rows hold several documents.

    Returns:
        ``[B, H, T, D]``.
    """
    local = window_attention(q_rope, k_rope, v, window, window_mask)
    if global_mask is None:
        global_mask = pooled_mask(torch.arange(q.shape[2], device=q.device), q.shape[2], block, stride)
    k_pool, v_pool = (pool_blocks(x, block, stride, starts) for x in (k, v))
    whole = pooled_attention(q, k_pool, v_pool, sink, global_mask)
    g = gate[..., None].to(local.dtype)
    return g * whole + (1 - g) * local


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
                    window=window, block=block, stride=stride,
                )  # fmt: skip
                start += length
        return y
    B, H, T, D = q.shape
    repeat = H // k.shape[1]
    k, v, k_rope = (x.repeat_interleave(repeat, 1) for x in (k, v, k_rope))
    sink = sink.repeat_interleave(repeat, 1)
    t = torch.arange(T, device=q.device)

    def softmax_attention(q: Tensor, k: Tensor, v: Tensor, mask: Tensor) -> Tensor:
        scores = (q @ k.transpose(-1, -2)) * D**-0.5
        return scores.masked_fill(~mask, float("-inf")).softmax(-1) @ v

    local = softmax_attention(q_rope, k_rope, v, causal_mask(t, t, window))
    keys, values = [sink[0].expand(B, H, D)], [sink[1].expand(B, H, D)]
    visible = [torch.ones(T, dtype=torch.bool, device=q.device)]
    for start in range(0, T - block + 1, stride):
        keys.append(k[:, :, start : start + block].mean(2))
        values.append(v[:, :, start : start + block].mean(2))
        visible.append(t >= start + block - 1)
    whole = softmax_attention(q, torch.stack(keys, 2), torch.stack(values, 2), torch.stack(visible, -1))
    g = gate[..., None]
    return g * whole + (1 - g) * local
