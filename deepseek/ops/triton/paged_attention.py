"""Attention over a paged cache: tiles, splits and launches; what runs is in ``paged_kernels``, ``paged_append``.

Everything that shapes a launch comes from the host's numbers (``StepRows.rows``, ``lengths``), never from the device:
a step can be captured in a CUDA graph. Then ``lengths`` are the most that the graph is for, the device's ``length_S``
say what there is: each sequence is cut in as many splits by its own length, a short one leaves some of them nothing to
do. Run a captured ``StepRows`` once before capturing: what is made once a step is copied from the host then.

With ``StepRows.exact`` every row goes through tiles of one shape and nothing is split, so that its result does not
depend on what else is in the step.

Shape letters: N rows of the step, S sequences, P pages, T positions of a page, J slots of a page, H query heads, K
key/value heads, G = H/K, D head size.
"""

# mypy: allow-untyped-defs, allow-untyped-calls

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from typing import NamedTuple

import torch
import triton
from torch import Tensor

from deepseek.ops.paged_rows import Pooled, StepRows
from deepseek.ops.triton import chain, processors
from deepseek.ops.triton.paged_append import append_kernel
from deepseek.ops.triton.paged_kernels import attend_kernel, combine_kernel, decode_kernel

SHORT = 16  #: sequences with at most so many rows are worth splitting


@dataclass(frozen=True)
class Tiles:
    """Rows of a tile (positions times the padded group; decodes take as few as fit), and keys read at a time."""

    rows: int
    keys: int
    warps: int
    stages: int


@dataclass(frozen=True)
class Tuning:
    """How work is cut.

    Attributes:
        short, long: tiles of decodes and other short sequences, and of prefill chunks.
        waves: programs per multiprocessor up to which keys are split (and a decode's branches are apart).
        least: keys that are worth a split.
        one: tiles of all rows in exact mode, decodes too.
        many: for so many decodes that without splits they have a program for each multiprocessor.
    """

    short: Tiles
    long: Tiles
    waves: float = 2.0
    least: int = 128
    one: Tiles | None = None
    many: Tuning | None = None

    @property
    def exact(self) -> Tiles:
        return self.one or self.long

    def several(self, rows: int) -> Tiles:
        """For a few rows of a sequence: as ``short``, but with room for more of them."""
        x = self.short
        return Tiles(max(16, rows), min(x.keys, 64), max(x.warps, 4), min(x.stages, 3))


_NARROW = Tuning(Tiles(16, 64, 4, 4), Tiles(64, 64, 4, 3))
_MANY = Tuning(Tiles(16, 128, 8, 2), Tiles(64, 64, 4, 2), one=Tiles(64, 64, 4, 3))

#: For 16-bit inputs by padded head size and kind: F all positions, L a window, H a window and pooled blocks. Those of
#: 128 were found on an H200 (``bench_paged.py --sweep``).
HALF = {
    64: {"F": _NARROW, "L": _NARROW, "H": _NARROW},
    128: {
        "F": replace(_MANY, short=Tiles(16, 128, 4, 3), waves=1.0, least=64, many=_MANY),
        "L": Tuning(Tiles(16, 64, 4, 3), Tiles(64, 32, 4, 3), least=64),
        "H": Tuning(Tiles(16, 64, 4, 2), Tiles(64, 32, 4, 2), least=64),
    },
}
#: fp32 by three tf32 products.
WIDE = Tuning(Tiles(16, 32, 4, 2), Tiles(32, 32, 4, 2))

_forced: Tuning | None = None


@contextmanager
def forced_tuning(tuning: Tuning) -> Iterator[None]:
    """Use ``tuning`` inside a ``with`` block, for tests and for finding better sizes."""
    global _forced
    before, _forced = _forced, tuning
    try:
        yield
    finally:
        _forced = before


def padded(size: int) -> int:
    """A head size as the kernels' tiles have it: a power of two that the matrix units take."""
    return max(16, triton.next_power_of_2(size))


def tuning_for(q: Tensor, kind: str) -> Tuning:
    """The sizes for queries of this dtype in a layer of kind F, L or H."""
    return _forced or (WIDE if q.dtype == torch.float32 else HALF[64 if q.shape[-1] <= 64 else 128][kind])


def paged_attention(
    q_NHD: Tensor, k_PTKD: Tensor, v_PTKD: Tensor, table_SP: Tensor, rows: StepRows, window: int | None = None
) -> Tensor:
    """``deepseek.ops.paged_attention.paged_attention``."""
    return _attend(q_NHD, k_PTKD, v_PTKD, table_SP, rows, window, None)


def paged_hybrid_attention(
    q_NHD: Tensor, k_PTKD: Tensor, v_PTKD: Tensor, pooled: Pooled, rows: StepRows, window: int
) -> Tensor:
    """``deepseek.ops.paged_attention.paged_hybrid_attention``."""
    pool = pooled._replace(q_NHD=_rows(pooled.q_NHD), sink=pooled.sink.contiguous())
    return _attend(q_NHD, k_PTKD, v_PTKD, rows.window_SP, rows, window, pool)


def _rows(x: Tensor) -> Tensor:
    return x if x.stride(-1) == 1 else x.contiguous()


def _attend(
    q_NHD: Tensor,
    k: Tensor,
    v: Tensor,
    table_SP: Tensor,
    rows: StepRows,
    window: int | None,
    pool: Pooled | None,
) -> Tensor:
    assert k.is_contiguous(), "pages are whole tensors"
    assert v.is_contiguous(), "pages are whole tensors"
    q = _rows(q_NHD)
    tuning = tuning_for(q, "H" if pool is not None else "F" if window is None else "L")
    out, group = q.new_empty(q.shape), triton.next_power_of_2(q.shape[1] // k.shape[2])
    used, decodes = sum(rows.rows), 0 if rows.exact else rows.decodes
    if used < len(q):
        out[used:].zero_()
    inputs = q, k, v, table_SP, rows, window, pool, out
    if decodes:
        many = decodes * k.shape[2] >= processors(q.device)
        t = tuning.many if many and tuning.many else tuning
        _launch(*inputs, None, replace(t.short, rows=max(t.short.rows, group)), (0, decodes), t)
    if counts := rows.rows[decodes:]:
        tiles, long = tuning.exact if rows.exact else tuning.long, rows.exact or max(counts) > SHORT
        if not long:
            tiles = tuning.several(triton.next_power_of_2(group * max(counts)))
        tiles = replace(tiles, rows=max(group, min(tiles.rows, tuning.long.rows)))
        size = tiles.rows // group
        cut = rows.once(("tiles", size), lambda: _cut(rows, decodes, size, q.device))
        _launch(*inputs, cut, tiles, (decodes, used), tuning, split=not long)
    return out


def _cut(rows: StepRows, decodes: int, size: int, device: torch.device) -> Tensor:
    """``[tiles, 4]`` int32, as ``attend_kernel`` says; those that see the most first."""
    before, tiles = 0, []
    for s, (start, count) in enumerate(zip(rows.starts, rows.rows)):
        if s >= decodes:
            tiles += [(start + row, s, before, count, row) for row in range(0, count, size)]
        before += count
    return torch.tensor([tile[1:] for tile in sorted(tiles, reverse=True)], dtype=torch.int32, device=device)


def _launch(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    table_SP: Tensor,
    rows: StepRows,
    window: int | None,
    pool: Pooled | None,
    out: Tensor,
    cut: Tensor | None,
    tiles: Tiles,
    span: tuple[int, int],
    tuning: Tuning,
    split: bool = True,
) -> None:
    """Attend for the rows ``span``: a decode a tile, or tiles as ``cut`` says."""
    H, D, K, BN = *q.shape[1:], k.shape[2], tiles.keys
    DP, (first, end) = padded(D), span
    programs = (end if cut is None else len(cut)) * K
    longest = max(rows.lengths[:end] if cut is None else rows.lengths[first:])
    keys = longest if window is None else min(longest, window + (0 if cut is None else SHORT + BN))
    blocks = 0 if pool is None else max(0, longest - pool.block) // pool.stride + 1
    cutting = tuning if split else replace(tuning, waves=0)
    pools, splits, least = share_out(cutting, BN, programs, keys, blocks, q.device, cut is None)
    parts = lses = out
    if splits > 1:
        shape = (end - first, H, splits)
        parts, lses = (q.new_empty(*shape, *x, dtype=torch.float32) for x in ((D,), ()))
    p = pool or Pooled(q, k, v, q, q, 1, 1)
    gate = p.gate_NH.stride()[:2]
    pooled = table_SP if pool is None else rows.global_SP
    common = {"H": H, "D": D, "DP": DP, "POOLED": pool is not None, **chain.options(q.device)}
    tensors = p.q_NHD, q, k, v, p.k_PJKD, p.v_PJKD, p.sink, p.gate_NH, out, parts, lses
    tables = rows.length_S, table_SP, pooled
    strides = *p.q_NHD.stride()[:2], *q.stride()[:2], *gate, *(x.stride(0) for x in tables[1:])
    strides = *strides, *(x.shape[1] for x in tables[1:])
    sizes = {
        "K": K, "G": H // K, "GP": triton.next_power_of_2(H // K), "BLOCK": p.block, "STRIDE": p.stride,
        "PAGE": rows.page, "WINDOW": window is not None, "SPLIT": splits > 1, "BM": tiles.rows, "BN": BN,
        "PRECISION": "tf32x3" if q.dtype == torch.float32 else "tf32", **common,
        "num_warps": tiles.warps, "num_stages": tiles.stages,
    }  # fmt: skip
    if cut is None:
        decode_kernel[(programs, splits)](
            *tensors, *tables, *strides, window or 0, least, pools, D**-0.5, **sizes
        )
    else:
        attend_kernel[(programs, splits - pools)](
            *tensors, cut, *tables, *strides, first, window or 0, least, D**-0.5, **sizes
        )
    if splits > 1:
        SP = triton.next_power_of_2(splits)
        combine_kernel[(end - first, H)](
            parts, lses, p.gate_NH, out, first, splits, pools, *gate,
            SP=SP, **common, num_warps=min(8, max(1, SP * DP // 1024)),
        )  # fmt: skip


class Shares(NamedTuple):
    """How many splits are of the pooled blocks and how many there are, and the keys that one takes at least."""

    pools: int
    splits: int
    least: int


def share_out(
    tuning: Tuning,
    tile: int,
    programs: int,
    keys: int,
    blocks: int,
    device: torch.device,
    decodes: bool = True,
) -> Shares:
    """How keys are split.

    Args:
        tile: keys read at a time. programs: without splits. keys, blocks: the most that a row sees, blocks 0 but in a
            hybrid layer.
        decodes: branches may be in programs of their own; otherwise a program has a split of each.
    """
    least = triton.cdiv(tuning.least, tile) * tile
    wanted = min(128, int(tuning.waves * processors(device) / programs))
    keys, blocks = triton.cdiv(keys, least), triton.cdiv(blocks, least)
    if not decodes:
        splits = max(1, min(wanted, max(keys, blocks)))
        pools = splits if splits > 1 and blocks else 0
        return Shares(pools, splits + pools, least)
    if not blocks:
        return Shares(0, max(1, min(wanted, keys)), least)
    if wanted < 2:
        return Shares(1, 1, least)
    pools = min(blocks, max(wanted // 2, wanted - keys))
    return Shares(pools, pools + min(keys, wanted - pools), least)


# --- filling the cache ----------------------------------------------------------------------------------------------


def _sequences(rows: StepRows) -> Tensor:
    """int32 ``[N]``: the sequence of each row, −1 for padding."""
    N = len(rows.position_N)
    of = [s for s, count in enumerate(rows.rows) for _ in range(count)]
    return torch.tensor(of + [-1] * (N - len(of)), dtype=torch.int32, device=rows.position_N.device)


def append(
    q_NHD: Tensor | None,
    k_NKD: Tensor,
    v_NKD: Tensor,
    rope: tuple[Tensor, Tensor] | None,
    pages: tuple[Tensor, Tensor],
    rows: StepRows,
    slot_N: Tensor | None,
    raw_k_PTKD: Tensor | None = None,
    pool: tuple[Tensor, Tensor] | None = None,
    block: int = 1,
    stride: int = 1,
    pooling: Tensor | None = None,
) -> Tensor | None:
    """``deepseek.ops.paged_attention.append_rows`` in one launch; without ``slot_N`` only what pools is done."""
    k_pages, v_pages = pages
    N, K, D = len(rows.position_N), *k_pages.shape[2:]
    write, H = slot_N is not None, K if q_NHD is None else q_NHD.shape[1]
    q_out = None if q_NHD is None or rope is None else q_NHD.new_empty(N, H, D)
    q, k, v = (_rows(x) for x in (k_NKD if q_NHD is None else q_NHD, k_NKD, v_NKD))
    cos, sin = (x.squeeze(1) if x.dim() == 3 else x for x in rope) if rope is not None else (k, k)
    if rope is not None:
        assert cos.shape == sin.shape == (N, D // 2), f"rotations of {N} rows, half a head of {D}"
        assert cos.stride() == sin.stride(), "cosines and sines lie alike"
        assert cos.stride(1) == 1, "a row's cosines lie side by side"
    sequence = rows.once("sequences", lambda: _sequences(rows)) if pool is not None else rows.position_N
    pool_k, pool_v = pool or pages
    learned = None if pooling is None else pooling.float().contiguous()
    append_kernel[(N, K)](
        q, k, v, cos, sin, q if q_out is None else q_out, k_pages, v_pages,
        k_pages if raw_k_PTKD is None else raw_k_PTKD, pool_k, pool_v, k_pages if learned is None else learned,
        rows.position_N if slot_N is None else slot_N, rows.position_N, sequence, rows.length_S, rows.ends_S,
        rows.window_SP, rows.global_SP, *q.stride()[:2], *k.stride()[:2], *v.stride()[:2],
        cos.stride(0), rows.window_SP.stride(0), rows.global_SP.stride(0),
        H=H, K=K, G=H // K, D=D, DP=padded(D), PAGE=rows.page, BLOCK=block, STRIDE=stride,
        ROTATE=rope is not None, WRITE=write, POOL=pool is not None, LEARNED=learned is not None,
        GP=triton.next_power_of_2(H // K), BP=triton.next_power_of_2(block), **chain.options(k.device),
        num_warps=1 if pool is None else 4,
    )  # fmt: skip
    return q_out
