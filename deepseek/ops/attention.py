"""Scaled dot-product attention over whole rows and over a sliding window, grouped-query, document-masked.

``window_attention`` splits the row into chunks as long as the window; a chunk attends to itself and the chunk
before it, so the work is O(T·W) in plain torch, forward and backward, on any device. ``dense_attention`` is
the same thing with an explicit T×T mask: the reference in tests, and the path for odd cases. On a GPU a fused kernel
(``deepseek.ops.triton``) takes windows and documents, and torch's own fused kernels take whole rows.

Shape letters: B rows, H query heads, K key/value heads (K divides H), T positions, D head size, W window, N
chunks.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from deepseek.registry import register_op


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
