"""Paged attention whose every row is the same to the last bit in any company: other rows, chunks, pages, threads.

Floating-point sums depend on their order, and matrix products choose it by shape. So nothing here has a shape that
depends on the step, but for how many equal things are computed side by side. Positions are cut at fixed borders: query
rows into *tiles* (a row's place in its tile follows from its position; places of rows that are not in this step are
zeros) and keys into *chunks* of ``CHUNK``. Scores and weighted values are products of one tile with one chunk, always
of the same shape; a row's maximum is exact in any order; sums over chunks are taken in order, and chunks that only pad
add zeros. A decoding step pays for a whole tile where it needs one row.

Shape letters: X tiles, R rows of a tile, C keys of a chunk, Y chunks, M = R·G rows of a product, N rows of the step, H
query heads, K key/value heads, G = H/K, D head size, T positions of a page, J slots of a page.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from deepseek.ops.exact import exact_map
from deepseek.ops.paged_rows import Pooled, StepRows, gather, key_slots
from deepseek.registry import register_op

CHUNK = 64  #: keys
TILE = 16  #: rows of a product: query rows times the heads of a group
BUDGET = 2 << 20  #: bytes of keys and values gathered at a time
FAR = -1e30  #: score of what is masked: finite, so that a place without a row gives numbers too


@dataclass(frozen=True)
class Tiles:
    """Some tiles, each with the chunks that it sees (padded to the most).

    Attributes:
        row_XR: which row of the step is at each place; N where none is.
        row, place: int64; row ``row[i]`` is at place ``place[i]`` of the X·R. slot: for ``gather``.
        masked_XYRC: what a place does not see.
    """

    row_XR: Tensor
    row: Tensor
    place: Tensor
    slot: Tensor
    masked_XYRC: Tensor


@register_op("paged_attention", "exact")
def paged_attention(
    q_NHD: Tensor, k_PTKD: Tensor, v_PTKD: Tensor, table_SP: Tensor, rows: StepRows, window: int | None = None
) -> Tensor:
    """``deepseek.ops.paged_attention.paged_attention``."""
    sizes = (q_NHD.shape[1], *k_PTKD.shape[2:])
    made = rows.once(("exact", window, sizes), lambda: _position_tiles(rows, table_SP, window, *sizes))
    return _over(made, q_NHD, k_PTKD, v_PTKD, None)


@register_op("paged_hybrid_attention", "exact")
def paged_hybrid_attention(
    q_NHD: Tensor, k_PTKD: Tensor, v_PTKD: Tensor, pooled: Pooled, rows: StepRows, window: int
) -> Tensor:
    """``deepseek.ops.paged_attention.paged_hybrid_attention``."""
    sizes = (q_NHD.shape[1], *k_PTKD.shape[2:])
    local = paged_attention(q_NHD, k_PTKD, v_PTKD, rows.window_SP, rows, window)
    shape = pooled.block, pooled.stride
    made = rows.once(("exact pooled", *shape, sizes), lambda: _pooled_tiles(rows, *shape, *sizes))
    whole = _over(made, pooled.q_NHD, pooled.k_PJKD, pooled.v_PJKD, pooled.sink.to(q_NHD.dtype))
    g = pooled.gate_NH[..., None].to(local.dtype)
    return g * whole + (1 - g) * local


def _over(made: list[Tiles], q_NHD: Tensor, k: Tensor, v: Tensor, sink: Tensor | None) -> Tensor:
    q = torch.cat((q_NHD, q_NHD.new_zeros(1, *q_NHD.shape[1:])))
    y_NHD = torch.zeros_like(q_NHD)
    for tiles in made:
        x = q.index_select(0, tiles.row_XR.flatten()).unflatten(0, tiles.row_XR.shape)
        y = _attend(tiles, x, k, v, sink).flatten(0, 1)
        y_NHD.index_copy_(0, tiles.row, y.index_select(0, tiles.place))
    return y_NHD


def _attend(tiles: Tiles, q_XRHD: Tensor, k: Tensor, v: Tensor, sink: Tensor | None) -> Tensor:
    """``[X, R, H, D]``."""
    (X, R, H, D), K, (Y, C) = q_XRHD.shape, k.shape[2], tiles.masked_XYRC.shape[1::2]
    G, keys = H // K, (X * K * Y, C, D)
    q = q_XRHD.view(X, R, K, G, D).transpose(1, 2).reshape(X, K, 1, R * G, D)
    each = q.expand(-1, -1, Y, -1, -1).reshape(-1, R * G, D)
    s = torch.bmm(each, gather(k, tiles.slot, "k", q.dtype).view(keys).mT).mul_(D**-0.5)
    s = (
        s.view(X, K, Y, R, G, C)
        .masked_fill_(tiles.masked_XYRC[:, None, :, :, None], FAR)
        .view(X, K, Y, R * G, C)
    )
    top = s.amax((2, 4))
    if sink is not None:
        first = (q[:, :, 0] * sink[0, :, None]).sum(-1).mul_(D**-0.5)
        top = torch.maximum(top, first)
    p = exact_map(torch.exp, s.sub_(top[:, :, None, :, None]))
    values = torch.bmm(p.view(-1, R * G, C), gather(v, tiles.slot, "v", q.dtype).view(keys))
    total, y = _in_order(p.sum(-1)), _in_order(values.view(X, K, Y, R * G, D))
    if sink is not None:
        share = exact_map(torch.exp, first.sub_(top))
        total, y = total + share, y + share[..., None] * sink[1, :, None]
    y = y / total[..., None]
    return y.view(X, K, R, G, D).transpose(1, 2).reshape(X, R, H, D)


def _in_order(x_XKY: Tensor) -> Tensor:
    """The sum over chunks: in eights, then the eights."""
    y = x_XKY[:, :, 0::8].clone()
    for i in range(1, min(8, x_XKY.shape[2])):
        part = x_XKY[:, :, i::8]
        y[:, :, : part.shape[2]] += part
    total = y[:, :, 0]
    for i in range(1, y.shape[2]):
        total = total + y[:, :, i]
    return total


# --- which tiles and chunks -----------------------------------------------------------------------------------------


def _cut(rows: StepRows, R: int) -> list[tuple[int, int]]:
    """``(sequence, tile)`` of all tiles that hold a row of this step, those with the most positions first."""
    tiles = [
        (s, x)
        for s, (start, length) in enumerate(zip(rows.starts, rows.lengths))
        for x in range(start // R, (length - 1) // R + 1)
    ]
    return sorted(tiles, key=lambda tile: -tile[1])


def _tiles(
    rows: StepRows, some: list[tuple[int, int]], R: int
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """``row_XR``, ``position_XR``, ``sequence_X``, and of the places that hold a row: the row and the place."""
    first, N = [0], len(rows.position_N)
    for count in rows.rows:
        first.append(first[-1] + count)
    device = rows.position_N.device
    start_X = torch.tensor([rows.starts[s] for s, _ in some], device=device)[:, None]
    end_X = torch.tensor([rows.lengths[s] for s, _ in some], device=device)[:, None]
    first_X = torch.tensor([first[s] for s, _ in some], device=device)[:, None]
    tile_X = torch.tensor([x for _, x in some], device=device)[:, None]
    position_XR = tile_X * R + torch.arange(R, device=device)
    here = (position_XR >= start_X) & (position_XR < end_X)
    row_XR = torch.where(here, first_X + position_XR - start_X, N)
    place = here.flatten().nonzero()[:, 0]
    sequence_X = torch.tensor([s for s, _ in some], device=device)
    return row_XR, position_XR, sequence_X, row_XR.flatten()[place], place


def _budgeted(tiles: list[tuple[int, int]], chunks: list[int], size: int) -> list[list[tuple[int, int]]]:
    """``tiles`` in parts that gather no more than the budget, if each tile gathers so many chunks of ``size`` bytes."""
    parts: list[list[tuple[int, int]]] = []
    most = 0
    for tile, count in zip(tiles, chunks):
        if not parts or (len(parts[-1]) + 1) * max(most, count) * size > BUDGET:
            parts.append([])
            most = 0
        parts[-1].append(tile)
        most = max(most, count)
    return parts


def _rows_of_tile(H: int, K: int) -> int:
    return max(1, TILE * K // H)


def _position_tiles(
    rows: StepRows, table_SP: Tensor, window: int | None, H: int, K: int, D: int
) -> list[Tiles]:
    R, C, made, device = _rows_of_tile(H, K), CHUNK, [], table_SP.device

    def span(tile: int) -> tuple[int, int]:
        """The first chunk and the end of those that any place of a tile sees."""
        lo = 0 if window is None else max(0, tile * R - window + 1) // C
        return lo, (tile * R + R - 1) // C + 1

    cut = _cut(rows, R)
    counts = [hi - lo for lo, hi in (span(x) for _, x in cut)]
    for some in _budgeted(cut, counts, 8 * C * K * D):
        row_XR, position_XR, sequence_X, row, place = _tiles(rows, some, R)
        Y = max(hi - lo for lo, hi in (span(x) for _, x in some))
        lo_X = torch.tensor([span(x)[0] for _, x in some], device=device)
        key_XYC = (lo_X[:, None] * C + torch.arange(Y * C, device=device)).view(-1, Y, 1, C)
        position = position_XR[:, None, :, None]
        masked = key_XYC > position
        if window is not None:
            masked |= key_XYC <= position - window
        slot = key_slots(
            table_SP[sequence_X], key_XYC.flatten(1), rows.length_S[sequence_X, None], rows.page, K
        )
        made.append(Tiles(row_XR, row, place, slot, masked))
    return made


def _pooled_tiles(rows: StepRows, block: int, stride: int, H: int, K: int, D: int) -> list[Tiles]:
    R, C, made, device = _rows_of_tile(H, K), CHUNK, [], rows.position_N.device

    def count(tile: int) -> int:
        return max(0, (tile * R + R - block - 1) // stride + 1) // C + 1

    cut = _cut(rows, R)
    for some in _budgeted(cut, [count(x) for _, x in cut], 8 * C * K * D):
        row_XR, position_XR, sequence_X, row, place = _tiles(rows, some, R)
        Y = max(count(x) for _, x in some)
        block_YC = torch.arange(Y * C, device=device).view(1, Y, 1, C)
        masked = block_YC * stride + block - 1 > position_XR[:, None, :, None]
        slot_XL = (block_YC.flatten() + (block - 1) // stride).expand(len(some), -1)
        end_X = rows.length_S[sequence_X, None] // stride
        slot = key_slots(rows.global_SP[sequence_X], slot_XL, end_X, rows.page // stride, K)
        made.append(Tiles(row_XR, row, place, slot, masked))
    return made
