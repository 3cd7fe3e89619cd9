"""Attention of one serving step over a paged cache: decodes, prefill chunks and speculation in one call (F50).

A page holds ``page`` positions of one sequence, pages lie anywhere, and a sequence's *table* says where
(PagedAttention, arXiv 2309.06180). Two groups of pages: **global** (all positions of a full layer; the pooled blocks of
a hybrid one) and **window** (what a window still reaches; older pages are given back and their entries are 0, the
trash page).

A pooled block j of a hybrid layer covers positions ``j·stride … j·stride + block − 1`` and lies in slot
``j + (block − 1) // stride``, slots counted like ``position // stride``: in the page of the position that completes it.
So what a page holds depends only on the tokens up to its end, which makes a cached prefix right for every layer.

Three backends: ``gathered`` (plain torch, ``paged_gathered``), ``exact`` (plain torch, every row to the last bit the
same in any company, ``paged_exact``) and ``triton`` (fused kernels that read the pages where they lie). The trash page
must hold finite numbers, zeros at first: it stands in for what nobody sees. Other pages may hold anything where their
sequence has not written yet.

Shape letters: N rows of the step, S sequences, P pages, T positions of a page, J slots of a page, H query heads, K
key/value heads, D head size.
"""

from __future__ import annotations

import torch
from torch import Tensor

from deepseek.ops import native_attention, paged_exact, paged_gathered, paged_static  # noqa: F401 - they register
from deepseek.ops.attention import KERNEL_DTYPES
from deepseek.ops.hybrid_attention import pooled_length
from deepseek.ops.paged_rows import Pooled, StepRows
from deepseek.ops.triton import kernels, runs_on
from deepseek.registry import get_op, register_op

__all__ = [
    "Pooled",
    "StepRows",
    "append_rows",
    "paged_attention",
    "paged_hybrid_attention",
    "pool_pages",
    "write_pages",
]


MOST_HEAD_DIM = 128  #: of the kernels, which take any even size up to it


def backend_for(q_NHD: Tensor, rows: StepRows, pages_PTKD: Tensor | None = None) -> str:
    """Which implementation takes this step: ``exact``, ``triton``, ``static``, ``native`` or ``gathered``."""
    if runs_on(q_NHD.device) and q_NHD.shape[-1] <= MOST_HEAD_DIM and q_NHD.dtype in KERNEL_DTYPES:
        return "triton"  # it has an exact mode of its own
    if rows.exact or rows.static:
        return "exact" if rows.exact else "static"
    takes = pages_PTKD is not None and native_attention.takes(pages_PTKD, q_NHD.shape[1])
    return "native" if takes else "gathered"


# --- writing --------------------------------------------------------------------------------------------------------


def write_pages(k_PTKD: Tensor, v_PTKD: Tensor, k_NKD: Tensor, v_NKD: Tensor, slot_N: Tensor) -> None:
    """Put keys and values of this step's rows ``[N, K, D]`` in their slots; rows of padding go to the trash page."""
    for pages, x in ((k_PTKD, k_NKD), (v_PTKD, v_NKD)):
        pages.flatten(0, 1).index_copy_(0, slot_N, x.to(pages.dtype))


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
    """Pool the blocks that this step's rows completed, from window pages into their slots of global pages.

    Call it after ``write_pages`` of unrotated keys and of values, while every row's last ``block`` positions are held.

    Args:
        raw_k_PTKD, v_PTKD: window pages. pool_k_PJKD, pool_v_PJKD: global pages with ``page // stride`` slots each.
        pooling: ``[2, K, block]``, the share of each place in a block's key and value; ``None``: equal shares.
    """
    if backend_for(v_PTKD, rows) == "triton":
        flat = raw_k_PTKD.flatten(0, 1), v_PTKD.flatten(0, 1)
        into = raw_k_PTKD, (pool_k_PJKD, pool_v_PJKD), block, stride, pooling
        kernels("paged_attention").append(None, *flat, None, (raw_k_PTKD, v_PTKD), rows, None, *into)
        return
    if rows.static:
        paged_static.pool_pages(raw_k_PTKD, v_PTKD, pool_k_PJKD, pool_v_PJKD, rows, block, stride, pooling)
        return
    from_JB, to_J = rows.once(("pool", block, stride), lambda: _completed(rows, block, stride))
    if not len(to_J):
        return
    shares = (None, None) if pooling is None else pooling.to(raw_k_PTKD.dtype).unbind()
    for pages, pool, share_KB in ((raw_k_PTKD, pool_k_PJKD, shares[0]), (v_PTKD, pool_v_PJKD, shares[1])):
        taken = pages.flatten(0, 1).index_select(0, from_JB).unflatten(0, (-1, block))
        if share_KB is None:
            made = taken.mean(1)
        else:  # products and sums of one block only, so that it is the same beside any others
            made = (taken * share_KB.T[None, :, :, None]).sum(1)
        pool.flatten(0, 1).index_copy_(0, to_J, made.to(pool.dtype))


def append_rows(
    q_NHD: Tensor,
    k_NKD: Tensor,
    v_NKD: Tensor,
    rope: tuple[Tensor, Tensor] | None,
    pages: tuple[Tensor, Tensor],
    rows: StepRows,
    slot_N: Tensor,
    raw_k_PTKD: Tensor | None = None,
    pool: tuple[Tensor, Tensor] | None = None,
    block: int = 1,
    stride: int = 1,
    pooling: Tensor | None = None,
) -> Tensor:
    """Rotate, ``write_pages`` and ``pool_pages`` together: on a GPU one launch instead of six.

    Args:
        rope: cosines and sines of the rows' positions, fp32 ``[N, D/2]`` or ``[N, 1, D/2]``; ``None``: not rotated.
        pages: of rotated keys and of values, written at ``slot_N``.
        raw_k_PTKD, pool, block, stride, pooling: of a hybrid layer, whose unrotated keys are kept and pooled.

    Returns:
        The rotated queries.
    """
    if backend_for(q_NHD, rows) == "triton":
        extra = raw_k_PTKD, pool, block, stride, pooling
        rotated: Tensor | None = kernels("paged_attention").append(
            q_NHD, k_NKD, v_NKD, rope, pages, rows, slot_N, *extra
        )
        return q_NHD if rotated is None else rotated
    q, k = q_NHD, k_NKD
    if rope is not None:
        cos, sin = (x.reshape(len(q), 1, -1) for x in rope)
        turned = []
        for x in (q, k):
            a, b = (x.float() if x.element_size() < 4 else x).chunk(2, -1)
            turned.append(torch.cat((a * cos - b * sin, b * cos + a * sin), -1).to(x.dtype))
        q, k = turned
    write_pages(*pages, k, v_NKD, slot_N)
    if raw_k_PTKD is not None and pool is not None:
        raw_k_PTKD.flatten(0, 1).index_copy_(0, slot_N, k_NKD)
        pool_pages(raw_k_PTKD, pages[1], *pool, rows, block, stride, pooling)
    return q


def _completed(rows: StepRows, block: int, stride: int) -> tuple[Tensor, Tensor]:
    """Slots ``[J·block]`` of the window pages that the completed blocks cover, and the slots ``[J]`` they go to."""
    sequence, first = [], []
    for s, (start, length) in enumerate(zip(rows.starts, rows.lengths)):
        before, after = (pooled_length(n, block, stride) for n in (start, length))
        sequence += [s] * (after - before)
        first += [j * stride for j in range(before, after)]
    device = rows.position_N.device
    s_J = torch.tensor(sequence, dtype=torch.int64, device=device)
    first_J = torch.tensor(first, dtype=torch.int64, device=device)
    place_JB = first_J[:, None] + torch.arange(block, device=device)
    from_JB = rows.window_SP[s_J[:, None], place_JB // rows.page].long() * rows.page + place_JB % rows.page
    slot, per_page = (first_J + block - 1) // stride, rows.page // stride
    to_J = rows.global_SP[s_J, slot // per_page].long() * per_page + slot % per_page
    return from_JB.flatten(), to_J


# --- reading --------------------------------------------------------------------------------------------------------


def paged_attention(
    q_NHD: Tensor, k_PTKD: Tensor, v_PTKD: Tensor, table_SP: Tensor, rows: StepRows, window: int | None = None
) -> Tensor:
    """Causal attention of every row over its sequence's pages, after ``write_pages``.

    Args:
        q_NHD: rotated queries. k_PTKD, v_PTKD: pages of rotated keys and of values.
        table_SP: ``rows.global_SP``, or ``rows.window_SP`` with a window.
        window: a row sees the last ``window`` positions, itself included; ``None``: all.

    Returns:
        ``[N, H, D]``.
    """
    return get_op("paged_attention", backend_for(q_NHD, rows, k_PTKD))(
        q_NHD, k_PTKD, v_PTKD, table_SP, rows, window
    )


def paged_hybrid_attention(
    q_NHD: Tensor, k_PTKD: Tensor, v_PTKD: Tensor, pooled: Pooled, rows: StepRows, window: int
) -> Tensor:
    """``gate · attention over pooled blocks + (1 − gate) · attention over the window``, after ``pool_pages``.

    Args:
        q_NHD: rotated queries, for the window. k_PTKD, v_PTKD: window pages of rotated keys and of values.
        pooled: the other branch.

    Returns:
        ``[N, H, D]``, equal to ``deepseek.nn.hybrid.HybridAttention`` over the whole sequence.
    """
    attend = get_op("paged_hybrid_attention", backend_for(q_NHD, rows, k_PTKD))
    return attend(q_NHD, k_PTKD, v_PTKD, pooled, rows, window)


@register_op("paged_attention", "triton")
def paged_attention_kernel(
    q_NHD: Tensor, k_PTKD: Tensor, v_PTKD: Tensor, table_SP: Tensor, rows: StepRows, window: int | None = None
) -> Tensor:
    """``paged_attention`` by a fused kernel; D and dtype as ``ops.attention.pick_backend`` asks."""
    y: Tensor = kernels("paged_attention").paged_attention(q_NHD, k_PTKD, v_PTKD, table_SP, rows, window)
    return y


@register_op("paged_hybrid_attention", "triton")
def paged_hybrid_attention_kernel(
    q_NHD: Tensor, k_PTKD: Tensor, v_PTKD: Tensor, pooled: Pooled, rows: StepRows, window: int
) -> Tensor:
    """``paged_hybrid_attention`` with both branches and the blend in one fused kernel."""
    y: Tensor = kernels("paged_attention").paged_hybrid_attention(q_NHD, k_PTKD, v_PTKD, pooled, rows, window)
    return y
