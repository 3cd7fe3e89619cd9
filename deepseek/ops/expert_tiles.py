"""Grouped matmuls as batched ones over tiles: of static size, without a word to the host, in any dtype.

CUDA's grouped kernel takes bf16 only, and a matmul per expert asks the host how many rows each has, which a CUDA graph
cannot hold. So every expert's rows are cut into tiles of one height, the last one filled up with zeros; a tile is one
matrix of a batched product, with a copy of its expert's weight. How many tiles there can be depends on the numbers of
rows and experts alone: of height ``R / 2E``, and of 16 at least, at most 3E. So however skewed the routing, the work is
at most 1.5 times what is needed (or 16 rows an expert more) and the copies are three times the weights.

Shape letters: R rows, E experts, D inputs, F outputs, N tiles, M rows of a tile.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor


class Tiles(NamedTuple):
    """Which rows are in which tile.

    Attributes:
        expert_N: the expert of each tile, some expert for a tile that is not used.
        row_NM: the row at each place, some row where there is none. there_NM: whether there is one.
        first_E: each expert's first tile.
    """

    expert_N: Tensor
    row_NM: Tensor
    there_NM: Tensor
    first_E: Tensor

    def take(self, x_RD: Tensor) -> Tensor:
        """``[N, M, D]``, zeros where there is no row."""
        x = x_RD.index_select(0, self.row_NM.flatten()).view(*self.row_NM.shape, -1)
        return x.masked_fill(~self.there_NM[..., None], 0)


def cut(ends_E: Tensor, rows: int) -> Tiles:
    """Tiles of ``rows`` rows of which expert e's end at ``ends[e]`` (int32)."""
    experts = ends_E.shape[0]
    height = -(-max(1, -(-rows // (2 * experts))) // 16) * 16
    size_E = torch.diff(ends_E, prepend=ends_E.new_zeros(1))
    tiles_E = (size_E + height - 1) // height
    end_E = tiles_E.cumsum(0, dtype=torch.int32)
    first_E = end_E - tiles_E
    tile_N = torch.arange(rows // height + experts, device=ends_E.device, dtype=torch.int32)
    found_N = torch.searchsorted(end_E, tile_N, right=True)
    expert_N = found_N.clamp(max=experts - 1)
    start_N = (ends_E - size_E)[expert_N] + (tile_N - first_E[expert_N]) * height
    row_NM = start_N[:, None] + torch.arange(height, device=ends_E.device, dtype=torch.int32)
    there_NM = (row_NM < ends_E[expert_N][:, None]) & (found_N < experts)[:, None]
    return Tiles(expert_N, torch.where(there_NM, row_NM, 0), there_NM, first_E)


def linear(x_RD: Tensor, weight_EDF: Tensor, ends_E: Tensor) -> Tensor:
    """As ``deepseek.ops.experts.grouped_linear``."""
    rows = x_RD.shape[0]
    if not rows:
        return x_RD.new_zeros(0, weight_EDF.shape[2])
    tiles = cut(ends_E, rows)
    y_NMF = torch.bmm(tiles.take(x_RD), weight_EDF.index_select(0, tiles.expert_N))
    # Where each row went. Rows beyond the last end, whose values nobody reads, take some place that exists.
    row = torch.arange(rows, device=x_RD.device, dtype=torch.int32)
    expert_R = torch.searchsorted(ends_E, row, right=True).clamp(max=ends_E.shape[0] - 1)
    begin_E = torch.cat((ends_E.new_zeros(1), ends_E[:-1]))
    place_R = tiles.first_E[expert_R] * y_NMF.shape[1] + row - begin_E[expert_R]
    y = y_NMF.flatten(0, 1)
    return y.index_select(0, place_R.clamp(max=y.shape[0] - 1))


def outer(x_RD: Tensor, y_RF: Tensor, ends_E: Tensor) -> Tensor:
    """As ``deepseek.ops.experts.grouped_outer``; an expert's tiles are added up in their order."""
    experts = ends_E.shape[0]
    if not x_RD.shape[0]:
        return x_RD.new_zeros(experts, x_RD.shape[1], y_RF.shape[1])
    tiles = cut(ends_E, x_RD.shape[0])
    parts_NDF = torch.bmm(tiles.take(x_RD).mT, tiles.take(y_RF))
    expert_E = torch.arange(experts, device=ends_E.device)
    own_EN = (expert_E[:, None] == tiles.expert_N).to(parts_NDF.dtype)  # unused tiles are zeros
    return (own_EN @ parts_NDF.flatten(1)).view(experts, *parts_NDF.shape[1:])
