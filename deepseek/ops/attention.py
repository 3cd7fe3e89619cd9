"""Scaled dot-product attention over whole rows and over a sliding window, grouped-query, document-masked.

``window_attention`` splits the row into chunks as long as the window; a chunk attends to itself and the chunk
before it, so the work is O(T·W) in plain torch, forward and backward, on any device. ``dense_attention`` is
the same thing with an explicit T×T mask: the reference in tests, and the path for odd cases. On a GPU, fused
kernels (``deepseek.ops.triton``) take windows and documents, and torch's own take whole rows.

Shape letters: B rows, H query heads, K key/value heads (K divides H), T positions, D head size, W window, N
chunks.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from deepseek.ops.triton import available
from deepseek.registry import register_op

#: What the Triton kernels take; anything else goes to plain torch.
KERNEL_HEAD_DIMS = (64, 96, 128)
KERNEL_DTYPES = (torch.bfloat16, torch.float16, torch.float32)


def pick_backend(device: torch.device, head_dim: int, dtype: torch.dtype) -> str:
    """Which implementation of windows and documents runs: ``triton`` or ``chunked``."""
    fits = head_dim in KERNEL_HEAD_DIMS and dtype in KERNEL_DTYPES
    return "triton" if fits and device.type == "cuda" and available() else "chunked"


class DocumentSpans(NamedTuple):
    """Where the document of each position starts and ends (exclusive): int32 ``[B, T]`` each."""

    start: Tensor
    end: Tensor


def document_spans(documents: Tensor) -> DocumentSpans:
    """The spans of contiguous documents ``[B, T]`` of ids; computed where the ids are, without waiting."""
    B, T = documents.shape
    t = torch.arange(T, device=documents.device, dtype=torch.int32).expand(B, T)
    changes = documents[:, 1:] != documents[:, :-1]
    start = torch.where(F.pad(changes, (1, 0), value=True), t, 0).cummax(1).values
    end = torch.where(F.pad(changes, (0, 1), value=True), t + 1, T).flip(1).cummin(1).values.flip(1)
    return DocumentSpans(start, end)


def causal_mask(
    queries_T: Tensor, keys_T: Tensor, window: int | None = None, documents: Tensor | None = None
) -> Tensor:
    """Which key each query may see.

    Args:
        queries_T, keys_T: int positions ``[Tq]`` and ``[Tk]``.
        window: a query sees the last ``window`` positions, itself included; ``None`` means all.
        documents: ``[B, T]`` document ids of a row in which ``queries_T`` and ``keys_T`` index; positions of
            different documents never see each other. Padding (id -1) sees padding only, so that no row is
            empty.

    Returns:
        bool ``[Tq, Tk]``, or ``[B, 1, Tq, Tk]`` with documents.
    """
    distance = queries_T[:, None] - keys_T[None, :]
    mask = distance >= 0
    if window is not None:
        mask = mask & (distance < window)
    if documents is None:
        return mask
    same = documents[:, queries_T, None] == documents[:, None, keys_T]
    return (mask & same)[:, None]


def dense_attention(q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None = None) -> Tensor:
    """Softmax attention with an explicit mask (``None``: plain causal).

    Args:
        q: ``[B, H, Tq, D]``; k, v: ``[B, K, Tk, D]``; mask: bool, broadcastable to ``[B, H, Tq, Tk]``.

    Returns:
        ``[B, H, Tq, D]``.
    """
    grouped = q.shape[1] != k.shape[1]
    if q.device.type == "cpu" and grouped:
        # The fused CPU kernel wants equal head counts; with enable_gqa torch takes the slow maths path.
        k, v = (x.repeat_interleave(q.shape[1] // x.shape[1], dim=1) for x in (k, v))
        grouped = False
    return F.scaled_dot_product_attention(q, k, v, attn_mask=mask, is_causal=mask is None, enable_gqa=grouped)


def window_mask(length: int, window: int, documents: Tensor | None, device: torch.device | str) -> Tensor:
    """The mask ``window_attention`` needs: bool ``[N, W, 2W]``, or ``[B·N, 1, W, 2W]`` with documents.

    A window longer than the row is the row: W is ``min(window, length)``.
    """
    window = min(window, length)
    chunks = -(-length // window)
    local = torch.arange(window, device=device)
    key = torch.arange(-window, window, device=device)
    distance = local[:, None] - key[None, :]
    mask = ((distance >= 0) & (distance < window)).expand(chunks, -1, -1)
    start = torch.arange(chunks, device=device)[:, None, None] * window
    mask = mask & (start + key >= 0)
    if documents is None:
        return mask
    ids = F.pad(documents, (0, chunks * window - length), value=-1).view(-1, chunks, window)
    before = F.pad(ids, (0, 0, 1, 0), value=-2)[:, :-1]
    same = ids[..., :, None] == torch.cat((before, ids), dim=-1)[..., None, :]
    return (mask & same).flatten(0, 1)[:, None]


@register_op("window_attention", "chunked")
def window_attention(q: Tensor, k: Tensor, v: Tensor, window: int, mask: Tensor | None = None) -> Tensor:
    """Causal attention in which a query sees the last ``window`` positions, itself included; O(T·W) work.

    The sliding window of Longformer (arXiv 2004.05150) and S1 §1, computed by chunks.

    Args:
        q: ``[B, H, T, D]``; k, v: ``[B, K, T, D]``.
        mask: what ``window_mask`` returned for this length, window and documents; made here when ``None``.

    Returns:
        ``[B, H, T, D]``.
    """
    B, T = q.shape[0], q.shape[2]
    if mask is None:
        mask = window_mask(T, window, None, q.device)
    window = min(window, T)
    chunks = -(-T // window)
    pad = chunks * window - T

    def split(x: Tensor) -> Tensor:
        x = F.pad(x, (0, 0, 0, pad)) if pad else x
        return x.unflatten(2, (chunks, window))

    def with_previous(x_BKNWD: Tensor) -> Tensor:
        previous = F.pad(x_BKNWD, (0, 0, 0, 0, 1, 0))[:, :, :-1]
        return torch.cat((previous, x_BKNWD), dim=3)

    def fold(x: Tensor) -> Tensor:
        return x.transpose(1, 2).flatten(0, 1)

    if mask.dim() == 3:
        mask = mask[:, None].repeat(B, 1, 1, 1)
    y = dense_attention(fold(split(q)), fold(with_previous(split(k))), fold(with_previous(split(v))), mask)
    return y.unflatten(0, (B, chunks)).transpose(1, 2).flatten(2, 3)[:, :, :T]


@register_op("window_attention", "triton")
def window_attention_kernel(
    q: Tensor, k: Tensor, v: Tensor, window: int, spans: DocumentSpans | None = None
) -> Tensor:
    """``window_attention`` in one fused kernel; a window as long as the row is causal attention.

    Args:
        q: ``[B, H, T, D]``; k, v: ``[B, K, T, D]``; D and dtype as ``pick_backend`` asks, one dtype for all.
        spans: ``document_spans`` when rows hold several documents.
    """
    from deepseek.ops.triton.hybrid_attention import window_forward

    start, end = spans or (None, None)
    return window_forward(q, k, v, start, end, window)[0]
