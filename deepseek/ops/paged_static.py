"""Paged attention of a decoding step that reads nothing on the host: every shape is known, so a graph can hold it.

Each sequence has one row. Tables have a fixed width and every entry of them is gathered, whatever the lengths are;
what a row does not see is masked by positions on the device. Sequences that only pad sit at position 0 of the trash
page. It is the reference for captured steps, and what a GPU without our kernels captures.

Shape letters: S sequences (and rows), P pages of a table, L gathered positions, J pooled slots, H query heads, K
key/value heads, G = H/K, D head size.
"""

from __future__ import annotations

import torch
from torch import Tensor

from deepseek.ops.paged_rows import Pooled, StepRows
from deepseek.registry import register_op

FAR = float("-inf")


@register_op("paged_attention", "static")
def paged_attention(
    q_NHD: Tensor, k_PTKD: Tensor, v_PTKD: Tensor, table_SP: Tensor, rows: StepRows, window: int | None = None
) -> Tensor:
    """``deepseek.ops.paged_attention.paged_attention``."""
    key_SL = torch.arange(table_SP.shape[1] * rows.page, device=table_SP.device)
    here = rows.position_N[:, None]
    seen = key_SL <= here
    if window is not None:
        seen = seen & (key_SL > here - window)
    return _attend(q_NHD, _all_pages(k_PTKD, table_SP), _all_pages(v_PTKD, table_SP), seen)


@register_op("paged_hybrid_attention", "static")
def paged_hybrid_attention(
    q_NHD: Tensor, k_PTKD: Tensor, v_PTKD: Tensor, pooled: Pooled, rows: StepRows, window: int
) -> Tensor:
    """``deepseek.ops.paged_attention.paged_hybrid_attention``."""
    local = paged_attention(q_NHD, k_PTKD, v_PTKD, rows.window_SP, rows, window)
    block, stride = pooled.block, pooled.stride
    pools = [_all_pages(pool, rows.global_SP) for pool in (pooled.k_PJKD, pooled.v_PJKD)]
    slots = pools[0].shape[1]
    # Slot s holds the block that position s·stride + (block − 1) mod stride completes.
    done_J = torch.arange(slots, device=q_NHD.device) * stride + (block - 1) % stride
    seen = (done_J >= block - 1) & (done_J <= rows.position_N[:, None])
    first = [x.to(pools[0].dtype).expand(len(q_NHD), 1, -1, -1) for x in pooled.sink]
    k, v = (torch.cat((a, b), 1) for a, b in zip(first, pools))
    whole = _attend(pooled.q_NHD, k, v, torch.nn.functional.pad(seen, (1, 0), value=True))
    g = pooled.gate_NH[..., None].to(local.dtype)
    return g * whole + (1 - g) * local


def pool_pages(
    raw_k_PTKD: Tensor,
    v_PTKD: Tensor,
    pool_k_PJKD: Tensor,
    pool_v_PJKD: Tensor,
    rows: StepRows,
    block: int,
    stride: int,
    pooling: Tensor | None = None,
) -> None:
    """``deepseek.ops.paged_attention.pool_pages``: each row pools a block that would end at it."""
    last = rows.position_N
    complete = (last >= block - 1) & ((last - block + 1) % stride == 0)
    place_SB = (last[:, None] - block + 1 + torch.arange(block, device=last.device)).clamp(min=0)
    from_SB = _slot(rows.window_SP, place_SB, rows.page)
    to_S = _slot(rows.global_SP, last[:, None] // stride, rows.page // stride)[:, 0]
    to_S = torch.where(complete, to_S, 0)  # the trash page's first slot
    shares = (None, None) if pooling is None else pooling.to(raw_k_PTKD.dtype).unbind()
    for pages, pool, share_KB in ((raw_k_PTKD, pool_k_PJKD, shares[0]), (v_PTKD, pool_v_PJKD, shares[1])):
        taken = pages.flatten(0, 1)[from_SB]
        made = taken.mean(1) if share_KB is None else (taken * share_KB.T[None, :, :, None]).sum(1)
        pool.flatten(0, 1).index_copy_(0, to_S, made.to(pool.dtype))


def _slot(table_SP: Tensor, place_SB: Tensor, slots: int) -> Tensor:
    page = table_SP.long().gather(1, (place_SB // slots).clamp(max=table_SP.shape[1] - 1))
    return page * slots + place_SB % slots


def _all_pages(pages: Tensor, table_SP: Tensor) -> Tensor:
    """``[S, P·slots, K, D]``."""
    return pages[table_SP.long()].flatten(1, 2)


def _attend(q_SHD: Tensor, k_SLKD: Tensor, v_SLKD: Tensor, seen_SL: Tensor) -> Tensor:
    q = q_SHD.unflatten(1, (k_SLKD.shape[2], -1)).float()
    scores = torch.einsum("skgd,slkd->skgl", q, k_SLKD.float()) * q_SHD.shape[-1] ** -0.5
    p = scores.masked_fill(~seen_SL[:, None, None], FAR).softmax(-1)
    return torch.einsum("skgl,slkd->skgd", p, v_SLKD.float()).flatten(1, 2).to(q_SHD.dtype)
